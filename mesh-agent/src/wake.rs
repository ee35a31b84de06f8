//! Parts of a task that are polled only when something has come to pass for them.
//!
//! A task is told that it has been woken, not for what. Of one that waits for several things each would be asked again each
//! time, and what one part of it does for another would wake the task once more, as often as not on another thread. A
//! [`Bell`] is a part's own waker: it remembers that it was rung, and wakes the task only from outside.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::task::AtomicWaker;
use pin_project_lite::pin_project;

/// Nothing has come to pass since it was last polled.
const QUIET: u8 = 0;
/// It is being polled.
const POLLED: u8 = 1;
/// Something has.
const RUNG: u8 = 2;

/// How often a part is polled before others get their turn.
const TURNS: usize = 8;

/// Whether a part of a task was woken, and the task that it is of.
#[derive(Debug)]
struct State {
    is: AtomicU8,
    task: AtomicWaker,
}

impl Wake for State {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.is.swap(RUNG, Ordering::AcqRel) == QUIET {
            self.task.wake();
        }
    }
}

/// The waker of a part of a task.
#[derive(Debug)]
pub(crate) struct Bell {
    state: Arc<State>,
    waker: Waker,
}

impl Bell {
    /// As if it had been rung: it is polled at first.
    pub(crate) fn new() -> Self {
        let state = Arc::new(State { is: AtomicU8::new(RUNG), task: AtomicWaker::new() });
        Self { waker: Waker::from(state.clone()), state }
    }

    /// Whether it was rung since it was last polled.
    pub(crate) fn is_rung(&self) -> bool {
        self.state.is.load(Ordering::Acquire) == RUNG
    }

    /// Polls what has this bell, and once more for as long as it rings itself.
    pub(crate) fn poll<T>(
        &self,
        cx: &mut Context<'_>,
        mut part: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let Self { state, waker } = self;
        for turn in 0..TURNS {
            state.is.store(POLLED, Ordering::Release);
            if turn == 0 {
                // Not before: who rings from here on is seen below, and does not take the task's waker away.
                state.task.register(cx.waker());
            }
            if let Poll::Ready(ready) = part(&mut Context::from_waker(waker)) {
                // Whatever is polled next begins anew.
                state.is.store(RUNG, Ordering::Release);
                return Poll::Ready(ready);
            }
            let quiet = state.is.compare_exchange(POLLED, QUIET, Ordering::AcqRel, Ordering::Acquire);
            if quiet.is_ok() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The same, if it was rung.
    pub(crate) fn poll_if_rung<T>(
        &self,
        cx: &mut Context<'_>,
        part: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        // First this, then the look: who rings in between wakes the task that polls now.
        self.state.task.register(cx.waker());
        if self.is_rung() { self.poll(cx, part) } else { Poll::Pending }
    }
}

pin_project! {
    /// A future that seldom has something to say, beside others of its task that are polled often.
    #[derive(Debug)]
    pub(crate) struct Seldom<F> {
        #[pin]
        of: F,
        bell: Bell,
    }
}

/// Polls this only when it was woken itself.
pub(crate) fn seldom<F: Future>(of: F) -> Seldom<F> {
    Seldom { of, bell: Bell::new() }
}

impl<F: Future> Future for Seldom<F> {
    type Output = F::Output;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let mut this = self.project();
        this.bell.poll_if_rung(cx, |cx| this.of.as_mut().poll(cx))
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::atomic::AtomicUsize};

    use futures_util::task::noop_waker;
    use tokio::sync::Notify;

    use super::*;

    /// A waker that counts.
    #[derive(Debug, Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn task() -> (Arc<Count>, Waker) {
        let count = Arc::new(Count::default());
        (count.clone(), Waker::from(count))
    }

    #[test]
    fn what_a_part_does_for_itself_wakes_nobody_and_is_seen_at_once() {
        let (woken, waker) = task();
        let bell = Bell::new();
        let mut polls = 0;
        let done = bell.poll(&mut Context::from_waker(&waker), |cx| {
            polls += 1;
            if polls == 3 {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        assert_eq!((done, polls), (Poll::Ready(()), 3));
        assert_eq!(woken.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_part_that_never_rests_lets_others_have_their_turn() {
        let (woken, waker) = task();
        let bell = Bell::new();
        let mut polls = 0;
        let pending = bell.poll(&mut Context::from_waker(&waker), |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!((pending, polls), (Poll::Pending, TURNS));
        assert_eq!(woken.0.load(Ordering::Relaxed), 1, "it is polled again");
    }

    #[test]
    fn whoever_polls_last_is_woken_from_outside() {
        let ((first, one), (second, two)) = (task(), task());
        let bell = Bell::new();
        for waker in [&one, &two] {
            assert!(bell.poll(&mut Context::from_waker(waker), |_| Poll::<()>::Pending).is_pending());
        }
        assert!(!bell.is_rung());
        bell.waker.wake_by_ref();
        bell.waker.wake_by_ref();
        assert!(bell.is_rung());
        assert_eq!((first.0.load(Ordering::Relaxed), second.0.load(Ordering::Relaxed)), (0, 1));
    }

    #[tokio::test]
    async fn what_is_seldom_woken_is_seldom_polled() {
        let (notify, polls) = (Notify::new(), AtomicUsize::new(0));
        let mut notified = Box::pin(notify.notified());
        let mut rare = seldom(poll_fn(|cx| {
            polls.fetch_add(1, Ordering::Relaxed);
            notified.as_mut().poll(cx)
        }));
        let noop = noop_waker();
        for _ in 0..10 {
            assert!(Pin::new(&mut rare).poll(&mut Context::from_waker(&noop)).is_pending());
        }
        assert_eq!(polls.load(Ordering::Relaxed), 1);
        notify.notify_waiters();
        rare.await;
        assert_eq!(polls.load(Ordering::Relaxed), 2);
    }
}
