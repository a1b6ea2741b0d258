//! The dispatcher: hands connections round-robin to the workers, after memcached's design.
//!
//! Each worker has a bounded queue. A worker that sleeps in its poll cannot wait on a channel as well, so
//! a waker raises an event in that poll.
//!
//! No wake-up is lost: see [`NotifyFlag`].

use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Sender, TryRecvError, TrySendError};

use crate::notify::NotifyFlag;

/// Wakes a thread that waits in a poll.
pub(crate) trait Wake {
    /// Raises an event in the poll. May be called by any thread.
    fn wake(&self);
}

impl Wake for mio::Waker {
    fn wake(&self) {
        if let Err(error) = mio::Waker::wake(self) {
            log::error!("cannot wake an event loop: {error}");
        }
    }
}

impl<W: Wake> Wake for Arc<W> {
    fn wake(&self) {
        W::wake(self);
    }
}

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
    shared: Arc<Shared>,
    waker: W,
}

/// What both ends of a queue share besides the channel.
#[derive(Debug)]
struct Shared {
    /// The worker was notified and has not looked into its queue since.
    notified: NotifyFlag,
    /// The receiver exists.
    alive: AtomicBool,
}

/// The receiving half: one worker's queue.
#[derive(Debug)]
pub(crate) struct Receiver<T> {
    channel: crossbeam_channel::Receiver<T>,
    shared: Arc<Shared>,
    closed: bool,
}

impl<T, W: Wake> Dispatcher<T, W> {
    /// Creates one queue of at most `capacity` items for each waker, and their receivers in the same order.
    pub(crate) fn new(
        capacity: usize,
        wakers: impl IntoIterator<Item = W>,
    ) -> (Self, Vec<Receiver<T>>) {
        let (mut queues, mut receivers) = (Vec::new(), Vec::new());
        for waker in wakers {
            let (sender, channel) = crossbeam_channel::bounded(capacity);
            let shared = Arc::new(Shared {
                notified: NotifyFlag::new(),
                alive: AtomicBool::new(true),
            });
            receivers.push(Receiver {
                channel,
                shared: Arc::clone(&shared),
                closed: false,
            });
            queues.push(Queue {
                sender,
                shared,
                waker,
            });
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
            if !queue.is_alive() {
                continue;
            }
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
            let has_item = !queue.sender.is_empty();
            if has_item && queue.shared.notified.set() {
                queue.waker.wake();
            }
        }
    }

    /// Whether a worker has room. This is the only sender, so the room lasts until it dispatches.
    pub(crate) fn has_room(&self) -> bool {
        self.queues
            .iter()
            .any(|queue| queue.is_alive() && !queue.sender.is_full())
    }
}

impl<T, W: Wake> Drop for Dispatcher<T, W> {
    /// Closes the queues first, so that the workers see it when they wake up.
    fn drop(&mut self) {
        for Queue { sender, waker, .. } in self.queues.drain(..) {
            drop(sender);
            waker.wake();
        }
    }
}

impl<T, W> Queue<T, W> {
    fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }
}

impl<T> Receiver<T> {
    /// Takes up to `max` items without waiting.
    pub(crate) fn take(&mut self, max: usize) -> impl Iterator<Item = T> {
        // Before the first item: a sender that still finds the flag set has pushed an item that this call finds.
        self.shared.notified.clear();
        let items = iter::from_fn(|| match self.channel.try_recv() {
            Ok(item) => Some(item),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                self.closed = true;
                None
            }
        });
        items.take(max)
    }

    /// Whether [`take`](Self::take) has found the queue empty and closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.alive.store(false, Ordering::Release);
    }
}

#[cfg(test)]
pub(crate) use tests::CountingWaker;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    /// Counts its wake-ups.
    #[derive(Clone, Default)]
    pub(crate) struct CountingWaker(Arc<AtomicUsize>);

    impl CountingWaker {
        pub(crate) fn count(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    impl Wake for CountingWaker {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    type Workers<T> = (Dispatcher<T, CountingWaker>, Vec<Receiver<T>>);

    fn workers<T>(count: usize, capacity: usize) -> (Workers<T>, Vec<CountingWaker>) {
        let wakers: Vec<_> = (0..count).map(|_| CountingWaker::default()).collect();
        (Dispatcher::new(capacity, wakers.clone()), wakers)
    }

    fn take_all<T>(receiver: &mut Receiver<T>) -> Vec<T> {
        receiver.take(usize::MAX).collect()
    }

    #[test]
    fn dispatches_round_robin() {
        let ((mut dispatcher, mut receivers), _) = workers(3, 8);
        for item in 0..7 {
            dispatcher.try_dispatch(item).unwrap();
        }
        let taken: Vec<_> = receivers.iter_mut().map(take_all).collect();
        assert_eq!(taken, [vec![0, 3, 6], vec![1, 4], vec![2, 5]]);
    }

    #[test]
    fn share_of_a_full_worker_is_spread_over_all_others() {
        let ((mut dispatcher, mut receivers), _) = workers(3, 4);
        for item in 0..12 {
            dispatcher.try_dispatch(item).unwrap();
        }
        assert_eq!(dispatcher.try_dispatch(12), Err(12));
        take_all(&mut receivers[1]);
        take_all(&mut receivers[2]);
        for item in 0..8 {
            dispatcher.try_dispatch(item).unwrap();
        }
        let taken: Vec<_> = receivers[1..].iter_mut().map(take_all).collect();
        assert_eq!(taken, [vec![0, 2, 4, 6], vec![1, 3, 5, 7]]);
    }

    #[test]
    fn dead_workers_are_skipped() {
        let ((mut dispatcher, mut receivers), _) = workers(2, 2);
        drop(receivers.remove(0));
        dispatcher.try_dispatch(1).unwrap();
        dispatcher.try_dispatch(2).unwrap();
        assert_eq!(dispatcher.try_dispatch(3), Err(3));
        assert!(!dispatcher.has_room());
        assert_eq!(take_all(&mut receivers[0]), [1, 2]);
        assert!(dispatcher.has_room());
        receivers.clear();
        assert!(!dispatcher.has_room());
        assert_eq!(dispatcher.try_dispatch(4), Err(4));
    }

    #[test]
    fn batch_notifies_each_worker_once() {
        let ((mut dispatcher, mut receivers), wakers) = workers(3, 8);
        for item in 0..5 {
            dispatcher.try_dispatch(item).unwrap();
        }
        take_all(&mut receivers[2]);
        dispatcher.notify();
        dispatcher.notify();
        let counts: Vec<_> = wakers.iter().map(CountingWaker::count).collect();
        assert_eq!(counts, [1, 1, 0], "an empty queue needs no notification");
        assert_eq!(take_all(&mut receivers[0]), [0, 3]);
        dispatcher.try_dispatch(5).unwrap();
        dispatcher.try_dispatch(6).unwrap();
        dispatcher.notify();
        assert_eq!(wakers[0].count(), 2, "notified again after it has looked");
    }

    #[test]
    fn item_pushed_while_the_queue_is_emptied_notifies_again() {
        let ((mut dispatcher, mut receivers), wakers) = workers(1, 8);
        dispatcher.try_dispatch(1).unwrap();
        dispatcher.notify();
        let mut items = receivers[0].take(usize::MAX);
        dispatcher.try_dispatch(2).unwrap();
        dispatcher.notify();
        assert_eq!(
            wakers[0].count(),
            2,
            "the flag was cleared before the first item"
        );
        assert_eq!(items.by_ref().collect::<Vec<_>>(), [1, 2]);
        dispatcher.try_dispatch(3).unwrap();
        dispatcher.notify();
        assert_eq!(
            wakers[0].count(),
            2,
            "the second notification is still pending"
        );
    }

    #[test]
    fn item_is_in_the_queue_before_the_notification() {
        #[derive(Default)]
        struct TakingWaker(Mutex<Option<Receiver<u32>>>, Mutex<Vec<u32>>);
        impl Wake for TakingWaker {
            fn wake(&self) {
                if let Some(receiver) = &mut *self.0.lock().unwrap() {
                    self.1.lock().unwrap().extend(take_all(receiver));
                }
            }
        }
        let waker = Arc::new(TakingWaker::default());
        let (mut dispatcher, mut receivers) = Dispatcher::new(8, [Arc::clone(&waker)]);
        *waker.0.lock().unwrap() = receivers.pop();
        dispatcher.try_dispatch(7).unwrap();
        dispatcher.notify();
        assert_eq!(*waker.1.lock().unwrap(), [7]);
    }

    #[test]
    fn take_is_bounded() {
        let ((mut dispatcher, mut receivers), _) = workers(1, 8);
        for item in 0..3 {
            dispatcher.try_dispatch(item).unwrap();
        }
        assert_eq!(receivers[0].take(2).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(receivers[0].take(2).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn drop_closes_the_queues_without_losing_items() {
        let ((mut dispatcher, mut receivers), wakers) = workers(2, 8);
        dispatcher.try_dispatch(1).unwrap();
        drop(dispatcher);
        assert!(wakers.iter().all(|waker| waker.count() == 1));
        assert_eq!(receivers[0].take(1).collect::<Vec<_>>(), [1]);
        assert!(!receivers[0].is_closed(), "not known yet");
        for receiver in &mut receivers {
            assert_eq!(take_all(receiver), [0; 0]);
            assert!(receiver.is_closed());
        }
    }

    #[test]
    fn no_wake_up_is_lost_between_threads() {
        const ITEMS: u32 = 100_000;
        const MAX: usize = 7;
        struct Unpark(thread::Thread);
        impl Wake for Unpark {
            fn wake(&self) {
                self.0.unpark();
            }
        }
        let (mut dispatcher, mut receivers) = Dispatcher::new(64, [Unpark(thread::current())]);
        let mut receiver = receivers.remove(0);
        thread::scope(|scope| {
            scope.spawn(move || {
                for mut item in 0..ITEMS {
                    while let Err(back) = dispatcher.try_dispatch(item) {
                        item = back;
                        thread::yield_now();
                    }
                    dispatcher.notify();
                }
            });
            let mut next = 0;
            while !receiver.is_closed() {
                let mut taken = 0;
                for item in receiver.take(MAX) {
                    assert_eq!(item, next);
                    next += 1;
                    taken += 1;
                }
                // As in the worker: only a take that found the queue empty is followed by a wake-up.
                if taken < MAX && !receiver.is_closed() {
                    thread::park();
                }
            }
            assert_eq!(next, ITEMS);
        });
    }
}
