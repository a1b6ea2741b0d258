//! A client for tests of an echo server: each wait has a time limit, and every byte is compared.
//!
//! Errors are one line. A client that sends much must read at the same time: a server may stop reading
//! while it cannot write.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockAddr, Socket};

use crate::figures::Count;
use crate::payload::Payload;
use crate::target::{self, error_text};

/// A sender is blocked if it has sent nothing for this many intervals.
const STALL_INTERVALS: u32 = 5;
const STALL_INTERVAL: Duration = Duration::from_millis(300);

/// Writes may wait longer than reads: until the reader of a late case has begun.
const WRITE_FACTOR: u32 = 3;

pub(crate) type CaseResult<T = ()> = Result<T, String>;

/// The server, and how long a case waits for it.
#[derive(Debug)]
pub(crate) struct Endpoint {
    address: SockAddr,
    patience: Duration,
    limit: Duration,
    deadline: Instant,
}

impl Endpoint {
    /// `patience` bounds each wait, and `limit` the whole case, which begins now.
    pub(crate) fn new(address: &SockAddr, patience: Duration, limit: Duration) -> Self {
        Self {
            address: address.clone(),
            patience,
            limit,
            deadline: Instant::now() + limit,
        }
    }

    pub(crate) fn connect(&self) -> CaseResult<Client<'_>> {
        self.connect_with(|_| Ok(()))
    }

    /// Connects with a receive buffer of about `bytes`, which TCP advertises from the start.
    pub(crate) fn connect_with_window(&self, bytes: usize) -> CaseResult<Client<'_>> {
        self.connect_with(|socket| socket.set_recv_buffer_size(bytes))
    }

    fn connect_with(
        &self,
        set_up: impl FnOnce(&Socket) -> io::Result<()>,
    ) -> CaseResult<Client<'_>> {
        self.check_limit()?;
        let connected = target::connect(&self.address, self.patience, set_up);
        let socket = connected.map_err(|error| match is_timeout(&error) {
            true => format!("cannot connect: no answer for {:?}", self.patience),
            false => format!("cannot connect: {}", error_text(&error)),
        })?;
        let client = Client {
            socket,
            endpoint: self,
            sent: AtomicU64::new(0),
        };
        client.reset_timeouts()?;
        Ok(client)
    }

    fn check_limit(&self) -> CaseResult {
        match Instant::now() < self.deadline {
            true => Ok(()),
            false => Err(format!("the case was not done after {:?}", self.limit)),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Client<'a> {
    socket: Socket,
    endpoint: &'a Endpoint,
    /// Bytes that the kernel has accepted.
    sent: AtomicU64,
}

impl Client<'_> {
    fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| (&self.socket).read(bytes))
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        uninterrupted(|| (&self.socket).write(bytes))
    }

    fn set_timeouts(&self, read: Duration, write: Duration) -> CaseResult {
        let set = self.socket.set_read_timeout(Some(read));
        let set = set.and_then(|()| self.socket.set_write_timeout(Some(write)));
        self.done(set, "set a timeout")
    }

    fn reset_timeouts(&self) -> CaseResult {
        let patience = self.endpoint.patience;
        self.set_timeouts(patience, patience * WRITE_FACTOR)
    }

    /// Sends all of `bytes`.
    pub(crate) fn send(&self, mut bytes: &[u8]) -> CaseResult {
        let length = bytes.len();
        while !bytes.is_empty() {
            self.endpoint.check_limit()?;
            match self.write(bytes) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    self.sent.fetch_add(count as u64, SeqCst);
                }
                Err(error) => {
                    let sent = count(length - bytes.len());
                    let end = self.end_text(&error, WRITE_FACTOR);
                    return Err(format!(
                        "{sent} of {} bytes were sent, then {end}",
                        count(length)
                    ));
                }
            }
        }
        Ok(())
    }

    /// Sends one urgent byte.
    pub(crate) fn send_urgent(&self, byte: u8) -> CaseResult {
        let sent = self.socket.send_out_of_band(&[byte]);
        self.done(sent.map(drop), "send an urgent byte")
    }

    /// Sends `bytes` until the kernel accepts no more; returns how many it accepted.
    pub(crate) fn send_until_stuck(&self, bytes: &[u8]) -> CaseResult<usize> {
        self.set_timeouts(STALL_INTERVAL, STALL_INTERVAL)?;
        let mut sent = 0;
        while sent < bytes.len() {
            self.endpoint.check_limit()?;
            match self.write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(error) if is_timeout(&error) => break,
                Err(error) => {
                    let end = self.end_text(&error, 1);
                    return Err(format!("{} bytes were sent, then {end}", count(sent)));
                }
            }
        }
        self.reset_timeouts()?;
        Ok(sent)
    }

    /// Sends a FIN: no more bytes follow.
    pub(crate) fn half_close(&self) -> CaseResult {
        self.done(self.socket.shutdown(Shutdown::Write), "half-close")
    }

    /// Shuts the reading half down, which the server cannot see.
    pub(crate) fn stop_reading(&self) -> CaseResult {
        self.done(self.socket.shutdown(Shutdown::Read), "stop reading")
    }

    fn done(&self, result: io::Result<()>, what: &str) -> CaseResult {
        result.map_err(|error| format!("cannot {what}: {}", self.end_text(&error, 1)))
    }

    /// Closes the connection with a reset.
    pub(crate) fn reset(self) {
        // It fails only if the connection is already reset.
        let _reset = self.socket.set_linger(Some(Duration::ZERO));
    }

    /// Reads until `expected` has come back, and not a byte further.
    pub(crate) fn expect(&self, expected: &[u8]) -> CaseResult {
        self.expect_in_pieces(expected, 64 << 10)
    }

    /// The same, with at most `size` bytes a read.
    pub(crate) fn expect_in_pieces(&self, expected: &[u8], size: usize) -> CaseResult {
        let mut buffer = vec![0; size.min(expected.len())];
        let mut received = 0;
        while received < expected.len() {
            let room = buffer.len().min(expected.len() - received);
            let read = self.endpoint.check_limit();
            let read = read.and_then(|()| match self.read(&mut buffer[..room]) {
                Ok(0) => Err("EOF".to_owned()),
                Ok(count) => Ok(count),
                Err(error) => Err(self.end_text(&error, 1)),
            });
            let length = read.map_err(|end| {
                let (received, all) = (count(received), count(expected.len()));
                format!("{received} of {all} bytes came back, then {end}")
            })?;
            let pairs = buffer[..length].iter().zip(&expected[received..]);
            if let Some((at, (got, sent))) = pairs.enumerate().find(|(_, (got, sent))| got != sent)
            {
                let (place, all) = (count(received + at + 1), count(expected.len()));
                return Err(format!(
                    "byte {place} of {all} was sent as {sent:#04x} and came back as {got:#04x}"
                ));
            }
            received += length;
        }
        Ok(())
    }

    /// Expects that the server closes the connection cleanly and sends nothing more.
    pub(crate) fn expect_eof(&self) -> CaseResult {
        let mut extra = [0; 64];
        match self.read(&mut extra) {
            Ok(0) => Ok(()),
            Ok(count) => {
                let extra = String::from_utf8_lossy(&extra[..count]);
                Err(format!("{extra:?} came back, but was never sent"))
            }
            Err(error) => {
                let end = self.end_text(&error, 1);
                Err(format!("everything came back, then {end} instead of EOF"))
            }
        }
    }

    /// Expects that the server sends nothing by itself.
    pub(crate) fn expect_silence(&self) -> CaseResult {
        self.set_timeouts(STALL_INTERVAL, STALL_INTERVAL)?;
        let mut bytes = [0; 64];
        match self.read(&mut bytes) {
            Ok(0) => return Err("EOF came before anything was sent".to_owned()),
            Ok(count) => {
                let bytes = String::from_utf8_lossy(&bytes[..count]);
                return Err(format!("the server spoke first: {bytes:?}"));
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => {
                let end = self.end_text(&error, 1);
                return Err(format!("{end} before anything was sent"));
            }
        }
        self.reset_timeouts()
    }

    /// Sends `bytes`, and expects them back. For what certainly fits into the sockets' buffers.
    pub(crate) fn echo(&self, bytes: &[u8]) -> CaseResult {
        self.send(bytes)?;
        self.expect(bytes)
    }

    /// Runs `send` on a thread of its own, and `read` at the same time.
    pub(crate) fn both(
        &self,
        send: impl FnOnce(&Self) -> CaseResult + Send,
        read: impl FnOnce(&Self) -> CaseResult,
    ) -> CaseResult {
        thread::scope(|scope| {
            let sending = scope.spawn(|| send(self));
            let received = read(self);
            if received.is_err() {
                // Ends a send that is stuck.
                let _closed = self.socket.shutdown(Shutdown::Both);
            }
            let all_sent = sending.join().expect("senders do not panic");
            received.and(all_sent)
        })
    }

    /// Sends `bytes` and half-closes; at the same time, reads all of it and then EOF.
    pub(crate) fn exchange(&self, bytes: &[u8]) -> CaseResult {
        self.both(
            |client| client.send(bytes).and_then(|()| client.half_close()),
            |client| client.expect(bytes).and_then(|()| client.expect_eof()),
        )
    }

    /// Waits until a sender on another thread has sent all that can be sent.
    pub(crate) fn wait_until_sender_blocks(&self) {
        let deadline = Instant::now() + self.endpoint.patience;
        let (mut before, mut stalls) = (u64::MAX, 0);
        // On a busy machine a sender pauses too; only several intervals in a row are the end.
        while stalls < STALL_INTERVALS && Instant::now() < deadline {
            let sent = self.sent.load(SeqCst);
            stalls = if sent == before { stalls + 1 } else { 0 };
            before = sent;
            thread::sleep(STALL_INTERVAL);
        }
    }

    /// Describes what a socket's error means to the client. A call that timed out waited for `factor` times
    /// the patience.
    fn end_text(&self, error: &io::Error, factor: u32) -> String {
        match is_timeout(error) {
            true => format!("nothing for {:?}", self.endpoint.patience * factor),
            false => error_text(error),
        }
    }
}

/// Bytes that look random, and differ from one seed to the next.
pub(crate) fn data(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Payload::new(seed).fill(0, &mut bytes);
    bytes
}

/// Runs `work` on `count` threads at once, and returns the first error.
pub(crate) fn side_by_side(count: u64, work: impl Fn(u64) -> CaseResult + Sync) -> CaseResult {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count)
            .map(|index| scope.spawn(move || work(index)))
            .collect();
        let results = threads
            .into_iter()
            .map(|thread| thread.join().expect("clients do not panic"));
        // Joins all before it looks at any.
        results.collect::<Vec<_>>().into_iter().collect()
    })
}

pub(crate) fn count(number: usize) -> Count {
    Count(number as u64)
}

/// Repeats a call that fails with EINTR: one with a timeout does after SIGSTOP and SIGCONT, without any handler.
fn uninterrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
