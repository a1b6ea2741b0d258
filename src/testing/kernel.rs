//! The simulated kernel: the clients of all connections, and edge-triggered readiness events.
//!
//! The kernel knows what each client will send and what it must receive, so it checks each call of the
//! server when it is made. A failed check does not panic, because the code under test catches panics.
//! The kernel records the first failure instead, and the simulation looks for it after each tick.
//!
//! Edges are those of Linux's epoll, and no others. An event becomes pending when bytes, EOF or a reset
//! arrive, and when the send buffer gets free space after a write found it full. A poll takes the event
//! and reports the state of that moment. Therefore a connection that stops reading before a read would
//! block, without a short read as proof, gets no second event for the same bytes.

use std::cell::RefCell;
use std::io::{self, ErrorKind, Read, Write};
use std::rc::Rc;
use std::sync::Arc;

use crate::connection::table::{Event, Limits, Millis};
use crate::connection::{Readiness, Stream};
use crate::stats::{CloseReason, Counter, Counters};

/// How many times a connection can be driven in one tick: twice for events, once from the run queue
/// or on registration, and once each at the start of a drain, at its read deadline and at the idle
/// timeout.
const MAX_RUNS_PER_TICK: usize = 6;

/// A seeded random number generator (SplitMix64) with the same numbers on every platform.
#[derive(Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number below `bound`, which must not be 0.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next_u64() % bound as u64) as usize
    }

    /// Returns a number from 1 to `max`, or 1 if `max` is 0.
    pub(super) fn up_to(&mut self, max: usize) -> usize {
        1 + self.below(max.max(1))
    }

    /// Returns true once in `count` times on average.
    pub(super) fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    /// Returns one of `choices`.
    pub(super) fn choose<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// How a client ends its connection after it has sent everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClosePolicy {
    /// Closes its side and waits for the server's EOF.
    HalfClose,
    /// Leaves the connection open.
    KeepOpen,
    /// Resets the connection, possibly before it has sent everything.
    Reset,
}

/// When a client reads the server's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadPolicy {
    Immediately,
    /// Only after all other clients have done everything they can.
    Late,
    Never,
}

/// A connection's state in the kernel and at its client. Positions are byte offsets from the start.
#[derive(Debug)]
// As in a kernel's socket, the flags are independent of each other.
#[allow(clippy::struct_excessive_bools)]
pub(super) struct SimConnection {
    // From the client to the server.
    /// Everything the client will send.
    input: Vec<u8>,
    /// How much of it has arrived in the receive buffer.
    arrived: usize,
    /// How much of it the server has read.
    read: usize,
    receive_buffer_size: usize,
    /// The position of the last urgent byte. A read that starts before it also ends before it.
    urgent: Option<usize>,
    half_closed: bool,
    reset_by_client: bool,
    close_policy: ClosePolicy,
    // From the server to the client.
    /// The model's output for the whole input.
    expected: Vec<u8>,
    written: usize,
    received: usize,
    send_buffer_size: usize,
    read_policy: ReadPolicy,
    // The server's side.
    token: Option<usize>,
    event_pending: bool,
    /// A write found the send buffer full, so free space will raise an event.
    awaits_writable: bool,
    eof_reported: bool,
    reset_reported: bool,
    /// The handler has returned [`Action::Close`](crate::Action::Close).
    close_requested: bool,
    /// When the server shut down its side, and how much it had read by then.
    write_shutdown: Option<(Millis, usize)>,
    /// When the server last read or wrote a byte.
    last_activity: Millis,
    /// Bytes the server has read and written in the current tick.
    bytes_in_tick: usize,
    /// How much had arrived when the server was asked to shut down.
    arrived_before_drain: usize,
    dropped_at: Option<Millis>,
    /// The connection was reset because the server closed it with unread input, or because input
    /// arrived after the close.
    reset_on_close: bool,
    close_reason: Option<CloseReason>,
}

impl SimConnection {
    fn unread(&self) -> usize {
        self.arrived - self.read
    }

    fn in_flight(&self) -> usize {
        self.written - self.received
    }

    /// As on Linux, at least a third of the send buffer must be free.
    fn is_writable(&self) -> bool {
        (self.send_buffer_size - self.in_flight()) * 3 >= self.send_buffer_size
    }

    fn is_readable(&self) -> bool {
        self.unread() > 0
            || (self.half_closed && !self.eof_reported)
            || (self.reset_by_client && !self.reset_reported)
    }

    fn is_open(&self) -> bool {
        self.dropped_at.is_none()
    }

    /// Returns whether the connection is open or was closed without a reset or a timeout.
    fn is_clean(&self) -> bool {
        let clean_reason = |reason| {
            matches!(
                reason,
                CloseReason::PeerClosed | CloseReason::Handler | CloseReason::Shutdown
            )
        };
        !self.reset_by_client && !self.reset_on_close && self.close_reason.is_none_or(clean_reason)
    }

    /// Returns what an event would report now.
    fn readiness(&self) -> Readiness {
        let read_closed = self.half_closed || self.reset_by_client;
        let closed = self.reset_by_client || (self.half_closed && self.write_shutdown.is_some());
        let priority = self
            .urgent
            .is_some_and(|urgent| (self.read..self.arrived).contains(&urgent));
        Readiness {
            readable: self.unread() > 0 || read_closed,
            writable: self.is_writable() || closed,
            read_until_would_block: read_closed || closed || priority,
        }
    }
}

pub(super) struct Kernel<'a> {
    pub(super) rng: Rng,
    pub(super) now: Millis,
    pub(super) connections: Vec<SimConnection>,
    /// The first failed check.
    pub(super) failure: Option<String>,
    /// What happened so far, if it is to be recorded.
    pub(super) trace: Option<Vec<String>>,
    /// Counts transfers, half-closes and resets. Unchanged means that nothing happened.
    pub(super) progress: usize,
    model: &'a dyn Fn(&[u8]) -> Vec<u8>,
    limits: Limits,
    counters: Arc<Counters>,
    /// The numbers of closes at the last check, by reason.
    closed: [u64; CloseReason::ALL.len()],
    /// A connection whose stream was dropped and whose close is not counted yet.
    uncounted_drop: Option<usize>,
    drain_started: Option<Millis>,
    /// Reads randomly return fewer bytes than have arrived, and
    /// [`Stream::short_read_means_drained`] is false.
    short_reads_unreliable: bool,
    /// One call in this many is interrupted, or a client acts during it.
    interrupt_interval: usize,
}

impl<'a> Kernel<'a> {
    pub(super) fn new(
        mut rng: Rng,
        model: &'a dyn Fn(&[u8]) -> Vec<u8>,
        limits: Limits,
        counters: Arc<Counters>,
        trace: bool,
    ) -> Self {
        Self {
            short_reads_unreliable: rng.one_in(8),
            interrupt_interval: rng.choose(&[2, 8, 1000]),
            rng,
            now: 0,
            connections: Vec::new(),
            failure: None,
            trace: trace.then(Vec::new),
            progress: 0,
            model,
            limits,
            counters,
            closed: [0; CloseReason::ALL.len()],
            uncounted_drop: None,
            drain_started: None,
        }
    }

    /// Appends a line to the trace.
    pub(super) fn record(&mut self, event: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>6} ms  {}", self.now, event()));
        }
    }

    pub(super) fn fail(&mut self, message: String) {
        self.record(|| format!("FAILURE: {message}"));
        self.failure.get_or_insert(message);
    }

    fn check(&mut self, condition: bool, message: impl FnOnce() -> String) {
        if !condition {
            self.fail(message());
        }
    }

    /// Connects a client that will send `input`, and returns its number.
    pub(super) fn connect(&mut self, input: Vec<u8>) -> usize {
        let expected = (self.model)(&input);
        let rng = &mut self.rng;
        let connection = SimConnection {
            arrived: 0,
            read: 0,
            receive_buffer_size: rng.choose(&[1, 7, 64, 300]),
            urgent: None,
            half_closed: false,
            reset_by_client: false,
            close_policy: rng.choose(&[
                ClosePolicy::HalfClose,
                ClosePolicy::HalfClose,
                ClosePolicy::HalfClose,
                ClosePolicy::KeepOpen,
                ClosePolicy::Reset,
            ]),
            written: 0,
            received: 0,
            send_buffer_size: rng.choose(&[1, 5, 40, 300]),
            read_policy: rng.choose(&[
                ReadPolicy::Immediately,
                ReadPolicy::Immediately,
                ReadPolicy::Immediately,
                ReadPolicy::Late,
                ReadPolicy::Never,
            ]),
            token: None,
            event_pending: false,
            awaits_writable: false,
            eof_reported: false,
            reset_reported: false,
            close_requested: false,
            write_shutdown: None,
            last_activity: self.now,
            bytes_in_tick: 0,
            arrived_before_drain: 0,
            dropped_at: None,
            reset_on_close: false,
            close_reason: None,
            input,
            expected,
        };
        let id = self.connections.len();
        self.record(|| {
            format!(
                "client {id} connects: sends {} bytes, then {:?}; reads {:?}; buffers of {} and {} bytes",
                connection.input.len(),
                connection.close_policy,
                connection.read_policy,
                connection.receive_buffer_size,
                connection.send_buffer_size
            )
        });
        self.connections.push(connection);
        id
    }

    /// Lets one client do one thing, both chosen at random.
    pub(super) fn run_random_client(&mut self) {
        if self.connections.is_empty() {
            return;
        }
        let id = self.rng.below(self.connections.len());
        match self.rng.below(8) {
            0..4 => self.send(id),
            4..7 => {
                if self.connections[id].read_policy == ReadPolicy::Immediately {
                    let amount = self.rng.up_to(self.connections[id].send_buffer_size);
                    self.receive(id, amount);
                }
            }
            _ => match self.connections[id].close_policy {
                ClosePolicy::Reset if self.rng.one_in(4) => self.reset(id),
                ClosePolicy::HalfClose => self.half_close(id),
                _ => {}
            },
        }
    }

    /// Lets each client do all it can. Late readers and resets are included with `include_late`.
    pub(super) fn run_all_clients(&mut self, include_late: bool) {
        for id in 0..self.connections.len() {
            self.send(id);
            match self.connections[id].read_policy {
                ReadPolicy::Immediately => self.receive(id, usize::MAX),
                ReadPolicy::Late if include_late => self.receive(id, usize::MAX),
                ReadPolicy::Late | ReadPolicy::Never => {}
            }
            match self.connections[id].close_policy {
                ClosePolicy::HalfClose => self.half_close(id),
                ClosePolicy::Reset if include_late => self.reset(id),
                ClosePolicy::Reset | ClosePolicy::KeepOpen => {}
            }
        }
    }

    fn send(&mut self, id: usize) {
        let connection = &mut self.connections[id];
        let max = (connection.receive_buffer_size - connection.unread())
            .min(connection.input.len() - connection.arrived);
        if max == 0
            || connection.half_closed
            || connection.reset_by_client
            || connection.reset_on_close
        {
            return;
        }
        if !connection.is_open() {
            connection.reset_on_close = true;
            return self
                .record(|| format!("client {id} sends to a closed connection, which resets it"));
        }
        let count = self.rng.up_to(max);
        let urgent = self.rng.one_in(8);
        let connection = &mut self.connections[id];
        connection.arrived += count;
        self.progress += 1;
        connection.event_pending = true;
        if urgent {
            connection.urgent = Some(connection.arrived - 1);
        }
        self.record(|| {
            format!(
                "client {id} sends {count} bytes{}",
                if urgent { ", urgent" } else { "" }
            )
        });
        if self.connections[id].close_policy == ClosePolicy::HalfClose && self.rng.one_in(2) {
            self.half_close(id);
        }
    }

    /// Closes the client's side, if it has sent everything.
    fn half_close(&mut self, id: usize) {
        let connection = &mut self.connections[id];
        if connection.half_closed
            || connection.reset_by_client
            || connection.reset_on_close
            || connection.arrived < connection.input.len()
        {
            return;
        }
        connection.half_closed = true;
        self.progress += 1;
        connection.event_pending = true;
        self.record(|| format!("client {id} closes its side"));
    }

    fn reset(&mut self, id: usize) {
        let discards_unread = self.rng.one_in(2);
        let connection = &mut self.connections[id];
        if connection.half_closed
            || connection.reset_by_client
            || connection.reset_on_close
            || !connection.is_open()
        {
            return;
        }
        connection.reset_by_client = true;
        self.progress += 1;
        connection.event_pending = true;
        // A reset can reach the server before it has read all data, which is then discarded.
        if discards_unread {
            connection.arrived = connection.read;
        }
        self.record(|| format!("client {id} resets the connection"));
    }

    fn receive(&mut self, id: usize, max: usize) {
        let connection = &mut self.connections[id];
        let count = max.min(connection.in_flight());
        if count == 0 || connection.reset_by_client || connection.reset_on_close {
            return;
        }
        connection.received += count;
        self.progress += 1;
        if connection.awaits_writable && connection.is_writable() {
            connection.awaits_writable = false;
            connection.event_pending = true;
        }
        self.record(|| format!("client {id} reads {count} bytes"));
    }

    /// Returns whether a poll would return at once.
    pub(super) fn has_pending_events(&self) -> bool {
        self.connections.iter().any(|connection| {
            connection.event_pending && connection.token.is_some() && connection.is_open()
        })
    }

    /// Returns a batch of events in random order: all pending ones with `all_events`, otherwise some.
    ///
    /// Occasionally an event is spurious, or comes twice, or in two parts as from kqueue.
    pub(super) fn poll(&mut self, all_events: bool) -> Vec<Event> {
        let mut batch = Vec::new();
        for id in 0..self.connections.len() {
            let connection = &mut self.connections[id];
            connection.bytes_in_tick = 0;
            let (Some(token), true) = (connection.token, connection.is_open()) else {
                continue;
            };
            if connection.event_pending && (all_events || !self.rng.one_in(4)) {
                self.connections[id].event_pending = false;
                self.take_event(id, token, &mut batch);
            } else if self.rng.one_in(32) {
                let spurious = Readiness {
                    readable: self.rng.one_in(2),
                    writable: self.rng.one_in(2),
                    read_until_would_block: self.rng.one_in(2),
                };
                self.record(|| format!("connection {id}: spurious event {spurious:?}"));
                batch.push(Event::Ready(token, spurious));
            }
        }
        // A Fisher-Yates shuffle.
        for last in (1..batch.len()).rev() {
            let other = self.rng.below(last + 1);
            batch.swap(last, other);
        }
        batch
    }

    fn take_event(&mut self, id: usize, token: usize, batch: &mut Vec<Event>) {
        let event = self.connections[id].readiness();
        if event == Readiness::default() {
            return;
        }
        self.record(|| format!("connection {id}: event {event:?}"));
        match self.rng.below(8) {
            0 => batch.extend([Event::Ready(token, event); 2]),
            1 => {
                let (mut read_part, mut write_part) = (event, event);
                read_part.writable = false;
                write_part.readable = false;
                batch.extend([read_part, write_part].map(|part| Event::Ready(token, part)));
            }
            _ => batch.push(Event::Ready(token, event)),
        }
    }

    fn open_connections(&self) -> usize {
        let open = self.connections.iter().filter(|one| one.is_open());
        open.count()
    }

    /// Records what has arrived when the server is asked to shut down: all of it must be answered.
    pub(super) fn record_drain_request(&mut self) {
        for connection in &mut self.connections {
            connection.arrived_before_drain = connection.arrived;
        }
    }

    /// Records when the worker starts to drain.
    pub(super) fn record_drain_start(&mut self) {
        if self.drain_started.is_none() {
            self.drain_started = Some(self.now);
            self.record(|| "the drain starts".to_owned());
        }
    }

    /// Checks what must hold after each tick.
    pub(super) fn check_tick(&mut self) {
        self.check_last_close();
        let stats = self.counters.snapshot();
        let total = stats.total();
        let open = self.open_connections();
        let bound = (open * 2 * self.limits.buffer_size) as u64;
        self.check(total.buffered <= bound, || {
            format!(
                "{} bytes are buffered for {open} connections, more than {bound}",
                total.buffered
            )
        });
        let read: usize = self
            .connections
            .iter()
            .map(|connection| connection.read)
            .sum();
        let written: usize = self
            .connections
            .iter()
            .map(|connection| connection.written)
            .sum();
        self.check(
            (total.bytes_in, total.bytes_out) == (read as u64, written as u64),
            || {
                format!(
                    "{read} bytes were read and {written} written, but {} and {} counted",
                    total.bytes_in, total.bytes_out
                )
            },
        );
        // Connections that wait in the mailbox are accepted, but not assigned yet.
        if stats.accepted == total.assigned
            && let Some(imbalance) = stats.check_balance()
        {
            self.fail(imbalance);
        }
        self.check_fairness();
        self.check_deadlines();
    }

    /// Checks that no connection has exceeded its budget.
    fn check_fairness(&mut self) {
        let Limits {
            buffer_size,
            budget,
            ..
        } = self.limits;
        // Pending output is one buffer. Then each round reads and writes one, or discards one.
        let max_bytes = MAX_RUNS_PER_TICK * (1 + 3 * budget as usize) * buffer_size;
        for id in 0..self.connections.len() {
            let bytes = self.connections[id].bytes_in_tick;
            self.check(bytes <= max_bytes, || {
                format!("connection {id} transferred {bytes} bytes in one tick")
            });
        }
    }

    /// Checks that no connection is open after its timeout or the drain's.
    fn check_deadlines(&mut self) {
        let (now, limits) = (self.now, self.limits);
        // Timeouts may be late by an eighth.
        let latest = |timeout: Millis| timeout + (timeout / 8).max(1);
        for id in 0..self.connections.len() {
            let connection = &self.connections[id];
            if !connection.is_open() || connection.token.is_none() {
                continue;
            }
            let overdue = match connection.write_shutdown {
                Some((at, _)) if self.drain_started.is_none() => {
                    now >= at + latest(limits.linger_timeout)
                }
                Some(_) => false,
                None => limits.idle_timeout.is_some_and(|idle_timeout| {
                    now >= connection.last_activity + latest(idle_timeout)
                }),
            };
            let drain_expired = self
                .drain_started
                .is_some_and(|at| now >= at + limits.drain_timeout);
            self.check(!overdue && !drain_expired, || {
                let timeout = if drain_expired { "the drain's" } else { "its" };
                format!("connection {id} is still open after {timeout} timeout")
            });
        }
    }

    /// Checks what must hold when the worker would sleep until the next event.
    pub(super) fn check_idle(&mut self) {
        for id in 0..self.connections.len() {
            let connection = &self.connections[id];
            if !connection.is_open() || connection.token.is_none() || connection.awaits_writable {
                continue;
            }
            if connection.is_readable() {
                let eof = connection.half_closed || connection.reset_by_client;
                let message = format!(
                    "connection {id} is stalled: {} unread bytes{}, and no event is pending",
                    connection.unread(),
                    if eof { " and EOF" } else { "" }
                );
                self.fail(message);
            } else if self.drain_started.is_some() && connection.write_shutdown.is_none() {
                self.fail(format!(
                    "connection {id} is stalled: nothing is left to do, and the drain has not closed it"
                ));
            } else if connection.write_shutdown.is_none() && !connection.eof_reported {
                let due = (self.model)(&connection.input[..connection.read]).len();
                let written = connection.written;
                self.check(written == due, || {
                    format!(
                        "connection {id} is stalled: {written} of {due} bytes of output written"
                    )
                });
            }
        }
    }

    /// Checks what must hold when all clients have done everything and the server is idle.
    pub(super) fn check_complete(&mut self) {
        for id in 0..self.connections.len() {
            let connection = &self.connections[id];
            let timed_out = connection.write_shutdown.is_some() && !connection.close_requested;
            if connection.read_policy == ReadPolicy::Never || !connection.is_clean() || timed_out {
                continue;
            }
            let due = (self.model)(&connection.input[..connection.arrived]).len();
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

    /// Checks what must hold after the worker has ended.
    pub(super) fn check_drained(&mut self) {
        let open = self.open_connections();
        self.check(open == 0, || {
            format!("{open} connections are open after the worker has ended")
        });
        let stats = self.counters.snapshot();
        if let Some(imbalance) = stats.check_balance() {
            self.fail(imbalance);
        }
        let (open, buffered) = (stats.open(), stats.total().buffered);
        self.check(open == 0 && buffered == 0, || {
            format!("after the drain the counters show {open} open connections and {buffered} buffered bytes")
        });
    }

    /// Determines the reason counted for the last dropped stream, and checks it.
    fn check_last_close(&mut self) {
        let counted = self.counters.workers[0].closed.each_ref().map(Counter::get);
        let reasons: Vec<CloseReason> = CloseReason::ALL
            .into_iter()
            .filter(|&reason| counted[reason as usize] != self.closed[reason as usize])
            .collect();
        let before: u64 = self.closed.iter().sum();
        let count = counted.iter().sum::<u64>() - before;
        self.closed = counted;
        let dropped = self.uncounted_drop.take();
        if count != u64::from(dropped.is_some()) {
            return self.fail(format!(
                "{count} closes were counted since the last check; dropped connection: {dropped:?}"
            ));
        }
        if let (Some(id), &[reason]) = (dropped, &reasons[..]) {
            self.record(|| format!("connection {id} was closed: {reason}"));
            self.connections[id].close_reason = Some(reason);
            if let Err(problem) = self.check_close(&self.connections[id], reason) {
                self.fail(format!(
                    "connection {id} was closed ({reason}), but {problem}"
                ));
            }
        }
    }

    /// Checks that a connection was closed for a valid `reason`, and with complete output.
    fn check_close(&self, connection: &SimConnection, reason: CloseReason) -> Result<(), String> {
        let limits = &self.limits;
        let closed_at = connection.dropped_at.unwrap_or(self.now);
        let shutdown_at = connection.write_shutdown.map(|(at, _)| at);
        let read = connection
            .write_shutdown
            .map_or(connection.read, |(_, read)| read);
        let drain_expired = self
            .drain_started
            .is_some_and(|at| closed_at >= at + limits.drain_timeout);
        let output_complete = |read: usize| {
            let due = (self.model)(&connection.input[..read]).len();
            let written = connection.written;
            let problem = format!("{written} of {due} bytes of output were written");
            require(written == due, problem)
        };
        let lingered = match shutdown_at.map(|at| closed_at - at) {
            _ if connection.eof_reported || drain_expired => Ok(()),
            Some(time) => {
                let problem = format!("it lingered for {time} ms only");
                require(time >= limits.linger_timeout, problem)
            }
            None => Err("its write side was not shut down first".to_owned()),
        };
        match reason {
            CloseReason::PeerClosed => require(connection.eof_reported, "no EOF was read")
                .and(output_complete(connection.arrived)),
            CloseReason::Handler => {
                require(connection.close_requested, "the handler did not request it")
                    .and(output_complete(read))
                    .and(lingered)
            }
            CloseReason::Shutdown => {
                let read_expired = match (self.drain_started, shutdown_at) {
                    (Some(start), Some(at)) => at >= start + limits.drain_timeout / 2,
                    _ => return Err("it was not drained".to_owned()),
                };
                let read_all = read >= connection.arrived_before_drain;
                require(read_all || read_expired, "not all arrived input was read")
                    .and(output_complete(read))
                    .and(lingered)
            }
            CloseReason::IdleTimeout => {
                let idle = shutdown_at.unwrap_or(closed_at) - connection.last_activity;
                let expired = limits.idle_timeout.is_some_and(|timeout| idle >= timeout);
                require(expired, "it was not idle for the whole timeout")
                    .and(shutdown_at.map_or(Ok(()), |_| lingered))
            }
            CloseReason::DrainTimeout => {
                require(drain_expired, "the drain timeout had not expired")
            }
            CloseReason::Reset => require(connection.reset_reported, "the client did not reset it"),
            CloseReason::Error => Err("no such error occurred".to_owned()),
            CloseReason::Panic => Err("the handler must not panic".to_owned()),
            CloseReason::BufferFull => Err("no message or answer exceeds the buffer".to_owned()),
        }
    }

    /// Decides whether the current call is interrupted. If not, a client may act during it.
    fn is_interrupted(&mut self) -> bool {
        if !self.rng.one_in(self.interrupt_interval) {
            return false;
        }
        if self.rng.one_in(2) {
            return true;
        }
        self.run_random_client();
        false
    }
}

fn require(condition: bool, problem: impl Into<String>) -> Result<(), String> {
    match condition {
        true => Ok(()),
        false => Err(problem.into()),
    }
}

/// The server's side of a connection.
pub(super) struct SimStream<'a> {
    id: usize,
    kernel: Rc<RefCell<Kernel<'a>>>,
}

impl<'a> SimStream<'a> {
    pub(super) fn new(id: usize, kernel: &Rc<RefCell<Kernel<'a>>>) -> Self {
        Self {
            id,
            kernel: Rc::clone(kernel),
        }
    }

    pub(super) fn id(&self) -> usize {
        self.id
    }

    /// Registers the stream under `token`. As with epoll, an event reports the current state first.
    pub(super) fn register(&mut self, token: usize) {
        let mut kernel = self.kernel.borrow_mut();
        let id = self.id;
        kernel.record(|| format!("connection {id}: registered with token {token}"));
        let now = kernel.now;
        let in_use = kernel
            .connections
            .iter()
            .any(|connection| connection.is_open() && connection.token == Some(token));
        kernel.check(!in_use, || format!("token {token} is already in use"));
        let connection = &mut kernel.connections[id];
        connection.token = Some(token);
        connection.event_pending = true;
        connection.last_activity = now;
    }
}

/// Records that a connection's handler was called, and whether it requested a close.
pub(super) fn record_handler_call(kernel: &RefCell<Kernel<'_>>, id: usize, close: bool) {
    let mut kernel = kernel.borrow_mut();
    let connection = &mut kernel.connections[id];
    let is_closing = connection.close_requested || connection.write_shutdown.is_some();
    connection.close_requested |= close;
    kernel.check(!is_closing, || {
        format!("connection {id} is closing, and its handler was called again")
    });
}

impl Read for SimStream<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut kernel = self.kernel.borrow_mut();
        let (kernel, id) = (&mut *kernel, self.id);
        kernel.check(!bytes.is_empty(), || {
            format!("connection {id} reads into a full buffer")
        });
        if kernel.is_interrupted() {
            return Err(ErrorKind::Interrupted.into());
        }
        let truncate = kernel.short_reads_unreliable && kernel.rng.one_in(2);
        let connection = &mut kernel.connections[id];
        if connection.unread() > 0 {
            let mut count = connection.unread().min(bytes.len());
            if let Some(urgent) = connection.urgent.filter(|urgent| *urgent > connection.read) {
                count = count.min(urgent - connection.read);
            }
            if truncate {
                count = kernel.rng.up_to(count);
            }
            bytes[..count]
                .copy_from_slice(&connection.input[connection.read..connection.read + count]);
            connection.read += count;
            connection.bytes_in_tick += count;
            kernel.progress += 1;
            if connection.write_shutdown.is_none() {
                connection.last_activity = kernel.now;
            }
            kernel.record(|| {
                format!(
                    "connection {id}: read returns {count} of at most {} bytes",
                    bytes.len()
                )
            });
            return Ok(count);
        }
        if connection.reset_by_client && !connection.reset_reported {
            connection.reset_reported = true;
            kernel.record(|| format!("connection {id}: read returns a reset"));
            return Err(ErrorKind::ConnectionReset.into());
        }
        if connection.half_closed || connection.reset_by_client {
            connection.eof_reported = true;
            kernel.record(|| format!("connection {id}: read returns EOF"));
            return Ok(0);
        }
        kernel.record(|| format!("connection {id}: read would block"));
        Err(ErrorKind::WouldBlock.into())
    }
}

impl Write for SimStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kernel = self.kernel.borrow_mut();
        let (kernel, id) = (&mut *kernel, self.id);
        if kernel.is_interrupted() {
            return Err(ErrorKind::Interrupted.into());
        }
        let (truncate, raises_event) = (kernel.rng.one_in(8), kernel.rng.one_in(2));
        let connection = &mut kernel.connections[id];
        if connection.reset_by_client {
            connection.reset_reported = true;
            kernel.record(|| format!("connection {id}: write returns a broken pipe"));
            return Err(ErrorKind::BrokenPipe.into());
        }
        let free = connection.send_buffer_size - connection.in_flight();
        if free == 0 {
            connection.awaits_writable = true;
            kernel.record(|| format!("connection {id}: write would block"));
            return Err(ErrorKind::WouldBlock.into());
        }
        let mut count = free.min(bytes.len());
        // A write that fills the buffer may or may not raise an event later.
        connection.awaits_writable |= count < bytes.len() && raises_event;
        if truncate {
            count = kernel.rng.up_to(count);
        }
        let start = connection.written;
        let is_expected = connection.expected.get(start..start + count) == Some(&bytes[..count]);
        let is_shut_down = connection.write_shutdown.is_some();
        connection.written += count;
        connection.bytes_in_tick += count;
        kernel.progress += 1;
        if !is_shut_down {
            connection.last_activity = kernel.now;
        }
        kernel.record(|| {
            format!(
                "connection {id}: write takes {count} of {} bytes",
                bytes.len()
            )
        });
        kernel.check(is_expected, || {
            format!("connection {id} wrote wrong bytes at position {start} of its output")
        });
        kernel.check(!is_shut_down, || {
            format!("connection {id} wrote after it had shut down its side")
        });
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for SimStream<'_> {
    fn shutdown_write(&mut self) -> io::Result<()> {
        let mut kernel = self.kernel.borrow_mut();
        let (id, now) = (self.id, kernel.now);
        kernel.record(|| format!("connection {id}: the server shuts down its side"));
        let connection = &mut kernel.connections[id];
        if connection.reset_by_client {
            connection.reset_reported = true;
            return Err(ErrorKind::NotConnected.into());
        }
        let twice = connection
            .write_shutdown
            .replace((now, connection.read))
            .is_some();
        kernel.check(!twice, || {
            format!("connection {id} shut down its side twice")
        });
        Ok(())
    }

    fn short_read_means_drained(&self) -> bool {
        !self.kernel.borrow().short_reads_unreliable
    }
}

impl Drop for SimStream<'_> {
    fn drop(&mut self) {
        // The kernel is borrowed only while a panic unwinds.
        let Ok(mut kernel) = self.kernel.try_borrow_mut() else {
            return;
        };
        let (id, now) = (self.id, kernel.now);
        kernel.check_last_close();
        kernel.record(|| format!("connection {id}: the server drops it"));
        let connection = &mut kernel.connections[id];
        connection.dropped_at = Some(now);
        // A close with unread bytes sends a reset, which destroys output in flight.
        connection.reset_on_close |= connection.unread() > 0;
        kernel.uncounted_drop = Some(id);
    }
}
