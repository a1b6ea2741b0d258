//! A client that trusts nobody: every wait has an end, and every byte is compared.
//!
//! What goes wrong is an error of one line. A client that sends much must read meanwhile: a server
//! may stop reading while it cannot write, so a server that does is not at fault.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// For so long nothing may move before a client gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(8);

/// A connection is at rest once nothing has moved for so many times so long.
const RESTS: u32 = 5;
const REST: Duration = Duration::from_millis(300);

pub(crate) type Verdict<T = ()> = Result<T, String>;

#[derive(Debug)]
pub(crate) struct Client {
    stream: TcpStream,
    /// Bytes that the system has taken to send.
    taken: AtomicU64,
}

impl Client {
    pub(crate) fn connect(target: SocketAddr) -> Verdict<Self> {
        let stream = TcpStream::connect_timeout(&target, PATIENCE);
        Self::over(stream.map_err(|error| format!("cannot connect: {}", Plain(&error)))?)
    }

    /// Connects with a receive buffer of about `bytes`, which TCP advertises from the start.
    pub(crate) fn connect_with_window(target: SocketAddr, bytes: usize) -> Verdict<Self> {
        let connect = || {
            let domain = Domain::for_address(target);
            let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_recv_buffer_size(bytes)?;
            socket.connect_timeout(&target.into(), PATIENCE)?;
            Ok(socket.into())
        };
        let stream = connect().map_err(|error| format!("cannot connect: {}", Plain(&error)))?;
        Self::over(stream)
    }

    fn over(stream: TcpStream) -> Verdict<Self> {
        let set_up = || {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))
        };
        set_up().map_err(|error| format!("cannot set up a socket: {}", Plain(&error)))?;
        Ok(Self {
            stream,
            taken: AtomicU64::new(0),
        })
    }

    /// Sends all of `bytes`, however long that takes: what the reader does about it has an end.
    pub(crate) fn send(&self, mut bytes: &[u8]) -> Verdict {
        let length = bytes.len();
        while !bytes.is_empty() {
            match (&self.stream).write(bytes) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    self.taken.fetch_add(count as u64, SeqCst);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    let sent = length - bytes.len();
                    return Err(format!(
                        "{} of {} bytes were sent, then {}",
                        Count(sent),
                        Count(length),
                        Plain(&error)
                    ));
                }
            }
        }
        Ok(())
    }

    /// Sends one urgent byte.
    pub(crate) fn send_urgent(&self, byte: u8) -> Verdict {
        match SockRef::from(&self.stream).send_out_of_band(&[byte]) {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("cannot send an urgent byte: {}", Plain(&error))),
        }
    }

    /// Sends `bytes` until the connection takes no more; says how many it took.
    pub(crate) fn send_until_stuck(&self, bytes: &[u8]) -> Verdict<usize> {
        let limit = |timeout| self.stream.set_write_timeout(timeout);
        let cannot = |error| format!("cannot set a timeout: {}", Plain(&error));
        limit(Some(REST)).map_err(cannot)?;
        let mut sent = 0;
        while sent < bytes.len() {
            match (&self.stream).write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(error) if is_timeout(&error) => break,
                Err(error) => {
                    return Err(format!(
                        "{} bytes were sent, then {}",
                        Count(sent),
                        Plain(&error)
                    ));
                }
            }
        }
        limit(None).map_err(cannot)?;
        Ok(sent)
    }

    /// Ends this side: no more bytes will be sent.
    pub(crate) fn end(&self) -> Verdict {
        let ended = self.stream.shutdown(Shutdown::Write);
        ended.map_err(|error| format!("cannot half-close: {}", Plain(&error)))
    }

    /// Ends the reading side, which the server can't see.
    pub(crate) fn stop_reading(&self) -> Verdict {
        let ended = self.stream.shutdown(Shutdown::Read);
        ended.map_err(|error| format!("cannot stop reading: {}", Plain(&error)))
    }

    /// Goes away with a reset.
    pub(crate) fn reset(self) {
        // A client that is gone already needs no reset.
        let _gone = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }

    /// Reads until `expected` has come back, and not a byte further.
    pub(crate) fn expect(&self, expected: &[u8]) -> Verdict {
        self.expect_in_sips(expected, 64 << 10)
    }

    /// The same, with at most `sip` bytes a read.
    pub(crate) fn expect_in_sips(&self, expected: &[u8], sip: usize) -> Verdict {
        let mut buffer = vec![0; sip.min(expected.len())];
        let mut got = 0;
        while got < expected.len() {
            let room = buffer.len().min(expected.len() - got);
            let count = match (&self.stream).read(&mut buffer[..room]) {
                Ok(0) => Err("EOF".to_owned()),
                Ok(count) => Ok(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => Err(Plain(&error).to_string()),
            };
            let count = count.map_err(|end| {
                let (got, all) = (Count(got), Count(expected.len()));
                format!("{got} of {all} bytes came back, then {end}")
            })?;
            let (piece, wanted) = (&buffer[..count], &expected[got..got + count]);
            if piece != wanted {
                let differs = |at: &usize| piece[*at] != wanted[*at];
                let at = (0..count).find(differs).expect("they differ");
                return Err(format!(
                    "byte {} of {} was sent as {:#04x} and came back as {:#04x}",
                    Count(got + at + 1),
                    Count(expected.len()),
                    wanted[at],
                    piece[at]
                ));
            }
            got += count;
        }
        Ok(())
    }

    /// Expects the server to end its side too, with nothing more to say.
    pub(crate) fn expect_end(&self) -> Verdict {
        let mut extra = [0; 64];
        match (&self.stream).read(&mut extra) {
            Ok(0) => Ok(()),
            Ok(count) => Err(format!(
                "{:?} came that was never sent",
                String::from_utf8_lossy(&extra[..count])
            )),
            Err(error) => Err(format!(
                "everything came back, then {} instead of EOF",
                Plain(&error)
            )),
        }
    }

    /// Expects that nothing comes of its own accord.
    pub(crate) fn expect_silence(&self) -> Verdict {
        let limit = |timeout| self.stream.set_read_timeout(Some(timeout));
        let cannot = |error| format!("cannot set a timeout: {}", Plain(&error));
        limit(REST).map_err(cannot)?;
        let mut words = [0; 64];
        match (&self.stream).read(&mut words) {
            Ok(0) => return Err("EOF came before anything was sent".to_owned()),
            Ok(count) => {
                let words = String::from_utf8_lossy(&words[..count]);
                return Err(format!("the server spoke first: {words:?}"));
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(format!("{} before anything was sent", Plain(&error))),
        }
        limit(PATIENCE).map_err(cannot)
    }

    /// Sends `bytes`, and expects them back. For what surely fits into the sockets' buffers.
    pub(crate) fn echo(&self, bytes: &[u8]) -> Verdict {
        self.send(bytes)?;
        self.expect(bytes)
    }

    /// Does what `send` does on a thread of its own, and what `read` does meanwhile.
    pub(crate) fn both(
        &self,
        send: impl FnOnce(&Self) -> Verdict + Send,
        read: impl FnOnce(&Self) -> Verdict,
    ) -> Verdict {
        thread::scope(|scope| {
            let sending = scope.spawn(|| send(self));
            let heard = read(self);
            if heard.is_err() {
                // Frees a sender that is stuck.
                let _gone = self.stream.shutdown(Shutdown::Both);
            }
            let all_sent = sending.join().expect("senders don't panic");
            heard.and(all_sent)
        })
    }

    /// Sends `bytes` and half-closes, reads all of it meanwhile, and then the end.
    pub(crate) fn exchange(&self, bytes: &[u8]) -> Verdict {
        self.both(
            |client| client.send(bytes).and_then(|()| client.end()),
            |client| client.expect(bytes).and_then(|()| client.expect_end()),
        )
    }

    /// Lets time pass until a sender on another thread has sent all that can be sent.
    pub(crate) fn come_late(&self) {
        let deadline = Instant::now() + PATIENCE;
        let (mut before, mut rests) = (u64::MAX, 0);
        // On a busy machine a sender rests too; only several rests in a row are the end.
        while rests < RESTS && Instant::now() < deadline {
            let taken = self.taken.load(SeqCst);
            rests = if taken == before { rests + 1 } else { 0 };
            before = taken;
            thread::sleep(REST);
        }
    }
}

/// Bytes that look random, and differ from one seed to the next.
pub(crate) fn data(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Does the same on `count` threads at once; the first that fails speaks for all.
pub(crate) fn side_by_side(count: u64, work: impl Fn(u64) -> Verdict + Sync) -> Verdict {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count)
            .map(|index| scope.spawn(move || work(index)))
            .collect();
        let verdicts = threads
            .into_iter()
            .map(|thread| thread.join().expect("clients don't panic"));
        // All are joined before any is judged.
        verdicts.collect::<Vec<_>>().into_iter().collect()
    })
}

/// A number as people read it: 3,000,000.
pub(crate) struct Count(pub(crate) usize);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && (digits.len() - place).is_multiple_of(3) {
                f.write_str(",")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

/// What an error of a socket is to a client.
struct Plain<'a>(&'a io::Error);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.kind() {
            _ if is_timeout(self.0) => write!(f, "nothing for {} s", PATIENCE.as_secs()),
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => f.write_str("a reset"),
            _ => write!(f, "{}", self.0),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
