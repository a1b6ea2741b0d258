//! Wake-ups of connections by other threads.
//!
//! A worker has one queue of wake-ups. A connection has at most one entry in it, so its length is bounded by the
//! number of connections whose wakers still exist, closed ones included. A wake-up never blocks. A connection's flag
//! means that it has an entry.
//!
//! No wake-up is lost: see [`Notifier`].

use std::fmt;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

use crate::notify::{Flag, Notifier};
use crate::system::Wake;

/// Has a connection's handler called with [`Event::Wake`](crate::Event::Wake), from any thread.
///
/// [`Context::waker`](crate::Context::waker) creates it; clones wake the same connection. A waker of a connection
/// that was closed does nothing.
///
/// What a thread has done before [`wake`](Self::wake) is visible to the handler in the call that follows.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Target>);

#[derive(Debug)]
struct Target {
    token: usize,
    /// The connection is in the queue.
    queued: Flag,
    queue: WakeQueue,
}

impl Waker {
    /// Schedules a call of the handler. Several wake-ups can be merged into one call. Never blocks.
    pub fn wake(&self) {
        if self.0.queued.set_if_clear() {
            let queue = &self.0.queue.0;
            // It fails only if the worker has ended.
            let _ended = queue.sender.send(self.clone());
            queue.notifier.notify();
        }
    }

    /// Returns a guard that wakes the connection when it is dropped. A job that starts with it wakes its connection
    /// when it is done and when it panics.
    #[must_use = "it wakes at once if it is not kept"]
    pub fn wake_on_drop(self) -> WakeOnDrop {
        WakeOnDrop(self)
    }

    /// The connection's token. It can have been reused since the wake-up.
    pub(crate) fn token(&self) -> usize {
        self.0.token
    }

    /// Whether both wake the same connection.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Wakes a connection when it is dropped; see [`Waker::wake_on_drop`].
///
/// Variables are dropped in reverse order, so create it before those whose drop the handler is to see, such as the sending
/// half of a channel.
#[derive(Debug)]
pub struct WakeOnDrop(Waker);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// The sending half of a worker's queue of wake-ups.
#[derive(Clone)]
pub(crate) struct WakeQueue(Arc<Channel>);

struct Channel {
    sender: Sender<Waker>,
    /// Notifies the worker.
    notifier: Notifier<WakeWorker>,
}

/// Wakes a worker's poll with mio's waker. The function hides that type from handlers.
struct WakeWorker(Box<dyn Fn() + Send + Sync>);

impl Wake for WakeWorker {
    fn wake(&self) {
        (self.0)();
    }
}

/// The receiving half of a worker's queue of wake-ups.
#[derive(Debug)]
pub(crate) struct WakeReceiver {
    wakes: Receiver<Waker>,
    queue: WakeQueue,
}

impl WakeQueue {
    /// Creates a queue whose worker is woken with `notify`.
    pub(crate) fn new(notify: impl Fn() + Send + Sync + 'static) -> (Self, WakeReceiver) {
        let (sender, wakes) = crossbeam_channel::unbounded();
        let queue = Self(Arc::new(Channel {
            sender,
            notifier: Notifier::new(WakeWorker(Box::new(notify))),
        }));
        let receiver = WakeReceiver {
            wakes,
            queue: queue.clone(),
        };
        (queue, receiver)
    }

    /// Creates a waker for the connection with this token.
    pub(crate) fn waker(&self, token: usize) -> Waker {
        Waker(Arc::new(Target {
            token,
            queued: Flag::default(),
            queue: self.clone(),
        }))
    }
}

#[cfg(test)]
impl Waker {
    /// Whether a wake-up would notify the worker; the next would not.
    pub(crate) fn notifies(&self) -> bool {
        !self.0.queue.0.notifier.notified.is_set()
    }
}

impl fmt::Debug for WakeQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WakeQueue").finish_non_exhaustive()
    }
}

impl WakeReceiver {
    /// Clears the flag: wake-ups that are pushed from now on notify the worker again. Call this before
    /// [`take`](Self::take).
    pub(crate) fn clear_notified(&self) {
        self.queue.0.notifier.notified.clear();
    }

    /// Takes a wake-up without waiting.
    pub(crate) fn take(&self) -> Option<Waker> {
        let waker = self.wakes.try_recv().ok()?;
        waker.0.queued.clear();
        Some(waker)
    }
}

#[cfg(test)]
mod tests;
