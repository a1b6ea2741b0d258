//! The stream of one connection, TCP or Unix-domain.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

#[cfg(any(target_os = "linux", target_os = "android"))]
use std::os::fd::AsFd;

use mio::event::{Event, Source};
use mio::{Interest, Registry, Token};
#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::event::{PollFd, PollFlags, Timespec};
#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::net::{RecvFlags, SendFlags};
use socket2::SockRef;

use crate::net::Register;
use crate::net::address::{Address, to_canonical};
#[cfg(unix)]
use crate::net::unix;
use crate::system::{Readiness, Stream};

/// A connection's socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(mio::net::TcpStream),
    #[cfg(unix)]
    Unix(mio::net::UnixStream),
}

impl Register for Socket {
    /// Registers the socket for every event it will ever need.
    ///
    /// Interest is registered once per connection and never changed: an edge-triggered registration
    /// costs nothing while the state of the socket does not change.
    fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let interest = Interest::READABLE.add(Interest::WRITABLE);
        // Tells when a read may end early at TCP's urgent mark.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let interest = interest.add(Interest::PRIORITY);
        registry.register(self.source(), token, interest)
    }
}

impl Socket {
    pub(crate) fn local_address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(stream) => Ok(Address::Ip(to_canonical(stream.local_addr()?))),
            #[cfg(unix)]
            Self::Unix(stream) => Ok(unix::address_of(&stream.local_addr()?)),
        }
    }

    fn source(&mut self) -> &mut dyn Source {
        match self {
            Self::Tcp(stream) => stream,
            #[cfg(unix)]
            Self::Unix(stream) => stream,
        }
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => receive(stream, bytes),
            #[cfg(unix)]
            Self::Unix(stream) => receive(stream, bytes),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => send(stream, bytes),
            #[cfg(unix)]
            Self::Unix(stream) => send(stream, bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Socket {
    fn shutdown_write(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            #[cfg(unix)]
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    fn await_delivery(&mut self) -> bool {
        match self {
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Self::Tcp(stream) => is_send_queue_empty(stream),
            // Other systems do not tell. A Unix-domain socket delivers at once.
            _ => true,
        }
    }

    fn unread(&self) -> u64 {
        match self {
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Self::Tcp(stream) => rustix::io::ioctl_fionread(stream).unwrap_or(0),
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Self::Unix(stream) => rustix::io::ioctl_fionread(stream).unwrap_or(0),
            // Other systems need more than the standard library for this.
            #[cfg(not(any(target_os = "linux", target_os = "android")))]
            _ => 0,
        }
    }

    fn abort(&mut self) {
        match self {
            Self::Tcp(stream) => {
                // It fails only if the peer has already reset the connection.
                let _already_reset = SockRef::from(&*stream).set_linger(Some(Duration::ZERO));
            }
            // A Unix-domain socket cannot be reset.
            #[cfg(unix)]
            Self::Unix(_) => {}
        }
    }

    fn short_read_means_drained(&self) -> bool {
        match self {
            // epoll and kqueue document this, but only Linux reports the urgent mark, which also ends
            // a read early.
            Self::Tcp(_) => cfg!(any(target_os = "linux", target_os = "android")),
            // A read also ends early at passed descriptors and credentials.
            #[cfg(unix)]
            Self::Unix(_) => false,
        }
    }
}

/// Receives with a raw system call. The wrapper in libc is a cancellation point: a message costs 346 user
/// instructions with the wrappers, and 232 without them.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn receive(stream: &impl AsFd, bytes: &mut [u8]) -> io::Result<usize> {
    match rustix::net::recv(stream, bytes, RecvFlags::empty()) {
        Ok((count, _)) => Ok(count),
        Err(code) => Err(into_error(code)),
    }
}

/// Sends with a raw system call, and without SIGPIPE.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn send(stream: &impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    match rustix::net::send(stream, bytes, SendFlags::NOSIGNAL) {
        Ok(count) => Ok(count),
        Err(code) => Err(into_error(code)),
    }
}

/// Returns whether the peer has acknowledged everything that was sent.
///
/// With the smallest send buffer and a limit of 1 for unsent bytes, a socket is writable only if everything is
/// sent and at most one or two small segments (3 KB, with the kernel's overhead) are unacknowledged. A poll
/// that finds it not writable arms the edge that reports it later.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn is_send_queue_empty(stream: &mio::net::TcpStream) -> bool {
    let socket = SockRef::from(stream);
    let set = socket.set_tcp_notsent_lowat(1);
    if set.and_then(|()| socket.set_send_buffer_size(0)).is_err() {
        return true;
    }
    let mut sockets = [PollFd::new(stream, PollFlags::OUT)];
    loop {
        match rustix::event::poll(&mut sockets, Some(&Timespec::default())) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
            Ok(_) => return !sockets[0].revents().is_empty(),
        }
    }
}

/// Kept out of line, away from the path of successful calls.
#[cold]
#[inline(never)] // 10 instructions per message
#[cfg(any(target_os = "linux", target_os = "android"))]
fn into_error(code: rustix::io::Errno) -> io::Error {
    code.into()
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn receive(stream: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    stream.read(bytes)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn send(stream: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
    stream.write(bytes)
}

/// Translates a poll event into what the stream may be ready for.
pub(crate) fn readiness(event: &Event) -> Readiness {
    let closed = event.is_error() || event.is_write_closed();
    Readiness {
        readable: event.is_readable() || event.is_read_closed() || closed,
        writable: event.is_writable() || closed,
        read_until_would_block: closed || event.is_read_closed() || event.is_priority(),
    }
}

#[cfg(test)]
impl Socket {
    /// Returns a connected socket, and its client.
    pub(crate) fn with_client() -> (Self, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        (Self::Tcp(mio::net::TcpStream::from_std(stream)), client)
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests;
