//! One thread of the load: an event loop that drives its share of the connections.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Registry, Token};
use socket2::SockRef;

use crate::figures::Count;
use crate::load::flow::{Flow, Schedule};
use crate::load::plan::Plan;
use crate::load::tally::Tally;
use crate::payload::Payload;
use crate::target::{self, client_error};

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
/// On Linux, a short read or write proves that the next one would block, and a later change raises an event.
const SHORT_MEANS_BLOCKED: bool = cfg!(target_os = "linux");

pub(crate) struct Driver<'a> {
    plan: &'a Plan<'a>,
    /// Number of this thread.
    index: usize,
    tally: &'a Mutex<Tally>,
    poll: Poll,
    connections: Vec<Connection>,
    /// Connections that may make progress without an event.
    runnable: VecDeque<usize>,
    next_sweep: Instant,
    /// Number of the next connection to be opened: its stream depends on it.
    next_number: u64,
    /// Messages that a schedule has made due.
    due: u64,
    /// Messages of this thread, and how many of them have not come back or been lost yet.
    messages: u64,
    remaining: u64,
    /// Received bytes, then bytes to be sent: one buffer takes less of the caches than two.
    buffer: Vec<u8>,
}

#[derive(Debug, Default)]
struct Connection {
    flow: Flow,
    link: Option<Link>,
    is_runnable: bool,
    is_answered: bool,
    /// It is opened again later, unless the number of messages is limited.
    has_failed: bool,
    /// Sweeps in a row that have seen no new byte, and the bytes received at the last one that has.
    idle_sweeps: u32,
    swept_bytes: u64,
}

/// A socket that is connecting or connected.
#[allow(clippy::struct_excessive_bools, reason = "independent flags")]
#[derive(Debug)]
struct Link {
    stream: TcpStream,
    payload: Payload,
    opened: Instant,
    is_connecting: bool,
    readable: bool,
    writable: bool,
    /// A short read may precede EOF.
    read_closed: bool,
}

/// Returns the part of `total` that the one with this index of `count` gets.
fn share(total: u64, index: usize, count: usize) -> u64 {
    let (index, count) = (index as u64, count as u64);
    total / count + u64::from(index < total % count)
}

fn cannot_connect(error: &io::Error) -> String {
    format!("cannot connect: {}", client_error(error))
}

impl<'a> Driver<'a> {
    /// Prepares the thread with this index, without opening connections.
    pub(crate) fn new(
        plan: &'a Plan<'a>,
        index: usize,
        tally: &'a Mutex<Tally>,
    ) -> io::Result<Self> {
        let max_per_stream = if plan.options.connect { 1 } else { u64::MAX };
        let connection = |_| Connection {
            flow: Flow::new(plan.size, plan.max_in_flight, max_per_stream),
            ..Connection::default()
        };
        let connections = share(plan.connections as u64, index, plan.threads);
        let messages = plan.options.messages.unwrap_or(u64::MAX);
        let messages = share(messages, index, plan.threads);
        Ok(Self {
            plan,
            index,
            tally,
            poll: Poll::new()?,
            connections: (0..connections).map(connection).collect(),
            runnable: VecDeque::new(),
            next_sweep: Instant::now(),
            next_number: index as u64,
            due: 0,
            messages,
            remaining: messages,
            buffer: vec![0; MAX_RECEIVE],
        })
    }

    /// Runs until the plan is done or stopped. Disconnects `_running` at the end.
    pub(crate) fn run(mut self, _running: Sender<()>) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let opened = self.open_all(&mut events);
        self.plan.opened.wait();
        opened?;
        self.start();
        while self.remaining > 0 && !self.plan.stop.load(Relaxed) {
            let now = Instant::now();
            self.sweep(now);
            let until_due = self.grant_due(now).map(|due| sleep_before(due - now));
            let wait = until_due.unwrap_or(Duration::MAX);
            self.tick(&mut events, wait.min(self.plan.sweep_interval))?;
        }
        Ok(())
    }

    /// Opens the connections, some at a time, until each is open or has failed.
    fn open_all(&mut self, events: &mut Events) -> io::Result<()> {
        let mut to_open = 0..self.connections.len();
        while !self.plan.options.connect && !self.plan.stop.load(Relaxed) {
            let links = self.connections.iter().flat_map(|it| &it.link);
            let opening = links.filter(|link| link.is_connecting).count();
            if opening == 0 && to_open.is_empty() {
                break;
            }
            for index in to_open.by_ref().take(MAX_OPENING - opening) {
                self.open(index);
            }
            self.tick(events, self.plan.sweep_interval)?;
            self.sweep(Instant::now());
        }
        Ok(())
    }

    /// Allows messages, or sets the times at which they are due.
    fn start(&mut self) {
        let (start, count, threads) = (Instant::now(), self.connections.len(), self.plan.threads);
        for index in 0..count {
            let flow = &mut self.connections[index].flow;
            flow.schedule = self.plan.options.rate.map(|rate| Schedule {
                start,
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
    fn grant_due(&mut self, now: Instant) -> Option<Instant> {
        let before = self.due;
        let limit = self.messages.min(before + MAX_GRANTS);
        loop {
            let index = (self.due % self.connections.len() as u64) as usize;
            let flow = &mut self.connections[index].flow;
            let next = flow.next_due()?;
            if next > now || self.due == limit {
                self.tally().due += self.due - before;
                return (self.due < self.messages).then_some(next);
            }
            flow.grant(1);
            self.make_runnable(index);
            self.due += 1;
        }
    }

    /// Waits for events, and gives each connection that may make progress one turn.
    fn tick(&mut self, events: &mut Events, wait: Duration) -> io::Result<()> {
        let is_idle = self.runnable.is_empty();
        let timeout = if is_idle { wait } else { Duration::ZERO };
        match self.poll.poll(events, Some(timeout)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in events.iter() {
            let index = event.token().0;
            if let Some(link) = &mut self.connections[index].link {
                link.readable |= event.is_readable() || event.is_error();
                link.writable |= event.is_writable() || event.is_error();
                link.read_closed |= event.is_read_closed() || event.is_error();
                self.make_runnable(index);
            }
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
        let result = connection.transfer(is_single, &mut self.buffer, &mut tally);
        let completed = tally.messages - completed;
        drop(tally);
        self.remaining -= completed;
        match result {
            Err(error) => self.fail(index, &error),
            Ok(()) if is_single && completed > 0 => {
                connection.link = None;
                connection.flow.restart();
                self.make_runnable(index);
            }
            Ok(()) if connection.can_proceed() => self.make_runnable(index),
            Ok(()) => {}
        }
    }

    fn open(&mut self, index: usize) {
        let opened = Instant::now();
        let payload = Payload::new(self.next_number);
        self.next_number += self.plan.threads as u64;
        let connection = &mut self.connections[index];
        (connection.has_failed, connection.idle_sweeps) = (false, 0);
        match connect(self.plan, self.poll.registry(), Token(index)) {
            Ok(stream) => {
                connection.link = Some(Link {
                    stream,
                    payload,
                    opened,
                    is_connecting: true,
                    readable: false,
                    writable: true,
                    read_closed: false,
                });
                // The connection may be complete already.
                self.make_runnable(index);
            }
            Err(error) => self.fail(index, &cannot_connect(&error)),
        }
    }

    /// Closes a connection. With a limited number of messages it is not opened again, so that the run ends.
    fn fail(&mut self, index: usize, error: &str) {
        let connection = &mut self.connections[index];
        connection.link = None;
        connection.has_failed = true;
        connection.idle_sweeps = 0;
        let lost = connection.flow.restart();
        let mut tally = self.tally();
        tally.failed += 1;
        tally.lost += lost;
        tally.add_errors(error, 1);
        drop(tally);
        if self.plan.options.messages.is_some() {
            self.remaining -= lost;
            self.make_runnable(index);
        }
    }

    /// Ends connections that make no progress, and opens failed ones again, if it is time.
    ///
    /// Progress is measured in sweeps, not in time: after a pause of this process, answers may wait to be read.
    fn sweep(&mut self, now: Instant) {
        if now < self.next_sweep {
            return;
        }
        let timeout = self.plan.options.timeout;
        self.next_sweep = now + self.plan.sweep_interval;
        for index in 0..self.connections.len() {
            let connection = &mut self.connections[index];
            let received = connection.flow.received;
            let is_waiting = match &connection.link {
                Some(link) => link.is_connecting || connection.flow.is_awaiting_bytes(),
                None => connection.has_failed && self.plan.options.messages.is_none(),
            };
            if !is_waiting || received != connection.swept_bytes {
                (connection.idle_sweeps, connection.swept_bytes) = (0, received);
                continue;
            }
            connection.idle_sweeps += 1;
            let idle = connection.idle_sweeps * self.plan.sweep_interval;
            match &connection.link {
                Some(link) if link.is_connecting && idle > timeout => {
                    self.fail(index, &format!("cannot connect: no answer for {timeout:?}"));
                }
                Some(_) if idle > timeout => {
                    self.fail(index, &format!("nothing came back for {timeout:?}"));
                }
                None if idle >= RETRY_DELAY => self.open(index),
                _ => {}
            }
        }
    }
}

impl Connection {
    fn can_proceed(&self) -> bool {
        self.link.as_ref().is_some_and(|link| {
            let sendable = link.writable && self.flow.sendable() > 0;
            !link.is_connecting && (link.readable || sendable)
        })
    }

    /// Receives, verifies and sends until calls would block, or up to a limit. The time of a message begins when it is
    /// sent, or, if it is the `single` one of its connection, when that is opened.
    fn transfer(
        &mut self,
        single: bool,
        buffer: &mut [u8],
        tally: &mut Tally,
    ) -> Result<(), String> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        let mut now = Instant::now();
        if link.is_connecting {
            let connected = link.is_connected();
            if !connected.map_err(|error| cannot_connect(&error))? {
                return Ok(());
            }
            link.is_connecting = false;
            tally.opened += 1;
            tally.connect.record(now - link.opened);
        }
        let mut calls = 0..MAX_CALLS;
        while link.readable && calls.next().is_some() {
            match link.stream.read(buffer) {
                Ok(0) => return Err("the server closed the connection".to_owned()),
                Ok(count) => {
                    now = Instant::now();
                    let is_short = count < buffer.len() && SHORT_MEANS_BLOCKED;
                    link.readable = !is_short || link.read_closed;
                    link.verify(&self.flow, &mut buffer[..count])?;
                    tally.answered += u64::from(!mem::replace(&mut self.is_answered, true));
                    tally.bytes += count as u64;
                    self.flow.add_received(count as u64, now, |time| {
                        tally.messages += 1;
                        tally.rtt.record(time);
                    });
                }
                Err(error) => link.readable = is_interrupted(&error)?,
            }
        }
        let start = if single { link.opened } else { now };
        let mut calls = 0..MAX_CALLS;
        while link.writable && self.flow.sendable() > 0 && calls.next().is_some() {
            let count = self.flow.sendable().min(MAX_SEND as u64) as usize;
            let bytes = &mut buffer[..count];
            link.payload.fill(self.flow.sent, bytes);
            match link.stream.write(bytes) {
                Ok(written) => {
                    link.writable = written == count || !SHORT_MEANS_BLOCKED;
                    self.flow.add_sent(written as u64, start);
                }
                Err(error) => link.writable = is_interrupted(&error)?,
            }
        }
        Ok(())
    }
}

/// Whether a call can be repeated at once, if it has not failed but was interrupted or would block.
fn is_interrupted(error: &io::Error) -> Result<bool, String> {
    match error.kind() {
        ErrorKind::Interrupted => Ok(true),
        ErrorKind::WouldBlock => Ok(false),
        _ => Err(format!("connection failed: {}", client_error(error))),
    }
}

impl Link {
    /// Returns whether the connection is established, as far as can be told.
    fn is_connected(&self) -> io::Result<bool> {
        let socket = SockRef::from(&self.stream);
        match socket.peer_addr() {
            Ok(_) => Ok(true),
            Err(_) => socket.take_error()?.map_or(Ok(false), Err),
        }
    }

    /// Checks that `bytes` are those of the stream that follow what was received.
    fn verify(&self, flow: &Flow, bytes: &mut [u8]) -> Result<(), String> {
        let offset = flow.received;
        if let Some((at, expected)) = self.payload.find_difference(offset, bytes) {
            let (place, got) = (Count(offset + at as u64 + 1), bytes[at]);
            return Err(format!(
                "wrong byte: byte {place} of a stream was sent as {expected:#04x} and came back as {got:#04x}"
            ));
        }
        if offset + bytes.len() as u64 > flow.sent {
            return Err("wrong byte: more came back than was sent".to_owned());
        }
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
fn connect(plan: &Plan<'_>, registry: &Registry, token: Token) -> io::Result<TcpStream> {
    let mut stream = if let Some(address) = plan.address.as_socket() {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream
    } else {
        let socket = target::connect(&plan.address, plan.options.timeout, |_| Ok(()))?;
        socket.set_nonblocking(true)?;
        TcpStream::from_std(socket.into())
    };
    registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
    Ok(stream)
}
