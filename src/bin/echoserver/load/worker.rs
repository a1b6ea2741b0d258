//! One thread of the load: an event loop that drives its share of the connections.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use socket2::{SockAddr, SockRef};

use crate::figures::Count;
use crate::load::Options;
use crate::load::flow::{Flow, Schedule, Timing};
use crate::load::tally::{Period, Tally, record};
use crate::payload::Payload;
use crate::target::{self, error_text};

/// Most bytes in one call. A message of up to 64 KiB is sent in one.
const MAX_SEND: usize = 64 << 10;
const MAX_RECEIVE: usize = 256 << 10;
/// Calls in each direction before other connections get their turn.
const MAX_CALLS: usize = 16;
/// Messages that become due in one tick, so that a rate that is too high does not delay the end.
const MAX_GRANTS: u64 = 10_000;
/// Connections that a thread opens at the same time before it starts.
const MAX_OPENING: usize = 64;
/// How long a failed connection stays closed.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// How often a thread looks for connections to open again or to give up, at least.
const MAX_SWEEP_INTERVAL: Duration = Duration::from_millis(500);
/// How often a thread looks whether it is to stop.
const MAX_SLEEP: Duration = Duration::from_millis(100);
/// On Linux, a short read or write proves that the next one would block, and a later change raises an event.
const SHORT_MEANS_BLOCKED: bool = cfg!(any(target_os = "linux", target_os = "android"));

/// What all threads do: the options, and what follows from them.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) options: &'a Options,
    pub(crate) address: SockAddr,
    pub(crate) size: u64,
    pub(crate) max_in_flight: u64,
    pub(crate) duration: Option<Duration>,
    pub(crate) threads: usize,
    pub(crate) connections: usize,
    pub(crate) stop: Arc<AtomicBool>,
    /// Passed by all threads when their connections are open.
    pub(crate) opened: Barrier,
}

pub(crate) struct Worker<'a> {
    plan: &'a Plan<'a>,
    poll: Poll,
    connections: Vec<Connection>,
    /// Connections that may make progress without an event.
    runnable: VecDeque<usize>,
    next_sweep: Instant,
    /// Number of the next connection to be opened: its stream depends on it.
    next_number: u64,
    schedule: Option<Schedule>,
    /// Messages that the schedule has made due.
    due: u64,
    /// Messages of this thread, and how many of them have not come back or been lost yet.
    messages: u64,
    remaining: u64,
    tally: Tally,
    /// Received bytes, then bytes to be sent: one buffer takes less of the caches than two.
    buffer: Vec<u8>,
}

#[allow(
    clippy::struct_excessive_bools,
    reason = "each is independent of the others"
)]
struct Connection {
    stream: Option<TcpStream>,
    payload: Payload,
    flow: Flow,
    is_connecting: bool,
    readable: bool,
    writable: bool,
    /// A short read may precede EOF.
    read_closed: bool,
    is_runnable: bool,
    is_answered: bool,
    opened: Instant,
    /// Sweeps in a row that have seen no new byte, and the bytes received at the last one that has.
    idle_sweeps: u32,
    swept_bytes: u64,
    /// When to open it again after a failure.
    retry: Option<Instant>,
    /// It has failed and is not opened again.
    has_ended: bool,
}

/// The current period of the run, and when the measurement starts and ends.
struct Phase<'a> {
    plan: &'a Plan<'a>,
    period: Period,
    period_end: Instant,
    start: Instant,
    end: Option<Instant>,
}

impl<'a> Phase<'a> {
    fn new(plan: &'a Plan<'a>, now: Instant) -> Self {
        let mut phase = Self {
            plan,
            period: Period::WarmUp,
            period_end: now + plan.options.warm_up,
            start: now,
            end: None,
        };
        if plan.options.warm_up.is_zero() {
            phase.advance(now);
        }
        phase
    }

    /// Starts the next period. The measurement starts with the first after the warm-up.
    fn advance(&mut self, now: Instant) {
        self.period = match self.period {
            Period::WarmUp => {
                (self.start, self.period_end) = (now, now);
                self.end = self.plan.duration.map(|duration| now + duration);
                Period::Second(1)
            }
            Period::Second(second) => Period::Second(second + 1),
        };
        self.period_end += Duration::from_secs(1);
    }
}

impl<'a> Worker<'a> {
    /// Prepares the thread with this index, without opening connections.
    pub(crate) fn new(plan: &'a Plan<'a>, index: usize) -> io::Result<Self> {
        let (threads, index, now) = (plan.threads as u64, index as u64, Instant::now());
        let share = |total: u64| total / threads + u64::from(index < total % threads);
        let schedule = plan.options.rate.map(|rate| Schedule {
            start: now,
            rate,
            first: index,
            step: threads,
        });
        let messages = plan.options.messages.map_or(u64::MAX, share);
        Ok(Self {
            plan,
            poll: Poll::new()?,
            connections: (0..share(plan.connections as u64))
                .map(|_| Connection::new(plan, now))
                .collect(),
            runnable: VecDeque::new(),
            next_sweep: now,
            next_number: index,
            schedule,
            due: 0,
            messages,
            remaining: messages,
            tally: Tally::new(),
            buffer: vec![0; MAX_RECEIVE],
        })
    }

    /// Runs until the plan is done, and reports what was counted once a second.
    pub(crate) fn run(mut self, reports: &Sender<(Period, Tally)>) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let opened = self.open_all(&mut events);
        self.plan.opened.wait();
        opened?;

        let mut now = Instant::now();
        let mut phase = Phase::new(self.plan, now);
        self.start(now);
        loop {
            while phase.period_end <= now {
                self.report(phase.period, reports);
                phase.advance(now);
            }
            let is_over = phase.end.is_some_and(|end| now >= end) || self.remaining == 0;
            if is_over || self.plan.stop.load(Relaxed) {
                self.finish(now.saturating_duration_since(phase.start));
                self.report(phase.period, reports);
                return Ok(());
            }
            let until_sweep = self.sweep(now);
            let mut wait = MAX_SLEEP.min(phase.period_end - now).min(until_sweep);
            if let Some(end) = phase.end {
                wait = wait.min(end - now);
            }
            if let Some(due) = self.grant_due(now) {
                wait = wait.min(sleep_before(due - now));
            }
            self.tick(&mut events, wait)?;
            now = Instant::now();
        }
    }

    /// Opens the connections, some at a time, until each is open or has failed.
    fn open_all(&mut self, events: &mut Events) -> io::Result<()> {
        if self.plan.options.connect {
            return Ok(());
        }
        let mut next = 0;
        loop {
            let is_connecting = |connection: &&Connection| connection.is_connecting;
            let mut opening = self.connections.iter().filter(is_connecting).count();
            while opening < MAX_OPENING && next < self.connections.len() {
                self.open(next);
                opening += usize::from(self.connections[next].is_connecting);
                next += 1;
            }
            if opening == 0 || self.plan.stop.load(Relaxed) {
                return Ok(());
            }
            self.tick(events, MAX_SLEEP)?;
            self.sweep(Instant::now());
        }
    }

    /// Allows messages that need no schedule, and sets the times of those that do.
    fn start(&mut self, now: Instant) {
        let count = self.connections.len() as u64;
        if let Some(schedule) = &mut self.schedule {
            schedule.start = now;
        }
        for index in 0..count {
            let flow = &mut self.connections[index as usize].flow;
            match self.schedule {
                Some(schedule) => flow.set_timing(Timing::Due(schedule.nth_of(index, count))),
                None if self.messages == u64::MAX => flow.grant(u64::MAX),
                None => {
                    flow.grant(self.messages / count + u64::from(index < self.messages % count));
                }
            }
            self.make_runnable(index as usize);
        }
    }

    /// Allows the messages that are due now, to one connection after the other; returns when the next is due.
    fn grant_due(&mut self, now: Instant) -> Option<Instant> {
        let schedule = self.schedule?;
        let limit = self.due.saturating_add(MAX_GRANTS);
        while self.due < self.messages {
            let next = schedule.due(self.due);
            if next > now || self.due == limit {
                return Some(next);
            }
            let index = (self.due % self.connections.len() as u64) as usize;
            self.due += 1;
            self.connections[index].flow.grant(1);
            self.make_runnable(index);
        }
        None
    }

    /// Waits for events, and gives each connection that may make progress one turn.
    fn tick(&mut self, events: &mut Events, wait: Duration) -> io::Result<()> {
        let wait = if self.runnable.is_empty() {
            wait
        } else {
            Duration::ZERO
        };
        match self.poll.poll(events, Some(wait)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in events.iter() {
            let index = event.token().0;
            let connection = &mut self.connections[index];
            connection.readable |= event.is_readable() || event.is_error();
            connection.writable |= event.is_writable() || event.is_error();
            connection.read_closed |= event.is_read_closed() || event.is_error();
            self.make_runnable(index);
        }
        for _ in 0..self.runnable.len() {
            if let Some(index) = self.runnable.pop_front() {
                self.connections[index].is_runnable = false;
                self.turn(index);
            }
        }
        Ok(())
    }

    fn make_runnable(&mut self, index: usize) {
        if !self.connections[index].is_runnable {
            self.connections[index].is_runnable = true;
            self.runnable.push_back(index);
        }
    }

    fn turn(&mut self, index: usize) {
        let connection = &self.connections[index];
        if connection.has_ended {
            self.remaining -= self.connections[index].flow.abandon();
            return;
        }
        let is_wanted = self.plan.options.connect && connection.flow.sendable() > 0;
        if is_wanted && connection.stream.is_none() && connection.retry.is_none() {
            // It may be complete at once.
            self.open(index);
        }
        let connection = &mut self.connections[index];
        let completed = self.tally.messages;
        let result = connection.transfer(&mut self.buffer, &mut self.tally);
        if self.messages < u64::MAX {
            self.remaining -= self.tally.messages - completed;
        }
        match result {
            Err(error) => self.fail(index, &error),
            Ok(()) if self.plan.options.connect && self.tally.messages > completed => {
                connection.stream = None;
                connection.flow.restart();
                self.make_runnable(index);
            }
            Ok(()) if connection.can_proceed() => self.make_runnable(index),
            Ok(()) => {}
        }
    }

    fn open(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        let now = Instant::now();
        connection.payload = Payload::new(self.next_number);
        self.next_number += self.plan.threads as u64;
        (connection.opened, connection.retry) = (now, None);
        (connection.idle_sweeps, connection.swept_bytes) = (0, 0);
        (connection.is_connecting, connection.writable) = (true, true);
        (connection.readable, connection.read_closed) = (false, false);
        if self.plan.options.connect && self.schedule.is_none() {
            connection.flow.set_timing(Timing::Opened(now));
        }
        let opened = start_connecting(&self.plan.address, self.plan.options.timeout).and_then(
            |mut stream| {
                let interest = Interest::READABLE | Interest::WRITABLE;
                self.poll
                    .registry()
                    .register(&mut stream, Token(index), interest)?;
                connection.stream = Some(stream);
                Ok(())
            },
        );
        match opened {
            // The connection may be complete already.
            Ok(()) => self.make_runnable(index),
            Err(error) => self.fail(index, &format!("cannot connect: {}", error_text(&error))),
        }
    }

    /// Closes a connection. With a limited number of messages it is not opened again, so that the run ends.
    fn fail(&mut self, index: usize, error: &str) {
        self.tally.failed += 1;
        self.tally.add_errors(error, 1);
        let connection = &mut self.connections[index];
        connection.stream = None;
        connection.is_connecting = false;
        let lost = connection.flow.restart();
        self.tally.lost += lost;
        connection.retry = Some(Instant::now() + RETRY_DELAY);
        if self.plan.options.messages.is_some() {
            self.remaining -= lost;
            connection.has_ended = true;
            self.make_runnable(index);
        }
    }

    /// Ends connections that make no progress, and opens failed ones again, if it is time; returns how long until it
    /// is again.
    ///
    /// Progress is measured in sweeps, not in time: after a pause of this process, answers may wait
    /// to be read.
    fn sweep(&mut self, now: Instant) -> Duration {
        let interval = (self.plan.options.timeout / 4).min(MAX_SWEEP_INTERVAL);
        if now < self.next_sweep {
            return self.next_sweep - now;
        }
        self.next_sweep = now + interval;
        for index in 0..self.connections.len() {
            let connection = &mut self.connections[index];
            if connection.stream.is_none() {
                if connection.retry.is_some_and(|retry| retry <= now) && !connection.has_ended {
                    self.open(index);
                }
                continue;
            }
            let received = connection.flow.received();
            let is_waiting = connection.is_connecting || connection.flow.is_awaiting_bytes();
            if !is_waiting || received > connection.swept_bytes {
                (connection.idle_sweeps, connection.swept_bytes) = (0, received);
                continue;
            }
            connection.idle_sweeps += 1;
            if connection.idle_sweeps * interval > self.plan.options.timeout {
                let error = match connection.is_connecting {
                    true => format!(
                        "cannot connect: no answer for {:?}",
                        self.plan.options.timeout
                    ),
                    false => format!("nothing came back for {:?}", self.plan.options.timeout),
                };
                self.fail(index, &error);
            }
        }
        interval
    }

    /// Adds what is only known at the end.
    fn finish(&mut self, elapsed: Duration) {
        self.tally.elapsed = elapsed;
        if self.schedule.is_some() {
            let connections = self.connections.iter();
            self.tally.unanswered = connections
                .map(|connection| connection.flow.unanswered())
                .sum();
        }
    }

    fn report(&mut self, period: Period, reports: &Sender<(Period, Tally)>) {
        let tally = std::mem::replace(&mut self.tally, Tally::new());
        if period == Period::WarmUp {
            for connection in &mut self.connections {
                connection.is_answered = false;
            }
        }
        // An error means that the receiver has failed, which also sets the stop flag.
        let _closed = reports.send((period, tally));
    }
}

impl Connection {
    fn new(plan: &Plan, now: Instant) -> Self {
        Self {
            stream: None,
            payload: Payload::new(0),
            flow: Flow::new(
                plan.size,
                plan.max_in_flight,
                if plan.options.connect { 1 } else { u64::MAX },
                Timing::Sent(VecDeque::new()),
            ),
            is_connecting: false,
            readable: false,
            writable: false,
            read_closed: false,
            is_runnable: false,
            is_answered: false,
            opened: now,
            idle_sweeps: 0,
            swept_bytes: 0,
            retry: None,
            has_ended: false,
        }
    }

    fn can_proceed(&self) -> bool {
        let sendable = self.writable && self.flow.sendable() > 0;
        !self.is_connecting && (self.readable || sendable)
    }

    /// Receives, verifies and sends until calls would block, or up to a limit.
    fn transfer(&mut self, buffer: &mut [u8], tally: &mut Tally) -> Result<(), String> {
        let Some(mut stream) = self.stream.take() else {
            return Ok(());
        };
        let mut now = Instant::now();
        if self.is_connecting && !self.connected(&stream, now, tally)? {
            self.stream = Some(stream);
            return Ok(());
        }
        for _ in 0..MAX_CALLS {
            if !self.readable {
                break;
            }
            match stream.read(buffer) {
                Ok(0) => return Err("the server closed the connection".to_owned()),
                Ok(count) => {
                    now = Instant::now();
                    self.readable =
                        count == buffer.len() || self.read_closed || !SHORT_MEANS_BLOCKED;
                    self.receive(&mut buffer[..count], now, tally)?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("connection failed: {}", error_text(&error))),
            }
        }
        for _ in 0..MAX_CALLS {
            let sendable = self.flow.sendable().min(MAX_SEND as u64) as usize;
            if !self.writable || sendable == 0 {
                break;
            }
            self.payload.fill(self.flow.sent(), &mut buffer[..sendable]);
            match stream.write(&buffer[..sendable]) {
                Ok(count) => {
                    self.writable = count == sendable || !SHORT_MEANS_BLOCKED;
                    self.flow.add_sent(count as u64, now);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("connection failed: {}", error_text(&error))),
            }
        }
        self.stream = Some(stream);
        Ok(())
    }

    /// Returns whether the connection is established, as far as can be told.
    fn connected(
        &mut self,
        stream: &TcpStream,
        now: Instant,
        tally: &mut Tally,
    ) -> Result<bool, String> {
        let cannot = |error| format!("cannot connect: {}", error_text(&error));
        let socket = SockRef::from(stream);
        if socket.peer_addr().is_err() {
            return match socket.take_error().map_err(cannot)? {
                Some(error) => Err(cannot(error)),
                None => Ok(false),
            };
        }
        self.is_connecting = false;
        self.writable = true;
        tally.opened += 1;
        record(&mut tally.connect, now - self.opened);
        Ok(true)
    }

    fn receive(&mut self, bytes: &mut [u8], now: Instant, tally: &mut Tally) -> Result<(), String> {
        let (offset, count) = (self.flow.received(), bytes.len() as u64);
        if let Some((at, expected)) = self.payload.find_difference(offset, bytes) {
            let place = Count(offset + at as u64 + 1);
            let got = bytes[at];
            return Err(format!(
                "wrong byte: byte {place} of a stream was sent as {expected:#04x} and came back as {got:#04x}"
            ));
        }
        if offset + count > self.flow.sent() {
            return Err("wrong byte: more came back than was sent".to_owned());
        }
        if !self.is_answered {
            self.is_answered = true;
            tally.answered += 1;
        }
        tally.bytes += count;
        let (messages, rtt) = (&mut tally.messages, &mut tally.rtt);
        self.flow.add_received(count, now, |time| {
            *messages += 1;
            record(rtt, time);
        });
        Ok(())
    }
}

/// Returns how long to sleep before a moment that must not be missed: polls sleep whole milliseconds, so the
/// last of them are spent polling.
fn sleep_before(time: Duration) -> Duration {
    Duration::from_millis((time.as_millis() as u64).saturating_sub(1))
}

/// Starts to connect a socket that does not block.
///
/// A Unix-domain socket connects at once, or waits for a place in the backlog. It is a `TcpStream` as well: this
/// type only owns a descriptor, and nothing of TCP is used.
fn start_connecting(address: &SockAddr, timeout: Duration) -> io::Result<TcpStream> {
    if let Some(address) = address.as_socket() {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        return Ok(stream);
    }
    let socket = target::connect(address, timeout, |_| Ok(()))?;
    socket.set_nonblocking(true)?;
    Ok(TcpStream::from_std(socket.into()))
}
