//! The promises of the server, as checks of the kernel's state.

use super::connection::{Close, ClosePolicy, ReadPolicy, Refusal, SimConnection};
use super::kernel::{ACCEPTOR, Kernel, Poller, TickPhase};
use crate::connection::handler::Action;
use crate::server::table::Inspection;
use crate::stats::{CloseReason, Counter};
use crate::system::{Millis, NEVER};

/// New connections per tick: of a worker, and of the acceptor outside a shutdown.
const MAX_NEW_CONNECTIONS: usize = 128;

/// Calls of handlers for a wake-up per tick of a worker, apart from those in the run queue.
const MAX_WAKES: usize = 128;

impl Kernel<'_> {
    /// Whether another connection can get a descriptor.
    pub(super) fn has_descriptor(&self) -> bool {
        self.descriptors + self.foreign_descriptors < self.parameters.max_descriptors
    }

    /// Whether the deadline of a shutdown has passed.
    pub(super) fn has_expired(&self, now: Millis) -> bool {
        self.shutdown
            .is_some_and(|shutdown| shutdown.deadline <= now)
    }

    /// The number of connections that the workers have taken over and not closed.
    fn assigned_and_open(&self) -> u64 {
        let workers = self.counters.workers.iter();
        workers
            .map(|worker| worker.assigned.get() - worker.closed())
            .sum()
    }

    /// Accepted connections that no worker has taken over.
    fn unassigned(&self) -> u64 {
        let workers = self.counters.workers.iter();
        let assigned: u64 = workers.map(|worker| worker.assigned.get()).sum();
        let acceptor = &self.counters.acceptor;
        acceptor.accepted.get() - acceptor.expired.get() - assigned
    }

    /// Checks the connection limit when a worker takes over a connection.
    pub(super) fn check_limit(&mut self) {
        let (open, max) = (
            self.assigned_and_open(),
            self.parameters.max_connections as u64,
        );
        self.check(open <= max, || {
            format!("{open} connections are open, {max} are allowed")
        });
    }

    /// Checks the number that a new connection has.
    pub(super) fn check_number(&mut self, id: usize, number: u64) {
        let due = self.connections[id].number;
        self.check(number == due, || {
            format!("connection {id} has number {number}, and was accepted as number {due}")
        });
    }

    /// Checks what must hold after a tick of the acceptor.
    pub(super) fn check_acceptor_tick(&mut self) {
        let accepts = self.pollers[ACCEPTOR].new_connections;
        let is_bounded = accepts <= MAX_NEW_CONNECTIONS || self.shutdown.is_some();
        self.check(is_bounded, || format!("{accepts} accepts in one tick"));
    }

    /// Checks what must hold after each tick of a worker, which owed `share` bulk turns, and whose table sees each
    /// connection as `inspect` returns.
    pub(super) fn check_worker_tick(
        &mut self,
        thread: usize,
        share: usize,
        inspect: impl Fn(usize) -> Option<Inspection>,
    ) {
        self.check_last_close(thread);
        let poller = &mut self.pollers[thread];
        poller.draining |= poller.sees_shutdown;
        if poller.draining
            && let Some(shutdown) = self.shutdown
            && poller.now >= self.parameters.end_of_reading(shutdown)
        {
            poller.stopped_reading.get_or_insert(poller.now);
        }
        let has_share = self.check_counts(thread, share);
        let may_sleep = !self.is_ready(thread);
        let mut open = 0;
        for id in 0..self.connections.len() {
            let connection = &self.connections[id];
            let here = connection.registered.filter(|(of, _)| *of == thread);
            let Some((_, token)) = here.filter(|_| connection.is_open()) else {
                continue;
            };
            open += 1;
            let Some(inspection) = inspect(token) else {
                return self.fail(format!("connection {id} is not in the table of its worker"));
            };
            self.check_turn(thread, id, inspection, has_share);
            self.check_told(thread, id);
            self.check_deadline(thread, id, inspection.deadline);
            self.check_timer(thread, id);
            if may_sleep {
                self.check_idle(thread, id);
            }
        }
        let buffered = self.counters.workers[thread - 1].buffered.get();
        let bound = (open * 2 * self.parameters.buffer_size) as u64;
        self.check(buffered <= bound, || {
            format!("{buffered} bytes are buffered for {open} connections, more than {bound}")
        });
        let holders = self
            .holders(thread)
            .filter(|holder| !holder.has_panicked && holder.held() > 0);
        let (holders, max) = (holders.count(), self.parameters.max_pairs);
        self.check(holders < max, || {
            format!("{holders} connections hold bytes, and the worker has {max} pairs of buffers")
        });
    }

    /// Checks what a worker has counted in a tick with at most `share` bulk turns. Returns whether it has had fewer.
    fn check_counts(&mut self, thread: usize, share: usize) -> bool {
        let workers = self.counters.workers.iter();
        let (mut bytes_in, mut bytes_out) = (0, 0);
        for worker in workers {
            bytes_in += worker.bytes_in.get();
            bytes_out += worker.bytes_out.get();
        }
        let (read, written) = (self.bytes_read, self.bytes_written);
        self.check((bytes_in, bytes_out) == (read, written), || {
            format!(
                "{read} bytes were read and {written} written, but {bytes_in} and {bytes_out} counted"
            )
        });
        let new = self.pollers[thread].new_connections;
        self.check(new <= MAX_NEW_CONNECTIONS, || {
            format!("{new} connections were taken over in one tick")
        });
        let wakes = self.pollers[thread].wakes;
        self.check(wakes <= MAX_WAKES, || {
            format!("{wakes} handlers were woken in one tick")
        });
        let bulk_turns = self.counters.workers[thread - 1].bulk_turns.get();
        let bulk_turns = bulk_turns - self.pollers[thread].bulk_turns_before;
        let share = share as u64;
        self.check(bulk_turns <= share, || {
            format!("{bulk_turns} bulk turns in one tick, at most {share} are its share")
        });
        bulk_turns < share
    }

    /// Checks the equations of the counters. No thread is in a tick.
    pub(super) fn check_balance(&mut self) {
        if self.unassigned() == 0
            && let Some(imbalance) = self.counters.snapshot().check_balance()
        {
            self.fail(imbalance);
        }
    }

    /// Checks the class of a connection after a tick, and that it waits in the run queue only for a reason.
    fn check_turn(&mut self, thread: usize, id: usize, inspection: Inspection, has_share: bool) {
        let tick = self.pollers[thread].ticks;
        let connection = &mut self.connections[id];
        connection.is_bulk = inspection.is_bulk;
        connection.is_queued = inspection.is_queued;
        if !connection.is_queued {
            connection.waits_behind.clear();
        }
        let had_turn = connection.bulk_turn_tick == tick;
        let is_lost = connection.is_unserved && !connection.is_queued;
        let is_passed_over = connection.is_queued && !had_turn && has_share;
        // One in the run queue can have more to do for another reason.
        let is_forgotten =
            connection.is_yielding() && connection.is_waiting() && !connection.is_queued;
        self.check(!is_forgotten, || {
            format!("connection {id} has work left and does not wait for its turn")
        });
        let connection = &self.connections[id];
        let is_demoted = connection.is_bulk && !connection.is_queued && !connection.moved_much;
        self.check(!is_lost, || {
            format!("connection {id} has input and neither was served nor waits for its turn")
        });
        self.check(!is_passed_over, || {
            format!("connection {id} waits for its turn, and the tick did not use its share")
        });
        self.check(!is_demoted, || {
            format!("connection {id} is bulk, and its last turn has moved little")
        });
    }

    /// Checks that the handler was called for a shutdown that has begun, or is called in the next turn.
    fn check_told(&mut self, thread: usize, id: usize) {
        let draining = self.pollers[thread].draining;
        let connection = &self.connections[id];
        let is_told =
            connection.shutdown_at.is_some() || connection.is_queued || !connection.calls_handler();
        self.check(is_told || !draining, || {
            format!("the handler of connection {id} was not called for the shutdown")
        });
    }

    /// Checks that the handler is called when its timer expires, and that its worker does not sleep beyond it.
    fn check_timer(&mut self, thread: usize, id: usize) {
        let poller = &self.pollers[thread];
        let connection = &self.connections[id];
        let Some(timer) = connection.timer.filter(|_| connection.calls_handler()) else {
            return;
        };
        let had_turn = connection.bulk_turn_tick == poller.ticks;
        // A connection in the run queue is called in its next turn, or refuses input then.
        let called = poller.now < timer || connection.is_queued || had_turn;
        let at = timer + poller.tick_length;
        let is_armed = self.is_ready(thread) || poller.wake_at.is_some_and(|wake_at| wake_at <= at);
        self.check(called && is_armed, || {
            format!("the timer of connection {id}, {timer} ms, has not called its handler")
        });
    }

    /// Checks what must hold for a connection when its worker would sleep until the next event.
    fn check_idle(&mut self, thread: usize, id: usize) {
        let draining = self.pollers[thread].draining;
        let connection = &self.connections[id];
        let is_called = !connection.is_woken || !connection.calls_handler();
        self.check(is_called, || {
            format!("connection {id} was woken, and its handler was not called")
        });
        let connection = &self.connections[id];
        if connection.blocked || connection.is_pending() || connection.is_yielding() {
            return;
        }
        if connection.is_readable() {
            let eof = connection.half_closed || connection.reset_by_client;
            let message = format!(
                "connection {id} is stalled: {} unread bytes{}, and no event is pending",
                connection.unread(),
                if eof { " and EOF" } else { "" }
            );
            self.fail(message);
        } else if draining && connection.write_shutdown.is_none() && connection.refusal.is_none() {
            self.fail(format!(
                "connection {id} is stalled: nothing is left to do, and the drain has not closed it"
            ));
        } else if connection.write_shutdown.is_none() {
            let due = self.output_of(connection, connection.answered_input());
            let written = connection.written;
            self.check(written == due, || {
                format!("connection {id} is stalled: {written} of {due} bytes of output written")
            });
        }
    }

    /// Returns how many bytes the model answers to the first `read` bytes of a client.
    fn output_of(&self, connection: &SimConnection, read: usize) -> usize {
        if connection.has_panicked {
            return connection.appended;
        }
        let will_end = connection.close_policy == ClosePolicy::HalfClose;
        match read == connection.input.len() && connection.ended == will_end {
            true => connection.expected.len(),
            false => (self.model)(connection.seen(read, connection.ended)).len(),
        }
    }

    /// Checks what must hold while every thread sleeps: no connection waits although there is capacity.
    pub(super) fn check_rest(&mut self) {
        let open = self.assigned_and_open();
        let is_full = open >= self.parameters.max_connections as u64;
        let waiting = self.unassigned();
        if waiting > 0 && (self.shutdown.is_none() || !is_full) {
            self.fail(format!(
                "{waiting} accepted connections wait, {open} are open, and every thread sleeps"
            ));
        }
        let backlog: usize = self
            .listeners
            .iter()
            .map(|listener| listener.waiting.len())
            .sum();
        let has_timer = self.pollers[ACCEPTOR].wake_at.is_some();
        if backlog > 0 && !is_full && !has_timer {
            self.fail(format!(
                "{backlog} clients wait in the backlog, {open} are open, and every thread sleeps"
            ));
        }
    }

    /// Checks what must hold when all clients have done everything and the server is at rest.
    pub(super) fn check_complete(&mut self) {
        for id in 0..self.connections.len() {
            let connection = &self.connections[id];
            let timed_out =
                connection.write_shutdown.is_some() && connection.close_requested.is_none();
            if connection.read_policy == ReadPolicy::Never
                || !connection.accepted
                || !connection.is_clean()
                || timed_out
            {
                continue;
            }
            let due = self.output_of(connection, connection.arrived);
            let (received, arrived) = (connection.received, connection.arrived);
            let len = connection.input.len();
            let still_open = connection.is_open() && connection.half_closed;
            self.check(received == due && arrived == len, || {
                format!(
                    "client {id} sent {arrived} of {len} bytes and received {received} of {due}"
                )
            });
            self.check(!still_open, || {
                format!("client {id} closed its side, and the connection is still open")
            });
        }
    }

    /// Checks that no thread sleeps after the deadline of a shutdown. A tick that lasted beyond the
    /// deadline can delay the next one by as much.
    pub(super) fn check_expired(&mut self) {
        let deadline = self.shutdown.map_or(0, |shutdown| shutdown.deadline);
        let sleeps = |poller: &Poller| {
            let at = deadline + poller.tick_length;
            !poller.ended && poller.wake_at.is_none_or(|wake_at| wake_at > at)
        };
        if let Some(thread) = self.pollers.iter().position(sleeps) {
            self.fail(format!(
                "thread {thread} sleeps after the deadline of the shutdown, {deadline} ms"
            ));
        }
    }

    /// Checks what must hold after all threads have ended.
    pub(super) fn check_ended(&mut self) {
        let open = self.descriptors;
        self.check(open == 0, || {
            format!("{open} connections are open after the server has ended")
        });
        if let Some(imbalance) = self.counters.snapshot().check_final_balance() {
            self.fail(imbalance);
        }
    }

    /// Closes a listener. The clients that wait are reset; those that had connected before the shutdown
    /// must have been accepted.
    pub(super) fn close_listener(&mut self, index: usize) {
        self.record(|| format!("listener {index} is closed"));
        self.listeners[index].open = false;
        let expired = self.has_expired(self.pollers[ACCEPTOR].now);
        let sequence = self.shutdown.map_or(u64::MAX, |shutdown| shutdown.sequence);
        for id in std::mem::take(&mut self.listeners[index].waiting) {
            let connection = &mut self.connections[id];
            connection.reset_by_server = true;
            let was_there = connection.connected <= sequence;
            self.check(!was_there || expired, || {
                format!("client {id} was waiting when the shutdown began, and was not accepted")
            });
        }
    }

    /// Checks that only data that had arrived before the last quarter of a shutdown is answered in it. What is
    /// read after that is refused, once everything before it is answered and delivered. A read that looks for the EOF,
    /// after none was unread, can return data that has just arrived.
    pub(super) fn check_reading(&mut self, id: usize, count: usize, looks_for_eof: bool) {
        let poller = &self.pollers[self.current];
        // In the tick that stops reading, the run queue comes after that.
        let stops_now = poller.tick_phase == TickPhase::RunQueue
            && poller.sees_shutdown
            && (self.shutdown)
                .is_some_and(|shutdown| poller.now >= self.parameters.end_of_reading(shutdown));
        let is_last_quarter = poller.stopped_reading.is_some() || stops_now;
        let connection = &self.connections[id];
        let read = connection.read - count;
        if !is_last_quarter
            || connection.write_shutdown.is_some()
            || connection.refusal.is_some()
            || (looks_for_eof && connection.read_limit == Some(read))
            || connection.read_limit.is_none_or(|limit| read < limit)
        {
            return;
        }
        let due = self.output_of(connection, read);
        let is_answered = connection.acknowledged == due || connection.reset_by_client;
        self.connections[id].refusal = Some(Refusal { read });
        self.check(is_answered, || {
            format!("connection {id} is read from in the last quarter of a shutdown")
        });
    }

    /// Checks that the client has acknowledged all output before the server ends its half in a shutdown.
    pub(super) fn check_delivered(&mut self, id: usize) {
        let connection = &self.connections[id];
        let is_delivered = connection.acknowledged == connection.written;
        let must_be = self.pollers[self.current].draining && !connection.reset_by_client;
        self.check(is_delivered || !must_be, || {
            format!("connection {id} ends in a shutdown before its output is delivered")
        });
    }

    /// Checks that the server has read an EOF that had arrived in time before it ends its half in a shutdown.
    pub(super) fn check_eof(&mut self, id: usize) {
        let connection = &self.connections[id];
        let is_ignored = connection.ended_in_time && !connection.eof_reported;
        let may_be = connection.close_requested.is_some();
        self.check(!is_ignored || may_be, || {
            format!("connection {id} ends in a shutdown, and the EOF of its client was not read")
        });
    }

    /// Determines the reason counted for the stream that the thread has dropped last, and checks it.
    pub(super) fn check_last_close(&mut self, thread: usize) {
        let dropped = self.pollers[thread].uncounted_drop.take();
        if thread == ACCEPTOR {
            return self.check_refused(dropped);
        }
        let counted = &self.counters.workers[thread - 1].closed;
        let counted = counted.each_ref().map(Counter::get);
        let closed = &mut self.pollers[thread].closed;
        let mut reasons = [CloseReason::Error; 2];
        let mut count = 0;
        for &reason in CloseReason::ALL {
            for _ in closed[reason as usize]..counted[reason as usize] {
                reasons[count.min(1)] = reason;
                count += 1;
            }
        }
        *closed = counted;
        if count != usize::from(dropped.is_some()) {
            return self.fail(format!(
                "{count} closes were counted since the last check; dropped connection: {dropped:?}"
            ));
        }
        let Some(id) = dropped else { return };
        let reason = reasons[0];
        self.record(|| format!("connection {id} was closed: {reason}"));
        self.connections[id].close_reason = Some(reason);
        let connection = &self.connections[id];
        if let Some(close) = connection.close
            && let Err(problem) = self.check_close(thread, connection, close, reason)
        {
            self.fail(format!(
                "connection {id} was closed ({reason}), but {problem}"
            ));
        }
    }

    /// Checks a connection that the acceptor has dropped.
    fn check_refused(&mut self, dropped: Option<usize>) {
        let Some(id) = dropped else { return };
        let expired = self.has_expired(self.pollers[ACCEPTOR].now);
        let was_reset = self.connections[id].abort_requested;
        self.check(expired && was_reset, || {
            format!(
                "the acceptor dropped client {id}; expired: {expired}, with a reset: {was_reset}"
            )
        });
    }

    /// Checks that a connection was closed for a valid `reason`, and with complete output.
    fn check_close(
        &self,
        thread: usize,
        connection: &SimConnection,
        close: Close,
        reason: CloseReason,
    ) -> Result<(), String> {
        let read = connection.answered_input();
        let (due, written) = (self.output_of(connection, read), connection.written);
        let aborted = connection.abort_requested;
        let ended = connection.eof_reported || connection.write_shutdown.is_some();
        let was_served = !connection.registration_failed && !connection.reset_by_client;
        if was_served && (!close.reset || (ended && !aborted)) {
            let problem = format!("{written} of {due} bytes of output were written");
            require(written == due, problem)?;
        }
        let was_refused = connection.refusal.is_some() && connection.write_shutdown.is_none();
        if was_refused && connection.eof_reported {
            require(aborted, "its stream was cut without a reset")?;
        }
        if aborted {
            let may_abort = matches!(
                reason,
                CloseReason::HandlerReset
                    | CloseReason::IdleTimeout
                    | CloseReason::DrainTimeout
                    | CloseReason::OutOfMemory
                    | CloseReason::BufferMemory
                    | CloseReason::AnswerTimeout
            );
            require(may_abort || connection.reset_by_client, "it was reset")?;
        }
        self.check_reason(thread, connection, close, reason)
    }

    /// Checks that there was this `reason` for a close.
    fn check_reason(
        &self,
        thread: usize,
        connection: &SimConnection,
        close: Close,
        reason: CloseReason,
    ) -> Result<(), String> {
        let draining = self.pollers[thread].draining;
        let aborted = connection.abort_requested;
        let is_over = close.deadline <= close.at;
        match reason {
            CloseReason::PeerClosed => {
                let is_delivered = connection.acknowledged == connection.written;
                let waits = draining && !connection.reset_by_client;
                require(connection.eof_reported, "no EOF was read")?;
                require(is_delivered || !waits, "its output was not delivered")
            }
            CloseReason::HandlerReset => {
                let requested = connection.action == Some(Action::Reset);
                require(requested && aborted, "the handler did not request it")
            }
            CloseReason::Handler | CloseReason::Panic => {
                let requested = connection.close_requested.is_some();
                require(requested, "the handler did not request it")?;
                let has_panicked = reason == CloseReason::Panic;
                let problem = "the reason is not that of the handler";
                require(connection.has_panicked == has_panicked, problem)?;
                self.check_lingered(connection, close)
            }
            CloseReason::Shutdown => self.check_drained(connection, close),
            CloseReason::IdleTimeout => self.check_timeout(draining, connection, close),
            CloseReason::AnswerTimeout => {
                let waited = connection.action == Some(Action::Pending)
                    && connection.written == connection.appended;
                require(waited && aborted && !draining, "no answer was to come")?;
                require(is_over, "the answer was not awaited for the whole timeout")
            }
            CloseReason::DrainTimeout => {
                let was_refused =
                    connection.refusal.is_some() && connection.write_shutdown.is_none();
                let cut = was_refused && connection.eof_reported;
                let valid = cut || self.has_expired(close.at);
                require(valid, "the shutdown had not expired")
            }
            CloseReason::Reset => require(connection.reset_reported, "the client did not reset it"),
            CloseReason::OutOfMemory => {
                let can_fail = self.parameters.lacks_memory && aborted;
                require(can_fail, "no allocation failed")?;
                close.victim.map_err(str::to_owned)
            }
            CloseReason::BufferMemory => {
                let is_full = close.holders >= self.parameters.max_pairs;
                require(is_full && aborted, "there were buffers left")?;
                close.victim.map_err(str::to_owned)
            }
            CloseReason::Error => require(connection.registration_failed, "no call failed"),
            CloseReason::BufferFull => Err("no message or answer exceeds the buffer".to_owned()),
        }
    }

    /// The connections of a worker whose buffers can hold bytes. How much a handler has consumed before it has panicked is
    /// not known.
    pub(super) fn holders(&self, thread: usize) -> impl Iterator<Item = &SimConnection> {
        let here = move |connection: &&SimConnection| {
            connection.registered.is_some_and(|(of, _)| of == thread) && connection.is_open()
        };
        let open = self.connections.iter().filter(here);
        open.filter(|connection| connection.may_hold())
    }

    /// Returns whether a connection is the one to be closed where buffers are lacking: the one that has been stuck longest, or
    /// else the one that needs them. What is wrong otherwise.
    pub(super) fn check_victim(&self, thread: usize, id: usize) -> Result<(), &'static str> {
        let poller = &self.pollers[thread];
        let stuck_at = |holder: &SimConnection| holder.quiet_since + self.parameters.timeouts.stuck;
        let certain = self
            .holders(thread)
            .filter(|holder| !holder.has_panicked && holder.held() > 0);
        let first = certain.map(stuck_at).min().unwrap_or(NEVER);
        let own = stuck_at(&self.connections[id]);
        let is_in_need = poller.turn.is_some_and(|turn| turn.id == id);
        match own <= poller.now {
            true if own > first => Err("another was stuck for longer"),
            false if !is_in_need => Err("it was neither stuck nor in need"),
            false if first <= poller.now => Err("another was stuck"),
            _ => Ok(()),
        }
    }

    /// Checks that the client's EOF was awaited.
    fn check_lingered(&self, connection: &SimConnection, close: Close) -> Result<(), String> {
        if connection.eof_reported || self.has_expired(close.at) {
            return Ok(());
        }
        let Some(shutdown) = connection.write_shutdown else {
            return Err("its write side was not shut down first".to_owned());
        };
        let time = close.at - shutdown.at;
        let is_over = close.deadline <= close.at;
        require(is_over, format!("it lingered for {time} ms only"))
    }

    /// Checks that a shutdown has read what had arrived.
    fn check_drained(&self, connection: &SimConnection, close: Close) -> Result<(), String> {
        let (Some(request), Some(shutdown)) = (self.shutdown, connection.write_shutdown) else {
            return Err("it was not drained".to_owned());
        };
        if shutdown.at < self.parameters.end_of_reading(request) {
            let read_all = shutdown.read >= connection.arrived_before_drain;
            require(read_all, "not all input before the shutdown was read")?;
            let problem = "input that an event had reported was not read";
            require(!shutdown.ignored_event, problem)?;
            let problem = "input that had arrived before was not read";
            require(!shutdown.ignored_input, problem)?;
        }
        self.check_lingered(connection, close)
    }

    /// Checks that a connection was idle for the whole timeout, and that the kernel knew of nothing to do.
    fn check_timeout(
        &self,
        draining: bool,
        connection: &SimConnection,
        close: Close,
    ) -> Result<(), String> {
        let problem = "it was not idle for the whole timeout";
        if let Some(shutdown) = connection.write_shutdown {
            require(shutdown.deadline <= shutdown.at, problem)?;
            require(!shutdown.had_input, "input had arrived before the poll")?;
            return self.check_lingered(connection, close);
        }
        require(!draining, "a shutdown has a deadline of its own")?;
        require(close.deadline <= close.at, problem)?;
        let due = self.output_of(connection, connection.read);
        match connection.written < due {
            true => require(!close.had_room, "the kernel had room before the poll"),
            false => require(!close.had_input, "input had arrived before the poll"),
        }
    }
}

fn require(condition: bool, problem: impl Into<String>) -> Result<(), String> {
    match condition {
        true => Ok(()),
        false => Err(problem.into()),
    }
}

#[cfg(test)]
pub(super) mod tests;
