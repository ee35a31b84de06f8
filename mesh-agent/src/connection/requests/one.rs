//! A connection to a backend that carries one request at a time, and is run by whoever waits for its answer, in the same task:
//! to hand a request to another task and to be handed its answer costs more than to speak HTTP.
//!
//! Not one whose request's body comes piece by piece, or that may go on in another protocol: their two ways end when they
//! like, and each must go on though nobody waits for the other. Such a connection has a task of its own from then on.

use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use http::{Request, Response, header};
use hyper::{
    body::Incoming,
    client::conn::{
        TrySendError,
        http1::{Connection, SendRequest},
    },
};
use hyper_util::rt::TokioIo;

use super::{body::Body, line::Cuttable, stream::Owed};
use crate::wake::Bell;

/// What became of a request that has no answer: itself, if it was not sent, and why.
pub(super) fn unsent(mut error: TrySendError<Request<Body>>) -> (Option<Box<Request<Body>>>, hyper::Error) {
    (error.take_message().map(Box::new), error.into_error())
}

/// A connection that carries one request at a time.
#[derive(Debug)]
pub(super) struct One {
    sender: SendRequest<Body>,
    /// `None` if a task of its own runs it.
    run: Option<Run>,
    /// Shared with the last request's body for as long as that is sent, if it is carried: an answer may end before.
    sending: Arc<()>,
    owed: Owed,
}

/// What has to be polled for anything to be sent or received.
struct Run {
    /// `None` once it has ended.
    connection: Option<Upgradeable>,
    bell: Bell,
}

type Upgradeable = Pin<Box<dyn Future<Output = Result<(), hyper::Error>> + Send>>;

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("bell", &self.bell).finish_non_exhaustive()
    }
}

impl Run {
    /// Polls what waits for the connection, and the connection.
    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut waits: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let Self { connection, bell } = self;
        bell.poll(cx, |cx| {
            let waited = waits(cx);
            if waited.is_ready() {
                return waited;
            }
            let Some(polled) = connection else { return Poll::Pending };
            if let Poll::Ready(ended) = polled.as_mut().poll(cx) {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection to a backend ended");
                }
                // Whoever waits for it is told so by this.
                *connection = None;
                return waits(cx);
            }
            Poll::Pending
        })
    }
}

/// Polls what waits for a connection, and the connection, unless a task of its own runs it.
fn poll<T>(
    run: &mut Option<Run>,
    cx: &mut Context<'_>,
    mut waits: impl FnMut(&mut Context<'_>) -> Poll<T>,
) -> Poll<T> {
    match run {
        Some(run) => run.poll(cx, waits),
        None => waits(cx),
    }
}

impl Drop for One {
    /// Without a sender it ends in its order, as far as it has come.
    fn drop(&mut self) {
        self.stand_alone();
    }
}

impl One {
    /// `owed` is of the way that the connection speaks on.
    pub(super) fn new(
        sender: SendRequest<Body>,
        connection: Connection<TokioIo<Cuttable>, Body>,
        owed: Owed,
    ) -> Self {
        let run = Run { connection: Some(Box::pin(connection.with_upgrades())), bell: Bell::new() };
        Self { sender, run: Some(run), sending: Arc::default(), owed }
    }

    /// Polls what waits for this connection, which does something only if it is polled, too.
    pub(super) fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        waits: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        poll(&mut self.run, cx, waits)
    }

    /// Whether it takes a request, once that is known.
    pub(super) async fn is_ready(&mut self) -> bool {
        let Self { sender, run, .. } = self;
        poll_fn(|cx| poll(run, cx, |cx| sender.poll_ready(cx))).await.is_ok()
    }

    /// The head of the answer, or the request, if it was not sent.
    pub(super) async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, (Option<Box<Request<Body>>>, hyper::Error)> {
        if !request.body().is_whole() || request.headers().contains_key(header::UPGRADE) {
            self.stand_alone();
        }
        let request = request.map(|body| body.sending(&self.sending));
        self.owed.ask();
        let Self { sender, run, .. } = self;
        let mut sent = std::pin::pin!(sender.try_send_request(request));
        poll_fn(|cx| poll(run, cx, |cx| sent.as_mut().poll(cx))).await.map_err(unsent)
    }

    /// Gives it a task of its own: it goes on though nobody polls it.
    pub(super) fn stand_alone(&mut self) {
        let Some(connection) = self.run.take().and_then(|run| run.connection) else { return };
        // Without a runtime the program ends, and the connection with it. Who watches the way beneath it, and is waited for
        // when the agent stops, has a task already.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a connection to a backend ended");
                }
            });
        }
    }

    /// Nobody uses it for a while: this is woken when something comes by it, as its end. Whether it can be used again.
    pub(super) fn rest(&mut self, watch: &Waker) -> bool {
        if let Some(run) = &mut self.run {
            let pending: Poll<()> = run.poll(&mut Context::from_waker(watch), |_| Poll::Pending);
            debug_assert!(pending.is_pending(), "nobody waits for anything");
            if run.connection.is_none() {
                return false;
            }
        }
        !self.sender.is_closed()
    }

    /// Whether something has come by it while nobody used it.
    pub(super) fn is_rung(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.bell.is_rung())
    }

    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whether nothing of a body is on its way any more.
    pub(super) fn has_sent_all(&self) -> bool {
        Arc::strong_count(&self.sending) == 1
    }
}
