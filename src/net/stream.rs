//! The stream of one connection, TCP or Unix-domain.

use std::io::{self, Read, Write};
use std::net::Shutdown;

#[cfg(any(target_os = "linux", target_os = "android"))]
use std::os::fd::AsFd;

use mio::event::{Event, Source};
use mio::{Interest, Registry, Token};
#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::net::{RecvFlags, SendFlags};

use crate::connection::{Readiness, Stream};

/// A connection's socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(mio::net::TcpStream),
    #[cfg(unix)]
    Unix(mio::net::UnixStream),
}

impl Socket {
    /// Has `registry`'s poll tell about everything that may ever matter. This is the only call for
    /// interest in a connection's life: edges cost nothing while nothing changes.
    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let interest = Interest::READABLE.add(Interest::WRITABLE);
        // Asked for only to know when a read may be cut short at the urgent mark.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let interest = interest.add(Interest::PRIORITY);
        registry.register(self.source(), token, interest)
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

    fn short_read_means_drained(&self) -> bool {
        match self {
            // So say the manuals of epoll and kqueue; but only Linux tells of the urgent mark.
            Self::Tcp(_) => cfg!(any(target_os = "linux", target_os = "android")),
            // Descriptors and credentials in the stream cut reads short too.
            #[cfg(unix)]
            Self::Unix(_) => false,
        }
    }
}

/// On Linux the system calls are made without libc, whose wrappers are points of cancellation and
/// cost a small message more than all of this crate does.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn receive(stream: &impl AsFd, bytes: &mut [u8]) -> io::Result<usize> {
    match rustix::net::recv(stream, bytes, RecvFlags::empty()) {
        Ok((count, _)) => Ok(count),
        Err(code) => Err(failed(code)),
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn send(stream: &impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    match rustix::net::send(stream, bytes, SendFlags::NOSIGNAL) {
        Ok(count) => Ok(count),
        Err(code) => Err(failed(code)),
    }
}

/// Out of the way of calls that succeed.
#[cold]
#[inline(never)]
#[cfg(any(target_os = "linux", target_os = "android"))]
fn failed(code: rustix::io::Errno) -> io::Error {
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

/// What an event tells of a stream.
pub(crate) fn readiness(event: &Event) -> Readiness {
    let gone = event.is_error() || event.is_write_closed();
    Readiness {
        readable: event.is_readable() || event.is_read_closed() || gone,
        writable: event.is_writable() || gone,
        read_until_would_block: gone || event.is_read_closed() || event.is_priority(),
    }
}
