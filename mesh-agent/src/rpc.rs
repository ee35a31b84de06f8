//! The controller's services as clients, and what every connection to it shares: limits, keepalive, backoff.
//!
//! Knows nothing of certificates: whoever opens a channel brings the connections, already authenticated.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint, Uri};

mod generated {
    #![allow(missing_docs, clippy::all, unreachable_pub, missing_debug_implementations)]
    include!(concat!(env!("OUT_DIR"), "/nodemesh.v1.rs"));
}

pub use generated::{enrolment_client::EnrolmentClient, node_client::NodeClient};

/// A connection on which nothing was heard for this long is probed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// A probe that is not answered for this long ends the connection: a partition is noticed within 10 s.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may take, name resolution, TCP and TLS together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the answer to a call may take.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// What the controller may send ahead of us reading it; a whole view of some thousand workloads.
const WINDOW_BYTES: u32 = 1 << 20;
/// The first pause after a failure.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);

/// How it stands with the controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// The stream of views is open.
    Open,
    /// It is not, and why.
    Away(String),
}

/// A channel whose connections `connect` makes: the first when it is first used, another whenever one was lost.
pub fn channel<C, F, S, E>(mut connect: C) -> Channel
where
    C: FnMut() -> F + Send + 'static,
    F: Future<Output = Result<S, E>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    // The name is never resolved: `connect` knows where to go and whom to expect there.
    let endpoint = Endpoint::from(Uri::from_static("http://controller"))
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let connection = connect();
        async move { connection.await.map(TokioIo::new) }
    }))
}

/// How long to wait after so many failures in a row: doubling from 200 ms to `cap`, the upper half of it random.
///
/// `fraction` is a random number in 0..1. Spreads out the agents of a mesh whose controller comes back.
pub fn backoff(failures: u32, fraction: f64, cap: Duration) -> Duration {
    let doubled = FIRST_BACKOFF.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(cap).mul_f64(0.5 + 0.5 * fraction.clamp(0.0, 1.0))
}

/// How far `now` is ahead of what the controller said; zero says nothing.
pub fn skew(now: OffsetDateTime, controller_unix_ms: i64) -> Option<time::Duration> {
    let theirs = OffsetDateTime::UNIX_EPOCH.checked_add(time::Duration::milliseconds(controller_unix_ms))?;
    (controller_unix_ms != 0).then(|| now - theirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_cap_and_half_of_each_is_random() {
        let cap = Duration::from_secs(5);
        let check = |failures, fraction, expected| {
            assert_eq!(
                backoff(failures, fraction, cap),
                Duration::from_millis(expected),
                "{failures} {fraction}"
            );
        };
        check(0, 1.0, 200);
        check(1, 1.0, 200);
        check(1, 0.0, 100);
        check(2, 1.0, 400);
        check(5, 1.0, 3200);
        check(6, 1.0, 5000);
        check(u32::MAX, 1.0, 5000);
        check(u32::MAX, 0.0, 2500);
    }
}
