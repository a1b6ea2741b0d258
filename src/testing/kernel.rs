//! The simulated kernel: the far ends of all connections, and what an edge-triggered selector says.
//!
//! It knows all that each client means to send and all that must come back, so it judges every
//! call of the server as it happens. It never panics: the code under test catches panics of
//! handlers. What is wrong is noted, the first fault only, and looked at after each turn.
//!
//! Edges are those of Linux's epoll, and no more: a connection becomes *pending* when bytes, an end
//! or a reset arrive, or when room comes back after a write found none; it ceases to be when an
//! event is taken, which says what is true at that moment. A connection that stops before a read
//! would block, without a short read to justify it, gets no second edge for the same bytes.

use std::cell::RefCell;
use std::io::{self, ErrorKind, Read, Write};
use std::rc::Rc;
use std::sync::Arc;

use crate::connection::table::{Event, Limits, Millis};
use crate::connection::{Readiness, Stream};
use crate::stats::{CloseReason, Counter, Counters};

/// How often one connection may be run in a turn: for two events, from the queue, or when it is
/// admitted; and again for a drain's beginning, for its deaf half and for being idle.
const MAX_RUNS: usize = 6;

/// A small generator of random numbers (splitmix64), so that a seed means the same everywhere.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A number from 1 to `most`, or 1.
    pub(super) fn up_to(&mut self, most: usize) -> usize {
        1 + self.below(most.max(1))
    }

    pub(super) fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// What a client does once it has sent everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Ends its stream, and awaits the server's end.
    HalfClose,
    /// Stays.
    Stay,
    /// Resets the connection, at any moment.
    Reset,
}

/// When a client reads what comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    AtOnce,
    /// Not before all the others have finished.
    Late,
    Never,
}

/// One connection, as the kernel and its client see it. Positions count bytes from the start.
#[derive(Debug)]
// Each is a fact of its own, as in a kernel's socket.
#[allow(clippy::struct_excessive_bools)]
pub(super) struct Wire {
    // Towards the server.
    input: Vec<u8>,
    arrived: usize,
    read: usize,
    receive_capacity: usize,
    /// The byte before which every read stops.
    urgent: Option<usize>,
    half_closed: bool,
    reset: bool,
    ending: Ending,
    // Towards the client.
    expected: Vec<u8>,
    written: usize,
    received: usize,
    send_capacity: usize,
    reading: Reading,
    // The server's side.
    token: Option<usize>,
    pending: bool,
    /// A write found no room, so an edge will tell of it.
    awaits_room: bool,
    told_end: bool,
    told_reset: bool,
    /// The handler asked for the close.
    closing: bool,
    /// When the server ended its stream, and how much it had read by then.
    ended: Option<(Millis, usize)>,
    /// When the server last moved a byte.
    active: Millis,
    /// Bytes that it has moved in this turn.
    moved: usize,
    /// What had arrived when the server was asked to end.
    owed_to_drain: usize,
    dropped: Option<Millis>,
    /// A close with unread bytes, or bytes after it, has reset the connection.
    cut: bool,
    reason: Option<CloseReason>,
}

impl Wire {
    fn unread(&self) -> usize {
        self.arrived - self.read
    }

    fn in_flight(&self) -> usize {
        self.written - self.received
    }

    fn has_room(&self) -> bool {
        (self.send_capacity - self.in_flight()) * 3 >= self.send_capacity
    }

    fn is_readable(&self) -> bool {
        self.unread() > 0
            || (self.half_closed && !self.told_end)
            || (self.reset && !self.told_reset)
    }

    fn is_open(&self) -> bool {
        self.dropped.is_none()
    }

    /// Whether the connection could take its course to the end: nobody reset, timed out or cut it.
    fn is_orderly(&self) -> bool {
        let in_order = |reason| {
            matches!(
                reason,
                CloseReason::PeerClosed | CloseReason::Handler | CloseReason::Shutdown
            )
        };
        !self.reset && !self.cut && self.reason.is_none_or(in_order)
    }

    /// What an event would say now.
    fn readiness(&self) -> Readiness {
        let read_closed = self.half_closed || self.reset;
        let gone = self.reset || (self.half_closed && self.ended.is_some());
        let priority = self
            .urgent
            .is_some_and(|urgent| (self.read..self.arrived).contains(&urgent));
        Readiness {
            readable: self.unread() > 0 || read_closed,
            writable: self.has_room() || gone,
            read_until_would_block: read_closed || gone || priority,
        }
    }
}

pub(super) struct Kernel<'a> {
    pub(super) random: Random,
    pub(super) now: Millis,
    pub(super) wires: Vec<Wire>,
    pub(super) fault: Option<String>,
    pub(super) trace: Option<Vec<String>>,
    /// How often anything has moved: bytes, an end, a reset.
    pub(super) moves: usize,
    model: &'a dyn Fn(&[u8]) -> Vec<u8>,
    limits: Limits,
    counters: Arc<Counters>,
    closed: [u64; CloseReason::ALL.len()],
    /// A stream that was dropped, and whose reason will be counted next.
    unexplained: Option<usize>,
    drained_at: Option<Millis>,
    /// Reads are cut short at random, and streams say that they promise nothing.
    promises_nothing: bool,
    /// One call in this many is interrupted, or lets clients act meanwhile.
    disturbance: usize,
}

impl<'a> Kernel<'a> {
    pub(super) fn new(
        mut random: Random,
        model: &'a dyn Fn(&[u8]) -> Vec<u8>,
        limits: Limits,
        counters: Arc<Counters>,
        trace: bool,
    ) -> Self {
        Self {
            promises_nothing: random.one_in(8),
            disturbance: random.pick(&[2, 8, 1000]),
            random,
            now: 0,
            wires: Vec::new(),
            fault: None,
            trace: trace.then(Vec::new),
            moves: 0,
            model,
            limits,
            counters,
            closed: [0; CloseReason::ALL.len()],
            unexplained: None,
            drained_at: None,
        }
    }

    pub(super) fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>6} ms  {}", self.now, what()));
        }
    }

    pub(super) fn fail(&mut self, fault: String) {
        self.note(|| format!("FAULT: {fault}"));
        self.fault.get_or_insert(fault);
    }

    fn check(&mut self, holds: bool, fault: impl FnOnce() -> String) {
        if !holds {
            self.fail(fault());
        }
    }

    /// A client connects, meaning to say `input`.
    pub(super) fn connect(&mut self, input: Vec<u8>) -> usize {
        let expected = (self.model)(&input);
        let random = &mut self.random;
        let wire = Wire {
            arrived: 0,
            read: 0,
            receive_capacity: random.pick(&[1, 7, 64, 300]),
            urgent: None,
            half_closed: false,
            reset: false,
            ending: random.pick(&[
                Ending::HalfClose,
                Ending::HalfClose,
                Ending::HalfClose,
                Ending::Stay,
                Ending::Reset,
            ]),
            written: 0,
            received: 0,
            send_capacity: random.pick(&[1, 5, 40, 300]),
            reading: random.pick(&[
                Reading::AtOnce,
                Reading::AtOnce,
                Reading::AtOnce,
                Reading::Late,
                Reading::Never,
            ]),
            token: None,
            pending: false,
            awaits_room: false,
            told_end: false,
            told_reset: false,
            closing: false,
            ended: None,
            active: self.now,
            moved: 0,
            owed_to_drain: 0,
            dropped: None,
            cut: false,
            reason: None,
            input,
            expected,
        };
        let id = self.wires.len();
        self.note(|| {
            format!(
                "client {id} connects: {} bytes, then {:?}; reads {:?}; windows {} and {}",
                wire.input.len(),
                wire.ending,
                wire.reading,
                wire.receive_capacity,
                wire.send_capacity
            )
        });
        self.wires.push(wire);
        id
    }

    /// Any client does anything.
    pub(super) fn anybody_acts(&mut self) {
        if self.wires.is_empty() {
            return;
        }
        let id = self.random.below(self.wires.len());
        match self.random.below(8) {
            0..4 => self.send(id),
            4..7 => {
                if self.wires[id].reading == Reading::AtOnce {
                    let amount = self.random.up_to(self.wires[id].send_capacity);
                    self.receive(id, amount);
                }
            }
            _ => match self.wires[id].ending {
                Ending::Reset if self.random.one_in(4) => self.reset(id),
                Ending::HalfClose => self.half_close(id),
                _ => {}
            },
        }
    }

    /// Every client does all that it still means to.
    pub(super) fn everybody_acts(&mut self, late_ones_too: bool) {
        for id in 0..self.wires.len() {
            self.send(id);
            match self.wires[id].reading {
                Reading::AtOnce => self.receive(id, usize::MAX),
                Reading::Late if late_ones_too => self.receive(id, usize::MAX),
                Reading::Late | Reading::Never => {}
            }
            match self.wires[id].ending {
                Ending::HalfClose => self.half_close(id),
                Ending::Reset if late_ones_too => self.reset(id),
                Ending::Reset | Ending::Stay => {}
            }
        }
    }

    fn send(&mut self, id: usize) {
        let wire = &mut self.wires[id];
        let most = (wire.receive_capacity - wire.unread()).min(wire.input.len() - wire.arrived);
        if most == 0 || wire.half_closed || wire.reset || wire.cut {
            return;
        }
        if !wire.is_open() {
            wire.cut = true;
            return self.note(|| format!("client {id} sends to a closed connection: reset"));
        }
        let count = self.random.up_to(most);
        let urgent = self.random.one_in(8);
        let wire = &mut self.wires[id];
        wire.arrived += count;
        self.moves += 1;
        wire.pending = true;
        if urgent {
            wire.urgent = Some(wire.arrived - 1);
        }
        self.note(|| {
            format!(
                "client {id} sends {count} bytes{}",
                if urgent { ", urgent" } else { "" }
            )
        });
        if self.wires[id].ending == Ending::HalfClose && self.random.one_in(2) {
            self.half_close(id);
        }
    }

    /// Ends the client's stream, if it has sent all of it.
    fn half_close(&mut self, id: usize) {
        let wire = &mut self.wires[id];
        if wire.half_closed || wire.reset || wire.cut || wire.arrived < wire.input.len() {
            return;
        }
        wire.half_closed = true;
        self.moves += 1;
        wire.pending = true;
        self.note(|| format!("client {id} ends its stream"));
    }

    fn reset(&mut self, id: usize) {
        let purged = self.random.one_in(2);
        let wire = &mut self.wires[id];
        if wire.half_closed || wire.reset || wire.cut || !wire.is_open() {
            return;
        }
        wire.reset = true;
        self.moves += 1;
        wire.pending = true;
        // What was not read yet may be lost to the server, or not.
        if purged {
            wire.arrived = wire.read;
        }
        self.note(|| format!("client {id} resets its connection"));
    }

    fn receive(&mut self, id: usize, most: usize) {
        let wire = &mut self.wires[id];
        let count = most.min(wire.in_flight());
        if count == 0 || wire.reset || wire.cut {
            return;
        }
        wire.received += count;
        self.moves += 1;
        if wire.awaits_room && wire.has_room() {
            wire.awaits_room = false;
            wire.pending = true;
        }
        self.note(|| format!("client {id} reads {count} bytes"));
    }

    /// Whether a poll would return at once.
    pub(super) fn is_anyone_pending(&self) -> bool {
        self.wires
            .iter()
            .any(|wire| wire.pending && wire.token.is_some() && wire.is_open())
    }

    /// What one poll returns: of those who are pending some or all, in any order, with the flags of
    /// this moment; now and then twice or in two parts, as kqueue does, or for nothing.
    pub(super) fn poll(&mut self, everyone: bool) -> Vec<Event> {
        let mut batch = Vec::new();
        for id in 0..self.wires.len() {
            let wire = &mut self.wires[id];
            wire.moved = 0;
            let (Some(token), true) = (wire.token, wire.is_open()) else {
                continue;
            };
            if wire.pending && (everyone || !self.random.one_in(4)) {
                self.wires[id].pending = false;
                self.take_event(id, token, &mut batch);
            } else if self.random.one_in(32) {
                let spurious = Readiness {
                    readable: self.random.one_in(2),
                    writable: self.random.one_in(2),
                    read_until_would_block: self.random.one_in(2),
                };
                self.note(|| format!("spurious event for {id}: {spurious:?}"));
                batch.push(Event::Ready(token, spurious));
            }
        }
        for last in (1..batch.len()).rev() {
            let other = self.random.below(last + 1);
            batch.swap(last, other);
        }
        batch
    }

    fn take_event(&mut self, id: usize, token: usize, batch: &mut Vec<Event>) {
        let event = self.wires[id].readiness();
        if event == Readiness::default() {
            return;
        }
        self.note(|| format!("event for {id}: {event:?}"));
        match self.random.below(8) {
            0 => batch.extend([Event::Ready(token, event); 2]),
            1 => {
                let (mut reading, mut writing) = (event, event);
                reading.writable = false;
                writing.readable = false;
                batch.extend([Event::Ready(token, reading), Event::Ready(token, writing)]);
            }
            _ => batch.push(Event::Ready(token, event)),
        }
    }

    /// The server was asked to end: what has arrived by now is to be answered.
    pub(super) fn note_what_a_drain_owes(&mut self) {
        for wire in &mut self.wires {
            wire.owed_to_drain = wire.arrived;
        }
    }

    /// The worker learns that it is to drain.
    pub(super) fn start_drain(&mut self) {
        if self.drained_at.is_none() {
            self.drained_at = Some(self.now);
            self.note(|| "the drain begins".to_owned());
        }
    }

    /// What must hold whenever the worker has come out of a turn.
    pub(super) fn check_turn(&mut self) {
        self.explain();
        let stats = self.counters.snapshot();
        let total = stats.total();
        let open = self.wires.iter().filter(|wire| wire.is_open()).count();
        let bound = (open * 2 * self.limits.buffer_size) as u64;
        self.check(total.buffered <= bound, || {
            format!(
                "{} bytes are held for {open} connections, more than {bound}",
                total.buffered
            )
        });
        let read: usize = self.wires.iter().map(|wire| wire.read).sum();
        let written: usize = self.wires.iter().map(|wire| wire.written).sum();
        self.check(
            (total.bytes_in, total.bytes_out) == (read as u64, written as u64),
            || {
                format!(
                    "{read} bytes in and {written} out, but {} and {} were counted",
                    total.bytes_in, total.bytes_out
                )
            },
        );
        let check_balance = stats.check_balance();
        // What is in the mailbox still has not reached its worker.
        if stats.accepted == total.assigned {
            self.check(check_balance.is_none(), || {
                check_balance.unwrap_or_default()
            });
        }
        self.check_fairness();
        self.check_deadlines();
    }

    /// Nobody has moved more than one turn allows.
    fn check_fairness(&mut self) {
        let Limits {
            buffer_size,
            budget,
            ..
        } = self.limits;
        // What was stuck; then each round reads and sends a buffer; then as many discard one.
        let run_max = (1 + 3 * budget as usize) * buffer_size;
        for id in 0..self.wires.len() {
            let moved = self.wires[id].moved;
            self.check(moved <= MAX_RUNS * run_max, || {
                format!("connection {id} has moved {moved} bytes in one turn")
            });
        }
    }

    /// Nobody is open beyond his time.
    fn check_deadlines(&mut self) {
        let (now, limits) = (self.now, self.limits);
        let late = |timeout_of: Millis| timeout_of + (timeout_of / 8).max(1);
        for id in 0..self.wires.len() {
            let wire = &self.wires[id];
            if !wire.is_open() || wire.token.is_none() {
                continue;
            }
            let overdue = match wire.ended {
                Some((at, _)) if self.drained_at.is_none() => {
                    now >= at + late(limits.linger_timeout)
                }
                Some(_) => false,
                None => limits
                    .idle_timeout
                    .is_some_and(|idle_timeout| now >= wire.active + late(idle_timeout)),
            };
            let cut = self
                .drained_at
                .is_some_and(|at| now >= at + limits.drain_timeout);
            self.check(!overdue && !cut, || {
                let bound = if cut { "the drain's end" } else { "its time" };
                format!("connection {id} is open beyond {bound}")
            });
        }
    }

    /// What must hold when the worker would now sleep until something happens.
    pub(super) fn check_rest(&mut self) {
        for id in 0..self.wires.len() {
            let wire = &self.wires[id];
            if !wire.is_open() || wire.token.is_none() || wire.awaits_room {
                continue;
            }
            if wire.is_readable() {
                let (unread, end) = (wire.unread(), wire.half_closed || wire.reset);
                self.fail(format!(
                    "connection {id} is forgotten: {unread} bytes{} wait to be read, and no event will come",
                    if end { " and its end" } else { "" }
                ));
            } else if self.drained_at.is_some() && wire.ended.is_none() {
                self.fail(format!(
                    "connection {id} is forgotten: nothing keeps it open, and the drain has not ended it"
                ));
            } else if wire.ended.is_none() && !wire.told_end {
                let due = (self.model)(&wire.input[..wire.read]).len();
                let written = wire.written;
                self.check(written == due, || {
                    format!("connection {id} is forgotten: of {due} bytes due only {written} were written")
                });
            }
        }
    }

    /// What must hold when every client has done all that it means to, and the server is at rest.
    pub(super) fn check_completeness(&mut self) {
        for id in 0..self.wires.len() {
            let wire = &self.wires[id];
            let timed_out = wire.ended.is_some() && !wire.closing;
            if wire.reading == Reading::Never || !wire.is_orderly() || timed_out {
                continue;
            }
            let due = (self.model)(&wire.input[..wire.arrived]).len();
            let (received, sent_all) = (wire.received, wire.arrived == wire.input.len());
            let ended = !wire.is_open() || !wire.half_closed;
            self.check(received == due && sent_all, || {
                format!("client {id} read all it could, and got {received} of {due} bytes")
            });
            self.check(ended, || {
                format!("client {id} ended its stream, and the connection stays open")
            });
        }
    }

    /// Once the worker has ended.
    pub(super) fn check_end(&mut self) {
        let left = self.wires.iter().filter(|wire| wire.is_open()).count();
        self.check(left == 0, || {
            format!("{left} connections outlive their worker")
        });
        let stats = self.counters.snapshot();
        let check_balance = stats.check_balance();
        self.check(check_balance.is_none(), || {
            check_balance.unwrap_or_default()
        });
        let (open, buffered) = (stats.open(), stats.total().buffered);
        self.check(open == 0 && buffered == 0, || {
            format!("at the end {open} connections and {buffered} bytes are counted as left")
        });
    }

    /// Finds out for what reason the stream dropped last was closed, and judges it.
    fn explain(&mut self) {
        let counted = self.counters.workers[0].closed.each_ref().map(Counter::get);
        let reasons: Vec<CloseReason> = CloseReason::ALL
            .into_iter()
            .filter(|&reason| counted[reason as usize] != self.closed[reason as usize])
            .collect();
        let before: u64 = self.closed.iter().sum();
        let count = counted.iter().sum::<u64>() - before;
        self.closed = counted;
        let dropped = self.unexplained.take();
        if count != u64::from(dropped.is_some()) {
            return self.fail(format!(
                "{count} closes were counted for the drop of {dropped:?}"
            ));
        }
        if let (Some(id), &[reason]) = (dropped, &reasons[..]) {
            self.note(|| format!("connection {id} was closed: {reason}"));
            self.wires[id].reason = Some(reason);
            if let Err(why) = self.after_process(&self.wires[id], reason) {
                self.fail(format!("connection {id} was closed ({reason}), but {why}"));
            }
        }
    }

    /// Whether a connection was rightly closed, and had got all that it was due.
    fn after_process(&self, wire: &Wire, reason: CloseReason) -> Result<(), String> {
        let limits = &self.limits;
        let closed_at = wire.dropped.unwrap_or(self.now);
        let since_end = wire.ended.map(|(at, _)| closed_at - at);
        let read = wire.ended.map_or(wire.read, |(_, read)| read);
        let is_cut = self
            .drained_at
            .is_some_and(|at| closed_at >= at + limits.drain_timeout);
        let due = |read: usize| (self.model)(&wire.input[..read]).len();
        let complete = |due: usize| match wire.written == due {
            true => Ok(()),
            false => Err(format!(
                "of {due} bytes due only {} were written",
                wire.written
            )),
        };
        let lingered = match since_end {
            _ if wire.told_end || is_cut => Ok(()),
            Some(time) if time >= limits.linger_timeout => Ok(()),
            Some(time) => Err(format!("its client's end was awaited for {time} ms only")),
            None => Err("its own end was not sent first".to_owned()),
        };
        let holds = |condition: bool, fault: &str| match condition {
            true => Ok(()),
            false => Err(fault.to_owned()),
        };
        match reason {
            CloseReason::PeerClosed => {
                holds(wire.told_end, "its client has not ended").and(complete(due(wire.arrived)))
            }
            CloseReason::Handler => holds(wire.closing, "its handler has not asked for it")
                .and(complete(due(read)))
                .and(lingered),
            CloseReason::Shutdown => {
                let deaf = self
                    .drained_at
                    .and_then(|at| Some(wire.ended?.0 >= at + limits.drain_timeout / 2));
                holds(
                    deaf.is_some(),
                    "there is no drain, or its own end was not sent",
                )
                .and(holds(
                    deaf == Some(true) || read >= wire.owed_to_drain,
                    "not all that had arrived was read",
                ))
                .and(complete(due(read)))
                .and(lingered)
            }
            CloseReason::IdleTimeout => {
                let idle = wire.ended.map_or(closed_at, |(at, _)| at) - wire.active;
                holds(
                    limits
                        .idle_timeout
                        .is_some_and(|idle_timeout| idle >= idle_timeout),
                    "it was not idle for so long",
                )
                .and(since_end.map_or(Ok(()), |_| lingered))
            }
            CloseReason::DrainTimeout => holds(is_cut, "the drain's time is not over"),
            CloseReason::Reset => holds(wire.told_reset, "nobody reset it"),
            CloseReason::Error => Err("no such error happened".to_owned()),
            CloseReason::Panic => Err("its handler should not panic".to_owned()),
            CloseReason::BufferFull => {
                Err("its handler should take what fills a whole buffer".to_owned())
            }
        }
    }

    /// Whether a call is interrupted; or clients act meanwhile.
    fn is_interrupted(&mut self) -> bool {
        if !self.random.one_in(self.disturbance) {
            return false;
        }
        if self.random.one_in(2) {
            return true;
        }
        self.anybody_acts();
        false
    }
}

/// The server's end of a connection.
pub(super) struct SimulatedStream<'a> {
    id: usize,
    kernel: Rc<RefCell<Kernel<'a>>>,
}

impl<'a> SimulatedStream<'a> {
    pub(super) fn new(id: usize, kernel: &Rc<RefCell<Kernel<'a>>>) -> Self {
        Self {
            id,
            kernel: Rc::clone(kernel),
        }
    }

    pub(super) fn id(&self) -> usize {
        self.id
    }

    /// From here on events come under `token`, the first one for what is so already.
    pub(super) fn register(&mut self, token: usize) {
        let mut kernel = self.kernel.borrow_mut();
        let id = self.id;
        kernel.note(|| format!("connection {id} is registered as {token}"));
        let now = kernel.now;
        let in_use = kernel
            .wires
            .iter()
            .any(|wire| wire.is_open() && wire.token == Some(token));
        kernel.check(!in_use, || {
            format!("token {token} belongs to another already")
        });
        let wire = &mut kernel.wires[id];
        wire.token = Some(token);
        wire.pending = true;
        wire.active = now;
    }
}

/// Notes that a connection's handler was called, and whether it asked for the close.
pub(super) fn note_handling(kernel: &RefCell<Kernel<'_>>, id: usize, closing: bool) {
    let mut kernel = kernel.borrow_mut();
    let wire = &mut kernel.wires[id];
    let over = wire.closing || wire.ended.is_some();
    wire.closing |= closing;
    kernel.check(!over, || {
        format!("connection {id} is closing, and its handler is called again")
    });
}

impl Read for SimulatedStream<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut kernel = self.kernel.borrow_mut();
        let (kernel, id) = (&mut *kernel, self.id);
        kernel.check(!bytes.is_empty(), || {
            format!("connection {id} reads without room")
        });
        if kernel.is_interrupted() {
            return Err(ErrorKind::Interrupted.into());
        }
        let short = kernel.promises_nothing && kernel.random.one_in(2);
        let wire = &mut kernel.wires[id];
        if wire.unread() > 0 {
            let mut count = wire.unread().min(bytes.len());
            if let Some(urgent) = wire.urgent.filter(|urgent| *urgent > wire.read) {
                count = count.min(urgent - wire.read);
            }
            if short {
                count = kernel.random.up_to(count);
            }
            bytes[..count].copy_from_slice(&wire.input[wire.read..wire.read + count]);
            wire.read += count;
            wire.moved += count;
            kernel.moves += 1;
            if wire.ended.is_none() {
                wire.active = kernel.now;
            }
            kernel.note(|| format!("connection {id}: read {count} of {} bytes", bytes.len()));
            return Ok(count);
        }
        if wire.reset && !wire.told_reset {
            wire.told_reset = true;
            kernel.note(|| format!("connection {id}: read says reset"));
            return Err(ErrorKind::ConnectionReset.into());
        }
        if wire.half_closed || wire.reset {
            wire.told_end = true;
            kernel.note(|| format!("connection {id}: read says end"));
            return Ok(0);
        }
        kernel.note(|| format!("connection {id}: read would block"));
        Err(ErrorKind::WouldBlock.into())
    }
}

impl Write for SimulatedStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kernel = self.kernel.borrow_mut();
        let (kernel, id) = (&mut *kernel, self.id);
        if kernel.is_interrupted() {
            return Err(ErrorKind::Interrupted.into());
        }
        let (short, edge) = (kernel.random.one_in(8), kernel.random.one_in(2));
        let wire = &mut kernel.wires[id];
        if wire.reset {
            wire.told_reset = true;
            kernel.note(|| format!("connection {id}: write says broken pipe"));
            return Err(ErrorKind::BrokenPipe.into());
        }
        let room = wire.send_capacity - wire.in_flight();
        if room == 0 {
            wire.awaits_room = true;
            kernel.note(|| format!("connection {id}: write would block"));
            return Err(ErrorKind::WouldBlock.into());
        }
        let mut count = room.min(bytes.len());
        wire.awaits_room |= count < bytes.len() && edge;
        if short {
            count = kernel.random.up_to(count);
        }
        let due = wire.expected.get(wire.written..wire.written + count);
        let (from, ended) = (wire.written, wire.ended.is_some());
        let right = due == Some(&bytes[..count]);
        wire.written += count;
        wire.moved += count;
        kernel.moves += 1;
        if !ended {
            wire.active = kernel.now;
        }
        kernel.note(|| format!("connection {id}: wrote {count} of {} bytes", bytes.len()));
        kernel.check(right, || {
            format!("connection {id}: bytes {from}.. of its output are not what they should be")
        });
        kernel.check(!ended, || format!("connection {id} writes after its end"));
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for SimulatedStream<'_> {
    fn shutdown_write(&mut self) -> io::Result<()> {
        let mut kernel = self.kernel.borrow_mut();
        let (id, now) = (self.id, kernel.now);
        kernel.note(|| format!("connection {id}: the server ends its stream"));
        let wire = &mut kernel.wires[id];
        if wire.reset {
            wire.told_reset = true;
            return Err(ErrorKind::NotConnected.into());
        }
        let twice = wire.ended.replace((now, wire.read)).is_some();
        kernel.check(!twice, || format!("connection {id} ends its stream twice"));
        Ok(())
    }

    fn short_read_means_drained(&self) -> bool {
        !self.kernel.borrow().promises_nothing
    }
}

impl Drop for SimulatedStream<'_> {
    fn drop(&mut self) {
        // Borrowed only where a panic is on its way.
        let Ok(mut kernel) = self.kernel.try_borrow_mut() else {
            return;
        };
        let (id, now) = (self.id, kernel.now);
        kernel.explain();
        kernel.note(|| format!("connection {id}: the server drops it"));
        let wire = &mut kernel.wires[id];
        wire.dropped = Some(now);
        // The kernel answers unread bytes with a reset, which destroys what is on its way.
        wire.cut |= wire.unread() > 0;
        kernel.unexplained = Some(id);
    }
}
