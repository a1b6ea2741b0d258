//! What the threads of a server share: the places for connections, and the request to shut down.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::notify::Notifier;
use crate::system::{Millis, NEVER, Wake};

#[derive(Debug)]
pub(crate) struct Control<W> {
    /// Notifies the acceptor of capacity: a free place, or room in a worker's queue.
    capacity: Notifier<W>,
    /// Connections that were dispatched and are not closed.
    open: AtomicU64,
    pub(crate) max_connections: u64,
    /// Wake the workers, which look at the deadline when they wake up. The acceptor wakes them when it ends, but a shutdown
    /// can be requested, or its deadline moved, before and after that.
    worker_wakers: Box<[W]>,
    /// When a shutdown must be complete, or [`NEVER`].
    shutdown_deadline: AtomicU64,
    /// The same for the acceptor, if the workers begin after it has closed its listeners.
    acceptor_deadline: AtomicU64,
}

impl<W: Wake> Control<W> {
    /// Creates the control of a server with these wakers: of the acceptor, and of each worker.
    pub(crate) fn new(
        max_connections: usize,
        waker: W,
        worker_wakers: impl IntoIterator<Item = W>,
    ) -> Self {
        Self {
            capacity: Notifier::new(waker),
            open: AtomicU64::new(0),
            max_connections: max_connections as u64,
            worker_wakers: worker_wakers.into_iter().collect(),
            shutdown_deadline: AtomicU64::new(NEVER),
            acceptor_deadline: AtomicU64::new(NEVER),
        }
    }

    /// Takes a place for a connection that is dispatched. Only the acceptor takes places, so they are not taken between
    /// [`is_full`](Self::is_full) and this.
    pub(crate) fn take_place(&self) {
        self.open.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the connection limit is reached.
    pub(crate) fn is_full(&self) -> bool {
        self.open.load(Ordering::Relaxed) >= self.max_connections
    }

    /// Announces capacity: these places, of connections that a worker has closed, and room in that worker's queue.
    pub(crate) fn free(&self, places: u64) {
        self.open.fetch_sub(places, Ordering::Relaxed);
        self.capacity.notify();
    }

    /// Makes the next announcement of capacity wake the acceptor, which must look for capacity after this.
    pub(crate) fn watch_capacity(&self) {
        self.capacity.notified.clear();
    }

    /// Whether capacity was announced since [`watch_capacity`](Self::watch_capacity).
    pub(crate) fn has_new_capacity(&self) -> bool {
        self.capacity.notified.is_set()
    }

    /// Requests a shutdown, or moves the deadline of one to an earlier time.
    pub(crate) fn shut_down(&self, deadline: Millis) {
        self.shutdown_deadline.fetch_min(deadline, Ordering::SeqCst);
        // The acceptor, without announcing capacity.
        self.capacity.waker.wake();
        self.wake_workers();
    }

    /// Requests a shutdown that the acceptor begins by itself: it requests that of the workers once its listeners are closed.
    pub(crate) fn shut_down_acceptor(&self, deadline: Millis) {
        self.acceptor_deadline.fetch_min(deadline, Ordering::SeqCst);
        self.capacity.waker.wake();
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

    /// The deadline of a shutdown of the acceptor, if one was requested.
    pub(crate) fn acceptor_deadline(&self) -> Option<Millis> {
        let deadline = self.acceptor_deadline.load(Ordering::SeqCst);
        let deadline = deadline.min(self.shutdown_deadline.load(Ordering::SeqCst));
        (deadline != NEVER).then_some(deadline)
    }
}
