//! Listening sockets, TCP or Unix-domain.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use mio::{Interest, Registry, Token};
#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::event::{PollFd, PollFlags, Timespec};
#[cfg(any(target_os = "linux", target_os = "android"))]
use socket2::SockFilter;
use socket2::{Domain, Protocol, SockRef, Socket as RawSocket, TcpKeepalive, Type};

use crate::error::{error_text, with_context};
use crate::net::Register;
use crate::net::address::{Address, to_canonical};
use crate::net::stream::Socket;
#[cfg(unix)]
use crate::net::unix::UnixListener;
use crate::peer::Peer;
use crate::system::Listen;

/// Unsent bytes that the kernel accepts for one connection. A small limit makes "written" mean nearly
/// "sent": a slow reader makes progress visibly, in small steps.
#[cfg(any(target_os = "linux", target_os = "android"))]
const MAX_UNSENT: u32 = 128 << 10;

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
}

/// A listening socket.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(mio::net::TcpListener),
    /// A socket that was created elsewhere. Other processes may accept from it too.
    AdoptedTcp(mio::net::TcpListener),
    #[cfg(unix)]
    Unix(UnixListener),
}

impl Listener {
    /// Listens on every socket address that `address` resolves to.
    ///
    /// # Errors
    ///
    /// The message names the address: `cannot listen on 127.0.0.1:5555: address in use`.
    pub(crate) fn bind(address: &Address, options: ListenOptions) -> io::Result<Vec<Self>> {
        let bound = match address {
            #[cfg(unix)]
            Address::UnixPath(path) => UnixListener::bind(path, options.backlog, options.unix_mode)
                .map(|listener| vec![Self::Unix(listener)]),
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Address::UnixAbstract(name) => UnixListener::bind_abstract(name, options.backlog)
                .map(|listener| vec![Self::Unix(listener)]),
            _ => bind_tcp(address, options),
        };
        bound.map_err(|error| with_context(&error, &format!("cannot listen on {address}")))
    }

    /// Takes over a TCP socket that already listens.
    pub(crate) fn from_tcp(
        listener: std::net::TcpListener,
        options: ListenOptions,
    ) -> io::Result<Self> {
        check_listening(
            &SockRef::from(&listener),
            &[Domain::IPV4, Domain::IPV6],
            "TCP",
        )?;
        listener.set_nonblocking(true)?;
        set_options(&SockRef::from(&listener), options)?;
        Ok(Self::AdoptedTcp(mio::net::TcpListener::from_std(listener)))
    }

    /// Takes over a Unix-domain socket that already listens. Its file is kept on drop.
    #[cfg(unix)]
    pub(crate) fn from_unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        UnixListener::from_std(listener).map(Self::Unix)
    }

    /// Returns the local address, with the port the system chose.
    pub(crate) fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => listener
                .local_addr()
                .map(Address::Ip)
                .map_err(|error| with_context(&error, "cannot get the address of a listener")),
            #[cfg(unix)]
            Self::Unix(listener) => Ok(listener.address()),
        }
    }
}

impl Listen for Listener {
    type Stream = Socket;

    fn accept(&self) -> io::Result<(Socket, Peer)> {
        match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => {
                let (stream, address) = listener.accept()?;
                // On Linux, accepted sockets inherit the options of the listener.
                #[cfg(not(any(target_os = "linux", target_os = "android")))]
                let _already_reset = set_common_options(&SockRef::from(&stream));
                Ok((Socket::Tcp(stream), Peer::Ip(to_canonical(address))))
            }
            #[cfg(unix)]
            Self::Unix(listener) => Ok((Socket::Unix(listener.accept()?), Peer::Unix)),
        }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn has_waiting_client(&self) -> bool {
        let mut socket = [match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => {
                PollFd::new(listener, PollFlags::IN)
            }
            Self::Unix(listener) => PollFd::new(listener, PollFlags::IN),
        }];
        // After an error, assume that there is one.
        !matches!(
            rustix::event::poll(&mut socket, Some(&Timespec::default())),
            Ok(0)
        )
    }

    /// Attaches a filter that drops packets with the SYN flag. A client repeats its SYN after a second.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn stop_handshakes(&self) -> bool {
        // Classic BPF: load the byte with TCP's flags; is SYN set? Then keep nothing, otherwise everything.
        const DROP_SYN: [SockFilter; 4] = [
            SockFilter::new(0x30, 0, 0, 13),
            SockFilter::new(0x45, 0, 1, 0x02),
            SockFilter::new(0x06, 0, 0, 0),
            SockFilter::new(0x06, 0, 0, u32::MAX),
        ];
        match self {
            Self::Tcp(listener) => SockRef::from(listener).attach_filter(&DROP_SYN).is_ok(),
            // A filter would outlive this process. A Unix-domain socket connects without a handshake.
            Self::AdoptedTcp(_) | Self::Unix(_) => false,
        }
    }

    /// Other systems do not tell without an `accept`.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    fn has_waiting_client(&self) -> bool {
        true
    }
}

impl Register for Listener {
    fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match self {
            Self::Tcp(listener) | Self::AdoptedTcp(listener) => {
                registry.register(listener, token, Interest::READABLE)
            }
            #[cfg(unix)]
            Self::Unix(listener) => listener.register(registry, token),
        }
    }
}

/// Checks that a socket that was created elsewhere is a stream socket of one of `families`, called `name`
/// in errors, and that it is listening.
pub(super) fn check_listening(
    socket: &RawSocket,
    families: &[Domain],
    name: &str,
) -> io::Result<()> {
    let is_stream = socket.r#type()? == Type::STREAM;
    let problem = if !is_stream || !families.contains(&socket.local_addr()?.domain()) {
        format!("not a {name} stream socket")
    } else if !is_listening(socket)? {
        format!("the {name} socket is not listening")
    } else {
        return Ok(());
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, problem))
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn is_listening(socket: &RawSocket) -> io::Result<bool> {
    socket.is_listener()
}

/// Other systems do not tell.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn is_listening(_socket: &RawSocket) -> io::Result<bool> {
    Ok(true)
}

/// Listens on every socket address of `address`, or on its fallback if the system has no IPv6.
fn bind_tcp(address: &Address, options: ListenOptions) -> io::Result<Vec<Listener>> {
    let (addresses, fallback) = address.resolve()?;
    let bind = |address| bind_socket(address, options);
    match (bind_existing(&addresses, bind), fallback) {
        (Err(error), Some(ipv4)) if is_missing(&error) => Ok(vec![bind(ipv4)?]),
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
fn bind_socket(address: SocketAddr, options: ListenOptions) -> io::Result<Listener> {
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
    set_options(&socket, options)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
    socket.set_nonblocking(true)?;
    Ok(Listener::Tcp(mio::net::TcpListener::from_std(
        socket.into(),
    )))
}

/// Sets the options that accepted sockets inherit on Linux.
fn set_options(socket: &RawSocket, options: ListenOptions) -> io::Result<()> {
    set_common_options(socket)?;
    set_keepalive(socket, options.keepalive).map_err(|error| {
        let time = options.keepalive.unwrap_or_default();
        with_context(&error, &format!("cannot set TCP keepalive to {time:?}"))
    })?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_notsent_lowat(MAX_UNSENT)?;
    Ok(())
}

fn set_keepalive(socket: &RawSocket, idle: Option<Duration>) -> io::Result<()> {
    let Some(idle) = idle else {
        // A socket that was created elsewhere may have it on.
        return socket.set_keepalive(false);
    };
    let keepalive = TcpKeepalive::new().with_time(idle);
    #[cfg(any(
        target_os = "linux",
        target_os = "android",
        target_vendor = "apple",
        windows
    ))]
    let keepalive = keepalive
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Small answers are sent without delay, and urgent bytes stay in the stream.
fn set_common_options(socket: &RawSocket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)
}

/// Returns whether `error` means that the system has no such address, or no addresses of its family.
fn is_missing(error: &io::Error) -> bool {
    const EAFNOSUPPORT: i32 = if cfg!(windows) {
        10047
    } else if cfg!(any(target_os = "linux", target_os = "android")) {
        97
    } else {
        47
    };
    matches!(
        error.kind(),
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported
    ) || error.raw_os_error() == Some(EAFNOSUPPORT)
}

#[cfg(test)]
mod tests;
