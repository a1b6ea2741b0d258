//! Two signals between the threads of a server: there is capacity again, and a shutdown was requested.

#[cfg(not(all(echoserver_loom, test)))]
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

#[cfg(all(echoserver_loom, test))]
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crate::system::{Millis, NEVER, Wake};

/// What the acceptor, the workers and the handle of a server share: whether the acceptor waits for capacity, and the
/// deadline of a shutdown.
#[derive(Debug)]
pub(crate) struct AcceptorControl<W> {
    /// Wakes the acceptor.
    waker: W,
    /// Wake the workers, which look at the deadline when they wake up. A shutdown wakes them itself, because the
    /// acceptor may have ended before the deadline is moved.
    worker_wakers: Box<[W]>,
    /// The acceptor waits for capacity: a free connection slot, or room in a worker's queue.
    paused: AtomicBool,
    /// When a shutdown must be complete, or [`NEVER`].
    shutdown_deadline: AtomicU64,
}

impl<W: Wake> AcceptorControl<W> {
    pub(crate) fn new(waker: W, worker_wakers: impl IntoIterator<Item = W>) -> Self {
        Self {
            waker,
            worker_wakers: worker_wakers.into_iter().collect(),
            paused: AtomicBool::new(false),
            shutdown_deadline: AtomicU64::new(NEVER),
        }
    }

    /// Requests a shutdown, or moves the deadline of one to an earlier time.
    pub(crate) fn shut_down(&self, deadline: Millis) {
        self.shutdown_deadline.fetch_min(deadline, Ordering::SeqCst);
        self.waker.wake();
        self.wake_workers();
    }

    /// Makes each worker run a tick.
    pub(crate) fn wake_workers(&self) {
        for waker in &self.worker_wakers {
            waker.wake();
        }
    }

    /// The deadline of a shutdown, if one was requested.
    pub(crate) fn shutdown_deadline(&self) -> Option<Millis> {
        let deadline = self.shutdown_deadline.load(Ordering::SeqCst);
        (deadline != NEVER).then_some(deadline)
    }

    /// Notifies the acceptor that a connection was closed or that a queue has room. Wakes it only if it
    /// has paused.
    pub(crate) fn notify_capacity(&self) {
        // Pairs with the fence in `pause`: either the acceptor sees the capacity, or this thread sees the
        // pause.
        fence(Ordering::SeqCst);
        if self.paused.load(Ordering::Relaxed) && self.paused.swap(false, Ordering::SeqCst) {
            self.waker.wake();
        }
    }

    /// Announces that the acceptor waits for capacity. It must look for capacity once more after this.
    pub(crate) fn pause(&self) {
        self.paused.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn resume(&self) {
        self.paused.store(false, Ordering::SeqCst);
    }

    /// Whether no capacity was announced since the pause.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }
}

/// Run with `RUSTFLAGS="--cfg echoserver_loom" cargo test --lib loom`.
#[cfg(all(echoserver_loom, test))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    use super::*;

    #[derive(Default)]
    struct CountingWaker(std::sync::atomic::AtomicUsize);

    impl Wake for &'static CountingWaker {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The acceptor pauses while a worker frees a place.
    #[test]
    fn capacity_during_a_pause_is_seen_or_wakes_the_acceptor() {
        loom::model(|| {
            let waker: &'static CountingWaker = Box::leak(Box::default());
            let control = Arc::new(AcceptorControl::new(waker, []));
            let capacity = Arc::new(AtomicUsize::new(0));
            let worker = {
                let (control, capacity) = (Arc::clone(&control), Arc::clone(&capacity));
                thread::spawn(move || {
                    capacity.store(1, Ordering::Relaxed);
                    control.notify_capacity();
                })
            };
            control.pause();
            let is_seen = capacity.load(Ordering::Relaxed) == 1;
            worker.join().expect("it does not panic");
            let wakes = waker.0.load(Ordering::Relaxed);
            assert!(is_seen || (wakes == 1 && !control.is_paused()));
        });
    }
}
