//! The dispatcher: hands connections round-robin to the workers, after memcached's design.
//!
//! Each worker has a bounded queue. A worker that sleeps in its poll cannot wait on a channel as well, so
//! a waker raises an event in that poll.
//!
//! No wake-up is lost: see [`Notifier`].

use std::iter;
use std::sync::Arc;

use crossbeam_channel::{Sender, TryRecvError, TrySendError};

use crate::notify::Notifier;
use crate::system::Wake;

/// The sending half. Dropping it closes every queue and wakes every worker.
#[derive(Debug)]
pub(crate) struct Dispatcher<T, W: Wake> {
    queues: Vec<Queue<T, W>>,
    /// The worker whose turn it is.
    next: usize,
}

#[derive(Debug)]
struct Queue<T, W> {
    sender: Sender<T>,
    /// Notifies the worker of new items. Shared with the receiver only.
    notifier: Arc<Notifier<W>>,
}

impl<T, W> Queue<T, W> {
    fn has_room(&self) -> bool {
        let has_receiver = Arc::strong_count(&self.notifier) > 1;
        has_receiver && !self.sender.is_full()
    }
}

/// The receiving half: one worker's queue.
#[derive(Debug)]
pub(crate) struct Receiver<T, W: Wake> {
    /// Dropped first, so that a queue without a receiver counts as full before items are refused.
    notifier: Arc<Notifier<W>>,
    channel: crossbeam_channel::Receiver<T>,
    closed: bool,
}

impl<T, W: Wake> Dispatcher<T, W> {
    /// Creates one queue of at most `capacity` items for each waker, and their receivers in the same order.
    pub(crate) fn new(
        capacity: usize,
        wakers: impl IntoIterator<Item = W>,
    ) -> (Self, Vec<Receiver<T, W>>) {
        let (mut queues, mut receivers) = (Vec::new(), Vec::new());
        for waker in wakers {
            let (sender, channel) = crossbeam_channel::bounded(capacity);
            let notifier = Arc::new(Notifier::new(waker));
            receivers.push(Receiver {
                notifier: Arc::clone(&notifier),
                channel,
                closed: false,
            });
            queues.push(Queue { sender, notifier });
        }
        (Self { queues, next: 0 }, receivers)
    }

    /// Pushes `item` into the queue of the next worker that has room, without a notification: a batch ends
    /// with one call of [`notify`](Self::notify). Returns the item if no queue has room.
    ///
    /// The next search starts after the worker that was chosen, so the share of a full worker is spread over
    /// all others.
    pub(crate) fn try_dispatch(&mut self, mut item: T) -> Result<(), T> {
        for _ in 0..self.queues.len() {
            let queue = &self.queues[self.next];
            self.next = (self.next + 1) % self.queues.len();
            match queue.sender.try_send(item) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(back) | TrySendError::Disconnected(back)) => item = back,
            }
        }
        Err(item)
    }

    /// Notifies each worker that has an item in its queue and was not notified of it yet.
    pub(crate) fn notify(&self) {
        for queue in &self.queues {
            if !queue.sender.is_empty() {
                queue.notifier.notify();
            }
        }
    }

    /// Whether a worker has room. This is the only sender, so the room lasts until it dispatches.
    pub(crate) fn has_room(&self) -> bool {
        self.queues.iter().any(Queue::has_room)
    }
}

impl<T, W: Wake> Drop for Dispatcher<T, W> {
    /// Closes the queues first, so that the workers see it when they wake up.
    fn drop(&mut self) {
        for Queue { sender, notifier } in self.queues.drain(..) {
            drop(sender);
            notifier.waker.wake();
        }
    }
}

impl<T, W: Wake> Receiver<T, W> {
    /// Takes up to `max` items without waiting.
    pub(crate) fn take(&mut self, max: usize) -> impl Iterator<Item = T> {
        // Before the first item: a sender that still finds the flag set has pushed an item that this call finds. If there are
        // more than `max`, the worker makes the next call without a notification.
        self.notifier.notified.clear();
        let items = iter::from_fn(|| {
            let item = self.channel.try_recv();
            self.closed |= matches!(item, Err(TryRecvError::Disconnected));
            item.ok()
        });
        items.take(max)
    }

    /// Whether [`take`](Self::take) has found the queue empty and closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }
}

#[cfg(test)]
pub(crate) use tests::CountingWaker;

#[cfg(test)]
mod tests;
