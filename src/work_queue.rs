//! A work queue: items dispatched round-robin into one bounded mailbox per worker, and the worker notified.
//!
//! With `W = Arc<mio::Waker>` it is the server's dispatcher, after memcached's: the acceptor dispatches
//! sockets, and a worker that sleeps in its poll is woken. With `W = ()` it is a plain multithreaded
//! job queue, whose workers wait in `for job in receiver`.
//!
//! A wake must never be lost, and should be rare. So an item is placed first and the worker notified
//! after; and a worker that has been notified and hasn't looked yet isn't notified again. [`Receiver::take_all`]
//! takes that mark away *before* it empties the mailbox: an item placed in between is either seen
//! by it or notifies anew.

use std::fmt;
use std::iter;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Select, Sender, TryRecvError, TrySendError};

/// Wakes a worker that waits somewhere else than in its mailbox.
pub trait Wake {
    /// Makes the worker look into its mailbox soon. May be called by any thread.
    fn wake(&self);
}

/// For workers that wait in the mailbox itself, and need no wake-up.
impl Wake for () {
    fn wake(&self) {}
}

/// For workers that wait in a [`mio::Poll`]. The waker only delivers while it is alive: the worker
/// keeps an `Arc` of its own, so that the queue's last wake, at its drop, is not lost.
impl Wake for Arc<mio::Waker> {
    fn wake(&self) {
        if let Err(error) = mio::Waker::wake(self) {
            log::error!("cannot wake a worker: {error}");
        }
    }
}

/// The sending half: dispatches items of type `T` to its workers in turn.
///
/// Dropping it closes every mailbox; workers still get what is in theirs, and then see the end.
///
/// ```
/// use std::num::NonZeroUsize;
/// use std::thread;
///
/// use echoserver::WorkQueue;
///
/// let (queue, receivers) = WorkQueue::bounded(NonZeroUsize::new(16).unwrap(), [(), ()]);
/// let sum: u64 = thread::scope(|scope| {
///     let workers: Vec<_> = receivers
///         .into_iter()
///         .map(|receiver| scope.spawn(move || receiver.sum::<u64>()))
///         .collect();
///     for job in 1..=100 {
///         queue.push(job).expect("both workers are alive");
///     }
///     drop(queue);
///     workers.into_iter().map(|worker| worker.join().unwrap()).sum()
/// });
/// assert_eq!(sum, 5050);
/// ```
#[derive(Debug)]
pub struct WorkQueue<T, W: Wake = ()> {
    mailboxes: Vec<Mailbox<T, W>>,
    next: AtomicUsize,
}

#[derive(Debug)]
struct Mailbox<T, W> {
    sender: Sender<T>,
    state: Arc<State>,
    waker: W,
}

#[derive(Debug)]
struct State {
    /// The worker was notified, and hasn't looked into its mailbox since.
    notified: AtomicBool,
    /// The worker still has its receiver.
    alive: AtomicBool,
}

/// The receiving half: one worker's mailbox.
///
/// As an iterator it waits for the next item, and ends when the queue was dropped and every mailbox
/// is empty. Towards the end it also takes what others have left over: items dispatched to a worker that
/// died are not lost while another one lives.
#[derive(Debug)]
pub struct Receiver<T> {
    channel: crossbeam_channel::Receiver<T>,
    state: Arc<State>,
    all_receivers: Arc<[crossbeam_channel::Receiver<T>]>,
    closed: bool,
}

/// An item that could not be placed, handed back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rejected<T> {
    /// Every live worker's mailbox is full.
    Full(T),
    /// No worker is left.
    Closed(T),
}

impl<T> Rejected<T> {
    /// The item.
    pub fn into_inner(self) -> T {
        match self {
            Self::Full(item) | Self::Closed(item) => item,
        }
    }
}

impl<T> fmt::Debug for Rejected<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "Full(..)",
            Self::Closed(_) => "Closed(..)",
        })
    }
}

impl<T> fmt::Display for Rejected<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "every mailbox is full",
            Self::Closed(_) => "no worker is left",
        })
    }
}

impl<T> std::error::Error for Rejected<T> {}

impl<T, W: Wake> WorkQueue<T, W> {
    /// A queue with one worker per waker, each of whose mailboxes holds at most `capacity` items;
    /// and the workers' receivers, in the order of their wakers. Room for all items is allocated at once.
    ///
    /// # Panics
    ///
    /// If that much memory cannot be had.
    pub fn bounded(
        capacity: NonZeroUsize,
        wakers: impl IntoIterator<Item = W>,
    ) -> (Self, Vec<Receiver<T>>) {
        let (mut mailboxes, mut receivers) = (Vec::new(), Vec::new());
        for waker in wakers {
            let (sender, receiver) = crossbeam_channel::bounded(capacity.get());
            let state = Arc::new(State {
                notified: AtomicBool::new(false),
                alive: AtomicBool::new(true),
            });
            mailboxes.push(Mailbox {
                sender,
                state,
                waker,
            });
            receivers.push(receiver);
        }
        let all_receivers: Arc<[crossbeam_channel::Receiver<T>]> = receivers.into();
        let receivers = iter::zip(&mailboxes, all_receivers.iter())
            .map(|(mailbox, receiver)| Receiver {
                channel: receiver.clone(),
                state: Arc::clone(&mailbox.state),
                all_receivers: Arc::clone(&all_receivers),
                closed: false,
            })
            .collect();
        (
            Self {
                mailboxes,
                next: AtomicUsize::new(0),
            },
            receivers,
        )
    }

    /// Places `item` with the next worker, or the next after it that has room, and notifies it.
    /// Never waits.
    ///
    /// # Errors
    ///
    /// Hands `item` back where every mailbox is full, or every worker gone.
    pub fn try_push(&self, item: T) -> Result<(), Rejected<T>> {
        self.dispatch(item).map(Mailbox::notify)
    }

    /// Like [`try_push`](Self::try_push), but waits until there is room.
    ///
    /// # Errors
    ///
    /// Hands `item` back where every worker is gone.
    pub fn push(&self, item: T) -> Result<(), Rejected<T>> {
        let mut attempt = self.try_push(item);
        while let Err(Rejected::Full(item)) = attempt {
            self.wait_for_room(None);
            attempt = self.try_push(item);
        }
        attempt
    }

    /// Like [`try_push`](Self::try_push), but notifies no worker: for a batch, which ends in one
    /// [`notify`](Self::notify). Until then a sleeping worker sleeps on.
    ///
    /// # Errors
    ///
    /// Hands `item` back where every mailbox is full, or every worker gone.
    pub fn try_push_without_notify(&self, item: T) -> Result<(), Rejected<T>> {
        self.dispatch(item).map(drop)
    }

    /// Notifies each worker that has something in its mailbox and was not notified for it yet.
    pub fn notify(&self) {
        for mailbox in &self.mailboxes {
            mailbox.notify();
        }
    }

    /// Whether an item pushed now would be taken: certain where there is one producer only.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.mailboxes
            .iter()
            .any(|mailbox| mailbox.is_alive() && !mailbox.sender.is_full())
    }

    fn dispatch(&self, mut item: T) -> Result<&Mailbox<T, W>, Rejected<T>> {
        let (count, first) = (
            self.mailboxes.len(),
            self.next.fetch_add(1, Ordering::Relaxed),
        );
        let mut any_alive = false;
        for turn in 0..count {
            let mailbox = &self.mailboxes[first.wrapping_add(turn) % count];
            if !mailbox.is_alive() {
                continue;
            }
            any_alive = true;
            match mailbox.sender.try_send(item) {
                Ok(()) => return Ok(mailbox),
                Err(TrySendError::Full(back) | TrySendError::Disconnected(back)) => item = back,
            }
        }
        Err(if any_alive {
            Rejected::Full(item)
        } else {
            Rejected::Closed(item)
        })
    }

    /// Waits until a live worker has taken something or none is left, but not for longer than
    /// `timeout`.
    pub(crate) fn wait_for_room(&self, timeout: Option<Duration>) {
        let mut room = Select::new();
        let live = self.mailboxes.iter().filter(|mailbox| mailbox.is_alive());
        if live.map(|mailbox| room.send(&mailbox.sender)).count() == 0 {
            return;
        }
        match timeout {
            // Either way the caller looks for itself.
            Some(timeout) => drop(room.ready_timeout(timeout)),
            None => drop(room.ready()),
        }
    }
}

impl<T, W: Wake> Drop for WorkQueue<T, W> {
    /// Closes the mailboxes, and only then notifies the workers, so that they see it.
    fn drop(&mut self) {
        for Mailbox { sender, waker, .. } in self.mailboxes.drain(..) {
            drop(sender);
            waker.wake();
        }
    }
}

impl<T, W: Wake> Mailbox<T, W> {
    fn notify(&self) {
        if !self.sender.is_empty() && !self.state.notified.swap(true, Ordering::SeqCst) {
            self.waker.wake();
        }
    }

    fn is_alive(&self) -> bool {
        self.state.alive.load(Ordering::Acquire)
    }
}

impl<T> Receiver<T> {
    /// Empties the mailbox without waiting: the way to look into it after having been notified.
    pub fn take_all(&mut self) -> impl Iterator<Item = T> {
        // Before the first look, and SeqCst as in `notify`: a producer that finds the mark still
        // set has placed an item that this look will find.
        self.state.notified.store(false, Ordering::SeqCst);
        iter::from_fn(|| match self.channel.try_recv() {
            Ok(item) => Some(item),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                self.closed = true;
                None
            }
        })
    }

    /// Whether [`take_all`](Self::take_all) has found that the queue was dropped, and nothing can come.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }
}

impl<T> Iterator for Receiver<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let leftover = || {
            self.all_receivers
                .iter()
                .find_map(|receiver| receiver.try_recv().ok())
        };
        self.channel.recv().ok().or_else(leftover)
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.state.alive.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread;

    use super::*;

    fn capacity(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).expect("not zero")
    }

    /// Counts its wakes.
    #[derive(Clone, Default)]
    struct CountingWaker(Arc<AtomicUsize>);

    impl CountingWaker {
        fn count(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    impl Wake for CountingWaker {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn dispatches_round_robin() {
        let (queue, mut receivers) = WorkQueue::bounded(capacity(8), [(), (), ()]);
        for item in 0..7 {
            queue.try_push(item).unwrap();
        }
        let dispatched: Vec<Vec<i32>> = receivers
            .iter_mut()
            .map(|receiver| receiver.take_all().collect())
            .collect();
        assert_eq!(dispatched, [vec![0, 3, 6], vec![1, 4], vec![2, 5]]);
    }

    #[test]
    fn full_mailboxes_are_skipped_and_excess_items_returned() {
        let (queue, mut receivers) = WorkQueue::bounded(capacity(1), [(), ()]);
        assert!(queue.has_room());
        queue.try_push('a').unwrap();
        queue.try_push('b').unwrap();
        assert!(!queue.has_room());
        assert_eq!(queue.try_push('c'), Err(Rejected::Full('c')));
        assert_eq!(receivers[1].take_all().collect::<Vec<_>>(), ['b']);
        queue.try_push('d').unwrap();
        assert_eq!(
            receivers[1].take_all().collect::<Vec<_>>(),
            ['d'],
            "the only one with room"
        );
    }

    #[test]
    fn dead_workers_are_skipped_and_reported_when_none_is_left() {
        let (queue, mut receivers) = WorkQueue::bounded(capacity(2), [(), ()]);
        drop(receivers.remove(0));
        queue.try_push(1).unwrap();
        queue.try_push(2).unwrap();
        assert_eq!(queue.try_push(3), Err(Rejected::Full(3)));
        assert_eq!(receivers[0].take_all().collect::<Vec<_>>(), [1, 2]);
        receivers.clear();
        assert!(!queue.has_room());
        assert_eq!(queue.push(4), Err(Rejected::Closed(4)));
        assert_eq!(Rejected::Closed(4).to_string(), "no worker is left");
        assert_eq!(Rejected::Full(4).to_string(), "every mailbox is full");
    }

    #[test]
    fn batch_notifies_each_worker_once() {
        let wakers: [CountingWaker; 3] = Default::default();
        let (queue, mut receivers) = WorkQueue::bounded(capacity(8), wakers.clone());
        for item in 0..5 {
            queue.try_push_without_notify(item).unwrap();
        }
        receivers[2].take_all().for_each(drop);
        queue.notify();
        assert_eq!(
            wakers.each_ref().map(CountingWaker::count),
            [1, 1, 0],
            "an empty mailbox needs no wake"
        );
    }

    #[test]
    fn worker_is_notified_once_until_it_takes_items() {
        let waker = CountingWaker::default();
        let (queue, mut receivers) = WorkQueue::bounded(capacity(8), [waker.clone()]);
        queue.try_push(1).unwrap();
        queue.try_push(2).unwrap();
        assert_eq!(waker.count(), 1);
        assert_eq!(receivers[0].take_all().collect::<Vec<_>>(), [1, 2]);
        queue.try_push(3).unwrap();
        assert_eq!(waker.count(), 2);
    }

    #[test]
    fn item_pushed_during_take_all_notifies_again() {
        let waker = CountingWaker::default();
        let (queue, mut receivers) = WorkQueue::bounded(capacity(8), [waker.clone()]);
        queue.try_push(1).unwrap();
        let mut taking = receivers[0].take_all();
        queue.try_push(2).unwrap();
        assert_eq!(
            waker.count(),
            2,
            "the mark is cleared before the first item is taken"
        );
        assert_eq!(taking.by_ref().collect::<Vec<_>>(), [1, 2]);
        queue.try_push(3).unwrap();
        assert_eq!(waker.count(), 2, "the second wake has not been handled yet");
    }

    #[test]
    fn item_is_in_the_mailbox_before_the_wake() {
        struct TakingWaker(Mutex<Option<Receiver<u32>>>, Arc<Mutex<Vec<u32>>>);
        impl Wake for Arc<TakingWaker> {
            fn wake(&self) {
                if let Some(receiver) = &mut *self.0.lock().unwrap() {
                    self.1.lock().unwrap().extend(receiver.take_all());
                }
            }
        }
        let taken = Arc::default();
        let waker = Arc::new(TakingWaker(Mutex::default(), Arc::clone(&taken)));
        let (queue, mut receivers) = WorkQueue::bounded(capacity(8), [Arc::clone(&waker)]);
        *waker.0.lock().unwrap() = receivers.pop();
        queue.try_push(7).unwrap();
        assert_eq!(*taken.lock().unwrap(), [7]);
        drop(queue);
        assert!(
            waker.0.lock().unwrap().as_ref().unwrap().is_closed(),
            "closed before the last wake"
        );
    }

    #[test]
    fn drop_closes_the_queue_and_loses_no_item() {
        let waker = CountingWaker::default();
        let (queue, mut receivers) = WorkQueue::bounded(capacity(8), [waker.clone()]);
        queue.try_push(1).unwrap();
        drop(queue);
        assert_eq!(waker.count(), 2);
        assert!(
            !receivers[0].is_closed(),
            "not known before the mailbox is read"
        );
        assert_eq!(receivers[0].take_all().collect::<Vec<_>>(), [1]);
        assert!(receivers[0].is_closed());
    }

    #[test]
    fn push_waits_for_room() {
        let (queue, receivers) = WorkQueue::bounded(capacity(1), [(), ()]);
        let total: u64 = thread::scope(|scope| {
            let workers: Vec<_> = receivers
                .into_iter()
                .map(|receiver| scope.spawn(move || receiver.sum::<u64>()))
                .collect();
            for job in 1..=10_000 {
                queue.push(job).unwrap();
            }
            drop(queue);
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap())
                .sum()
        });
        assert_eq!(total, 50_005_000);
    }

    #[test]
    fn dead_worker_loses_no_other_job() {
        let (queue, mut receivers) = WorkQueue::bounded(capacity(100), [(), ()]);
        for job in 0..100 {
            queue.try_push(job).unwrap();
        }
        let (survivor, mut doomed) = (receivers.remove(0), receivers.remove(0));
        let lost = doomed.next().expect("a job");
        drop(doomed);
        drop(queue);
        let mut done: Vec<i32> = survivor.collect();
        done.push(lost);
        done.sort_unstable();
        assert_eq!(done, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn push_fails_at_once_when_all_workers_are_dead() {
        let (queue, receivers) = WorkQueue::<u32>::bounded(capacity(1), [()]);
        drop(receivers);
        queue.wait_for_room(None);
        assert_eq!(queue.push(1), Err(Rejected::Closed(1)));
    }

    #[test]
    fn push_stops_waiting_when_all_workers_die() {
        let (queue, receivers) = WorkQueue::bounded(capacity(1), [()]);
        queue.try_push(1).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.push(2));
            drop(receivers);
            assert_eq!(waiting.join().unwrap(), Err(Rejected::Closed(2)));
        });
    }
}
