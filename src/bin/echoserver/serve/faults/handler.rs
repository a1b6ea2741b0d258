//! The handler of a connection that misbehaves. It uses the public interface of the library only, and reads no clock.
//!
//! What is received waits in `input` until it goes through one pipeline: delay, slices, throttle, and the faults that change
//! a byte. Beside it, a connection can end by one of the other faults. All times are in milliseconds.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use echoserver::{Action, Context, Echo, Event, Handler};

/// The longest delay is divided into at most this many steps of a whole millisecond. A connection has one entry for a step.
const MAX_STEPS: u64 = 1024;

/// A throttled connection sends what 10 ms allow at a time, and catches up on 50 ms that it has missed.
const THROTTLE_STEP: u64 = 10;
const THROTTLE_BURST: u64 = 50;

/// Declares the kinds with their names.
macro_rules! kinds {
    ($($kind:ident $name:literal)*) => {
        /// What can go wrong. The last three are options of their own.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Kind {
            $($kind,)*
        }

        /// All kinds in their order, with their names.
        pub(crate) const KINDS: [(Kind, &str); 11] = [$((Kind::$kind, $name),)*];
    };
}

kinds! {
    Close "close" Cut "cut" Reset "reset" Stall "stall" Blackhole "blackhole"
    Corrupt "corrupt" Repeat "repeat" Drop "drop"
    Delay "delay" Throttle "throttle" Slice "slice"
}

impl Kind {
    /// Whether it changes one byte of what comes back. The others end the answers.
    pub(crate) fn changes_a_byte(self) -> bool {
        matches!(self, Self::Corrupt | Self::Repeat | Self::Drop)
    }
}

/// When a fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// After this many bytes were received.
    Received(u64),
    /// This long after the first call of the handler.
    Elapsed(u64),
    /// When the client has ended its half.
    Eof,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) when: When,
}

/// What the connections that misbehave do, and how often they have.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) delay: Option<RangeInclusive<u64>>,
    /// Bytes per second.
    pub(crate) throttle: Option<u64>,
    /// The sizes of pieces, and the pause between them.
    pub(crate) slice: Option<(RangeInclusive<u64>, u64)>,
    pub(crate) faults: Vec<Fault>,
    /// How long a connection is kept without an answer.
    pub(crate) hold: u64,
    /// How often each kind has happened; connections with a delay, a throttle or slices.
    pub(crate) counts: [AtomicU64; KINDS.len()],
}

/// Random numbers of one connection (SplitMix64).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Random(u64);

impl Random {
    /// They depend on the seed and on the number of the connection only.
    pub(crate) fn new(seed: u64, number: u64) -> Self {
        Self(Self(Self(seed).next() ^ number).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number from `range`, all with the same probability.
    pub(crate) fn within(&mut self, range: &RangeInclusive<u64>) -> u64 {
        range.start() + self.next() % (range.end() - range.start() + 1)
    }
}

/// An echo that misbehaves if it has a pipeline, and otherwise does not.
#[derive(Debug)]
pub(crate) struct Faulty<'a>(pub(crate) Option<(&'a Plan, Box<Pipeline>)>);

impl Handler for Faulty<'_> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        match &mut self.0 {
            Some((plan, pipeline)) => pipeline.process(plan, event, context),
            None => Echo.process(event, context),
        }
    }
}

/// The state of a connection that misbehaves.
#[derive(Debug, Default)]
pub(crate) struct Pipeline {
    random: Random,
    /// Faults that have not happened: those that change a byte, and those that end the answers.
    changes: Vec<Fault>,
    ends: Vec<Fault>,
    /// The time of the first call.
    opened: Option<u64>,
    /// Bytes received, and those of them that were answered or left out: `input` holds the difference.
    received: u64,
    answered: u64,
    /// The client has ended its half.
    ended: bool,
    /// Where the answer ends, after which the connection closes.
    last: Option<u64>,
    /// When bytes at the end of `input` are due, and how many.
    delayed: VecDeque<(u64, u64)>,
    /// How many bytes at the front of `input` are due.
    due: u64,
    /// What the throttle allowed at a time, in thousandths of a byte.
    credit: u64,
    credited: u64,
    /// The size of the next piece, 0 if it is not chosen, and when it may be sent.
    piece: u64,
    piece_at: u64,
    /// Nothing is answered any more: the fault, and until when.
    silence: Option<(Fault, u64)>,
    /// The faults that have happened, and what has ended a silence, for the log.
    notes: Vec<String>,
    /// When the handler must be called next, or later than any time.
    wake: u64,
}

impl Pipeline {
    pub(crate) fn new(plan: &Plan, random: Random) -> Box<Self> {
        let faults = plan.faults.iter();
        let (changes, ends) = faults.partition(|fault| fault.kind.changes_a_byte());
        let options = [
            plan.delay.is_some(),
            plan.throttle.is_some(),
            plan.slice.is_some(),
        ];
        for (count, is_chosen) in plan.counts[Kind::Delay as usize..].iter().zip(options) {
            count.fetch_add(is_chosen.into(), Relaxed);
        }
        Box::new(Self {
            random,
            changes,
            ends,
            ..Self::default()
        })
    }

    fn process(&mut self, plan: &Plan, event: Event, context: &mut Context<'_>) -> Action {
        let now = context.now().as_millis() as u64;
        self.ended |= event == Event::Eof;
        let opened = *self.opened.get_or_insert(now);
        self.wake = u64::MAX;
        self.take_in(plan, now, opened, context.input.len() as u64);
        let action = self.go_on(plan, now, opened, context);
        let timeout = Duration::from_millis(self.wake.saturating_sub(now));
        // `None` stops a timer that is not needed any more.
        context.set_timer(Some(timeout).filter(|_| self.wake != u64::MAX));
        action
    }

    /// Counts what was received, and when it is due.
    fn take_in(&mut self, plan: &Plan, now: u64, opened: u64, length: u64) {
        let new = self.answered + length - self.received;
        if new == 0 {
            return;
        }
        for fault in &mut self.changes {
            if matches!(fault.when, When::Elapsed(time) if now >= opened + time) {
                fault.when = When::Received(self.received);
            }
        }
        self.received += new;
        match &plan.delay {
            // What is discarded has no time.
            _ if self.silence.is_some() => {}
            None => self.due += new,
            Some(delay) => {
                let step = delay.end().div_ceil(MAX_STEPS).max(1);
                // The time of a tick is rounded down; so a delay is never shorter by that.
                let at = (now + 1 + self.random.within(delay)).next_multiple_of(step);
                match self.delayed.back_mut() {
                    // The order is kept.
                    Some((last, count)) if *last >= at => *count += new,
                    _ => self.delayed.push_back((at, new)),
                }
            }
        }
    }

    /// Lets happen what is due, answers what is due, and returns what comes next.
    fn go_on(&mut self, plan: &Plan, now: u64, opened: u64, context: &mut Context<'_>) -> Action {
        loop {
            if let Some(action) = self.keep_silent(now, context) {
                return action;
            }
            if let Some(fault) = self.take_end(now, opened, context.output.is_empty()) {
                let offset = received(&fault).min(self.received);
                self.record(plan, fault.kind, offset, context);
                match fault.kind {
                    Kind::Close => self.last = Some(self.received),
                    Kind::Cut => return Action::Close,
                    Kind::Reset => return Action::Reset,
                    _ => self.silence = Some((fault, now + plan.hold)),
                }
            } else if !context.output.is_empty() {
                // Nothing is appended to it, so that pieces stay apart.
                return Action::Flush;
            } else if self.last == Some(self.answered) {
                return Action::Close;
            } else if !self.answer(plan, now, context) {
                let is_done = context.input.is_empty();
                return if is_done {
                    Action::Continue
                } else {
                    Action::Pending
                };
            }
        }
    }

    /// After a stall or as a black hole, answers nothing until the client ends its half, or the time is over.
    fn keep_silent(&mut self, now: u64, context: &mut Context<'_>) -> Option<Action> {
        let (fault, until) = self.silence?;
        if fault.kind == Kind::Blackhole {
            context.input.consume(context.input.len());
            self.answered = self.received;
        }
        let is_over = now >= until;
        if !is_over && (!self.ended || fault.when == When::Eof) {
            self.wake = until;
            return Some(Action::Pending);
        }
        self.note(if is_over { "hold" } else { "eof" }.to_owned(), context);
        Some(Action::Reset)
    }

    /// Takes a fault that ends the answers, if one is due. With a number of bytes, that is when these are answered.
    fn take_end(&mut self, now: u64, opened: u64, is_sent: bool) -> Option<Fault> {
        let is_due = |fault: &Fault| match (fault.kind, fault.when) {
            (Kind::Close, When::Received(count)) => self.received >= count,
            // A reset discards what is not sent.
            (Kind::Reset, When::Received(count)) => self.answered >= count && is_sent,
            (_, When::Received(count)) => self.answered >= count,
            (_, When::Elapsed(time)) => now >= opened + time,
            (_, When::Eof) => self.ended,
        };
        if let Some(index) = self.ends.iter().position(is_due) {
            return Some(self.ends.remove(index));
        }
        for fault in &self.ends {
            if let When::Elapsed(time) = fault.when {
                self.wake = self.wake.min(opened + time);
            }
        }
        None
    }

    /// Answers what is due, up to the next fault that ends the answers. Returns whether that was anything.
    fn answer(&mut self, plan: &Plan, now: u64, context: &mut Context<'_>) -> bool {
        while let Some(&(at, count)) = self.delayed.front()
            && at <= now
        {
            self.due += count;
            self.delayed.pop_front();
        }
        let ends = self.ends.iter().map(received);
        let end = ends.chain(self.last).min().unwrap_or(u64::MAX);
        let count = self.due.min(end.saturating_sub(self.answered));
        let delayed_until = self.delayed.front().map_or(u64::MAX, |(at, _)| *at);
        let at = if count > 0 {
            self.piece_at
        } else {
            delayed_until
        };
        if count == 0 || now < at {
            self.wake = self.wake.min(at);
            return false;
        }
        if self.piece == 0 {
            let sizes = plan.slice.as_ref().map(|(sizes, _)| sizes);
            self.piece = sizes.map_or(u64::MAX, |sizes| self.random.within(sizes));
        }
        let count = self.throttled(plan, now, count.min(self.piece));
        if let Some((_, pause)) = plan.slice.as_ref().filter(|_| count > 0) {
            (self.piece, self.piece_at) = (0, now + pause);
        }
        self.forward(plan, count, context);
        self.credit = self
            .credit
            .saturating_sub(1000 * context.output.len() as u64);
        count > 0
    }

    /// Returns how many of `count` bytes the throttle allows now.
    fn throttled(&mut self, plan: &Plan, now: u64, count: u64) -> u64 {
        let Some(rate) = plan.throttle else {
            return count;
        };
        let earned = rate.saturating_mul(now - self.credited);
        let max = (rate * THROTTLE_BURST).max(1000);
        self.credit = self.credit.saturating_add(earned).min(max);
        self.credited = now;
        let wanted = count.min((rate * THROTTLE_STEP / 1000).max(1));
        let missing = (1000 * wanted).saturating_sub(self.credit);
        if missing > 0 {
            self.wake = self.wake.min(now + missing.div_ceil(rate));
            return 0;
        }
        count.min(self.credit / 1000)
    }

    /// Moves up to `count` bytes from `input` to `output`, with the faults that change a byte.
    fn forward(&mut self, plan: &Plan, count: u64, context: &mut Context<'_>) {
        let end = self.answered + count;
        while self.answered < end && context.output.room() > 0 {
            let places = self.changes.iter().map(received).zip(0..);
            let (at, index) = places.min().unwrap_or((u64::MAX, 0));
            let until_fault = (at.min(end) - self.answered) as usize;
            if until_fault > 0 {
                let sent = context
                    .output
                    .push_some(&context.input.data()[..until_fault]);
                self.advance(sent, context);
                continue;
            }
            let kind = self.changes.remove(index).kind;
            match kind {
                Kind::Corrupt => context.input.data_mut()[0] ^= 1 << (at % 8),
                Kind::Repeat => _ = context.output.push_some(&context.input.data()[..1]),
                _ => self.advance(1, context),
            }
            self.record(plan, kind, at, context);
        }
    }

    /// Removes bytes that are answered, or left out.
    fn advance(&mut self, count: usize, context: &mut Context<'_>) {
        context.input.consume(count);
        self.answered += count as u64;
        self.due -= count as u64;
    }

    /// Counts a fault, and notes it and its byte.
    fn record(&mut self, plan: &Plan, kind: Kind, offset: u64, context: &Context<'_>) {
        let (_, name) = KINDS[kind as usize];
        plan.counts[kind as usize].fetch_add(1, Relaxed);
        self.note(format!("{name}@{offset}B"), context);
    }

    /// Adds to the note in the log record of the connection.
    fn note(&mut self, note: String, context: &Context<'_>) {
        self.notes.push(note);
        context.set_note(&self.notes.join(","));
    }
}

/// Returns the number of bytes after which a fault happens, or more than any.
fn received(fault: &Fault) -> u64 {
    match fault.when {
        When::Received(count) => count,
        _ => u64::MAX,
    }
}
