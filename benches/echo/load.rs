//! The load: clients that send, check every byte that comes back, and take the time.
//!
//! One thread drives all of its connections from one epoll, edge-triggered, with no more calls than
//! the fastest server makes; so the load is not what is measured. What a connection sends is a slice
//! of one table made at the start: sending copies nothing, and checking is one comparison of memory.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::time::Timespec;

/// How long anything outside of a measurement may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// The most bytes in one call, each way.
const CHUNK: usize = 256 << 10;

/// Events taken per wait.
const MAX_EVENTS: usize = 1024;

/// A flooding client sends and reads by this much at a time.
const FLOOD_CHUNK: usize = 64 << 10;

/// So many times each way before others get their turn: as good as "until the kernel takes no more".
const FLOOD_CALLS_MAX: usize = 16;

/// What a client sends to be served once: to hold an idle connection, or in a short one.
const GREETING: usize = 64;

/// The stream's period: a prime, so that no buffer's size divides it, and bytes that are lost,
/// doubled or swapped by the bufferful do not fit.
const PERIOD: usize = 65_537;

/// Noise, and enough of its repetition that a chunk can start anywhere in the period.
static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(PERIOD)
    .collect();
    noise.iter().copied().cycle().take(PERIOD + CHUNK).collect()
});

/// The `count` bytes of a stream that follow its first `offset` ones. Every stream has a seed.
fn stream_bytes(seed: u64, offset: u64, count: usize) -> &'static [u8] {
    let start = ((seed + offset) % PERIOD as u64) as usize;
    &TABLE[start..start + count.min(CHUNK)]
}

fn seed(index: usize) -> u64 {
    index as u64 * 7_919
}

/// A minute; no sample takes so long.
const LATENCY_MAX_NS: u64 = 60_000_000_000;

/// What was counted in one stretch of time.
pub(crate) struct Tally {
    /// Messages answered; in a flood, bytes that came back.
    pub(crate) operations: u64,
    /// Connections that were answered at all.
    pub(crate) served: usize,
    pub(crate) elapsed: Duration,
    /// In nanoseconds.
    pub(crate) latency: Histogram<u64>,
}

impl Tally {
    fn new() -> Self {
        Self {
            operations: 0,
            served: 0,
            elapsed: Duration::ZERO,
            latency: Histogram::new_with_bounds(1, LATENCY_MAX_NS, 2).expect("sound bounds"),
        }
    }

    fn note(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latency.saturating_record(nanos.max(1));
    }

    fn add(&mut self, other: &Tally) {
        self.operations += other.operations;
        self.served += other.served;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.latency += &other.latency;
    }
}

/// A thread's share of the load.
pub(crate) trait Client: Send {
    /// Keeps the server busy for so long.
    fn run(&mut self, duration: Duration) -> io::Result<Tally>;
}

/// Runs all clients at once, each in a thread of its own unless there is only one.
pub(crate) fn run(clients: &mut [Box<dyn Client>], duration: Duration) -> io::Result<Tally> {
    if let [client] = clients {
        return client.run(duration);
    }
    let mut total = Tally::new();
    thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter_mut()
            .map(|client| scope.spawn(move || client.run(duration)))
            .collect();
        for thread in threads {
            total.add(&thread.join().expect("a client does not panic")?);
        }
        Ok(total)
    })
}

/// How the connections of one client behave.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// So many messages of so many bytes are on their way, always.
    Messages { bytes: usize, in_flight: usize },
    /// Sends without waiting, and reads what comes.
    Flood,
}

/// A moment that is over once the stream has come back up to an offset.
struct Mark {
    offset: u64,
    sent: Instant,
}

struct Connection {
    stream: TcpStream,
    seed: u64,
    sent: u64,
    received: u64,
    /// How far it may send.
    goal: u64,
    marks: VecDeque<Mark>,
    served: bool,
}

/// Clients of an echo: many connections, one thread.
pub(crate) struct Echoes {
    epoll: OwnedFd,
    connections: Vec<Connection>,
    pace: Pace,
    buffer: Vec<u8>,
}

impl Echoes {
    /// Connects `count` times. They send once they are run.
    pub(crate) fn connect(address: SocketAddr, count: usize, pace: Pace) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let (goal, edge) = match pace {
            Pace::Messages { bytes, in_flight } => ((bytes * in_flight) as u64, EventFlags::ET),
            // Both directions get their turn only if the kernel goes on telling of both.
            Pace::Flood => (u64::MAX, EventFlags::empty()),
        };
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | edge;
        let mut connections = Vec::with_capacity(count);
        for index in 0..count {
            let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            epoll::add(&epoll, &stream, EventData::new_u64(index as u64), flags)?;
            connections.push(Connection {
                stream,
                seed: seed(index),
                sent: 0,
                received: 0,
                goal,
                marks: VecDeque::new(),
                served: false,
            });
        }
        Ok(Self {
            epoll,
            connections,
            pace,
            buffer: vec![0; CHUNK],
        })
    }
}

impl Client for Echoes {
    fn run(&mut self, duration: Duration) -> io::Result<Tally> {
        let mut tally = Tally::new();
        let mut events = Vec::with_capacity(MAX_EVENTS);
        for connection in &mut self.connections {
            connection.served = false;
        }
        let start = Instant::now();
        let deadline = start + duration;
        loop {
            let now = Instant::now();
            if now >= deadline {
                tally.elapsed = now - start;
                break;
            }
            wait(&self.epoll, &mut events, deadline - now)?;
            for event in &events {
                let index = event.data.u64() as usize;
                let connection = &mut self.connections[index];
                let flags = event.flags;
                connection.turn(self.pace, flags, start, &mut self.buffer, &mut tally)?;
            }
        }
        let served = |connection: &&Connection| connection.served;
        tally.served = self.connections.iter().filter(served).count();
        Ok(tally)
    }
}

impl Connection {
    fn turn(
        &mut self,
        pace: Pace,
        flags: EventFlags,
        start: Instant,
        buffer: &mut [u8],
        tally: &mut Tally,
    ) -> io::Result<()> {
        if flags.contains(EventFlags::IN) {
            self.receive(pace, start, buffer, tally)?;
        }
        if flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            let fault = "the server closed a connection";
            return Err(io::Error::new(ErrorKind::ConnectionAborted, fault));
        }
        match pace {
            Pace::Messages { bytes, .. } => self.send(bytes),
            Pace::Flood if flags.contains(EventFlags::OUT) => self.flood(),
            Pace::Flood => Ok(()),
        }
    }

    /// Reads what is there; in a flood only so much that the others get their turn.
    fn receive(
        &mut self,
        pace: Pace,
        start: Instant,
        buffer: &mut [u8],
        tally: &mut Tally,
    ) -> io::Result<()> {
        let (room, calls_max) = match pace {
            Pace::Messages { .. } => (buffer.len(), usize::MAX),
            Pace::Flood => (FLOOD_CHUNK, FLOOD_CALLS_MAX),
        };
        for _ in 0..calls_max {
            let count = match recv(&self.stream, &mut buffer[..room], RecvFlags::empty()) {
                Ok((_, count)) => count,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            self.check(&buffer[..count])?;
            self.received += count as u64;
            self.served |= count > 0;
            self.take_time(pace, start, tally);
            if let Pace::Flood = pace {
                tally.operations += count as u64;
            }
            if count < room {
                break;
            }
        }
        Ok(())
    }

    fn check(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes == stream_bytes(self.seed, self.received, bytes.len())
            && self.received + bytes.len() as u64 <= self.sent
        {
            return Ok(());
        }
        Err(wrong_bytes())
    }

    /// Ends the marks that have been reached, and lets as many new messages go.
    fn take_time(&mut self, pace: Pace, start: Instant, tally: &mut Tally) {
        let reached = |mark: &Mark| mark.offset <= self.received;
        if !self.marks.front().is_some_and(reached) {
            return;
        }
        let now = Instant::now();
        while let Some(mark) = self.marks.front()
            && mark.offset <= self.received
        {
            // Those on their way when the measurement began had waited for it.
            if mark.sent >= start {
                tally.note(now - mark.sent);
            }
            if let Pace::Messages { bytes, .. } = pace {
                tally.operations += 1;
                self.goal += bytes as u64;
            }
            self.marks.pop_front();
        }
    }

    /// Sends all the messages it may, in one call where the kernel takes it.
    fn send(&mut self, message: usize) -> io::Result<()> {
        if self.sent == self.goal {
            return Ok(());
        }
        let now = Instant::now();
        while self.sent < self.goal {
            let before = self.sent;
            let count = (self.goal - before) as usize;
            if !self.send_once(count)? {
                break;
            }
            // Each message's time begins when its first byte is sent.
            let message = message as u64;
            let begun = before.div_ceil(message)..self.sent.div_ceil(message);
            self.marks.extend(begun.map(|index| Mark {
                offset: (index + 1) * message,
                sent: now,
            }));
        }
        Ok(())
    }

    /// Sends whatever the kernel takes; times one byte after another.
    fn flood(&mut self) -> io::Result<()> {
        for _ in 0..FLOOD_CALLS_MAX {
            if !self.send_once(FLOOD_CHUNK)? {
                break;
            }
            if self.marks.is_empty() {
                self.marks.push_back(Mark {
                    offset: self.sent,
                    sent: Instant::now(),
                });
            }
        }
        Ok(())
    }

    /// Sends the stream's next bytes, that many at most; says whether the kernel took any.
    fn send_once(&mut self, count: usize) -> io::Result<bool> {
        let bytes = stream_bytes(self.seed, self.sent, count);
        match send(&self.stream, bytes, SendFlags::NOSIGNAL) {
            Ok(sent) => self.sent += sent as u64,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }
}

/// Clients that come and go: connect, one echo, close; so many at once.
pub(crate) struct Visits {
    address: SocketAddr,
    epoll: OwnedFd,
    open: Vec<Option<Visit>>,
    buffer: Vec<u8>,
}

struct Visit {
    stream: TcpStream,
    received: usize,
    began: Instant,
}

impl Visits {
    pub(crate) fn new(address: SocketAddr, count: usize) -> io::Result<Self> {
        Ok(Self {
            address,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            open: std::iter::repeat_with(|| None).take(count).collect(),
            buffer: vec![0; GREETING],
        })
    }

    fn begin(&mut self, index: usize) -> io::Result<()> {
        let began = Instant::now();
        let stream = TcpStream::connect(self.address).map_err(|error| match error.kind() {
            ErrorKind::AddrNotAvailable => {
                io::Error::new(error.kind(), "no local port is left: all rest in TIME_WAIT")
            }
            _ => error,
        })?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(
            &self.epoll,
            &stream,
            EventData::new_u64(index as u64),
            flags,
        )?;
        send(
            &stream,
            stream_bytes(seed(index), 0, GREETING),
            SendFlags::NOSIGNAL,
        )?;
        self.open[index] = Some(Visit {
            stream,
            received: 0,
            began,
        });
        Ok(())
    }

    /// Reads; says whether the visit is over.
    fn advance(&mut self, index: usize, start: Instant, tally: &mut Tally) -> io::Result<bool> {
        let Some(visit) = &mut self.open[index] else {
            return Ok(false);
        };
        let room = &mut self.buffer[..GREETING - visit.received];
        let (_, count) = match recv(&visit.stream, &mut *room, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            outcome => outcome?,
        };
        let expected = stream_bytes(seed(index), visit.received as u64, count);
        if count == 0 || room[..count] != *expected {
            return Err(wrong_bytes());
        }
        visit.received += count;
        if visit.received < GREETING {
            return Ok(false);
        }
        tally.operations += 1;
        if visit.began >= start {
            tally.note(visit.began.elapsed());
        }
        Ok(true)
    }
}

impl Client for Visits {
    fn run(&mut self, duration: Duration) -> io::Result<Tally> {
        let mut tally = Tally::new();
        let mut events = Vec::with_capacity(MAX_EVENTS);
        let start = Instant::now();
        let deadline = start + duration;
        for index in 0..self.open.len() {
            if self.open[index].is_none() {
                self.begin(index)?;
            }
        }
        loop {
            let now = Instant::now();
            if now >= deadline {
                tally.elapsed = now - start;
                break;
            }
            wait(&self.epoll, &mut events, deadline - now)?;
            for event in &events {
                let index = event.data.u64() as usize;
                if self.advance(index, start, &mut tally)? {
                    self.open[index] = None;
                    self.begin(index)?;
                }
            }
        }
        // Each of them is followed by the next, so who is served at all is not a question here.
        tally.served = self.open.len();
        Ok(tally)
    }
}

/// Connections that were served once and then rest.
pub(crate) fn rest(address: SocketAddr, count: usize) -> io::Result<Vec<TcpStream>> {
    let mut answer = [0; GREETING];
    let mut resting = Vec::with_capacity(count);
    for index in 0..count {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE / 5))?;
        let greeting = stream_bytes(seed(index), 0, GREETING);
        stream.write_all(greeting)?;
        stream.read_exact(&mut answer).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("only {index} of {count} connections are served"),
            )
        })?;
        if answer != *greeting {
            return Err(wrong_bytes());
        }
        resting.push(stream);
    }
    Ok(resting)
}

fn wrong_bytes() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "wrong bytes came back")
}

/// Waits for events, for so long at most.
fn wait(epoll: impl AsFd, events: &mut Vec<epoll::Event>, timeout: Duration) -> io::Result<()> {
    events.clear();
    let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
    match epoll::wait(epoll, spare_capacity(events), Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
