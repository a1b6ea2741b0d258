//! A flag that coalesces notifications without losing one.
//!
//! A thread pushes an item, then sets the flag, and notifies the queue's owner only if the flag was clear. The owner
//! clears the flag *before* it reads the queue. A thread that finds the flag set has therefore pushed its item in time
//! for the owner to see it.

#[cfg(not(all(echoserver_loom, test)))]
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(all(echoserver_loom, test))]
use loom::sync::atomic::{AtomicBool, Ordering};

/// A flag that any thread sets and one clears.
#[derive(Debug)]
pub(crate) struct NotifyFlag(AtomicBool);

impl NotifyFlag {
    /// A flag that is clear.
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Sets the flag. Returns whether it was clear: then a notification is due.
    ///
    /// Both methods are acquire-release swaps, so whatever a thread wrote before it set the flag is visible to the
    /// thread that clears it.
    #[must_use]
    pub(crate) fn set(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Clears the flag. Call this before reading what it stands for.
    pub(crate) fn clear(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }
}

/// Run with `RUSTFLAGS="--cfg echoserver_loom" cargo test --lib loom`.
#[cfg(all(echoserver_loom, test))]
mod loom_tests {
    use std::collections::VecDeque;

    use loom::sync::atomic::AtomicUsize;
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    use super::*;

    /// What the owner of a queue and the threads that add to it share.
    #[derive(Debug)]
    struct Shared {
        notified: NotifyFlag,
        /// Notifications that the owner has not handled.
        notifications: AtomicUsize,
        /// A connection's place in the queue.
        queued: NotifyFlag,
        queue: Mutex<VecDeque<()>>,
        /// What the handler looks at.
        data: AtomicUsize,
    }

    impl Shared {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                notified: NotifyFlag::new(),
                notifications: AtomicUsize::new(0),
                queued: NotifyFlag::new(),
                queue: Mutex::new(VecDeque::new()),
                data: AtomicUsize::new(0),
            })
        }

        fn notify(&self) {
            if self.notified.set() {
                self.notifications.fetch_add(1, Ordering::Relaxed);
            }
        }

        /// Wakes the connection, as a `Waker` does.
        fn wake(&self) {
            self.data.fetch_add(1, Ordering::Relaxed);
            if self.queued.set() {
                self.queue.lock().expect("no thread panics").push_back(());
                self.notify();
            }
        }

        /// Handles a notification, if there is one; returns what the handler has seen, if it was called.
        fn handle(&self) -> Option<usize> {
            if self.notifications.swap(0, Ordering::Relaxed) == 0 {
                return None;
            }
            self.notified.clear();
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
            shared.notify();
            let adding = {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    shared.data.store(1, Ordering::Relaxed);
                    shared.notify();
                })
            };
            shared.notifications.store(0, Ordering::Relaxed);
            shared.notified.clear();
            let is_seen = shared.data.load(Ordering::Relaxed) == 1;
            adding.join().expect("it does not panic");
            assert!(is_seen || shared.notifications.load(Ordering::Relaxed) == 1);
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
}
