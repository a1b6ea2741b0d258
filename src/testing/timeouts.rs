//! A plain model of the timeouts, written from the promises and not from the code that keeps them.
//!
//! The kernel sees every call of the server, so it knows since when nothing has happened on a connection, and which
//! timeout applies:
//!
//! | the connection | timeout | what starts it again |
//! | --- | --- | --- |
//! | serves its client | idle; none in a shutdown | bytes that are read or sent |
//! | owes an answer and has no output to send | answer; none in a shutdown | bytes that are sent |
//! | has work left and has no output to send | none | |
//! | sends its last output | flush; none in a shutdown | bytes that are sent |
//! | refuses input in a shutdown | linger or a sixteenth of drain, the shorter one | nothing |
//! | has shut its write half down | linger | in a shutdown, bytes that are discarded; otherwise nothing |
//!
//! Each change between the first rows and the others starts the timeout as well. An EOF is not a byte. Input that is left unread because output
//! is stuck starts nothing.
//!
//! After each tick of a worker, the deadline that its table holds must be the one of the model.

use super::connection::SimConnection;
use super::kernel::Kernel;
use crate::connection::handler::Action;
use crate::system::{Millis, NEVER};

/// What a connection does, and the timeout that applies to it.
type Limit = (&'static str, Option<Millis>);

/// The deadline of something that lasts at most `timeout`: rounded up to a multiple of an eighth of it.
fn deadline(since: Millis, timeout: Option<Millis>) -> Millis {
    timeout.map_or(NEVER, |timeout| {
        let step = (timeout / 8).max(1);
        (since + timeout).div_ceil(step) * step
    })
}

/// A deadline in a message.
fn show(deadline: Millis) -> String {
    match deadline {
        NEVER => "never".to_owned(),
        at => format!("{at} ms"),
    }
}

impl Kernel<'_> {
    fn limit_of(&self, connection: &SimConnection, in_shutdown: bool) -> Limit {
        let timeouts = self.parameters.timeouts;
        if connection.write_shutdown.is_some() {
            ("lingering", Some(timeouts.linger))
        } else if connection.refuses {
            ("refusing", Some(timeouts.linger.min(timeouts.drain / 16)))
        } else if in_shutdown {
            ("in a shutdown and quiet", None)
        } else if connection.close_requested.is_some() {
            ("flushing", Some(timeouts.close))
        } else if connection.is_waiting() && connection.is_pending() {
            ("waiting for its answer", timeouts.answer)
        } else if connection.is_waiting() {
            ("waiting for its turn", None)
        } else {
            ("idle", timeouts.idle)
        }
    }

    /// Notes that the server has read bytes of a connection, or sent `sent` bytes.
    pub(super) fn note_transfer(&mut self, id: usize, sent: usize) {
        let poller = &self.pollers[self.current];
        let connection = &mut self.connections[id];
        let is_lingering = connection.write_shutdown.is_some();
        let is_progress = if is_lingering {
            poller.draining || poller.can_see_shutdown()
        } else {
            !connection.refuses && (sent > 0 || !connection.is_waiting())
        };
        if is_progress {
            connection.quiet_since = poller.now;
        }
    }

    /// Notes that a call of a handler has ended, before which the connection has `waited` after this action.
    pub(super) fn note_call(&mut self, id: usize, waited: Option<Action>) {
        let now = self.pollers[self.current].now;
        let connection = &mut self.connections[id];
        if connection.waits_after() != waited {
            connection.quiet_since = now;
        }
    }

    /// Notes that the server refuses further input of a connection.
    pub(super) fn note_refusal(&mut self, id: usize) {
        let now = self.pollers[self.current].now;
        let connection = &mut self.connections[id];
        connection.refuses = true;
        connection.quiet_since = now;
    }

    /// The deadline of a connection during a tick of its worker.
    pub(super) fn deadline_in_tick(&self, id: usize) -> Millis {
        let poller = &self.pollers[self.current];
        let connection = &self.connections[id];
        // A worker sees a shutdown before it closes what has expired.
        let in_shutdown = poller.draining || poller.can_see_shutdown();
        let (_, timeout) = self.limit_of(connection, in_shutdown);
        deadline(connection.quiet_since, timeout)
    }

    /// Checks that input is refused until the deadline, before the server ends its half of the connection.
    pub(super) fn check_refusal(&mut self, id: usize) {
        let now = self.pollers[self.current].now;
        let is_done = !self.connections[id].refuses || self.deadline_in_tick(id) <= now;
        self.check(is_done, || {
            format!("connection {id} has not refused input until its deadline")
        });
    }

    /// Checks the deadline that the table holds for a connection after a tick of its worker, that the connection is not
    /// open after it, and that the worker does not sleep beyond it.
    pub(super) fn check_deadline(&mut self, thread: usize, id: usize, held: Millis) {
        let poller = &self.pollers[thread];
        let (now, draining) = (poller.now, poller.draining);
        let connection = &self.connections[id];
        let (action, timeout) = self.limit_of(connection, draining);
        let is_lingering = connection.write_shutdown.is_some();
        // A turn from the run queue comes after the expiries of its tick.
        let is_queued = connection.is_queued || connection.bulk_turn_tick == poller.ticks;
        let since = connection.quiet_since;
        let due = deadline(since, timeout);
        // To be tightened: once it has stopped refusing, it can wait in the run queue to end its half.
        let has_refused = connection.refuses && is_queued && due <= now && held == NEVER;
        if held != due && !has_refused {
            let (held, due) = (show(held), show(due));
            return self.fail(format!(
                "connection {id}: its deadline is {held}; {action} since {since} ms, it should be {due}"
            ));
        }
        let may_be_open = held > now || (is_queued && !is_lingering);
        self.check(may_be_open, || {
            format!("connection {id} is still open after its deadline, {held} ms")
        });
        self.check_armed(thread, id, held);
    }

    /// Checks that a worker does not sleep beyond a deadline of one of its connections, or of the shutdown.
    fn check_armed(&mut self, thread: usize, id: usize, held: Millis) {
        let poller = &self.pollers[thread];
        let shutdown = self.shutdown.filter(|_| poller.draining);
        let deadline = shutdown.map_or(NEVER, |shutdown| shutdown.deadline);
        let deadline = deadline.min(held);
        // The sleep begins at the end of the tick.
        let at = deadline.saturating_add(poller.tick_length);
        let wake_at = poller.wake_at.unwrap_or(NEVER);
        let is_armed = self.is_ready(thread) || wake_at <= at;
        self.check(is_armed, || {
            format!("worker sleeps beyond the deadline of connection {id}, {deadline} ms")
        });
    }
}

#[cfg(test)]
mod tests;
