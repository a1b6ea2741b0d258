//! Run with `RUSTFLAGS="--cfg echoserver_loom" cargo test --lib loom`.

use std::collections::VecDeque;

use loom::sync::atomic::AtomicUsize;
use loom::sync::{Arc, Mutex};
use loom::thread;

use super::*;

/// Notifications that the owner has not handled.
#[derive(Debug)]
struct Notifications(AtomicUsize);

impl Wake for Notifications {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the owner of a queue and the threads that add to it share.
#[derive(Debug)]
struct Shared {
    notifier: Notifier<Notifications>,
    /// A connection's place in the queue.
    queued: Flag,
    queue: Mutex<VecDeque<()>>,
    /// What the handler looks at.
    data: AtomicUsize,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            notifier: Notifier::new(Notifications(AtomicUsize::new(0))),
            queued: Flag::default(),
            queue: Mutex::new(VecDeque::new()),
            data: AtomicUsize::new(0),
        })
    }

    /// Wakes the connection, as a `Waker` does.
    fn wake(&self) {
        self.data.fetch_add(1, Ordering::Relaxed);
        if self.queued.set_if_clear() {
            self.queue.lock().expect("no thread panics").push_back(());
            self.notifier.notify();
        }
    }

    /// Handles a notification, if there is one; returns what the handler has seen, if it was called.
    fn handle(&self) -> Option<usize> {
        if self.notifier.waker.0.swap(0, Ordering::Relaxed) == 0 {
            return None;
        }
        self.notifier.notified.clear();
        let mut seen = None;
        while self
            .queue
            .lock()
            .expect("no thread panics")
            .pop_front()
            .is_some()
        {
            self.queued.clear();
            seen = Some(self.data.load(Ordering::Relaxed));
        }
        seen
    }
}

#[test]
fn added_item_is_seen_or_notifies() {
    loom::model(|| {
        let shared = Shared::new();
        // The owner is about to handle an earlier notification.
        shared.notifier.notify();
        let adding = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.data.store(1, Ordering::Relaxed);
                shared.notifier.notify();
            })
        };
        shared.notifier.waker.0.store(0, Ordering::Relaxed);
        shared.notifier.notified.clear();
        let is_seen = shared.data.load(Ordering::Relaxed) == 1;
        adding.join().expect("it does not panic");
        assert!(is_seen || shared.notifier.waker.0.load(Ordering::Relaxed) == 1);
    });
}

#[test]
fn every_wake_is_followed_by_a_call_that_sees_it() {
    loom::model(|| {
        let shared = Shared::new();
        let waking: Vec<_> = (0..2)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.wake())
            })
            .collect();
        let early = shared.handle();
        for thread in waking {
            thread.join().expect("it does not panic");
        }
        // What the early look has missed has notified again.
        let late = shared.handle();
        assert_eq!(late.or(early), Some(2), "{shared:?}");
    });
}

/// The acceptor looks for capacity once more after it has cleared the flag, while a worker frees a place.
#[test]
fn capacity_during_a_pause_is_seen_or_wakes_the_acceptor() {
    loom::model(|| {
        let shared = Shared::new();
        let worker = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.data.store(1, Ordering::Relaxed);
                shared.notifier.notify();
            })
        };
        shared.notifier.notified.clear();
        let is_seen = shared.data.load(Ordering::Relaxed) == 1;
        worker.join().expect("it does not panic");
        let wakes = shared.notifier.waker.0.load(Ordering::Relaxed);
        assert!(is_seen || (wakes == 1 && shared.notifier.notified.is_set()));
    });
}
