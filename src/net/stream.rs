//! Listeners and streams, TCP or Unix-domain: one small enum each, so that nothing above cares.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};

#[cfg(any(target_os = "linux", target_os = "android"))]
use std::os::fd::AsFd;

use mio::event::{Event, Source};
use mio::{Interest, Registry, Token};
#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::net::{RecvFlags, SendFlags};
use socket2::{Domain, Protocol, SockRef, Socket as RawSocket, Type};

use crate::connection::{Readiness, Stream};
use crate::net::address::Address;
#[cfg(unix)]
use crate::net::unix::UnixListener;

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Peer {
    /// A TCP client. An IPv4 client of a dual-stack listener is shown as IPv4.
    Ip(SocketAddr),
    /// A client of a Unix-domain socket; these have no names.
    Unix,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

/// A socket that listens.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(mio::net::TcpListener),
    #[cfg(unix)]
    Unix(UnixListener),
}

impl Listener {
    /// Listens at every place that `address` stands for; a path's file gets `mode`, if there is one.
    ///
    /// # Errors
    ///
    /// Name the place: `cannot listen on 127.0.0.1:5555: address in use`.
    #[cfg_attr(not(unix), expect(unused_variables, reason = "files are Unix's"))]
    pub(crate) fn bind(
        address: &Address,
        backlog: u32,
        mode: Option<u32>,
    ) -> io::Result<Vec<Self>> {
        let bound = match address {
            #[cfg(unix)]
            Address::Path(path) => {
                UnixListener::bind(path, backlog, mode).map(|one| vec![Self::Unix(one)])
            }
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Address::Abstract(name) => {
                UnixListener::bind_abstract(name, backlog).map(|one| vec![Self::Unix(one)])
            }
            _ => bind_all(address, backlog),
        };
        bound.map_err(|error| about(&error, &format!("cannot listen on {address}")))
    }

    /// Takes over a socket that listens already.
    pub(crate) fn from_tcp(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        set_options(&SockRef::from(&listener))?;
        Ok(Self::Tcp(mio::net::TcpListener::from_std(listener)))
    }

    /// Takes over a socket that listens already; its file, if it has one, is somebody else's.
    #[cfg(unix)]
    pub(crate) fn from_unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        UnixListener::adopt(listener).map(Self::Unix)
    }

    /// Where it listens in fact, with the port that was picked.
    pub(crate) fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Address::Ip),
            #[cfg(unix)]
            Self::Unix(listener) => Ok(listener.address()),
        }
    }

    /// Accepts one connection; never blocks.
    pub(crate) fn accept(&self) -> io::Result<(Socket, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, mut address) = listener.accept()?;
                // Linux's sockets have inherited these from the listener.
                #[cfg(not(any(target_os = "linux", target_os = "android")))]
                let _reset_already = set_options(&SockRef::from(&stream));
                address.set_ip(address.ip().to_canonical());
                Ok((Socket::Tcp(stream), Peer::Ip(address)))
            }
            #[cfg(unix)]
            Self::Unix(listener) => Ok((Socket::Unix(listener.accept()?), Peer::Unix)),
        }
    }

    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => registry.register(listener, token, Interest::READABLE),
            #[cfg(unix)]
            Self::Unix(listener) => listener.register(registry, token),
        }
    }
}

/// Listens at every IP address of `address`, or at its fallback where this system has no IPv6.
fn bind_all(address: &Address, backlog: u32) -> io::Result<Vec<Listener>> {
    let (places, fallback) = address.resolve()?;
    let bound: io::Result<Vec<_>> = places
        .iter()
        .map(|place| bind_tcp(*place, backlog))
        .collect();
    match (bound, fallback) {
        (Err(error), Some(place)) if lacks_ipv6(&error) => Ok(vec![bind_tcp(place, backlog)?]),
        (bound, _) => bound,
    }
}

/// A listener at one TCP address. `mio`'s own `bind` would fix the backlog, and leave it to the
/// system whether `[::]` takes IPv4 too.
fn bind_tcp(address: SocketAddr, backlog: u32) -> io::Result<Listener> {
    let socket = RawSocket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // On Windows this would let two servers share a port; elsewhere it only ignores old connections.
    #[cfg(not(windows))]
    socket.set_reuse_address(true)?;
    set_options(&SockRef::from(&socket))?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    socket.set_nonblocking(true)?;
    Ok(Listener::Tcp(mio::net::TcpListener::from_std(
        socket.into(),
    )))
}

/// What every connection's socket has: no delay for small answers, and urgent bytes in the stream,
/// where they belong.
fn set_options(socket: &RawSocket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)
}

/// Whether an error says that this system has no IPv6.
fn lacks_ipv6(error: &io::Error) -> bool {
    const EAFNOSUPPORT: i32 = if cfg!(windows) {
        10047
    } else if cfg!(target_os = "linux") {
        97
    } else {
        47
    };
    matches!(
        error.kind(),
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported
    ) || error.raw_os_error() == Some(EAFNOSUPPORT)
}

/// An error's message without the number that `io::Error` puts behind it.
pub(crate) fn reason_of(error: &io::Error) -> String {
    let text = error.to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    let mut text = text[..end].to_owned();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

/// An error that says what it is about.
pub(crate) fn about(error: &io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {}", reason_of(error)))
}

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
    fn end(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            #[cfg(unix)]
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    fn is_drained_by_short_read(&self) -> bool {
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
        to_the_end: gone || event.is_read_closed() || event.is_priority(),
    }
}
