//! A worker's connections: the connection table, the run queue and the deadlines.
//!
//! This is all of a worker except its thread and its poll. Time, readiness and new streams are arguments,
//! so a simulated kernel can drive exactly the code that serves sockets.
//!
//! What happens to an interactive connection is handled at once; what happens to a bulk connection puts it into the run
//! queue, of which each tick serves a share after everything else: see [`Turns`](crate::connection::shared::Turns). So a
//! small message waits for the other small ones of its tick and for a few bulk turns, however many connections flood, and
//! each bulk connection gets its turn in order. While the run queue is not empty, the worker must not sleep.
//!
//! A connection has one [deadline](Connection::deadline). Progress moves it without touching the [timers](Timers), so
//! nothing is scheduled per message. A handler's timer is independent of the deadline; one timer is set, for the
//! earlier of the two.

use std::collections::VecDeque;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};

use slab::Slab;

use crate::connection::handler::Handler;
use crate::connection::shared::{Drain, Shared};
use crate::connection::waker::WakeReceiver;
use crate::connection::{Connection, Resources, State, Status};
use crate::error::dispose;
use crate::peer::Peer;
use crate::server::timers::Timers;
use crate::stats::{CloseReason, WorkerCounters};
use crate::system::{Millis, NEVER, Readiness, Stream};

/// Wake-ups per tick, so that many at once do not delay the events of sockets. Those that send more than a bulk turn together
/// are fewer.
const MAX_WAKES: usize = 128;

#[derive(Debug)]
struct Entry<S, H> {
    connection: Connection<S, H>,
    peer: Peer,
    opened: Millis,
    /// When to look at the connection next: a timer is set for this time, which is not later than the deadline and the
    /// handler's timer. [`NEVER`] without a timer: there is neither, or the timer has just expired and the next one is not set
    /// yet. Superseded timers, also those of an earlier connection with
    /// this token, may still be set, and do nothing.
    armed: Millis,
    /// The last turn has moved much, or ended [`Status::Runnable`].
    bulk: bool,
    /// It counts as lingering.
    lingers: bool,
    /// The connection is among the [holders](ConnectionTable::holders).
    is_listed: bool,
    /// The number of its place in the run queue; 0 if it has none, as every interactive connection. Places with another number are void.
    ticket: u32,
}

/// A connection as its table sees it.
#[cfg(any(test, feature = "testing"))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inspection {
    /// Or [`NEVER`].
    pub(crate) deadline: Millis,
    pub(crate) is_bulk: bool,
    /// It is in the run queue.
    pub(crate) is_queued: bool,
}

impl<S: Stream, H: Handler> Entry<S, H> {
    /// Drives the connection. Returns its status if the table must act on it. `None`: the connection is idle, and the timer
    /// that is set is early enough, because it was plain before, so its deadline has only moved to a later time.
    #[inline(always)]
    fn drive(&mut self, token: usize, resources: &mut Resources) -> Option<Status> {
        resources.shared.token = token;
        let (before, was_bulk) = (self.connection.transferred(), self.bulk);
        let was_plain = self.connection.is_plain();
        let status = self.connection.drive(resources);
        let moved = self.connection.transferred() - before;
        let bulk = moved >= resources.shared.turns.bulk_bytes;
        if bulk != was_bulk {
            self.set_bulk(bulk, &resources.shared.counters);
        }
        let needs_no_timer = resources.shared.timeouts.idle.is_none() || self.armed != NEVER;
        let stays_plain = was_plain && self.connection.is_plain();
        let needs_nothing = status == Status::Idle && stays_plain && needs_no_timer;
        (!needs_nothing || resources.pool.is_empty()).then_some(status)
    }

    #[cold]
    fn set_bulk(&mut self, bulk: bool, counters: &WorkerCounters) {
        let before = mem::replace(&mut self.bulk, bulk);
        counters.bulk.adjust(before.into(), bulk.into());
    }
}

#[derive(Debug)]
pub(crate) struct ConnectionTable<S, H> {
    entries: Slab<Entry<S, H>>,
    /// Tokens and tickets of bulk connections that are ready: their places in the queue. Those of connections that were closed
    /// or driven since are void.
    run_queue: VecDeque<(usize, u32)>,
    /// The ticket that was given last.
    last_ticket: u32,
    /// Turns of interactive connections in this tick.
    interactive_turns: usize,
    timers: Timers,
    /// The connections that hold buffers, and others that have held some: each with the time from which on it is
    /// [stuck](crate::connection::shared::Timeouts::stuck), or an earlier one.
    holders: Timers,
    wake_receiver: WakeReceiver,
    /// The queue may hold wake-ups: the worker was woken, for whatever reason, or has not taken all.
    has_wakes: bool,
    resources: Resources,
    /// Connections that were closed since the last [`ConnectionTable::take_closed`].
    closed: u64,
    /// The worker's index, for the log.
    worker: usize,
}

impl<S: Stream, H: Handler> ConnectionTable<S, H> {
    pub(crate) fn new(resources: Resources, wake_receiver: WakeReceiver, worker: usize) -> Self {
        Self {
            entries: Slab::new(),
            run_queue: VecDeque::new(),
            last_ticket: 0,
            interactive_turns: 0,
            timers: Timers::default(),
            holders: Timers::default(),
            wake_receiver,
            has_wakes: false,
            resources,
            closed: 0,
            worker,
        }
    }

    /// Starts a tick, and sets its time.
    pub(crate) fn start_tick(&mut self, now: Millis) {
        self.resources.shared.now = now;
        self.resources.shared.budget = self.shared().turns.interactive_budget;
        self.interactive_turns = 0;
    }

    /// The time of the current tick.
    pub(crate) fn now(&self) -> Millis {
        self.shared().now
    }

    fn shared(&self) -> &Shared {
        &self.resources.shared
    }

    /// How long the worker may sleep; `None` means until the next event.
    pub(crate) fn poll_timeout(&self) -> Option<Millis> {
        if !self.run_queue.is_empty() || self.has_wakes {
            return Some(0);
        }
        let next = self.next_timer();
        (next != NEVER).then(|| next.saturating_sub(self.now()))
    }

    /// Whether a timer has expired or a step of a shutdown is due.
    pub(crate) fn is_due(&self) -> bool {
        self.next_timer() <= self.now()
    }

    fn next_timer(&self) -> Millis {
        let timer = self.timers.next().unwrap_or(NEVER);
        timer.min(self.next_drain_step())
    }

    /// When a shutdown stops reading what arrives, and then when it ends.
    fn next_drain_step(&self) -> Millis {
        match self.shared().drain {
            Drain::Off => NEVER,
            Drain::Answering { deadline } => {
                deadline.saturating_sub(self.shared().timeouts.finish())
            }
            Drain::Finishing { deadline } => deadline,
        }
    }

    /// Returns how many connections were closed since the last call.
    pub(crate) fn take_closed(&mut self) -> u64 {
        mem::take(&mut self.closed)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// What the simulation compares with its model; `None` for an unknown token.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn inspect(&self, token: usize) -> Option<Inspection> {
        let entry = self.entries.get(token)?;
        Some(Inspection {
            deadline: entry.connection.deadline(self.shared()),
            is_bulk: entry.bulk,
            is_queued: entry.ticket != 0,
        })
    }

    /// The memory of the buffers that connections hold, in bytes.
    pub(crate) fn held_memory(&self) -> u64 {
        self.resources.pool.held_bytes()
    }

    /// How many bulk turns this tick has.
    pub(crate) fn share(&self) -> usize {
        1 + self.interactive_turns / self.shared().turns.interactive_per_bulk
    }

    pub(crate) fn drain_timeout(&self) -> Millis {
        self.shared().timeouts.drain
    }

    /// Adds a new connection and drives it. `open` registers the stream under the given token and creates
    /// its handler.
    ///
    /// Call this after all events of a batch are handled: the token may have belonged to a connection that
    /// was closed in the batch, and the batch may hold more events for it.
    pub(crate) fn add(
        &mut self,
        mut stream: S,
        peer: Peer,
        open: impl FnOnce(&mut S, usize) -> Result<H, CloseReason>,
    ) {
        self.reserve_slot();
        self.shared().counters.assigned.add(1);
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
        let now = self.resources.shared.now;
        let mut connection = Connection::new(stream, handler, now);
        match self.resources.shared.drain {
            Drain::Off => {}
            Drain::Answering { .. } => connection.begin_drain(),
            Drain::Finishing { .. } => {
                connection.begin_drain();
                connection.set_read_limit();
            }
        }
        slot.insert(Entry {
            connection,
            peer,
            opened: now,
            armed: NEVER,
            bulk: false,
            lingers: false,
            is_listed: false,
            ticket: 0,
        });
        self.drive_or_enqueue(token);
    }

    /// Grows a full table by a quarter; doubling would waste up to half of it.
    fn reserve_slot(&mut self) {
        let len = self.entries.len();
        if len == self.entries.capacity() {
            self.entries.reserve_exact((len / 4).max(64));
        }
    }

    /// Drives the connections at the front of the run queue, as many as this tick's share, each once. This ends a tick.
    pub(crate) fn run_queued(&mut self) {
        let mut share = self.share();
        self.resources.shared.budget = self.shared().turns.bulk_budget;
        for _ in 0..self.run_queue.len() {
            let Some((token, ticket)) = self.run_queue.pop_front() else {
                break;
            };
            // A void place costs no turn.
            if self
                .entries
                .get(token)
                .is_some_and(|entry| entry.ticket == ticket)
            {
                self.shared().counters.bulk_turns.add(1);
                self.drive(token);
                share -= 1;
                if share == 0 {
                    break;
                }
            }
        }
    }

    /// Adds readiness to a connection, and drives it if it is interactive. An unknown token
    /// belongs to a connection that was closed earlier in this batch.
    #[inline(always)]
    pub(crate) fn on_ready(&mut self, token: usize, readiness: Readiness) {
        if let Some(entry) = self.entries.get_mut(token) {
            entry.connection.add_readiness(readiness);
            if entry.bulk {
                return self.enqueue(token);
            }
            // As `Self::drive`, but an interactive connection is not in the run queue.
            self.interactive_turns += 1;
            if let Some(status) = entry.drive(token, &mut self.resources) {
                self.after_drive(token, status);
            }
        }
    }

    /// Drives a connection at once if it is interactive, otherwise in its turn.
    fn drive_or_enqueue(&mut self, token: usize) {
        self.on_ready(token, Readiness::default());
    }

    /// Adds a connection to the back of the run queue, unless it is in the queue.
    #[inline(never)]
    fn enqueue(&mut self, token: usize) {
        let entry = &mut self.entries[token];
        if entry.ticket == 0 {
            self.last_ticket = self.last_ticket.wrapping_add(1).max(1);
            entry.ticket = self.last_ticket;
            self.run_queue.push_back((token, entry.ticket));
        }
    }

    /// Marks that connections may have been woken.
    pub(crate) fn on_wake(&mut self) {
        self.has_wakes = true;
    }

    /// Calls the handlers of a bounded number of connections that were woken.
    pub(crate) fn run_wakes(&mut self) {
        if !mem::take(&mut self.has_wakes) {
            return;
        }
        self.wake_receiver.clear_notified();
        let sent = self.shared().counters.bytes_out.get();
        let max_sent = sent + self.shared().turns.bulk_budget;
        for _ in 0..MAX_WAKES {
            if self.shared().counters.bytes_out.get() >= max_sent {
                break;
            }
            let Some(waker) = self.wake_receiver.take() else {
                return;
            };
            if let Some(entry) = self.entries.get_mut(waker.token())
                && entry.connection.owns(&waker)
            {
                entry.connection.woken();
                self.drive_or_enqueue(waker.token());
            }
        }
        self.has_wakes = true;
    }

    /// Drives a connection at once. If it is in the run queue, it loses its place there.
    #[inline(never)]
    fn drive(&mut self, token: usize) {
        let entry = &mut self.entries[token];
        entry.ticket = 0;
        if let Some(status) = entry.drive(token, &mut self.resources) {
            self.after_drive(token, status);
        }
    }

    /// Drives all connections, except those that are closed for the benefit of others before their turn.
    fn drive_all(&mut self) {
        let tokens: Vec<_> = self.entries.iter().map(|(token, _)| token).collect();
        for token in tokens {
            if self.entries.contains(token) {
                self.drive(token);
            }
        }
    }

    /// Acts on the status of a connection that was driven, and on a change of its deadline.
    #[inline(never)]
    fn after_drive(&mut self, token: usize, status: Status) {
        if let Status::Closed(reason) = status {
            return self.close(token, reason);
        }
        if self.resources.pool.is_empty() {
            self.list_holder(token);
            self.clean_holders();
            self.refill_pool(token);
            if !self.entries.contains(token) {
                return;
            }
        }
        if status == Status::Runnable {
            self.entries[token].set_bulk(true, &self.resources.shared.counters);
            self.enqueue(token);
        }
        let entry = &mut self.entries[token];
        let lingers = matches!(entry.connection.state, State::Lingering(_));
        let before = mem::replace(&mut entry.lingers, lingers);
        let counters = &self.resources.shared.counters;
        counters.lingering.adjust(before.into(), lingers.into());
        self.arm(token);
    }

    /// Refills the pool after a connection has kept its last pair. At the limit, or if no memory is available, the connection
    /// that has been stuck longest is reset, and its pair is used again. If none is stuck, that is the one in `need`.
    fn refill_pool(&mut self, need: usize) {
        if let Err(reason) = self.resources.pool.refill() {
            let token = self.longest_stuck().unwrap_or(need);
            self.close(token, reason);
        }
    }

    /// Adds a connection to the holders, unless it is among them.
    fn list_holder(&mut self, token: usize) {
        let entry = &mut self.entries[token];
        if !mem::replace(&mut entry.is_listed, true) {
            let stuck = self.resources.shared.timeouts.stuck;
            self.holders.set(entry.connection.since + stuck, token);
        }
    }

    /// Removes those that hold no buffers from the holders, if they are many, and what earlier connections with the token of a
    /// holder have left there.
    fn clean_holders(&mut self) {
        if !self.holders.needs_rebuild(self.resources.pool.held()) {
            return;
        }
        let mut tokens = self.holders.take_tokens();
        tokens.retain(|token| {
            let Some(entry) = self.entries.get_mut(*token) else {
                return false;
            };
            mem::take(&mut entry.is_listed) && entry.connection.holds_buffers()
        });
        for token in tokens {
            self.list_holder(token);
        }
    }

    /// Returns the connection that holds buffers and has been stuck longest, if one has been for long enough. It is no longer
    /// among the holders.
    fn longest_stuck(&mut self) -> Option<usize> {
        while let Some((at, token)) = self.holders.pop_expired(self.now()) {
            let Some(entry) = self.entries.get_mut(token) else {
                continue;
            };
            entry.is_listed = false;
            if !entry.connection.holds_buffers() {
                continue;
            }
            if entry.connection.since + self.resources.shared.timeouts.stuck <= at {
                return Some(token);
            }
            self.list_holder(token);
        }
        None
    }

    /// Sets a timer for the earlier of a connection's deadline and its handler's timer, unless one is set that is at
    /// least as early.
    fn arm(&mut self, token: usize) {
        let shared = &self.resources.shared;
        let look_at = |entry: &Entry<S, H>| {
            let connection = &entry.connection;
            connection.deadline(shared).min(connection.timer())
        };
        let entry = &mut self.entries[token];
        let at = look_at(entry);
        if at < entry.armed {
            entry.armed = at;
            self.timers.set(at, token);
        }
        if self.timers.needs_rebuild(self.entries.len()) {
            self.timers
                .rebuild(self.entries.iter_mut().map(|(token, entry)| {
                    entry.armed = look_at(entry);
                    (entry.armed, token)
                }));
        }
    }

    /// Calls the handlers whose timer has expired, closes the connections whose deadline has passed, and advances a
    /// shutdown.
    ///
    /// Call this only after all events up to now were handled: a connection is idle only if the kernel
    /// has nothing to report about it.
    pub(crate) fn expire(&mut self) {
        while let Some((_, token)) = self.timers.pop_expired(self.now()) {
            self.on_timer(token);
        }
        if let Drain::Answering { deadline } = self.shared().drain
            && self.next_drain_step() <= self.now()
        {
            self.resources.shared.drain = Drain::Finishing { deadline };
            for (_, entry) in &mut self.entries {
                entry.connection.set_read_limit();
            }
            self.drive_all();
        }
        // A step that is still due is the deadline.
        if self.next_drain_step() <= self.now() {
            self.close_all();
        }
    }

    /// Looks at a connection whose timer has expired: its handler's timer, its deadline, both or neither.
    fn on_timer(&mut self, token: usize) {
        let now = self.now();
        let Some(entry) = self.entries.get_mut(token) else {
            return;
        };
        if entry.armed > now {
            // The timer was set for an earlier state; the current one is still to come.
            return;
        }
        entry.armed = NEVER;
        if entry.ticket != 0 && entry.connection.timer() <= now {
            // Data that has arrived is handled before the handler's timer.
            self.drive(token);
        }
        if let Some(entry) = self.entries.get_mut(token)
            && entry.connection.timer() <= now
        {
            entry.connection.timer_expired();
            self.drive(token);
        }
        match self.entries.get(token) {
            Some(entry) if entry.connection.deadline(self.shared()) <= now => {
                self.expire_one(token);
            }
            Some(_) => self.arm(token),
            None => {}
        }
    }

    /// Handles a deadline that has passed. A connection that refuses input ends its half. Any other is driven once more at
    /// once; if that makes progress, the deadline has moved. Otherwise one that lingers is closed, one with
    /// empty buffers is closed cleanly, and one with buffered bytes or without its answer is reset.
    fn expire_one(&mut self, token: usize) {
        let now = self.now();
        let entry = &mut self.entries[token];
        let lingering_reason = match entry.connection.state {
            State::Refusing => {
                // Its client keeps sending. What was answered is delivered, and then it lingers.
                entry
                    .connection
                    .close_after_flush(CloseReason::Shutdown, now);
                return self.drive(token);
            }
            State::Lingering(reason) => Some(reason),
            _ => None,
        };
        // The kernel announces room in large steps only, so try once more.
        entry.connection.add_readiness(Readiness::WRITABLE);
        self.drive(token);
        let Some(entry) = self.entries.get_mut(token) else {
            return;
        };
        if entry.connection.deadline(&self.resources.shared) > now {
            return self.arm(token);
        }
        match lingering_reason {
            Some(reason) => self.close(token, reason),
            None if entry.connection.awaits_answer() => {
                self.close(token, CloseReason::AnswerTimeout);
            }
            None if entry.connection.buffered() == 0 => {
                entry
                    .connection
                    .close_after_flush(CloseReason::IdleTimeout, now);
                self.drive(token);
            }
            None => self.close(token, CloseReason::IdleTimeout),
        }
    }

    fn close(&mut self, token: usize, reason: CloseReason) {
        let Entry {
            mut connection,
            peer,
            opened,
            bulk,
            lingers,
            ..
        } = self.entries.remove(token);
        let Resources { pool, shared } = &mut self.resources;
        let Shared { counters, now, .. } = shared;
        counters.bulk.adjust(bulk.into(), 0);
        counters.lingering.adjust(lingers.into(), 0);
        connection.abort_if_incomplete();
        let buffered = connection.release_buffers(pool);
        counters.buffered.adjust(buffered, 0);
        counters.discarded[reason as usize].add(buffered as u64);
        macro_rules! log_closed {
            ($($note:tt)*) => {
                log::debug!(
                    target: "echoserver::access",
                    peer:%, worker = self.worker, ms = now.saturating_sub(opened),
                    bytes_in = connection.bytes_in, bytes_out = connection.bytes_out, reason:% $($note)*;
                    "closed"
                )
            };
        }
        match connection.take_note() {
            Some(note) => log_closed!(, note:%),
            None => log_closed!(),
        }
        // Dropping the handler runs user code. The panic hook has already reported a panic.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(connection))) {
            dispose(panic);
        }
        self.count_close(reason);
    }

    /// Counted last, so that the descriptor is closed before the count is visible.
    fn count_close(&mut self, reason: CloseReason) {
        self.shared().counters.closed[reason as usize].add(1);
        self.closed += 1;
    }

    /// Tells each handler, answers input until a connection has nothing left to read and its output is delivered, then closes
    /// it. Connections that arrive later are treated in the same way.
    /// Those that are not done at `deadline` are closed then, with a reset if their buffers hold bytes or an answer is
    /// still to come.
    ///
    /// A further call can only move the deadline to an earlier time.
    pub(crate) fn shut_down(&mut self, deadline: Millis) {
        if let Drain::Answering { deadline: current } | Drain::Finishing { deadline: current } =
            &mut self.resources.shared.drain
        {
            *current = deadline.min(*current);
            return;
        }
        self.resources.shared.drain = Drain::Answering { deadline };
        for (_, entry) in &mut self.entries {
            entry.connection.begin_drain();
        }
        self.drive_all();
    }

    /// Closes every connection at the deadline of a shutdown.
    fn close_all(&mut self) {
        let reason_of = |entry: &Entry<S, H>| match entry.connection.state {
            State::Lingering(reason) => reason,
            _ => CloseReason::DrainTimeout,
        };
        let open = self.entries.iter();
        let open: Vec<_> = open
            .map(|(token, entry)| (token, reason_of(entry)))
            .collect();
        for (token, reason) in open {
            self.close(token, reason);
        }
    }
}

#[cfg(test)]
mod tests;
