//! One connection of the load: its messages, and the states of its socket.
//!
//! A socket is opening, skips a greeting, runs, and ends: it is half-closed after the last answer, and closed at the
//! server's EOF. With a connection for each message, the next one runs while the one before ends.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::ops;
use std::time::Instant;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token, event::Event};
use socket2::{SockAddr, SockRef, Socket, Type};

use crate::error::excerpt;
use crate::figures::Count;
use crate::load::flow::Flow;
use crate::load::plan::Plan;
use crate::load::tally::{Tally, count};
use crate::payload::Payload;
use crate::target::{client_error, refuse_itself, with_cause};

/// Most bytes in one call. A message of up to 64 KiB is sent in one.
const MAX_SEND: usize = 64 << 10;
/// Calls in each direction before other connections get their turn.
const MAX_CALLS: ops::Range<usize> = 0..16;
/// Longest first line of a server.
const MAX_GREETING: usize = 4 << 10;
/// On Linux, a short read or write proves that the next one would block, and a later change raises an event.
const SHORT_MEANS_BLOCKED: bool = cfg!(target_os = "linux");
const SURPLUS: &str = "wrong byte: more came back than was sent";

#[derive(Debug, Default)]
pub(crate) struct Connection {
    pub(crate) flow: Flow,
    pub(crate) link: Option<Link>,
    /// The socket that was used before: half-closed, and its EOF has not been read.
    pub(crate) ending: Option<Link>,
    pub(crate) is_runnable: bool,
    pub(crate) is_answered: bool,
    /// It is opened again later, unless the number of messages is limited.
    pub(crate) has_failed: bool,
    /// Sweeps in a row that have seen no new byte, and the bytes received at the last one that has.
    pub(crate) idle_sweeps: u32,
    pub(crate) swept_bytes: u64,
}

#[derive(Debug)]
enum State {
    /// Connecting. A Unix-domain socket tries again until the backlog has room.
    Opening,
    /// Contains the beginning of the first line. Messages are sent already: a balancer may wait for them.
    Greeting(Vec<u8>),
    Running,
}

/// A socket.
#[allow(clippy::struct_excessive_bools, reason = "independent flags")]
#[derive(Debug)]
pub(crate) struct Link {
    stream: TcpStream,
    is_registered: bool,
    payload: Payload,
    pub(crate) opened: Instant,
    state: State,
    readable: bool,
    writable: bool,
    /// A short read may precede EOF.
    read_closed: bool,
}

pub(crate) fn cannot_connect(error: &io::Error) -> String {
    format!("cannot connect: {}", client_error(error))
}

impl Connection {
    /// Takes a socket, which may still connect.
    pub(crate) fn add(
        &mut self,
        index: usize,
        mut stream: TcpStream,
        payload: Payload,
        opened: Instant,
        registry: &Registry,
    ) -> io::Result<()> {
        registry.register(
            &mut stream,
            Token(2 * index),
            Interest::READABLE | Interest::WRITABLE,
        )?;
        (self.has_failed, self.idle_sweeps) = (false, 0);
        self.link = Some(Link {
            stream,
            is_registered: true,
            payload,
            opened,
            state: State::Opening,
            readable: false,
            writable: true,
            read_closed: false,
        });
        Ok(())
    }

    /// Notes what an event says about one of the sockets. That of the one that is ending has an odd token.
    pub(crate) fn note(&mut self, event: &Event) {
        let is_ending = event.token().0 % 2 == 1;
        let link = if is_ending {
            &mut self.ending
        } else {
            &mut self.link
        };
        if let Some(link) = link {
            link.readable |= event.is_readable() || event.is_error();
            link.writable |= event.is_writable() || event.is_error();
            link.read_closed |= event.is_read_closed() || event.is_error();
        }
    }

    pub(crate) fn is_opening(&self) -> bool {
        let link = self.link.as_ref();
        link.is_some_and(|link| matches!(link.state, State::Opening))
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.link.is_none() && self.ending.is_none()
    }

    pub(crate) fn can_proceed(&self) -> bool {
        self.link.as_ref().is_some_and(|link| {
            let sendable = link.writable && self.flow.sendable() > 0;
            !self.is_opening() && (link.readable || sendable)
        })
    }

    /// Returns the local address of a socket that has never got an answer to what it has sent.
    pub(crate) fn unanswered_address(&self) -> Option<String> {
        let is_silent = !self.is_answered && self.flow.is_awaiting_bytes();
        let link = self.link.as_ref().filter(|_| is_silent)?;
        let address = link.stream.local_addr();
        Some(address.map_or_else(|_| "unix".to_owned(), |it| it.to_string()))
    }

    /// Receives, verifies and sends until calls would block, or up to a limit. The time of a message begins when it is
    /// sent, or, if it is the only one of its connection, when that is opened.
    pub(crate) fn transfer(
        &mut self,
        plan: &Plan<'_>,
        buffer: &mut [u8],
        tally: &mut Tally,
    ) -> Result<(), String> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        if matches!(link.state, State::Opening) && !link.establish(plan, tally)? {
            return Ok(());
        }
        let mut now = Instant::now();
        let mut calls = MAX_CALLS;
        while link.readable && calls.next().is_some() {
            match link.stream.read(buffer) {
                Ok(0) => return Err("the server closed the connection".to_owned()),
                Ok(count) => {
                    now = Instant::now();
                    let is_short = count < buffer.len() && SHORT_MEANS_BLOCKED;
                    link.readable = !is_short || link.read_closed;
                    let bytes = link.skip_greeting(&mut buffer[..count], tally)?;
                    link.verify(&self.flow, bytes)?;
                    let count = bytes.len() as u64;
                    let is_answer = count > 0;
                    tally.answered += u64::from(is_answer && !self.is_answered);
                    self.is_answered |= is_answer;
                    tally.bytes += count;
                    self.flow.add_received(count, now, |time| {
                        tally.messages += 1;
                        tally.rtt.record(time);
                    });
                }
                Err(error) => link.readable = is_interrupted(&error)?,
            }
        }
        let start = Some(link.opened).filter(|_| plan.options.connect);
        let start = start.unwrap_or(now);
        let mut calls = MAX_CALLS;
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

    /// Half-closes the socket. One that is still ending is closed. Until [`watch_ending`](Self::watch_ending), no event wakes
    /// the thread for its EOF: the next connection does not wait for that.
    pub(crate) fn half_close(&mut self, registry: &Registry) {
        let link = self.link.take();
        self.ending = link.filter(|link| !matches!(link.state, State::Opening));
        if let Some(link) = &mut self.ending {
            // It fails if the server has reset the connection.
            let _reset = link.stream.shutdown(Shutdown::Write);
            let _never = registry.deregister(&mut link.stream);
            // The EOF may have arrived when it is asked for.
            (link.is_registered, link.readable) = (false, true);
        }
    }

    /// Has an event tell that the socket that is ending can be read.
    pub(crate) fn watch_ending(&mut self, index: usize, registry: &Registry) -> io::Result<()> {
        let Some(link) = self.ending.as_mut().filter(|link| !link.is_registered) else {
            return Ok(());
        };
        link.is_registered = true;
        registry.register(&mut link.stream, Token(2 * index + 1), Interest::READABLE)
    }

    /// Reads the EOF of the socket that is ending, and closes it. A byte is an error.
    pub(crate) fn read_eof(&mut self, buffer: &mut [u8], tally: &mut Tally) -> Result<(), String> {
        while let Some(link) = self.ending.as_mut().filter(|link| link.readable) {
            match (link.stream.read(buffer)).map_err(|error| is_interrupted(&error)) {
                Err(Ok(again)) => link.readable = again,
                // All answers have come back: a reset is no failure.
                Ok(0) | Err(Err(_)) => self.ending = None,
                Ok(count) => {
                    let rest = link.skip_greeting(&mut buffer[..count], tally);
                    if !matches!(rest, Ok([])) {
                        self.ending = None;
                        return Err(SURPLUS.to_owned());
                    }
                }
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
    /// Returns whether the connection is established, as far as can be told, and counts it.
    fn establish(&mut self, plan: &Plan<'_>, tally: &mut Tally) -> Result<bool, String> {
        let connected = self.is_connected(plan);
        if !connected.map_err(|error| cannot_connect(&error))? {
            return Ok(false);
        }
        tally.opened += 1;
        tally.connect.record(self.opened.elapsed());
        let greeting = plan.options.skip_greeting.then(Vec::new);
        self.state = greeting.map_or(State::Running, State::Greeting);
        Ok(true)
    }

    fn is_connected(&mut self, plan: &Plan<'_>) -> io::Result<bool> {
        let socket = SockRef::from(&self.stream);
        match socket.peer_addr() {
            Ok(_) if plan.is_unix => Ok(true),
            Ok(_) => refuse_itself(&socket).map(|()| true),
            Err(_) if plan.is_unix => match socket.connect(&plan.address) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
                connected => {
                    // Before it was connected, an event has reported its end.
                    self.read_closed = false;
                    connected.map(|()| true)
                }
            },
            Err(_) => socket.take_error()?.map_or(Ok(false), Err),
        }
    }

    /// Returns what follows the first line, if that was still to come.
    fn skip_greeting<'b>(
        &mut self,
        bytes: &'b mut [u8],
        tally: &mut Tally,
    ) -> Result<&'b mut [u8], String> {
        let State::Greeting(line) = &mut self.state else {
            return Ok(bytes);
        };
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let (part, rest) = bytes.split_at_mut(end.map_or(bytes.len(), |end| end + 1));
        line.extend_from_slice(part);
        if line.len() > MAX_GREETING {
            let limit = Count(MAX_GREETING);
            return Err(format!("no greeting: no line in the first {limit} bytes"));
        }
        if end.is_some() {
            let line = String::from_utf8_lossy(line);
            count(&mut tally.greetings, &excerpt(line.trim_end()), 1);
            self.state = State::Running;
        }
        Ok(rest)
    }

    /// Checks that `bytes` are those of the stream that follow what was received.
    fn verify(&self, flow: &Flow, bytes: &mut [u8]) -> Result<(), String> {
        let offset = flow.received;
        if let Some((at, expected)) = self.payload.find_difference(offset, bytes) {
            let (index, got) = (offset + at as u64, bytes[at]);
            let place = Count(index + 1);
            let hint = match index {
                0 => "; if the server greets, use --skip-greeting",
                _ => "",
            };
            return Err(format!(
                "wrong byte: byte {place} of a stream was sent as {expected:#04x} and came back as {got:#04x}{hint}"
            ));
        }
        if offset + bytes.len() as u64 > flow.sent {
            return Err(SURPLUS.to_owned());
        }
        Ok(())
    }
}

/// Starts to connect a socket that does not block.
///
/// A Unix-domain socket connects at once, or not at all while the backlog is full: it is connected when it is asked whether
/// it is. It is a `TcpStream` as well: this type only owns a descriptor, and nothing of TCP is used.
pub(crate) fn connect(address: &SockAddr) -> io::Result<TcpStream> {
    if let Some(ip) = address.as_socket() {
        let stream = TcpStream::connect(ip);
        let stream = stream.map_err(|error| with_cause(error, address))?;
        stream.set_nodelay(true)?;
        return Ok(stream);
    }
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    Ok(TcpStream::from_std(socket.into()))
}
