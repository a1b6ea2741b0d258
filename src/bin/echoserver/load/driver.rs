//! One thread of the load: an event loop that drives its share of the connections.
//!
//! It opens them, runs until the time is over or all messages are done, and ends them: what is in flight or due comes
//! back, and each connection is closed after its EOF.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::mem;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Poll};
use socket2::Socket;

use crate::load::connection::{Connection, cannot_connect, connect};
use crate::load::flow::{Flow, Schedule};
use crate::load::plan::Plan;
use crate::load::tally::{Tally, count};
use crate::payload::Payload;

const MAX_RECEIVE: usize = 256 << 10;
/// Messages that become due in one tick, so that a rate that is too high does not delay the end.
const MAX_GRANTS: u64 = 10_000;
/// Connections that a thread opens at the same time before it starts.
const MAX_OPENING: usize = 64;
/// How long a failed connection stays closed.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// How long a Unix-domain socket waits before it tries again to connect: no event tells that the backlog has room.
const BACKLOG_DELAY: Duration = Duration::from_millis(1);

/// What a thread counts until its end, and after it.
pub(crate) type Tallies = [Mutex<Tally>; 2];

pub(crate) struct Driver<'a> {
    plan: &'a Plan<'a>,
    /// Number of this thread.
    index: usize,
    tallies: &'a Tallies,
    tally: &'a Mutex<Tally>,
    /// Not while the connections are opened for the first time.
    is_running: bool,
    poll: Poll,
    connections: Vec<Connection>,
    /// Connections that may make progress without an event.
    runnable: VecDeque<usize>,
    /// Connections that wait for room in the backlog.
    queued: Vec<usize>,
    next_sweep: Instant,
    /// Number of the next connection to be opened: its stream depends on it.
    next_number: u64,
    /// Messages that a schedule has made due.
    due: u64,
    /// Messages of this thread, and how many of them have not come back or been lost yet.
    messages: u64,
    remaining: u64,
    /// How long it took to open the first connection.
    first_time: Duration,
    /// Received bytes, then bytes to be sent: one buffer takes less of the caches than two.
    buffer: Vec<u8>,
}

/// Returns the part of `total` that the one with this index of `count` gets.
fn share(total: u64, index: usize, count: usize) -> u64 {
    let (index, count) = (index as u64, count as u64);
    total / count + u64::from(index < total % count)
}

impl<'a> Driver<'a> {
    /// Prepares the thread with this index, without opening connections.
    pub(crate) fn new(
        plan: &'a Plan<'a>,
        index: usize,
        tallies: &'a Tallies,
        first: Option<(Socket, Duration)>,
    ) -> io::Result<Self> {
        let max_per_stream = if plan.options.connect { 1 } else { u64::MAX };
        let connection = |_| Connection {
            flow: Flow::new(plan.size, plan.max_in_flight, max_per_stream),
            ..Connection::default()
        };
        let connections = share(plan.connections as u64, index, plan.threads);
        let messages = share(plan.messages, index, plan.threads);
        let mut driver = Self {
            plan,
            index,
            tallies,
            tally: &tallies[0],
            is_running: false,
            poll: Poll::new()?,
            connections: (0..connections).map(connection).collect(),
            runnable: VecDeque::new(),
            queued: Vec::new(),
            next_sweep: Instant::now(),
            next_number: index as u64,
            due: 0,
            messages,
            remaining: messages,
            first_time: Duration::ZERO,
            buffer: vec![0; MAX_RECEIVE],
        };
        if let Some((socket, time)) = first {
            socket.set_nonblocking(true)?;
            let (stream, now) = (TcpStream::from_std(socket.into()), Instant::now());
            driver.add(0, Ok(stream), now.checked_sub(time).unwrap_or(now));
            driver.turn(0);
            driver.first_time = time;
        }
        Ok(driver)
    }

    /// Runs until the plan is done or stopped. Tells `running` when that was, and then ends the connections.
    pub(crate) fn run(mut self, running: Sender<Instant>) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let result = self.run_phases(&mut events, running);
        if result.is_err() {
            self.plan.stop();
        }
        result
    }

    fn run_phases(&mut self, events: &mut Events, running: Sender<Instant>) -> io::Result<()> {
        let opened = self.open_all(events);
        self.plan.opened.wait();
        opened?;
        let start = self.plan.start();
        let end = self.plan.length.map(|length| start + length);
        self.start(start);
        let ended = loop {
            let now = Instant::now();
            if self.is_over(now, end) {
                break now;
            }
            self.sweep(now);
            let due = self.grant_due(now, MAX_GRANTS);
            let until_due = due.map(|due| sleep_before(due - now));
            let until_end = end.map_or(Duration::MAX, |end| end - now);
            let wait = until_due.unwrap_or(Duration::MAX).min(until_end);
            self.tick(events, wait.min(self.plan.sweep_interval))?;
        };
        // From here on, another tally counts.
        self.tally = &self.tallies[1];
        let _main_thread_has_failed = running.send(ended);
        drop(running);
        self.end_all(events)?;
        self.count_unanswered(end);
        Ok(())
    }

    fn is_over(&self, now: Instant, end: Option<Instant>) -> bool {
        let is_done = self.remaining == 0 && now >= self.plan.start() + self.plan.min_length;
        is_done || self.plan.is_stopped() || end.is_some_and(|end| now >= end)
    }

    /// Makes one attempt to open each connection, some at a time. An attempt without an answer ends the phase.
    fn open_all(&mut self, events: &mut Events) -> io::Result<()> {
        let mut to_open = 0..self.connections.len();
        if self.plan.options.connect {
            to_open = 0..0;
        }
        let mut is_stuck = false;
        while !self.plan.is_stopped() {
            let links = self.connections.iter();
            let opening = links.filter(|connection| connection.is_opening()).count();
            if opening == 0 && (is_stuck || to_open.is_empty()) {
                break;
            }
            let room = if is_stuck { 0 } else { MAX_OPENING - opening };
            for index in to_open.by_ref().take(room) {
                if self.connections[index].link.is_none() {
                    self.open(index);
                    // It may be complete at once.
                    self.turn(index);
                }
            }
            if self.connections.iter().any(Connection::is_opening) {
                self.tick(events, self.plan.sweep_interval)?;
                is_stuck |= self.sweep(Instant::now());
            }
        }
        // It is opened later, or given up.
        for index in to_open {
            self.connections[index].has_failed = true;
        }
        Ok(())
    }

    /// Allows messages, or sets the times at which they are due.
    fn start(&mut self, start: Instant) {
        self.is_running = true;
        let (count, threads) = (self.connections.len(), self.plan.threads);
        for index in 0..count {
            let connection = &mut self.connections[index];
            if let Some(link) = connection.link.as_mut() {
                // With `--connect`, the time of its message does not contain the start of the threads.
                link.opened = start.checked_sub(self.first_time).unwrap_or(start);
            }
            let flow = &mut connection.flow;
            flow.schedule = self.plan.options.rate.map(|rate| Schedule {
                // In the middle of its interval, so that each line of figures has the same number of messages. The first is
                // not much later for that.
                start: start + Duration::from_secs_f64((0.5 / rate).min(0.5)),
                rate,
                first: self.index + index * threads,
                step: count * threads,
            });
            if flow.schedule.is_none() {
                flow.grant(share(self.messages, index, count));
            }
            self.make_runnable(index);
        }
    }

    /// Allows the messages that are due now, to one connection after the other; returns when the next is due.
    fn grant_due(&mut self, now: Instant, max: u64) -> Option<Instant> {
        self.plan.options.rate?;
        let limit = self.messages.min(self.due.saturating_add(max));
        let mut tally = self.tally();
        loop {
            let index = (self.due % self.connections.len() as u64) as usize;
            let flow = &mut self.connections[index].flow;
            let next = flow.next_due()?;
            if next > now || self.due == limit {
                return (self.due < self.messages).then_some(next.max(now));
            }
            tally.lateness.record(now - next);
            flow.grant(1);
            self.make_runnable(index);
            self.due += 1;
        }
    }

    /// Lets what is in flight or due come back, and closes each connection after its EOF, until nothing has come for some time.
    fn end_all(&mut self, events: &mut Events) -> io::Result<()> {
        let options = self.plan.options;
        let has_schedule = options.rate.is_some();
        // What floods have sent takes as long as the path.
        let mut limit = self.plan.grace;
        if !has_schedule {
            limit = options.timeout;
            for connection in &mut self.connections {
                let has_begun = options.connect && connection.link.is_some();
                connection.flow.withdraw(has_begun);
            }
        }
        let (start, mut silence) = (Instant::now(), Duration::ZERO);
        while silence < self.plan.grace && start.elapsed() < limit && !self.plan.is_stopped() {
            self.grant_due(start, MAX_GRANTS);
            let is_last = !has_schedule || self.due == self.messages;
            for index in 0..self.connections.len() {
                let (connection, registry) = (&mut self.connections[index], self.poll.registry());
                if is_last && connection.link.is_some() && connection.flow.is_complete() {
                    connection.half_close(registry);
                }
                connection.watch_ending(index, registry)?;
                self.read_eof(index);
            }
            if self.connections.iter().all(Connection::is_closed) {
                break;
            }
            // A pause of this process counts as one interval.
            silence = match self.tick(events, self.plan.sweep_interval)? {
                true => Duration::ZERO,
                false => silence + self.plan.sweep_interval,
            };
        }
        Ok(())
    }

    /// Counts the messages that have no answer now. After a signal, only those that have waited for long enough.
    fn count_unanswered(&mut self, end: Option<Instant>) {
        let now = Instant::now();
        // What fell due while the process was stopped counts as well.
        self.grant_due(end.map_or(now, |end| end.min(now)), u64::MAX);
        let mut tally = self.tally();
        for connection in &self.connections {
            for start in connection.flow.outstanding() {
                let age = now.saturating_duration_since(start);
                if age >= self.plan.grace || !self.plan.is_stopped() {
                    tally.add_unanswered(age);
                }
            }
            tally.never_answered.extend(connection.unanswered_address());
            let link = connection.link.as_ref().filter(|_| connection.is_opening());
            if link.is_some_and(|link| now - link.opened >= self.plan.grace) {
                tally.failed += 1;
                let error = "cannot connect: no answer until the end";
                count(&mut tally.errors, error, 1);
            }
        }
    }

    /// Waits for events, and gives each connection that may make progress one turn. Returns whether there was one.
    fn tick(&mut self, events: &mut Events, wait: Duration) -> io::Result<bool> {
        let timeout = match (self.runnable.is_empty(), self.queued.is_empty()) {
            (false, _) => Duration::ZERO,
            (true, false) => wait.min(BACKLOG_DELAY),
            (true, true) => wait,
        };
        match self.poll.poll(events, Some(timeout)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in events.iter() {
            let index = event.token().0 / 2;
            self.connections[index].note(event);
            self.make_runnable(index);
        }
        for index in mem::take(&mut self.queued) {
            self.make_runnable(index);
        }
        let is_active = !self.runnable.is_empty();
        for _ in 0..self.runnable.len() {
            if let Some(index) = self.runnable.pop_front() {
                self.connections[index].is_runnable = false;
                self.turn(index);
            }
        }
        Ok(is_active)
    }

    fn make_runnable(&mut self, index: usize) {
        if !mem::replace(&mut self.connections[index].is_runnable, true) {
            self.runnable.push_back(index);
        }
    }

    fn tally(&self) -> MutexGuard<'a, Tally> {
        self.tally.lock().expect("no thread panics")
    }

    fn turn(&mut self, index: usize) {
        let is_single = self.plan.options.connect;
        let connection = &mut self.connections[index];
        if connection.has_failed {
            if self.plan.options.messages.is_some() {
                self.remaining -= connection.flow.abandon();
            }
            return;
        }
        if is_single && connection.link.is_none() && connection.flow.sendable() > 0 {
            // It may be complete at once.
            self.open(index);
        }
        let mut tally = self.tally();
        let completed = tally.messages;
        let connection = &mut self.connections[index];
        let result = connection.transfer(self.plan, &mut self.buffer, &mut tally);
        let completed = tally.messages - completed;
        drop(tally);
        self.remaining -= completed;
        match result {
            Err(error) => self.fail(index, &error),
            Ok(()) if is_single && completed > 0 => {
                self.read_eof(index);
                let connection = &mut self.connections[index];
                connection.half_close(self.poll.registry());
                connection.flow.restart();
                self.make_runnable(index);
            }
            Ok(()) if connection.can_proceed() => self.make_runnable(index),
            Ok(()) if self.plan.is_unix && connection.is_opening() => self.queued.push(index),
            Ok(()) => {}
        }
    }

    /// Reads the EOF of the connection before, if it has arrived.
    fn read_eof(&mut self, index: usize) {
        let mut tally = self.tally();
        let ended = self.connections[index].read_eof(&mut self.buffer, &mut tally);
        if let Err(error) = ended {
            tally.failed += 1;
            count(&mut tally.errors, &error, 1);
        }
    }

    fn open(&mut self, index: usize) {
        let opened = Instant::now();
        self.add(index, connect(&self.plan.address), opened);
    }

    fn add(&mut self, index: usize, stream: io::Result<TcpStream>, opened: Instant) {
        let payload = Payload::new(self.next_number);
        self.next_number += self.plan.threads as u64;
        self.tally().attempts += 1;
        let (connection, registry) = (&mut self.connections[index], self.poll.registry());
        let added =
            stream.and_then(|stream| connection.add(index, stream, payload, opened, registry));
        match added {
            // The connection may be complete already.
            Ok(()) => self.make_runnable(index),
            Err(error) => self.fail(index, &cannot_connect(&error)),
        }
    }

    /// Closes a connection. With a limited number of messages it is not opened again, so that the run ends. What was in flight
    /// for long enough is unanswered: otherwise a long stall would be missing from the round-trip times.
    fn fail(&mut self, index: usize, error: &str) {
        let now = Instant::now();
        let connection = &mut self.connections[index];
        connection.link = None;
        connection.has_failed = true;
        connection.idle_sweeps = 0;
        let lost = connection.flow.restart();
        let ages = lost
            .iter()
            .map(|start| now.saturating_duration_since(*start));
        let (late, young): (Vec<_>, Vec<_>) = ages.partition(|age| *age >= self.plan.grace);
        // With what comes after the end: it has not come back in an interval.
        let mut after_end = self.tallies[1].lock().expect("no thread panics");
        for age in late {
            after_end.add_unanswered(age);
        }
        drop(after_end);
        let mut tally = self.tally();
        tally.failed += 1;
        tally.lost += young.len() as u64;
        count(&mut tally.errors, error, 1);
        drop(tally);
        if self.plan.options.messages.is_some() {
            self.remaining -= lost.len() as u64;
            self.make_runnable(index);
        }
    }

    /// Ends connections that make no progress, and opens failed ones again, if it is time. Returns whether an attempt to
    /// open one has got no answer.
    ///
    /// Progress is measured in sweeps, not in time: after a pause of this process, answers may wait to be read.
    fn sweep(&mut self, now: Instant) -> bool {
        if now < self.next_sweep {
            return false;
        }
        let timeout = self.plan.options.timeout;
        self.next_sweep = now + self.plan.sweep_interval;
        let is_reopened = self.is_running && self.plan.options.messages.is_none();
        let mut is_stuck = false;
        for index in 0..self.connections.len() {
            let connection = &mut self.connections[index];
            let received = connection.flow.received;
            let is_opening = connection.is_opening();
            let is_waiting = match &connection.link {
                Some(_) => is_opening || connection.flow.is_awaiting_bytes(),
                None => connection.has_failed && is_reopened,
            };
            if !is_waiting || received != connection.swept_bytes {
                (connection.idle_sweeps, connection.swept_bytes) = (0, received);
                continue;
            }
            connection.idle_sweeps += 1;
            let idle = connection.idle_sweeps * self.plan.sweep_interval;
            match &connection.link {
                Some(_) if idle > timeout => {
                    is_stuck |= is_opening;
                    let error = match is_opening {
                        true => format!("cannot connect: no answer for {timeout:?}"),
                        false => format!("nothing came back for {timeout:?}"),
                    };
                    self.fail(index, &error);
                }
                None if idle >= RETRY_DELAY => self.open(index),
                _ => {}
            }
        }
        is_stuck
    }
}

/// Returns how long to sleep before a moment that must not be missed: polls sleep whole milliseconds, so the
/// last of them are spent polling.
fn sleep_before(time: Duration) -> Duration {
    Duration::from_millis((time.as_millis() as u64).saturating_sub(1))
}
