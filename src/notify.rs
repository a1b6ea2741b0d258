//! Notifications that coalesce and are never lost.
//!
//! A thread changes something, for example pushes an item, then sets a flag, and wakes the owner only if the flag was
//! clear. The owner clears the flag *before* it looks. A thread that finds the flag set has therefore made its change in
//! time for the owner to see it.

#[cfg(not(all(echoserver_loom, test)))]
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(all(echoserver_loom, test))]
use loom::sync::atomic::{AtomicBool, Ordering};

use crate::system::Wake;

/// A flag that any thread sets and one clears.
#[derive(Debug, Default)]
pub(crate) struct Flag(AtomicBool);

impl Flag {
    /// Sets the flag. Returns `true` if it was clear.
    ///
    /// This and [`clear`](Self::clear) are acquire-release swaps, so whatever a thread wrote before it set the flag is
    /// visible to the thread that clears it.
    #[must_use]
    pub(crate) fn set_if_clear(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Clears the flag. Call this before reading what it stands for.
    pub(crate) fn clear(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Wakes one thread for the changes that others make.
#[derive(Debug)]
pub(crate) struct Notifier<W> {
    /// A change was announced. The owner clears this before it looks for changes, so that the next one notifies again.
    pub(crate) notified: Flag,
    pub(crate) waker: W,
}

impl<W: Wake> Notifier<W> {
    pub(crate) fn new(waker: W) -> Self {
        Self {
            notified: Flag::default(),
            waker,
        }
    }

    /// Announces a change. Wakes the owner unless it was notified and has not cleared that since.
    pub(crate) fn notify(&self) {
        if self.notified.set_if_clear() {
            self.waker.wake();
        }
    }
}

#[cfg(all(echoserver_loom, test))]
mod loom_tests;
