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

/// A listening socket.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(mio::net::TcpListener),
    #[cfg(unix)]
    Unix(UnixListener),
}

impl Listener {
    /// Listens on every socket address that `address` resolves to. `mode` sets the permissions of a
    /// Unix-domain socket's file.
    ///
    /// # Errors
    ///
    /// The message names the address: `cannot listen on 127.0.0.1:5555: address in use`.
    #[cfg_attr(
        not(unix),
        expect(unused_variables, reason = "only Unix sockets have a mode")
    )]
    pub(crate) fn bind(
        address: &Address,
        backlog: u32,
        mode: Option<u32>,
    ) -> io::Result<Vec<Self>> {
        let bound = match address {
            #[cfg(unix)]
            Address::UnixPath(path) => {
                UnixListener::bind(path, backlog, mode).map(|listener| vec![Self::Unix(listener)])
            }
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Address::UnixAbstract(name) => UnixListener::bind_abstract(name, backlog)
                .map(|listener| vec![Self::Unix(listener)]),
            _ => bind_tcp(address, backlog),
        };
        bound.map_err(|error| with_context(&error, &format!("cannot listen on {address}")))
    }

    /// Takes over a TCP socket that already listens.
    pub(crate) fn from_tcp(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        set_options(&SockRef::from(&listener))?;
        Ok(Self::Tcp(mio::net::TcpListener::from_std(listener)))
    }

    /// Takes over a Unix-domain socket that already listens. Its file is kept on drop.
    #[cfg(unix)]
    pub(crate) fn from_unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        UnixListener::from_std(listener).map(Self::Unix)
    }

    /// Returns the local address, with the port the system chose.
    pub(crate) fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Address::Ip),
            #[cfg(unix)]
            Self::Unix(listener) => Ok(listener.address()),
        }
    }

    /// Accepts one connection without blocking.
    pub(crate) fn accept(&self) -> io::Result<(Socket, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, mut address) = listener.accept()?;
                // On Linux, accepted sockets inherit the options of the listener.
                #[cfg(not(any(target_os = "linux", target_os = "android")))]
                let _already_reset = set_options(&SockRef::from(&stream));
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

/// Listens on every socket address of `address`, or on its fallback if the system has no IPv6.
fn bind_tcp(address: &Address, backlog: u32) -> io::Result<Vec<Listener>> {
    let (addresses, fallback) = address.resolve()?;
    let bound: io::Result<Vec<_>> = addresses
        .iter()
        .map(|address| bind_socket(*address, backlog))
        .collect();
    match (bound, fallback) {
        (Err(error), Some(ipv4)) if lacks_ipv6(&error) => Ok(vec![bind_socket(ipv4, backlog)?]),
        (bound, _) => bound,
    }
}

/// Listens on one TCP address.
///
/// `mio::net::TcpListener::bind` has a fixed backlog and leaves it to the system whether `[::]`
/// accepts IPv4 clients.
fn bind_socket(address: SocketAddr, backlog: u32) -> io::Result<Listener> {
    let socket = RawSocket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // Allows a restart while old connections are in TIME_WAIT. On Windows it would let two servers
    // bind the same port.
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

/// Sets the options of every connection's socket: small answers are sent without delay, and urgent
/// bytes stay in the stream.
fn set_options(socket: &RawSocket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)
}

/// Returns whether `error` means that the system has no IPv6.
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
