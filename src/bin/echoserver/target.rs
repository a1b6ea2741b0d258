//! The server that `check` and `load` connect to.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::time::Duration;

use echoserver::Address;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::error::error_text;
use crate::output::{Exit, UNREACHABLE};
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
        // With a low limit, connections fail with an error that says so.
        let _limit = platform::raise_descriptor_limit();
        let name = match address {
            Address::AnyInterface(port) => format!("localhost:{port}"),
            address => address.to_string(),
        };
        let try_one = |address| connect(&address, timeout, |_| Ok(())).map(|_| address);
        let found = resolve(address).and_then(|addresses| {
            let mut results = addresses.into_iter().map(try_one);
            let no_address = || Err(io::Error::other("the name has no address"));
            let first = results.next().unwrap_or_else(no_address);
            first.or_else(|error| results.find_map(Result::ok).ok_or(error))
        });
        let error = |error| format!("cannot connect to {name}: {}", client_error(&error));
        match found {
            Ok(address) => Ok(Self { name, address }),
            Err(cause) => Err(Exit(UNREACHABLE, Some(error(cause)))),
        }
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.address.as_socket().is_some()
    }
}

impl fmt::Display for Target {
    /// Writes the name, and the IP address if the name does not show it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = self.address.as_socket().map(|address| address.to_string());
        match ip.filter(|ip| *ip != self.name) {
            Some(ip) => write!(f, "{} ({ip})", self.name),
            None => f.write_str(&self.name),
        }
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
    if address.domain() == Domain::UNIX {
        // It connects at once, or waits for a place in the backlog for as long as a write may wait.
        socket.set_write_timeout(Some(timeout))?;
        socket.connect(address)?;
    } else {
        socket.set_tcp_nodelay(true)?;
        socket.connect_timeout(address, timeout)?;
    }
    Ok(socket)
}

/// Returns what an error of a connection means for a client.
pub(crate) fn client_error(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "timed out".to_owned(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "a reset".to_owned(),
        ErrorKind::AddrNotAvailable => {
            "no local port is free: closed connections hold them for a minute".to_owned()
        }
        _ => error_text(error),
    }
}
