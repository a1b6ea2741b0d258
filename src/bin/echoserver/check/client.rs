//! A client for tests of an echo server: each wait has a time limit, and every byte is compared.
//!
//! Errors are one line. A client that sends much must read at the same time: a server may stop reading
//! while it cannot write.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::OnceLock;
use std::thread::{self, Builder, ScopedJoinHandle};
use std::time::{Duration, Instant};

use socket2::{SockAddr, Socket};

use crate::error::error_text;
use crate::figures::Count;
use crate::payload::Payload;
use crate::platform;
use crate::target::{self, client_error, is_local};

/// The timeout of a socket's calls, which are repeated while a case may wait.
const TICK: Duration = Duration::from_millis(100);

/// A write that waits for this long is stuck; a server that sends nothing for this long is silent.
const STALL: Duration = Duration::from_millis(300);

/// How long a late reader waits after the sender is stuck: on a busy machine, the server may only have paused.
const LATE: Duration = Duration::from_millis(1_200);

/// Writes may wait longer than reads: until the reader of a late case has begun.
const WRITE_FACTOR: u32 = 3;

/// A case may take this many times as long as the server may do nothing.
const LIMIT_FACTOR: u32 = 5;

pub(crate) type CaseResult<T = ()> = Result<T, String>;

/// The server, as one case sees it.
#[derive(Debug)]
pub(crate) struct TestedServer<'a> {
    pub(crate) address: &'a SockAddr,
    /// How long it may do nothing.
    pub(crate) patience: Duration,
    /// When the case has begun.
    pub(crate) start: Instant,
    /// Whether each connection starts with a line from the server, which is no part of the echo.
    pub(crate) skip_greeting: bool,
    /// What this machine lacks for the case, whose failure then says nothing about the server.
    pub(crate) local_fault: OnceLock<String>,
}

impl TestedServer<'_> {
    pub(crate) fn connect(&self) -> CaseResult<Client<'_>> {
        self.connect_with_window(None)
    }

    /// Connects with a receive buffer of about `bytes`, which TCP advertises from the start.
    pub(crate) fn connect_with_window(
        &self,
        bytes: impl Into<Option<usize>>,
    ) -> CaseResult<Client<'_>> {
        let (patience, window) = (self.patience, bytes.into());
        let connect = || {
            let socket = target::connect(self.address, patience, |socket| {
                window.map_or(Ok(()), |bytes| socket.set_recv_buffer_size(bytes))
            })?;
            platform::set_timeouts(&socket, TICK)?;
            Ok(Client {
                socket,
                server: self,
            })
        };
        // The call itself waits, and is not repeated.
        let connected = self.attempt(Duration::ZERO, connect);
        let client = connected.map_err(|error| {
            if is_timeout(&error) {
                format!("cannot connect: no answer for {patience:?}")
            } else {
                format!("cannot connect: {error}")
            }
        })?;
        if self.skip_greeting {
            client.skip_line()?;
        }
        Ok(client)
    }

    /// Returns how many bytes a client can surely send before it reads: this many, or half of what fills all buffers between
    /// it and the server.
    pub(crate) fn room(&self, bytes: usize) -> CaseResult<usize> {
        let sent = self.connect()?.send_until_stuck(&data(0, bytes))?;
        Ok(if sent == bytes { bytes } else { sent / 2 })
    }

    /// Repeats a call while it times out, for `patience` at most. Its error says what the client has seen.
    fn attempt<T>(
        &self,
        patience: Duration,
        mut call: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        // Counts ticks: a process that is stopped by SIGSTOP uses up one, however long it is stopped.
        let mut left = patience;
        let limit = self.patience * LIMIT_FACTOR;
        while self.start.elapsed() < limit {
            match platform::call_with_timeout(TICK, &mut call) {
                Ok(value) => return Ok(value),
                Err(error) if !is_timeout(&error) => {
                    let text = client_error(&error);
                    if is_local(&error) {
                        self.local_fault.get_or_init(|| text.clone());
                    }
                    return Err(io::Error::new(error.kind(), text));
                }
                Err(_) if left > TICK => left -= TICK,
                Err(error) => {
                    let text = format!("nothing for {patience:?}");
                    return Err(io::Error::new(error.kind(), text));
                }
            }
        }
        Err(io::Error::other(format!(
            "the case was not done after {limit:?}"
        )))
    }

    /// Runs `work` on `count` threads at once, and collects the results.
    pub(crate) fn side_by_side<T: Send, All: FromIterator<T>>(
        &self,
        count: usize,
        work: impl Fn(usize) -> CaseResult<T> + Sync,
    ) -> CaseResult<All> {
        thread::scope(|scope| {
            let work = &work;
            let spawn = |index| {
                let thread = Builder::new().spawn_scoped(scope, move || work(index));
                thread.map_err(|error| self.cannot_start(&error))
            };
            let threads: CaseResult<Vec<_>> = (0..count).map(spawn).collect();
            let results = threads?.into_iter().map(ScopedJoinHandle::join);
            results.map(|result| result.expect("no panic")).collect()
        })
    }

    /// Notes that a thread cannot be started. Returns the error.
    fn cannot_start(&self, error: &io::Error) -> String {
        let text = || format!("cannot start a thread: {}", error_text(error));
        self.local_fault.get_or_init(text).clone()
    }
}

#[derive(Debug)]
pub(crate) struct Client<'a> {
    socket: Socket,
    server: &'a TestedServer<'a>,
}

impl Client<'_> {
    /// Sends all of `bytes`.
    pub(crate) fn send(&self, bytes: &[u8]) -> CaseResult {
        let patience = self.server.patience * WRITE_FACTOR;
        self.send_within(patience, bytes).map_err(|(sent, end)| {
            let (sent, all) = (Count(sent), Count(bytes.len()));
            format!("{sent} of {all} bytes were sent, then {end}")
        })
    }

    /// Sends `bytes` until the kernel accepts no more; returns how many it accepted.
    pub(crate) fn send_until_stuck(&self, bytes: &[u8]) -> CaseResult<usize> {
        match self.send_within(STALL, bytes) {
            Ok(()) => Ok(bytes.len()),
            Err((sent, end)) if is_timeout(&end) => Ok(sent),
            Err((sent, end)) => Err(format!("{} bytes were sent, then {end}", Count(sent))),
        }
    }

    /// Sends all of `bytes`. An error comes with how many were sent.
    fn send_within(&self, patience: Duration, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut sent = 0;
        while sent < bytes.len() {
            let write = || (&self.socket).write(&bytes[sent..]);
            let written = self.server.attempt(patience, write);
            sent += written.map_err(|error| (sent, error))?;
        }
        Ok(())
    }

    /// Sends one urgent byte.
    pub(crate) fn send_urgent(&self, byte: u8) -> CaseResult {
        let patience = self.server.patience * WRITE_FACTOR;
        let send = || self.socket.send_out_of_band(&[byte]).map(drop);
        let done = self.server.attempt(patience, send);
        done.map_err(|error| format!("cannot send an urgent byte: {error}"))
    }

    /// Shuts down one half: the server sees EOF after [`Shutdown::Write`], and nothing after [`Shutdown::Read`].
    pub(crate) fn shut_down(&self, half: Shutdown) -> CaseResult {
        let done = self.socket.shutdown(half);
        done.map_err(|error| format!("cannot half-close: {}", client_error(&error)))
    }

    /// Closes the connection with a reset.
    pub(crate) fn reset(self) {
        // It fails only if the connection is already reset.
        let _reset = self.socket.set_linger(Some(Duration::ZERO));
    }

    /// Returns the next bytes, as many as fit into `buffer`. EOF is an error too.
    fn read<'b>(&self, patience: Duration, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
        let read = || (&self.socket).read(buffer);
        match self.server.attempt(patience, read)? {
            0 => Err(io::Error::new(ErrorKind::UnexpectedEof, "EOF")),
            length => Ok(&buffer[..length]),
        }
    }

    /// Reads a line, and not a byte further.
    fn skip_line(&self) -> CaseResult {
        let mut byte = [0];
        while byte != *b"\n" {
            let read = self.read(self.server.patience, &mut byte);
            read.map_err(|end| format!("the greeting was not a line: {end}"))?;
        }
        Ok(())
    }

    /// Reads until `expected` has come back, and not a byte further.
    pub(crate) fn expect(&self, expected: &[u8]) -> CaseResult {
        self.expect_in_pieces(expected, 64 << 10)
    }

    /// The same, with at most `size` bytes a read.
    pub(crate) fn expect_in_pieces(&self, expected: &[u8], size: usize) -> CaseResult {
        let mut buffer = vec![0; size.min(expected.len())];
        let all = Count(expected.len());
        let mut received = 0;
        while received < expected.len() {
            let rest = &expected[received..];
            let room = size.min(rest.len());
            let read = self.read(self.server.patience, &mut buffer[..room]);
            let place = Count(received);
            let error = |end| format!("{place} of {all} bytes came back, then {end}");
            let part = read.map_err(error)?;
            let mut pairs = part.iter().zip(rest);
            if let Some(at) = pairs.position(|(got, sent)| got != sent) {
                let (place, sent, got) = (Count(received + at + 1), rest[at], part[at]);
                let is_first = received + at == 0;
                let answer = is_first.then(|| self.describe_answer(part));
                let answer = answer.unwrap_or_default();
                return Err(format!(
                    "byte {place} of {all} was sent as {sent:#04x} and came back as {got:#04x}{answer}"
                ));
            }
            received += part.len();
        }
        Ok(())
    }

    /// Describes an answer that starts with `bytes`, which are no echo, if it is text of another protocol.
    fn describe_answer(&self, bytes: &[u8]) -> String {
        let mut rest = [0; 64];
        let rest = self.read(STALL, &mut rest).unwrap_or_default();
        let bytes = [bytes, rest].concat();
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(64)]);
        let line = text.lines().next().unwrap_or_default();
        if line.len() < 3 || line.contains(|letter| !matches!(letter, ' '..='~')) {
            return String::new();
        }
        let http = line.split(' ').find(|word| word.starts_with("HTTP/"));
        let protocol = http.map(|version| format!(", which looks like {version}"));
        let protocol = protocol.unwrap_or_default();
        format!("; the answer starts with {line:?}{protocol}")
    }

    /// The same, after a sender on another thread has had time to get stuck or to send all.
    pub(crate) fn expect_late(&self, expected: &[u8]) -> CaseResult {
        thread::sleep(LATE.min(self.server.patience));
        self.expect(expected)
    }

    /// Expects that the server closes the connection cleanly and sends nothing more.
    pub(crate) fn expect_eof(&self) -> CaseResult {
        match self.read(self.server.patience, &mut [0; 64]) {
            Ok(more) => Err(format!("{} came back, but was never sent", quoted(more))),
            Err(end) if end.kind() == ErrorKind::UnexpectedEof => Ok(()),
            Err(end) => Err(format!("everything came back, then {end} instead of EOF")),
        }
    }

    /// Expects that the server sends nothing by itself.
    pub(crate) fn expect_silence(&self) -> CaseResult {
        match self.read(STALL, &mut [0; 64]) {
            Ok(bytes) => Err(format!("the server spoke first: {}", quoted(bytes))),
            Err(end) if is_timeout(&end) => Ok(()),
            Err(end) => Err(format!("{end} came before anything was sent")),
        }
    }

    /// Sends `bytes`, and expects them back at the same time.
    pub(crate) fn echo(&self, bytes: &[u8]) -> CaseResult {
        self.both(|| self.send(bytes), || self.expect(bytes))
    }

    /// The same, with a half-close and EOF at the end.
    pub(crate) fn exchange(&self, bytes: &[u8]) -> CaseResult {
        self.both_to_eof(|| self.send(bytes), || self.expect(bytes))
    }

    /// Half-closes, and expects EOF.
    pub(crate) fn finish(&self) -> CaseResult {
        self.exchange(&[])
    }

    /// Runs `send` on a thread of its own, and `read` at the same time.
    pub(crate) fn both(
        &self,
        send: impl FnOnce() -> CaseResult + Send,
        read: impl FnOnce() -> CaseResult,
    ) -> CaseResult {
        thread::scope(|scope| {
            let sending = Builder::new().spawn_scoped(scope, send);
            let sending = sending.map_err(|error| self.server.cannot_start(&error))?;
            // Ends a send that is stuck.
            let received = read().inspect_err(|_| drop(self.socket.shutdown(Shutdown::Both)));
            received.and(sending.join().expect("senders do not panic"))
        })
    }

    /// The same, with a half-close after `send`, and EOF expected after `read`.
    pub(crate) fn both_to_eof(
        &self,
        send: impl FnOnce() -> CaseResult + Send,
        read: impl FnOnce() -> CaseResult,
    ) -> CaseResult {
        self.both(
            || send().and_then(|()| self.shut_down(Shutdown::Write)),
            || read().and_then(|()| self.expect_eof()),
        )
    }
}

/// Bytes that look random, and differ from one seed to the next.
pub(crate) fn data(seed: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Payload::new(seed as u64).fill(0, &mut bytes);
    bytes
}

pub(crate) fn quoted(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}

fn is_timeout(error: &io::Error) -> bool {
    use ErrorKind::{Interrupted, TimedOut, WouldBlock};
    // SIGCONT interrupts a call that has a timeout, without any handler.
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}
