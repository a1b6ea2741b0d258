//! The timers of a worker: an ordered set of times at which to look at a connection.
//!
//! A timer is a hint, like an event: the connection's own deadline decides. Moving a deadline to a later
//! time therefore costs nothing here. When the old timer expires, the caller sets the next one. Timers of
//! closed connections stay until they expire or the set is rebuilt.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::mem;

use crate::system::{Millis, NEVER};

#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Millis, usize)>>,
}

impl Timers {
    /// Adds a timer. Setting one for [`NEVER`] does nothing.
    pub(crate) fn set(&mut self, at: Millis, token: usize) {
        if at != NEVER {
            self.heap.push(Reverse((at, token)));
        }
    }

    /// The time of the earliest timer.
    pub(crate) fn next(&self) -> Option<Millis> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Removes a timer that has expired by `now`, the earliest first, and returns its time and its token.
    pub(crate) fn pop_expired(&mut self, now: Millis) -> Option<(Millis, usize)> {
        let Reverse((at, token)) = *self.heap.peek()?;
        (at <= now).then(|| {
            self.heap.pop();
            (at, token)
        })
    }

    /// Removes all timers, and returns their tokens.
    pub(crate) fn take_tokens(&mut self) -> Vec<usize> {
        let timers = mem::take(&mut self.heap).into_iter();
        timers.map(|Reverse((_, token))| token).collect()
    }

    /// Whether there are many more timers than `open` connections: those of closed connections and of deadlines
    /// that were replaced.
    pub(crate) fn needs_rebuild(&self, open: usize) -> bool {
        self.heap.len() > 2 * open + 64
    }

    /// Replaces all timers.
    pub(crate) fn rebuild(&mut self, deadlines: impl Iterator<Item = (Millis, usize)>) {
        self.heap.clear();
        for (at, token) in deadlines {
            self.set(at, token);
        }
    }
}

#[cfg(test)]
mod tests;
