//! The timers of a worker: an ordered set of times at which to look at a connection.
//!
//! A timer is a hint, like an event: the connection's own deadline decides. Moving a deadline to a later
//! time therefore costs nothing here. When the old timer expires, the caller sets the next one. Timers of
//! closed connections stay until they expire or the set is rebuilt.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// Milliseconds: a duration, or the time since a fixed moment.
pub(crate) type Millis = u64;

/// No deadline.
pub(crate) const NEVER: Millis = Millis::MAX;

/// Converts to milliseconds, rounded up so that no deadline is early.
pub(crate) fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(NEVER)
}

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

    /// Removes a timer that has expired by `now`, the earliest first.
    pub(crate) fn pop_expired(&mut self, now: Millis) -> Option<usize> {
        let Reverse((at, token)) = *self.heap.peek()?;
        (at <= now).then(|| {
            self.heap.pop();
            token
        })
    }

    /// Whether there are many more timers than `open` connections: those of closed connections and of earlier
    /// phases.
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
mod tests {
    use super::*;

    #[test]
    fn timers_expire_in_order_and_not_early() {
        let mut timers = Timers::default();
        for (at, token) in [(30, 3), (10, 1), (NEVER, 9), (20, 2)] {
            timers.set(at, token);
        }
        assert_eq!(timers.next(), Some(10));
        assert_eq!(timers.pop_expired(9), None);
        assert_eq!(timers.pop_expired(20), Some(1));
        assert_eq!(timers.pop_expired(20), Some(2));
        assert_eq!(timers.pop_expired(20), None);
        assert_eq!(timers.next(), Some(30));
    }

    #[test]
    fn durations_round_up() {
        assert_eq!(millis(Duration::ZERO), 0);
        assert_eq!(millis(Duration::from_nanos(1)), 1);
        assert_eq!(millis(Duration::from_millis(7)), 7);
        assert_eq!(millis(Duration::MAX), NEVER);
    }

    #[test]
    fn rebuild_drops_the_timers_of_closed_connections() {
        let mut timers = Timers::default();
        for at in 0..69 {
            timers.set(at, 0);
            assert_eq!(timers.needs_rebuild(2), at == 68);
        }
        timers.rebuild([(7, 1), (NEVER, 2)].into_iter());
        assert_eq!(timers.pop_expired(NEVER), Some(1));
        assert_eq!(timers.pop_expired(NEVER), None);
    }
}
