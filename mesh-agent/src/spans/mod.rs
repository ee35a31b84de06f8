//! Spans of requests, and the collector that they are handed to, over OTLP.
//!
//! Stands apart, as no request waits for any of it: spans go through a bounded queue to one task, which hands them over many at a
//! time. What does not fit is dropped and counted. A collector that is away costs what the queue takes, and nothing else.
//!
//! Neither OpenTelemetry's SDK nor its exporter are used: the SDK keeps to itself how many spans it drops, makes a thread of its own,
//! and wants a span to be known by its context when it begins, which is not how a request is told here.
//!
//! | file | what |
//! |---|---|
//! | `collector` | the way there |
//! | `otlp` | the messages |
//! | `post` | each in a request of HTTP/1.1, where it is not gRPC |
//! | `resource` | the workload that a span is of, as OpenTelemetry says it |

mod collector;
pub(crate) mod otlp;
mod post;
mod resource;

use std::{path::PathBuf, sync::Arc, time::Duration};

use mesh_core::{http::trace::Share, model::Name, view::Snapshot};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout, timeout_at},
};

pub use self::collector::CollectorError;
use self::collector::{Collector, NotTaken};
pub(crate) use self::resource::Whose;
use crate::{config::TracingProtocol, metrics::Metrics, rpc};

/// Spans that wait at most: about 8 MiB.
const QUEUE: usize = 4096;
/// Spans that are handed over at once, at most.
const TOGETHER: usize = 512;
/// How long they gather.
const GATHER: Duration = Duration::from_secs(1);
/// How long the collector may take for them.
const EXPORT_TIME: Duration = Duration::from_secs(10);
/// The longest pause after it has failed.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// What of requests is traced, and who is told.
#[derive(Debug, Clone)]
pub struct Tracing {
    /// The collector, `http://HOST:PORT` or `https://HOST:PORT`.
    pub endpoint: String,
    /// What it speaks.
    pub protocol: TracingProtocol,
    /// The roots that it has to lead to, PEM; without them those of the system.
    pub roots: Option<PathBuf>,
    /// Which part of the requests of which nobody has said whether they are traced.
    pub share: Share,
}

/// Where spans go; cheap to clone.
#[derive(Debug, Clone)]
pub struct Spans {
    share: Share,
    view: watch::Receiver<Option<Arc<Snapshot>>>,
    queue: mpsc::Sender<Item>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
enum Item {
    Span(Box<(Whose, otlp::Span)>),
    Flush(oneshot::Sender<()>),
}

impl Spans {
    /// Must be called on a runtime: it starts the task that hands spans over, which ends with the last clone. `view`: what the
    /// node knows of its workloads.
    pub fn start(
        tracing: &Tracing,
        node: &str,
        view: watch::Receiver<Option<Arc<Snapshot>>>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, CollectorError> {
        let collector = Collector::new(tracing, node)?;
        let (queue, waiting) = mpsc::channel(QUEUE);
        tokio::spawn(hand_over(waiting, collector, metrics.clone()));
        Ok(Self { share: tracing.share, view, queue, metrics })
    }

    pub(crate) fn share(&self) -> Share {
        self.share
    }

    /// Whose a span is that is of this workload, as it is now.
    pub(crate) fn whose(&self, name: Name) -> Whose {
        let workload = self.view.borrow().as_ref().and_then(|view| view.workload(&name).cloned());
        Whose { name, workload }
    }

    /// Hands a span over, sooner or later.
    pub(crate) fn tell(&self, whose: Whose, span: otlp::Span) {
        if self.queue.try_send(Item::Span(Box::new((whose, span)))).is_err() {
            self.metrics.spans_dropped("queue", 1);
        }
    }

    /// Done when every span so far was handed over, or when this has taken too long.
    pub async fn flush(&self, limit: Duration) {
        let (done, wait) = oneshot::channel();
        let flushed = async {
            if self.queue.send(Item::Flush(done)).await.is_ok() {
                let _ = wait.await;
            }
        };
        if timeout(limit, flushed).await.is_err() {
            tracing::warn!(?limit, "the collector of spans has not taken the last ones in time");
        }
    }
}

async fn hand_over(mut queue: mpsc::Receiver<Item>, mut collector: Collector, metrics: Arc<Metrics>) {
    while let Some(first) = queue.recv().await {
        let (mut spans, mut flushed) = (vec![], None);
        let deadline = Instant::now() + GATHER;
        let mut next = Some(first);
        while let Some(item) = next {
            match item {
                Item::Span(span) => spans.push(*span),
                Item::Flush(done) => flushed = Some(done),
            }
            if spans.len() >= TOGETHER || flushed.is_some() {
                break;
            }
            next = timeout_at(deadline, queue.recv()).await.ok().flatten();
        }
        if !spans.is_empty() {
            export(spans, &mut collector, &metrics).await;
        }
        // A closed receiver has stopped waiting.
        let _ = flushed.map(|done| done.send(()));
    }
}

/// Until the collector has taken them, or said that it never will.
async fn export(spans: Vec<(Whose, otlp::Span)>, collector: &mut Collector, metrics: &Metrics) {
    let count = spans.len() as u64;
    let request = collector.request(spans);
    for failures in 1.. {
        let answer = timeout(EXPORT_TIME, collector.export(request.clone())).await;
        let not_taken = match answer {
            Ok(Ok(answer)) => {
                let partial = answer.partial_success.unwrap_or_default();
                let rejected = u64::try_from(partial.rejected_spans).unwrap_or(0).min(count);
                metrics.spans_exported(count - rejected);
                if rejected > 0 {
                    tracing::warn!(rejected, error = partial.error_message, "the collector rejects spans");
                    metrics.spans_dropped("collector", rejected);
                }
                return;
            }
            Ok(Err(not_taken)) => not_taken,
            Err(_) => NotTaken::again("no answer in time"),
        };
        if !not_taken.again {
            tracing::warn!(why = %not_taken, spans = count, "the collector refuses spans");
            return metrics.spans_dropped("collector", count);
        }
        // Once, not as often as it is tried.
        if failures == 1 {
            tracing::warn!(why = %not_taken, "the collector of spans cannot be reached: spans wait, and are dropped when they are too many");
        }
        tokio::time::sleep(pause(failures, rand::random(), not_taken.after)).await;
    }
}

/// How long it waits until it tries again: longer each time, and no shorter than the collector wants, within bounds.
fn pause(failures: u32, random: f64, after: Option<Duration>) -> Duration {
    rpc::backoff(failures, random, MAX_BACKOFF).max(after.unwrap_or_default().min(MAX_BACKOFF))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_that_wants_to_be_left_alone_is_for_a_while() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert!(pause(1, 0.5, None) < pause(3, 0.5, None));
        assert_eq!(pause(1, 0.5, seconds(0)), pause(1, 0.5, None));
        assert_eq!(pause(1, 0.5, seconds(20)), Duration::from_secs(20));
        assert_eq!(pause(1, 0.5, seconds(3600)), MAX_BACKOFF);
    }
}
