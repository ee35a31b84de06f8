//! What hyper would run in tasks of their own, in the task of its connection: the streams of HTTP/2, which else wake each other
//! from one thread to another for each request.

use std::{
    fmt, mem,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
};

use futures_util::{StreamExt, stream::FuturesUnordered, task::AtomicWaker};

use crate::wake::Bell;

type Part = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Takes what hyper wants to be run; clones are the same.
#[derive(Clone, Default)]
pub(in crate::connection) struct Within(Arc<Parts>);

#[derive(Default)]
struct Parts {
    /// What has come since it was last looked at.
    new: Mutex<Vec<Part>>,
    runner: AtomicWaker,
}

impl fmt::Debug for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Within").finish_non_exhaustive()
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Within {
    fn execute(&self, part: F) {
        self.0.new.lock().unwrap_or_else(PoisonError::into_inner).push(Box::pin(part));
        self.0.runner.wake();
    }
}

impl Within {
    /// Runs a connection with all its parts, until all have ended.
    pub(in crate::connection) async fn run<T>(self, connection: impl Future<Output = T>) -> T {
        let mut connection = pin!(connection);
        let (mut parts, mut ended, bell) = (FuturesUnordered::<Part>::new(), None, Bell::new());
        let run = std::future::poll_fn(|cx| {
            bell.poll(cx, |cx| {
                self.0.runner.register(cx.waker());
                if ended.is_none()
                    && let Poll::Ready(result) = connection.as_mut().poll(cx)
                {
                    ended = Some(result);
                }
                loop {
                    let new = mem::take(&mut *self.0.new.lock().unwrap_or_else(PoisonError::into_inner));
                    let is_new = !new.is_empty();
                    parts.extend(new);
                    match parts.poll_next_unpin(cx) {
                        Poll::Ready(Some(())) => {}
                        Poll::Ready(None) | Poll::Pending if is_new => {}
                        Poll::Ready(None) | Poll::Pending => break,
                    }
                }
                if parts.is_empty() { ended.take().map_or(Poll::Pending, Poll::Ready) } else { Poll::Pending }
            })
        });
        run.await
    }
}

#[cfg(test)]
mod tests {
    use hyper::rt::Executor;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn parts_of_parts_run_and_are_waited_for() {
        let within = Within::default();
        let (told, tells) = oneshot::channel();
        let (go, goes) = oneshot::channel();
        let inner = within.clone();
        within.execute(async move {
            inner.execute(async move {
                goes.await.unwrap();
                told.send("done").unwrap();
            });
        });
        let mut run = Box::pin(within.run(async { 5 }));
        assert!(futures_util::poll!(run.as_mut()).is_pending(), "a part of it has not ended");
        go.send(()).unwrap();
        assert_eq!((run.await, tells.await), (5, Ok("done")));
    }

    #[tokio::test]
    async fn what_comes_from_outside_is_run() {
        let within = Within::default();
        let (over, is_over) = oneshot::channel::<()>();
        let running = tokio::spawn(within.clone().run(is_over));
        let (told, tells) = oneshot::channel();
        within.execute(async move { told.send(()).unwrap() });
        tells.await.unwrap();
        over.send(()).unwrap();
        running.await.unwrap().unwrap();
    }
}
