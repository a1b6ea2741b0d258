//! The server that `check` and `load` connect to.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use echoserver::Address;
use socket2::{SockAddr, Socket, Type};

use crate::error::error_text;
use crate::output::{Exit, NOT_RUN, UNREACHABLE};
use crate::platform;

/// Help text of the argument that names the server.
pub(crate) const FORMS: &str = "Server to connect to: HOST:PORT, IP:PORT, [V6]:PORT, unix:PATH or \
    unix:@NAME; PORT or :PORT means localhost";

/// A server that accepted a connection.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// As the user wrote it.
    pub(crate) name: String,
    pub(crate) address: SockAddr,
}

impl Target {
    /// Resolves `address` and chooses the first of its socket addresses that accepts a connection.
    pub(crate) fn find(address: &Address, timeout: Duration) -> Result<Self, Exit> {
        Self::connect(address, timeout).map(|(target, _connection)| target)
    }

    /// The same; returns the connection and how long it took to open it, too. Each of the addresses gets an equal part of
    /// `timeout`.
    pub(crate) fn connect(
        address: &Address,
        timeout: Duration,
    ) -> Result<(Self, (Socket, Duration)), Exit> {
        // With a low limit, connections fail with an error that says so.
        let _limit = platform::raise_descriptor_limit();
        let name = match address {
            Address::AnyInterface(port) => format!("localhost:{port}"),
            address => address.to_string(),
        };
        let found = resolve(address).and_then(|addresses| {
            let timeout = timeout / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX);
            let mut results = addresses.into_iter().map(|address| {
                let start = Instant::now();
                let socket = connect(&address, timeout, |_| Ok(()))?;
                Ok((address, (socket, start.elapsed())))
            });
            let no_address = || Err(io::Error::other("the name has no address"));
            let first = results.next().unwrap_or_else(no_address);
            first.or_else(|error| results.find_map(Result::ok).ok_or(error))
        });
        match found {
            Ok((address, connection)) => Ok((Self { name, address }, connection)),
            Err(cause) => {
                let error = format!("cannot connect to {name}: {}", client_error(&cause));
                let status = if is_local(&cause) {
                    NOT_RUN
                } else {
                    UNREACHABLE
                };
                Err(Exit(status, Some(error)))
            }
        }
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.address.as_socket().is_some()
    }

    /// Returns the address in use: that of a Unix-domain socket as the user wrote it.
    pub(crate) fn address_text(&self) -> String {
        let ip = self.address.as_socket();
        ip.map_or_else(|| self.name.clone(), |ip| ip.to_string())
    }
}

impl fmt::Display for Target {
    /// Writes the name, and the IP address if the name does not show it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = self.address_text();
        if address == self.name {
            return f.write_str(&self.name);
        }
        write!(f, "{} ({address})", self.name)
    }
}

fn resolve(address: &Address) -> io::Result<Vec<SockAddr>> {
    match address {
        Address::Ip(address) => Ok(vec![(*address).into()]),
        Address::Host(host, port) => {
            let addresses = (host.as_str(), *port).to_socket_addrs()?;
            Ok(addresses.map(SockAddr::from).collect())
        }
        // Localhost, without a resolver, which a container may not have.
        Address::AnyInterface(port) => {
            let ips: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
            Ok(ips.map(|ip| SocketAddr::from((ip, *port)).into()).into())
        }
        Address::UnixPath(path) => Ok(vec![SockAddr::unix(path)?]),
        Address::UnixAbstract(name) if cfg!(target_os = "linux") => {
            Ok(vec![SockAddr::unix(format!("\0{name}"))?])
        }
        other => Err(io::Error::other(format!("{other} is not supported"))),
    }
}

/// Connects a blocking socket. `set_up` can set options before.
pub(crate) fn connect(
    address: &SockAddr,
    timeout: Duration,
    set_up: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    set_up(&socket)?;
    if address.is_unix() {
        // It connects at once, or waits for a place in the backlog for as long as a write may wait.
        socket.set_write_timeout(Some(timeout))?;
        socket.connect(address)?;
    } else {
        socket.set_tcp_nodelay(true)?;
        let connected = socket.connect_timeout(address, timeout);
        connected.map_err(|error| with_cause(error, address))?;
        refuse_itself(&socket)?;
    }
    Ok(socket)
}

/// Fails if a socket is connected to itself, which TCP allows if its local port is the one that it connects to: there is no
/// server.
pub(crate) fn refuse_itself(socket: &Socket) -> io::Result<()> {
    let [local, peer] = [socket.local_addr()?, socket.peer_addr()?];
    let is_itself = local.as_socket() == peer.as_socket();
    let refused = || io::Error::from(ErrorKind::ConnectionRefused);
    (!is_itself).then_some(()).ok_or_else(refused)
}

/// Returns an error of `connect` that tells the two causes of `EADDRNOTAVAIL` apart.
pub(crate) fn with_cause(error: io::Error, address: &SockAddr) -> io::Error {
    if error.kind() != ErrorKind::AddrNotAvailable {
        return error;
    }
    // A datagram socket needs a local address as well, but no port of TCP. This sends nothing.
    let datagram = Socket::new(address.domain(), Type::DGRAM, None);
    let cause = match datagram.and_then(|socket| socket.connect(address)) {
        Ok(()) => "no local port is free: closed connections hold them for a minute",
        Err(_) => "this machine has no address to connect from",
    };
    io::Error::new(error.kind(), cause)
}

/// Returns whether the cause of an error is this machine: it has no more descriptors, ports or memory.
pub(crate) fn is_local(error: &io::Error) -> bool {
    let kinds = [ErrorKind::AddrNotAvailable, ErrorKind::OutOfMemory];
    let code = error.raw_os_error();
    kinds.contains(&error.kind()) || code.is_some_and(platform::is_lack_of_sockets)
}

/// Returns what an error of a connection means for a client.
pub(crate) fn client_error(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "timed out".to_owned(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "a reset".to_owned(),
        _ => error_text(error),
    }
}

#[cfg(test)]
mod tests;
