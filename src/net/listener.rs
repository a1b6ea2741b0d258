//! Listening sockets, TCP or Unix-domain.

use std::io;
use std::net::SocketAddr;

use mio::{Interest, Registry, Token};
use socket2::{Domain, Protocol, SockRef, Socket as RawSocket, Type};

use crate::error::with_context;
use crate::net::address::Address;
use crate::net::stream::Socket;
#[cfg(unix)]
use crate::net::unix::UnixListener;
use crate::peer::Peer;

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
            Address::UnixPath(path) => {
                UnixListener::bind(path, backlog, mode).map(|one| vec![Self::Unix(one)])
            }
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Address::UnixAbstract(name) => {
                UnixListener::bind_abstract(name, backlog).map(|one| vec![Self::Unix(one)])
            }
            _ => bind_all(address, backlog),
        };
        bound.map_err(|error| with_context(&error, &format!("cannot listen on {address}")))
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
