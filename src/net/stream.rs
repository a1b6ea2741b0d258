//! The stream of one connection, TCP or Unix-domain.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use mio::event::Event;
use mio::net::TcpStream;
use mio::{Registry, Token};
use socket2::SockRef;

use crate::net::address::{Address, address_of};
use crate::net::{Register, platform};
use crate::system::{Readiness, Stream};

/// A connection's socket.
#[derive(Debug)]
pub(crate) struct Socket {
    /// mio's type for a descriptor that is read, written, shut down and registered. A Unix-domain socket uses it
    /// as well.
    pub(super) stream: TcpStream,
    pub(super) is_tcp: bool,
}

impl Register for Socket {
    /// Registers the socket for every event it will ever need.
    ///
    /// Interest is registered once per connection and never changed: an edge-triggered registration
    /// costs nothing while the state of the socket does not change.
    fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(&mut self.stream, token, platform::STREAM_EVENTS)
    }
}

impl Socket {
    pub(crate) fn local_address(&self) -> io::Result<Address> {
        address_of(&SockRef::from(&self.stream))
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        platform::receive(&self.stream, bytes)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        platform::send(&self.stream, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Socket {
    fn shutdown_write(&mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }

    fn poll_delivery(&mut self) -> bool {
        platform::poll_delivery(&self.stream)
    }

    fn unread(&self) -> u64 {
        platform::unread(&self.stream)
    }

    /// A Unix-domain socket cannot be reset, and ignores the option.
    fn reset_on_close(&mut self) {
        // It fails only if the peer has already reset the connection.
        let _already_reset = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }

    /// A read of a Unix-domain socket also ends early at passed descriptors and credentials.
    fn short_read_means_drained(&self) -> bool {
        self.is_tcp && platform::SHORT_READ_MEANS_DRAINED
    }
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
        let socket = Self {
            stream: TcpStream::from_std(stream),
            is_tcp: true,
        };
        (socket, client)
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
