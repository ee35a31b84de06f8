//! The accept loops: what the kernel steers to a workload's listeners becomes a connection with a task of its own.

use std::{
    io,
    net::TcpListener as StdListener,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    connection::{self, Accepted, Direction, Node},
    local::Local,
    net::socket,
    threads::Threads,
};

/// How long an accept loop goes on once a successor's listener is in force: handshakes that had begun with this one
/// end here, also those whose SYN-ACK was lost once (retransmitted after 1 s, RFC 6298).
const HALF_OPEN_WAIT: Duration = Duration::from_secs(2);
/// How long an accept loop waits when the kernel has nothing left to accept with, so that it does not spin.
const SHORTAGE_WAIT: Duration = Duration::from_millis(50);
/// How often the log says so.
const SHORTAGE_SAID: Duration = Duration::from_secs(10);

/// Serves a listener on one of the threads until `stop`, or until draining has begun and its last handshakes are
/// through. What waits in its queue then is still served.
pub fn spawn(
    threads: &Threads,
    listener: &StdListener,
    direction: Direction,
    local: Arc<Local>,
    node: Node,
    stop: CancellationToken,
) -> io::Result<()> {
    let _inside = threads.for_listener().enter();
    // The enrolment keeps the original, to prove that it still listens.
    let listener = TcpListener::from_std(listener.try_clone()?)?;
    let (drain, threads) = (node.drain().clone(), threads.clone());
    drain.clone().spawn(async move {
        let mut drained = std::pin::pin!(async {
            drain.draining().await;
            tokio::time::sleep(HALF_OPEN_WAIT).await;
        });
        let mut said = Said::default();
        loop {
            tokio::select! {
                // All branches are cancel-safe: accept loses no connection when it is dropped.
                biased;
                () = stop.cancelled() => break,
                () = drain.cut() => break,
                () = &mut drained => break,
                result = listener.accept() => match result {
                    Ok((stream, peer)) => start(stream, peer, direction, &local, &node, &threads),
                    // Destroyed from outside (`ss -K`): the enrolment notices and opens another.
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
                    Err(error) => {
                        said.say(&error);
                        let refused = socket::is_shortage(&error)
                            && node.refuse_one(&listener, |stream, peer| accepted(stream, peer, direction, &local));
                        if !refused && is_lack(&error) {
                            tokio::time::sleep(SHORTAGE_WAIT).await;
                        }
                    }
                },
            }
        }
        while let Some(Ok((stream, peer))) = futures_util::FutureExt::now_or_never(listener.accept()) {
            start(stream, peer, direction, &local, &node, &threads);
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
    threads: &Threads,
) {
    if let Some(accepted) = accepted(stream, peer, direction, local) {
        connection::spawn(accepted, node, threads);
    }
}

/// `None` for a connection that is gone already: its peer reset it in the queue.
fn accepted(
    stream: tokio::net::TcpStream,
    peer: std::net::SocketAddr,
    direction: Direction,
    local: &Arc<Local>,
) -> Option<Accepted> {
    let original = stream.local_addr().ok()?;
    Some(Accepted { stream, peer, original, direction, workload: local.clone() })
}

/// Errors of accept that concern one connection are over at once; those of the process need a pause.
fn is_lack(error: &io::Error) -> bool {
    socket::is_shortage(error) || matches!(error.raw_os_error(), Some(nix::libc::ENOBUFS | nix::libc::ENOMEM))
}

/// What an accept loop has said in the log.
#[derive(Debug, Default)]
struct Said(Option<Instant>);

impl Said {
    /// Says it again after a while only: a flood is thousands of it. Each refusal is in the access log.
    fn say(&mut self, error: &io::Error) {
        if is_lack(error) && self.0.is_none_or(|last| last.elapsed() > SHORTAGE_SAID) {
            self.0 = Some(Instant::now());
            tracing::error!(%error, "cannot accept: raise LimitNOFILE of the agent's service");
        }
    }
}
