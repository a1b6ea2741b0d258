//! A client for tests of an echo server: each wait has a time limit, and every byte is compared.
//!
//! Errors are one line. A client that sends much must read at the same time: a server may stop reading
//! while it cannot write.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use socket2::{SockAddr, Socket};

use crate::figures::Count;
use crate::payload::Payload;
use crate::target::{self, error_text};

/// The timeout of a socket's calls, which are repeated while a case may wait.
const TICK: Duration = Duration::from_millis(50);

/// A write that waits for this long is stuck; a server that sends nothing for this long is silent.
const STALL: Duration = Duration::from_millis(300);

/// A late reader waits for this long: on a busy machine, a stuck server may have been a slow one.
const LATE: Duration = Duration::from_millis(1_200);

/// Writes may wait longer than reads: until the reader of a late case has begun.
const WRITE_FACTOR: u32 = 3;

pub(crate) type CaseResult<T = ()> = Result<T, String>;

/// The server, and how long a case waits for it.
#[derive(Debug)]
pub(crate) struct Endpoint<'a> {
    pub(crate) address: &'a SockAddr,
    /// Bounds each wait.
    pub(crate) patience: Duration,
    /// Bounds the whole case, from its start.
    pub(crate) limit: Duration,
    pub(crate) start: Instant,
}

impl Endpoint<'_> {
    pub(crate) fn connect(&self) -> CaseResult<Client<'_>> {
        self.connect_with(|_| Ok(()))
    }

    /// Connects with a receive buffer of about `bytes`, which TCP advertises from the start.
    pub(crate) fn connect_with_window(&self, bytes: usize) -> CaseResult<Client<'_>> {
        self.connect_with(|socket| socket.set_recv_buffer_size(bytes))
    }

    fn connect_with(&self, set_up: impl Fn(&Socket) -> io::Result<()>) -> CaseResult<Client<'_>> {
        // The call itself waits, and is not repeated.
        let connected = self.attempt(Duration::ZERO, || {
            let socket = target::connect(self.address, self.patience, &set_up)?;
            socket.set_read_timeout(Some(TICK))?;
            socket.set_write_timeout(Some(TICK))?;
            Ok(socket)
        });
        let socket = connected.map_err(|error| match is_timeout(&error) {
            true => format!("cannot connect: no answer for {:?}", self.patience),
            false => format!("cannot connect: {error}"),
        })?;
        Ok(Client {
            socket,
            endpoint: self,
        })
    }

    /// Repeats a call while it times out, for `patience` at most. The text of its error can be shown.
    fn attempt<T>(
        &self,
        patience: Duration,
        mut call: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        let start = Instant::now();
        while self.start.elapsed() < self.limit {
            let error = match call() {
                Ok(value) => return Ok(value),
                Err(error) if is_timeout(&error) && start.elapsed() < patience => continue,
                Err(error) => error,
            };
            let text = match is_timeout(&error) {
                true => format!("nothing for {patience:?}"),
                false => error_text(&error),
            };
            return Err(io::Error::new(error.kind(), text));
        }
        let text = format!("the case was not done after {:?}", self.limit);
        Err(io::Error::other(text))
    }
}

#[derive(Debug)]
pub(crate) struct Client<'a> {
    socket: Socket,
    endpoint: &'a Endpoint<'a>,
}

impl Client<'_> {
    /// Sends all of `bytes`.
    pub(crate) fn send(&self, bytes: &[u8]) -> CaseResult {
        let patience = self.endpoint.patience * WRITE_FACTOR;
        self.send_until(|_| false, patience, bytes).map(drop)
    }

    /// Sends `bytes` until the kernel accepts no more; returns how many it accepted.
    pub(crate) fn send_until_stuck(&self, bytes: &[u8]) -> CaseResult<usize> {
        self.send_until(is_timeout, STALL, bytes)
    }

    /// Sends `bytes` until an error that `ends` it; returns how many were sent.
    fn send_until(
        &self,
        ends: fn(&io::Error) -> bool,
        patience: Duration,
        bytes: &[u8],
    ) -> CaseResult<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            let write = || (&self.socket).write(&bytes[sent..]);
            match self.endpoint.attempt(patience, write) {
                Ok(length) => sent += length,
                Err(error) if ends(&error) => break,
                Err(error) => {
                    let (sent, all) = (count(sent), count(bytes.len()));
                    return Err(format!("{sent} of {all} bytes were sent, then {error}"));
                }
            }
        }
        Ok(sent)
    }

    /// Sends one urgent byte.
    pub(crate) fn send_urgent(&self, byte: u8) -> CaseResult {
        let patience = self.endpoint.patience * WRITE_FACTOR;
        let send = || self.socket.send_out_of_band(&[byte]).map(drop);
        done("send an urgent byte", self.endpoint.attempt(patience, send))
    }

    /// Sends a FIN: no more bytes follow.
    pub(crate) fn half_close(&self) -> CaseResult {
        done("half-close", self.socket.shutdown(Shutdown::Write))
    }

    /// Shuts the reading half down, which the server cannot see.
    pub(crate) fn stop_reading(&self) -> CaseResult {
        done("stop reading", self.socket.shutdown(Shutdown::Read))
    }

    /// Closes the connection with a reset.
    pub(crate) fn reset(self) {
        // It fails only if the connection is already reset.
        let _reset = self.socket.set_linger(Some(Duration::ZERO));
    }

    /// Returns the next bytes, as many as fit into `buffer`. EOF is an error too.
    fn read<'b>(&self, patience: Duration, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
        let read = || (&self.socket).read(buffer);
        match self.endpoint.attempt(patience, read)? {
            0 => Err(io::Error::new(ErrorKind::UnexpectedEof, "EOF")),
            length => Ok(&buffer[..length]),
        }
    }

    /// Reads until `expected` has come back, and not a byte further.
    pub(crate) fn expect(&self, expected: &[u8]) -> CaseResult {
        self.expect_in_pieces(expected, 64 << 10)
    }

    /// The same, with at most `size` bytes a read.
    pub(crate) fn expect_in_pieces(&self, expected: &[u8], size: usize) -> CaseResult {
        let mut buffer = vec![0; size.min(expected.len())];
        let all = count(expected.len());
        let mut received = 0;
        while received < expected.len() {
            let rest = &expected[received..];
            let room = size.min(rest.len());
            let read = self.read(self.endpoint.patience, &mut buffer[..room]);
            let part = read.map_err(|end| {
                format!("{} of {all} bytes came back, then {end}", count(received))
            })?;
            let mut pairs = part.iter().zip(rest);
            if let Some(at) = pairs.position(|(got, sent)| got != sent) {
                let (place, sent, got) = (count(received + at + 1), rest[at], part[at]);
                return Err(format!(
                    "byte {place} of {all} was sent as {sent:#04x} and came back as {got:#04x}"
                ));
            }
            received += part.len();
        }
        Ok(())
    }

    /// The same, later than a sender on another thread can send.
    pub(crate) fn expect_late(&self, expected: &[u8]) -> CaseResult {
        thread::sleep(LATE.min(self.endpoint.patience));
        self.expect(expected)
    }

    /// Expects that the server closes the connection cleanly and sends nothing more.
    pub(crate) fn expect_eof(&self) -> CaseResult {
        match self.read(self.endpoint.patience, &mut [0; 64]) {
            Ok(extra) => {
                let extra = extra.escape_ascii();
                Err(format!("\"{extra}\" came back, but was never sent"))
            }
            Err(end) if end.kind() == ErrorKind::UnexpectedEof => Ok(()),
            Err(end) => Err(format!("everything came back, then {end} instead of EOF")),
        }
    }

    /// Expects that the server sends nothing by itself.
    pub(crate) fn expect_silence(&self) -> CaseResult {
        match self.read(STALL, &mut [0; 64]) {
            Ok(bytes) => {
                let bytes = bytes.escape_ascii();
                Err(format!("the server spoke first: \"{bytes}\""))
            }
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
            let sending = scope.spawn(send);
            let received = read();
            if received.is_err() {
                // Ends a send that is stuck.
                let _closed = self.socket.shutdown(Shutdown::Both);
            }
            let all_sent = sending.join().expect("senders do not panic");
            received.and(all_sent)
        })
    }

    /// The same, with a half-close after `send`, and EOF expected after `read`.
    pub(crate) fn both_to_eof(
        &self,
        send: impl FnOnce() -> CaseResult + Send,
        read: impl FnOnce() -> CaseResult,
    ) -> CaseResult {
        self.both(
            || send().and_then(|()| self.half_close()),
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

/// Runs `work` on `count` threads at once, and collects the results.
pub(crate) fn side_by_side<R: Send, All: FromIterator<R>>(
    count: usize,
    work: impl Fn(usize) -> R + Sync,
) -> All {
    thread::scope(|scope| {
        let work = &work;
        let spawn = |index| scope.spawn(move || work(index));
        let threads: Vec<_> = (0..count).map(spawn).collect();
        let results = threads.into_iter().map(ScopedJoinHandle::join);
        results
            .map(|result| result.expect("no thread panics"))
            .collect()
    })
}

pub(crate) fn count(number: usize) -> Count {
    Count(number as u64)
}

fn done(what: &str, result: io::Result<()>) -> CaseResult {
    result.map_err(|error| format!("cannot {what}: {}", error_text(&error)))
}

fn is_timeout(error: &io::Error) -> bool {
    use ErrorKind::{Interrupted, TimedOut, WouldBlock};
    // SIGSTOP and SIGCONT interrupt a call that has a timeout, without any handler.
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}
