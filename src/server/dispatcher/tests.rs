use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
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

type Workers<T> = (
    Dispatcher<T, CountingWaker>,
    Vec<Receiver<T, CountingWaker>>,
);

fn workers<T>(count: usize, capacity: usize) -> (Workers<T>, Vec<CountingWaker>) {
    let wakers: Vec<_> = (0..count).map(|_| CountingWaker::default()).collect();
    (Dispatcher::new(capacity, wakers.clone()), wakers)
}

fn take_all<T>(receiver: &mut Receiver<T, impl Wake>) -> Vec<T> {
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

/// Rule 8 of the event loop.
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

/// Rule 8 of the event loop.
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

/// Rule 8 of the event loop.
#[test]
fn item_is_in_the_queue_before_the_notification() {
    #[derive(Default)]
    struct TakingWaker(Mutex<Option<Receiver<u32, Arc<Self>>>>, Mutex<Vec<u32>>);
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
    drop(waker.0.lock().unwrap().take());
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

/// Rule 8 of the event loop.
#[test]
fn drop_closes_the_queues_without_losing_items() {
    let ((mut dispatcher, mut receivers), wakers) = workers(2, 8);
    dispatcher.try_dispatch(1).unwrap();
    drop(dispatcher);
    assert!(wakers.iter().all(|waker| waker.count() == 1));
    assert_eq!(receivers[0].take(1).collect::<Vec<_>>(), [1]);
    assert!(!receivers[0].is_closed(), "not known yet");
    for receiver in &mut receivers {
        for _ in 0..2 {
            assert_eq!(take_all(receiver), [0; 0]);
            assert!(receiver.is_closed());
        }
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
