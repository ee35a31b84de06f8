//! The accept loops: what the kernel steers to a workload's listeners becomes a connection with a task of its own.

use std::{io, net::TcpListener as StdListener, sync::Arc, time::Duration};

use tokio::{net::TcpListener, runtime::Handle};
use tokio_util::sync::CancellationToken;

use crate::{
    connection::{self, Accepted, Direction, Node},
    local::Local,
};

/// How long an accept loop goes on once a successor's listener is in force: handshakes that had begun with this one
/// end here, also those whose SYN-ACK was lost once (retransmitted after 1 s, RFC 6298).
const HALF_OPEN_WAIT: Duration = Duration::from_secs(2);
/// How long an accept loop waits when the process has no descriptors left, so that it does not spin.
const NO_DESCRIPTORS_WAIT: Duration = Duration::from_millis(50);

/// Serves a listener on the data runtime until `stop`, or until draining has begun and its last handshakes are
/// through. What waits in its queue then is still served.
pub fn spawn(
    runtime: &Handle,
    listener: &StdListener,
    direction: Direction,
    local: Arc<Local>,
    node: Node,
    stop: CancellationToken,
) -> io::Result<()> {
    let _inside = runtime.enter();
    // The enrolment keeps the original, to prove that it still listens.
    let listener = TcpListener::from_std(listener.try_clone()?)?;
    let drain = node.drain().clone();
    drain.clone().spawn(async move {
        let mut drained = std::pin::pin!(async {
            drain.draining().await;
            tokio::time::sleep(HALF_OPEN_WAIT).await;
        });
        loop {
            tokio::select! {
                // All branches are cancel-safe: accept loses no connection when it is dropped.
                biased;
                () = stop.cancelled() => break,
                () = drain.cut() => break,
                () = &mut drained => break,
                result = listener.accept() => match result {
                    Ok((stream, peer)) => start(stream, peer, direction, &local, &node),
                    // Destroyed from outside (`ss -K`): the enrolment notices and opens another.
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
                    Err(error) => wait_after(error).await,
                },
            }
        }
        while let Some(Ok((stream, peer))) = futures_util::FutureExt::now_or_never(listener.accept()) {
            start(stream, peer, direction, &local, &node);
        }
    });
    Ok(())
}

fn start(
    stream: tokio::net::TcpStream,
    peer: std::net::SocketAddr,
    direction: Direction,
    local: &Arc<Local>,
    node: &Node,
) {
    // Without an original destination the connection is gone already: the peer reset it in the queue.
    let Ok(original) = stream.local_addr() else { return };
    let accepted = Accepted { stream, peer, original, direction, workload: local.clone() };
    node.drain().spawn(connection::serve(accepted, node.clone()));
}

/// Errors of accept that concern one connection are over at once; those of the process need a pause.
async fn wait_after(error: io::Error) {
    let exhausted = matches!(
        error.raw_os_error(),
        Some(nix::libc::EMFILE | nix::libc::ENFILE | nix::libc::ENOBUFS | nix::libc::ENOMEM)
    );
    if exhausted {
        tracing::error!(%error, "cannot accept: raise LimitNOFILE of the agent");
        tokio::time::sleep(NO_DESCRIPTORS_WAIT).await;
    }
}
