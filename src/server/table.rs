//! A worker's connections: the connection table, the run queue and the deadlines.
//!
//! This is all of a worker except its thread and its poll. Time, readiness and new streams are arguments,
//! so a simulated kernel can drive exactly the code that serves sockets.
//!
//! A connection that becomes ready is driven at once, up to a [budget](crate::connection::BUDGET) of bytes. A
//! connection that has used its budget moves to the back of the run queue, which is run once per tick,
//! before any event is handled. While the run queue is not empty, the worker must not sleep. A flooding
//! connection therefore delays the others by one budget per tick.
//!
//! A connection has one deadline, which its [phase](Phase) determines: the idle timeout, the timeout of a flush, the
//! wait for EOF or, in a shutdown, the wait for late input. Progress moves the deadline without touching the
//! [timers](Timers), so nothing is scheduled per message. In a shutdown the idle and flush timeouts are off. A
//! handler's timer is independent of the deadline; one timer is set, for the earlier of the two.

use std::collections::VecDeque;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};

use slab::Slab;

use crate::connection::handler::{Event, Handler};
use crate::connection::waker::WakeReceiver;
use crate::connection::{Connection, Phase, Resources, Status, dispose};
use crate::peer::Peer;
use crate::server::timers::Timers;
use crate::stats::CloseReason;
use crate::system::{Millis, NEVER, Readiness, Stream};

/// Wake-ups per tick, so that many at once do not delay the events of sockets.
const MAX_WAKES: usize = 128;

/// Timeouts of a worker's connections. Except for `drain`, deadlines are rounded up by at most an eighth of the timeout,
/// so that one wake-up serves many connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    /// A connection is closed when the client has sent nothing, and accepted none of the pending output,
    /// for this long.
    pub(crate) idle: Option<Millis>,
    /// The same for a connection that only sends its last output.
    pub(crate) flush: Millis,
    /// How long to wait for the EOF of a client after the server has shut its write half down.
    pub(crate) linger: Millis,
    /// Time limit of a shutdown. In its second half only data that had arrived before is read.
    pub(crate) drain: Millis,
}

/// `timeout` after `now`, rounded up to a multiple of an eighth of the timeout.
fn deadline_after(now: Millis, timeout: Millis) -> Millis {
    let step = (timeout / 8).max(1);
    let deadline = now.saturating_add(timeout);
    deadline.checked_next_multiple_of(step).unwrap_or(NEVER)
}

#[derive(Debug)]
struct Entry<S, H> {
    connection: Connection<S, H>,
    peer: Peer,
    opened: Millis,
    /// When the connection expires unless it makes progress, or [`NEVER`]. A timer is set for this time or
    /// an earlier one.
    deadline: Millis,
    /// The phase that the deadline belongs to.
    phase: Phase,
    /// The connection is in the run queue.
    queued: bool,
}

impl<S: Stream, H: Handler> Entry<S, H> {
    /// When the handler's timer expires, or [`NEVER`].
    fn handler_timer(&mut self) -> Millis {
        let extras = self.connection.extras_mut();
        extras.map_or(NEVER, |extras| extras.timer)
    }

    /// When to look at the connection next.
    fn next_timer(&mut self) -> Millis {
        self.deadline.min(self.handler_timer())
    }

    /// Records, if the connection has extras, the time for which the caller sets a timer, and returns it.
    fn record_timer(&mut self) -> Millis {
        let at = self.next_timer();
        if let Some(extras) = self.connection.extras_mut() {
            extras.armed = at;
        }
        at
    }
}

/// How far a shutdown has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shutdown {
    NotRequested,
    /// Data that arrives is still read and answered.
    Reading {
        deadline: Millis,
    },
    /// Only data that had arrived before is answered.
    Sending {
        deadline: Millis,
    },
}

#[derive(Debug)]
pub(crate) struct ConnectionTable<S, H> {
    entries: Slab<Entry<S, H>>,
    /// Tokens of runnable connections (see [`Entry::queued`]), and some of connections that were closed.
    run_queue: VecDeque<usize>,
    timers: Timers,
    wakes: WakeReceiver,
    /// The queue of wake-ups may not be empty, although its notification has been handled.
    has_wakes: bool,
    resources: Resources,
    timeouts: Timeouts,
    shutdown: Shutdown,
    /// A connection was closed since the last [`ConnectionTable::take_closed`].
    closed: bool,
    /// The worker's index, for the log.
    worker: usize,
}

impl<S: Stream, H: Handler> ConnectionTable<S, H> {
    pub(crate) fn new(
        timeouts: Timeouts,
        resources: Resources,
        wakes: WakeReceiver,
        worker: usize,
    ) -> Self {
        Self {
            entries: Slab::new(),
            run_queue: VecDeque::new(),
            timers: Timers::default(),
            wakes,
            has_wakes: false,
            resources,
            timeouts,
            shutdown: Shutdown::NotRequested,
            closed: false,
            worker,
        }
    }

    /// How long the worker may sleep; `None` means until the next event.
    pub(crate) fn poll_timeout(&self, now: Millis) -> Option<Millis> {
        if !self.run_queue.is_empty() || self.has_wakes {
            return Some(0);
        }
        let next = self.next_deadline();
        (next != NEVER).then(|| next.saturating_sub(now))
    }

    /// Whether a deadline has passed by `now`.
    pub(crate) fn is_due(&self, now: Millis) -> bool {
        self.next_deadline() <= now
    }

    fn next_deadline(&self) -> Millis {
        let timer = self.timers.next().unwrap_or(NEVER);
        timer.min(self.next_shutdown_step())
    }

    /// When the shutdown stops reading, or ends.
    fn next_shutdown_step(&self) -> Millis {
        match self.shutdown {
            Shutdown::NotRequested => NEVER,
            Shutdown::Reading { deadline } => deadline.saturating_sub(self.timeouts.drain / 2),
            Shutdown::Sending { deadline } => deadline,
        }
    }

    /// Whether a connection was closed since the last call.
    pub(crate) fn take_closed(&mut self) -> bool {
        mem::take(&mut self.closed)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The deadline of a connection, or [`NEVER`]; `None` for an unknown token.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn deadline(&self, token: usize) -> Option<Millis> {
        self.entries.get(token).map(|entry| entry.deadline)
    }

    pub(crate) fn drain_timeout(&self) -> Millis {
        self.timeouts.drain
    }

    pub(crate) fn is_shutting_down(&self) -> bool {
        self.shutdown != Shutdown::NotRequested
    }

    /// Adds a new connection and drives it. `open` registers the stream under the given token and creates
    /// its handler.
    ///
    /// Call this after all events of a batch are handled: the token may have belonged to a connection that
    /// was closed in the batch, and the batch may hold more events for it.
    pub(crate) fn register(
        &mut self,
        mut stream: S,
        peer: Peer,
        now: Millis,
        open: impl FnOnce(&mut S, usize) -> Result<H, CloseReason>,
    ) {
        self.reserve_slot();
        self.resources.tick.counters.assigned.add(1);
        let slot = self.entries.vacant_entry();
        let token = slot.key();
        // Contain panics from the handler factory too.
        let opened = catch_unwind(AssertUnwindSafe(|| open(&mut stream, token)));
        let opened = opened.unwrap_or_else(|panic| {
            dispose(panic);
            Err(CloseReason::Panic)
        });
        let handler = match opened {
            Ok(handler) => handler,
            Err(reason) => {
                log::debug!(target: "echoserver::access", peer:%, worker = self.worker, reason:%; "not opened");
                drop(stream);
                self.count_close(reason);
                return;
            }
        };
        let mut connection = Connection::new(stream, handler);
        match self.shutdown {
            Shutdown::NotRequested => {}
            Shutdown::Reading { .. } => connection.drain(),
            Shutdown::Sending { .. } => {
                connection.drain();
                connection.limit_reading();
            }
        }
        slot.insert(Entry {
            connection,
            peer,
            opened: now,
            deadline: NEVER,
            phase: Phase::Serving,
            queued: false,
        });
        self.set_deadline(token, now);
        self.drive(token, now);
    }

    /// Grows a full table by a quarter; doubling would waste up to half of it.
    fn reserve_slot(&mut self) {
        let len = self.entries.len();
        if len == self.entries.capacity() {
            self.entries.reserve_exact((len / 4).max(64));
        }
    }

    /// Drives the connections that were in the run queue when this was called.
    pub(crate) fn run_queued(&mut self, now: Millis) {
        for _ in 0..self.run_queue.len() {
            let Some(token) = self.run_queue.pop_front() else {
                return;
            };
            // A closed connection leaves its token in the queue.
            if let Some(entry) = self.entries.get_mut(token)
                && mem::take(&mut entry.queued)
            {
                self.drive(token, now);
            }
        }
    }

    /// Adds readiness to a connection and drives it, unless it is in the run queue. An unknown token
    /// belongs to a connection that was closed earlier in this batch.
    #[inline(always)]
    pub(crate) fn on_ready(&mut self, token: usize, readiness: Readiness, now: Millis) {
        let Some(entry) = self.entries.get_mut(token) else {
            return;
        };
        let connection = &mut entry.connection;
        connection.add_readiness(readiness);
        if entry.queued {
            return;
        }
        (self.resources.tick.token, self.resources.tick.now) = (token, now);
        let status = connection.drive(&mut self.resources);
        let moves_deadline = entry.deadline != NEVER && connection.take_progress();
        let has_changed =
            !matches!(status, Status::AwaitingInput) || !matches!(entry.phase, Phase::Serving);
        if moves_deadline || has_changed {
            self.after_drive(token, status, moves_deadline, now);
        }
    }

    /// Marks that connections may have been woken.
    pub(crate) fn on_wake(&mut self) {
        self.has_wakes = true;
    }

    /// Calls the handlers of a bounded number of connections that were woken.
    pub(crate) fn run_wakes(&mut self, now: Millis) {
        if !mem::take(&mut self.has_wakes) {
            return;
        }
        self.wakes.clear_notified();
        for _ in 0..MAX_WAKES {
            let Some(waker) = self.wakes.take() else {
                return;
            };
            let token = waker.token();
            if self
                .entries
                .get(token)
                .is_some_and(|entry| entry.connection.owns(&waker))
            {
                self.call(token, Event::Wake, now);
            }
        }
        self.has_wakes = true;
    }

    /// Has the handler of a connection called, unless it is in the run queue, which calls it in its turn.
    fn call(&mut self, token: usize, event: Event, now: Millis) {
        self.entries[token].connection.request_call(event);
        self.drive(token, now);
    }

    /// Drives a connection without new readiness, unless it is in the run queue.
    fn drive(&mut self, token: usize, now: Millis) {
        self.on_ready(token, Readiness::default(), now);
    }

    /// Drives all connections that are not in the run queue.
    fn drive_all(&mut self, now: Millis) {
        let tokens: Vec<_> = self.entries.iter().map(|(token, _)| token).collect();
        for token in tokens {
            self.drive(token, now);
        }
    }

    /// Acts on the status, the phase and the progress of a connection that was driven.
    fn after_drive(&mut self, token: usize, status: Status, moves_deadline: bool, now: Millis) {
        let entry = &mut self.entries[token];
        match status {
            Status::AwaitingInput | Status::Idle => {}
            Status::Runnable => {
                self.resources.tick.counters.yields.add(1);
                entry.queued = true;
                self.run_queue.push_back(token);
            }
            Status::Closed(reason) => return self.close(token, reason, now),
        }
        let phase = entry.connection.phase();
        if phase != entry.phase {
            entry.phase = phase;
            return self.set_deadline(token, now);
        }
        // A client that keeps sending could extend the wait for its EOF without end. In a shutdown, the deadline of the
        // shutdown prevents that.
        let is_extensible = match phase {
            Phase::Serving | Phase::Waiting | Phase::Flushing => true,
            Phase::Lingering(_) => self.is_shutting_down(),
            Phase::Refusing => false,
        };
        if moves_deadline && is_extensible {
            let deadline = self.deadline_of(phase, now);
            self.entries[token].deadline = deadline;
        }
        if self.entries[token].connection.extras_mut().is_some() {
            self.arm(token);
        }
    }

    /// Sets the deadline of a connection's phase, and a timer.
    fn set_deadline(&mut self, token: usize, now: Millis) {
        let deadline = self.deadline_of(self.entries[token].phase, now);
        let entry = &mut self.entries[token];
        entry.deadline = deadline;
        // Progress up to now does not extend this deadline.
        entry.connection.take_progress();
        self.arm(token);
    }

    /// Sets a timer for the earlier of a connection's deadline and its handler's timer, unless its extras record one
    /// that is at least as early.
    fn arm(&mut self, token: usize) {
        let entry = &mut self.entries[token];
        let extras = entry.connection.extras_mut();
        let armed = extras.map_or(NEVER, |extras| extras.armed);
        if entry.next_timer() < armed {
            self.timers.set(entry.record_timer(), token);
        }
        if self.timers.needs_rebuild(self.entries.len()) {
            let entries = self.entries.iter_mut();
            self.timers
                .rebuild(entries.map(|(token, entry)| (entry.record_timer(), token)));
        }
    }

    /// The deadline of a connection that enters `phase` or makes progress in it.
    fn deadline_of(&self, phase: Phase, now: Millis) -> Millis {
        let timeout = match phase {
            Phase::Lingering(_) => Some(self.timeouts.linger),
            Phase::Serving | Phase::Flushing if self.is_shutting_down() => None,
            Phase::Waiting => None,
            Phase::Serving => self.timeouts.idle,
            Phase::Flushing => Some(self.timeouts.flush),
            // Long enough for a client to send what a closed window has held back.
            Phase::Refusing => Some(self.timeouts.linger.min(self.timeouts.drain / 8)),
        };
        timeout.map_or(NEVER, |timeout| deadline_after(now, timeout))
    }

    /// Closes the connections whose deadline has passed, and advances a shutdown.
    ///
    /// Call this only after all events up to `now` were handled: a connection is idle only if the kernel
    /// has nothing to report about it.
    pub(crate) fn expire(&mut self, now: Millis) {
        while let Some(token) = self.timers.pop_expired(now) {
            self.on_timer(token, now);
        }
        if let Shutdown::Reading { deadline } = self.shutdown
            && self.next_shutdown_step() <= now
        {
            self.shutdown = Shutdown::Sending { deadline };
            self.limit_reading(now);
        }
        if self.next_shutdown_step() <= now {
            self.close_all(now);
        }
    }

    /// Looks at a connection whose timer has expired: its handler's timer, its deadline, both or neither.
    fn on_timer(&mut self, token: usize, now: Millis) {
        let Some(entry) = self.entries.get_mut(token) else {
            return;
        };
        if let Some(extras) = entry.connection.extras_mut() {
            if extras.armed > now {
                // An older one; the current one is still to come.
                return;
            }
            extras.armed = NEVER;
        }
        if entry.handler_timer() <= now {
            self.call(token, Event::Timer, now);
        }
        let Some(entry) = self.entries.get(token) else {
            return;
        };
        match entry.deadline <= now {
            true => self.expire_one(token, now),
            false => self.arm(token),
        }
    }

    /// Handles a deadline that has passed. A connection with empty buffers is closed cleanly. One with buffered bytes gets
    /// one more write: if that makes progress, the deadline is extended; otherwise the connection is reset, because
    /// bytes are lost.
    fn expire_one(&mut self, token: usize, now: Millis) {
        let entry = &mut self.entries[token];
        match entry.phase {
            Phase::Lingering(reason) => return self.close(token, reason, now),
            Phase::Refusing => {
                entry.connection.close_after_flush(CloseReason::Shutdown);
                return self.drive(token, now);
            }
            Phase::Serving | Phase::Waiting | Phase::Flushing => {}
        }
        // A connection in the run queue can make progress.
        if !entry.queued && entry.connection.buffered() == 0 {
            entry.connection.close_after_flush(CloseReason::IdleTimeout);
            return self.drive(token, now);
        }
        // The kernel announces room in large steps only, so try once more.
        let writable = Readiness {
            writable: true,
            ..Readiness::default()
        };
        self.on_ready(token, writable, now);
        let Some(entry) = self.entries.get(token) else {
            return;
        };
        match entry.queued || entry.deadline > now {
            true => self.set_deadline(token, now),
            false => self.close(token, CloseReason::IdleTimeout, now),
        }
    }

    fn close(&mut self, token: usize, reason: CloseReason, now: Millis) {
        let Entry {
            mut connection,
            peer,
            opened,
            ..
        } = self.entries.remove(token);
        let counters = &self.resources.tick.counters;
        let discarded = connection.abort_if_incomplete();
        counters.buffered.adjust(discarded, 0);
        counters.discarded[reason as usize].add(discarded as u64);
        log::debug!(
            target: "echoserver::access",
            peer:%, worker = self.worker, ms = now.saturating_sub(opened),
            bytes_in = connection.bytes_in(), bytes_out = connection.bytes_out(), reason:%;
            "closed"
        );
        // Dropping the handler runs user code. The panic hook has already reported a panic.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(connection))) {
            dispose(panic);
        }
        self.count_close(reason);
    }

    /// Counted last, so that the descriptor is closed before the count is visible.
    fn count_close(&mut self, reason: CloseReason) {
        self.resources.tick.counters.closed[reason as usize].add(1);
        self.closed = true;
    }

    /// Answers the data that has arrived, then closes every connection, those that arrive later included.
    /// Those that are not done at `deadline` are closed then, with a reset if their buffers hold bytes or an answer is
    /// still to come.
    ///
    /// A further call can only move the deadline to an earlier time.
    pub(crate) fn shut_down(&mut self, deadline: Millis, now: Millis) {
        if let Shutdown::Reading { deadline: current } | Shutdown::Sending { deadline: current } =
            &mut self.shutdown
        {
            *current = deadline.min(*current);
            return;
        }
        self.shutdown = Shutdown::Reading { deadline };
        for (_, entry) in &mut self.entries {
            entry.connection.drain();
            if !matches!(entry.phase, Phase::Lingering(_)) {
                entry.deadline = NEVER;
            }
        }
        self.drive_all(now);
    }

    /// Limits reading to data that has arrived: some clients send without end.
    fn limit_reading(&mut self, now: Millis) {
        for (_, entry) in &mut self.entries {
            entry.connection.limit_reading();
        }
        self.drive_all(now);
    }

    /// Closes every connection at the deadline of a shutdown.
    fn close_all(&mut self, now: Millis) {
        let open = self.entries.iter();
        let open: Vec<_> = open.map(|(token, entry)| (token, entry.phase)).collect();
        for (token, phase) in open {
            let reason = match phase {
                Phase::Lingering(reason) => reason,
                Phase::Serving | Phase::Waiting | Phase::Refusing | Phase::Flushing => {
                    CloseReason::DrainTimeout
                }
            };
            self.close(token, reason, now);
        }
    }
}

#[cfg(test)]
mod tests;
