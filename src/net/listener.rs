//! Listening sockets, TCP or Unix-domain.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mio::event::Source;
use mio::net::TcpListener;
use mio::{Interest, Registry, Token};
use socket2::{Domain, Protocol, SockRef, Socket as RawSocket, TcpKeepalive, Type};

use crate::error::{error_text, with_context};
use crate::net::address::{Address, address_of, to_canonical};
use crate::net::stream::Socket;
#[cfg(unix)]
use crate::net::unix_socket::{self, SocketFile};
use crate::net::{Register, platform};
use crate::peer::Peer;
use crate::system::Listen;

/// TCP keepalive probes, and their interval, before an unresponsive client counts as gone.
const KEEPALIVE_PROBES: u32 = 6;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Options of the listening sockets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ListenOptions {
    pub(crate) backlog: u32,
    /// Permissions of a Unix-domain socket's file.
    #[cfg_attr(not(unix), expect(dead_code))]
    pub(crate) unix_mode: Option<u32>,
    /// Idle time before the first TCP keepalive probe.
    pub(crate) keepalive: Option<Duration>,
    /// Other servers can listen on the same TCP addresses.
    pub(crate) reuse_port: bool,
}

/// A listening socket.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    /// A socket that was created elsewhere. Other processes may accept from it too.
    AdoptedTcp(TcpListener),
    #[cfg(unix)]
    Unix {
        /// Removed on drop, before the listener is closed. In the other order a second server could find
        /// the file stale and replace it, and this drop could then remove the new file.
        _file: Option<SocketFile>,
        listener: mio::net::UnixListener,
    },
}

impl Listener {
    /// Listens on every socket address that `addresses` resolve to. One that another listener serves as well needs none of
    /// its own.
    ///
    /// # Errors
    ///
    /// The message names the address: `cannot listen on 127.0.0.1:5555: address in use`.
    pub(crate) fn bind(addresses: &[Address], options: ListenOptions) -> io::Result<Vec<Self>> {
        let resolve = |address: &Address| match address {
            #[cfg(unix)]
            Address::UnixPath(_) | Address::UnixAbstract(_) => Ok(Vec::new()),
            _ => address
                .resolve()
                .map_err(|error| cannot_listen(address, &error)),
        };
        // All of them first, because they decide how each one is bound.
        let resolved: Vec<_> = addresses.iter().map(resolve).collect::<io::Result<_>>()?;
        let all = resolved.concat();
        let bind_one = |address| bind_socket(address, is_ipv6_only(address, &all), options);
        let (mut listeners, mut seen) = (Vec::new(), BTreeSet::new());
        for (address, mut resolved) in addresses.iter().zip(resolved) {
            resolved.retain(|address| {
                (seen.insert(*address) || address.port() == 0) && !is_covered(*address, &all)
            });
            let bound = match address {
                #[cfg(unix)]
                Address::UnixPath(_) | Address::UnixAbstract(_) => {
                    unix_socket::listen(address, options.backlog, options.unix_mode).map(
                        |(file, listener)| {
                            vec![Self::Unix {
                                _file: file,
                                listener,
                            }]
                        },
                    )
                }
                _ if resolved.is_empty() => {
                    log::info!("another listener serves {address} as well");
                    continue;
                }
                _ => bind_name(address, &resolved, bind_one),
            };
            listeners.extend(bound.map_err(|error| cannot_listen(address, &error))?);
        }
        Ok(listeners)
    }

    /// Takes over a TCP socket that already listens.
    pub(crate) fn from_tcp(
        listener: std::net::TcpListener,
        options: ListenOptions,
    ) -> io::Result<Self> {
        let socket = SockRef::from(&listener);
        check_listening(&socket, &[Domain::IPV4, Domain::IPV6], "TCP")?;
        set_options(&socket, options)?;
        Ok(Self::AdoptedTcp(TcpListener::from_std(listener)))
    }

    /// Takes over a Unix-domain socket that already listens. Its file is kept on drop.
    #[cfg(unix)]
    pub(crate) fn from_unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        check_listening(&SockRef::from(&listener), &[Domain::UNIX], "Unix-domain")?;
        listener.set_nonblocking(true)?;
        Ok(Self::Unix {
            _file: None,
            listener: mio::net::UnixListener::from_std(listener),
        })
    }

    /// Returns the local address, with the port the system chose.
    pub(crate) fn address(&self) -> io::Result<Address> {
        address_of(&self.socket())
            .map_err(|error| with_context(&error, "cannot get the address of a listener"))
    }

    fn socket(&self) -> SockRef<'_> {
        match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => SockRef::from(listener),
            #[cfg(unix)]
            Self::Unix { listener, .. } => SockRef::from(listener),
        }
    }
}

impl Listen for Listener {
    type Stream = Socket;

    fn accept(&self) -> io::Result<(Socket, Peer)> {
        let (stream, peer) = match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => {
                let (stream, address) = listener.accept()?;
                if !platform::INHERITS_OPTIONS {
                    let _already_reset = set_common_options(&SockRef::from(&stream));
                }
                (stream, Peer::Ip(to_canonical(address)))
            }
            #[cfg(unix)]
            Self::Unix { listener, .. } => {
                let (stream, _unnamed) = listener.accept()?;
                // Fails on systems without urgent data on Unix-domain sockets, where it is not needed.
                let _unsupported = SockRef::from(&stream).set_out_of_band_inline(true);
                (std::os::fd::OwnedFd::from(stream).into(), Peer::Unix)
            }
        };
        let is_tcp = peer != Peer::Unix;
        Ok((Socket { stream, is_tcp }, peer))
    }

    fn has_waiting_client(&self) -> bool {
        platform::has_waiting_client(&self.socket())
    }

    /// The kernel ignores clients by a packet filter on the socket, which would stay on an adopted socket after this process
    /// has ended. A Unix-domain socket connects without a handshake.
    fn stop_handshakes(&self) -> bool {
        matches!(self, Self::Tcp(_)) && platform::stop_handshakes(&self.socket())
    }
}

impl Register for Listener {
    fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let source: &mut dyn Source = match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => listener,
            #[cfg(unix)]
            Self::Unix { listener, .. } => listener,
        };
        registry.register(source, token, Interest::READABLE)
    }
}

/// Checks that a socket that was created elsewhere is a stream socket of one of `families`, called `name`
/// in errors, and that it is listening.
fn check_listening(socket: &RawSocket, families: &[Domain], name: &str) -> io::Result<()> {
    let is_stream = socket.r#type()? == Type::STREAM;
    let problem = if !is_stream || !families.contains(&socket.local_addr()?.domain()) {
        format!("not a {name} stream socket")
    } else if !platform::is_listening(socket)? {
        format!("the {name} socket is not listening")
    } else {
        return Ok(());
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, problem))
}

fn cannot_listen(address: &Address, error: &io::Error) -> io::Error {
    with_context(error, &format!("cannot listen on {address}"))
}

/// Whether the listener on all interfaces that is one of `all` serves the clients of `address`, which the system then
/// refuses to bind. Port 0 is another port each time.
fn is_covered(address: SocketAddr, all: &[SocketAddr]) -> bool {
    let covers = |other: &SocketAddr| {
        let has_family = other.is_ipv6() || address.is_ipv4();
        other.ip().is_unspecified() && other.port() == address.port() && has_family
    };
    address.port() != 0 && !address.ip().is_unspecified() && all.iter().any(covers)
}

/// Whether a listener is for IPv6 clients only. That on all interfaces is, if another one is for all IPv4 clients.
fn is_ipv6_only(address: SocketAddr, all: &[SocketAddr]) -> bool {
    let ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    !address.ip().is_unspecified() || (address.port() != 0 && all.contains(&ipv4))
}

/// Binds the addresses of a name. If the system chooses the port, that is one port for all, or in use at one of them.
fn bind_name(
    address: &Address,
    resolved: &[SocketAddr],
    bind: impl Fn(SocketAddr) -> io::Result<Listener>,
) -> io::Result<Vec<Listener>> {
    let port = Cell::new(0);
    bind_tcp(address, resolved, |mut address| {
        if address.port() == 0 {
            address.set_port(port.get());
        }
        let listener = bind(address)?;
        if let Address::Ip(bound) = listener.address()? {
            port.set(bound.port());
        }
        Ok(listener)
    })
}

/// Binds `resolved`, or `0.0.0.0` instead of `[::]` if the system has no IPv6.
fn bind_tcp<T>(
    address: &Address,
    resolved: &[SocketAddr],
    bind: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<Vec<T>> {
    match (bind_existing(resolved, &bind), address) {
        (Err(error), Address::AnyInterface(port)) if is_missing(&error) => {
            Ok(vec![bind((Ipv4Addr::UNSPECIFIED, *port).into())?])
        }
        (bound, _) => bound,
    }
}

/// Binds every address. Those that do not exist on this system are skipped if another one does: `localhost`
/// usually resolves to `::1` as well, also where only IPv4 is configured.
fn bind_existing<T>(
    addresses: &[SocketAddr],
    bind: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<Vec<T>> {
    let mut bound = Vec::new();
    let mut missing = Vec::new();
    for address in addresses {
        match bind(*address) {
            Ok(listener) => bound.push(listener),
            Err(error) if is_missing(&error) => missing.push((address, error)),
            Err(error) => return Err(error),
        }
    }
    if bound.is_empty() && !missing.is_empty() {
        return Err(missing.remove(0).1);
    }
    for (address, error) in missing {
        log::info!("not listening on {address}: {}", error_text(&error));
    }
    Ok(bound)
}

/// Listens on one TCP address.
///
/// `mio::net::TcpListener::bind` has a fixed backlog and leaves it to the system whether `[::]`
/// accepts IPv4 clients.
fn bind_socket(
    address: SocketAddr,
    ipv6_only: bool,
    options: ListenOptions,
) -> io::Result<Listener> {
    let domain = Domain::for_address(address);
    let socket = RawSocket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(ipv6_only)?;
    }
    // Allows a restart while old connections are in TIME_WAIT. On Windows it would let two servers
    // bind the same port.
    if cfg!(not(windows)) {
        socket.set_reuse_address(true)?;
    }
    if options.reuse_port {
        platform::reuse_port(&socket)?;
    }
    set_options(&socket, options)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
    Ok(Listener::Tcp(TcpListener::from_std(socket.into())))
}

/// Sets the options of a TCP listener. On Linux, accepted sockets inherit all but the non-blocking mode.
fn set_options(socket: &RawSocket, options: ListenOptions) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    set_common_options(socket)?;
    if let Some(idle) = options.keepalive {
        let set = set_keepalive(socket, idle);
        set.map_err(|error| {
            with_context(&error, &format!("cannot set TCP keepalive to {idle:?}"))
        })?;
    } else {
        // A socket that was created elsewhere may have it on.
        socket.set_keepalive(false)?;
    }
    platform::limit_unsent(socket)
}

/// Sets TCP keepalive, with the probes of the system if it has no option for their number and interval.
fn set_keepalive(socket: &RawSocket, idle: Duration) -> io::Result<()> {
    let keepalive = TcpKeepalive::new().with_time(idle);
    let with_probes = (keepalive.clone())
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&with_probes).or_else(|error| {
        socket.set_tcp_keepalive(&keepalive)?;
        let error = error_text(&error);
        log::warn!(
            "TCP keepalive has the number and the interval of probes of the system: {error}"
        );
        Ok(())
    })
}

/// Small answers are sent without delay, and urgent bytes stay in the stream.
fn set_common_options(socket: &RawSocket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)
}

/// Returns whether `error` means that the system has no such address, or no addresses of its family.
fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.kind() == io::ErrorKind::Unsupported
        || platform::is_missing_family(error)
}

#[cfg(test)]
mod tests;
