//! Listening addresses: their text form, and the socket addresses they resolve to.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use socket2::Socket as RawSocket;

use crate::error::{escape_control, excerpt};
use crate::net::platform;

/// An address to listen on.
///
/// ```
/// use echoserver::Address;
///
/// assert_eq!("5555".parse(), Ok(Address::AnyInterface(5555)));
/// assert_eq!(":5555".parse(), Ok(Address::AnyInterface(5555)));
/// assert_eq!("127.0.0.1:7".parse(), Ok(Address::Ip("127.0.0.1:7".parse().unwrap())));
/// assert_eq!("[::1]:7".parse(), Ok(Address::Ip("[::1]:7".parse().unwrap())));
/// assert_eq!("localhost:7".parse(), Ok(Address::Host("localhost".to_owned(), 7)));
/// assert_eq!("[fe80::1%eth0]:7".parse(), Ok(Address::Host("fe80::1%eth0".to_owned(), 7)));
/// assert_eq!("unix:/run/echo".parse(), Ok(Address::UnixPath("/run/echo".into())));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// This TCP port on every interface, for IPv6 and IPv4. On a system without IPv6, for IPv4 only.
    AnyInterface(u16),
    /// One IP address and TCP port. With port 0 the system chooses a free port. An IPv4-mapped IPv6
    /// address means the IPv4 address.
    Ip(SocketAddr),
    /// This TCP port on every IP address that a host name resolves to and that exists on this system. The
    /// name can also be an IPv6 address with a zone, such as `fe80::1%eth0`.
    Host(String, u16),
    /// A Unix-domain socket at a path in the file system. A stale socket file is replaced.
    UnixPath(PathBuf),
    /// A Unix-domain socket with a name in Linux's abstract namespace, which uses no file.
    UnixAbstract(String),
}

impl Address {
    /// Returns the IP address and port of [`Ip`](Self::Ip), as each of [`Server::addresses`](crate::Server::addresses) is that a
    /// client can connect to with TCP.
    #[must_use]
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Ip(address) => Some(*address),
            _ => None,
        }
    }

    /// Returns the socket addresses to bind.
    pub(crate) fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let addresses = match self {
            Self::AnyInterface(port) => vec![(Ipv6Addr::UNSPECIFIED, *port).into()],
            Self::Ip(address) => vec![*address],
            Self::Host(host, port) => (host.as_str(), *port).to_socket_addrs()?.collect(),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        let distinct: BTreeSet<_> = addresses.into_iter().map(to_canonical).collect();
        Ok(distinct.into_iter().collect())
    }
}

/// Replaces an IPv4-mapped IPv6 address by its IPv4 address. The system cannot bind the former to an IPv6
/// socket that accepts IPv6 clients only.
pub(super) fn to_canonical(mut address: SocketAddr) -> SocketAddr {
    address.set_ip(address.ip().to_canonical());
    address
}

/// Returns the local address of a socket.
pub(super) fn address_of(socket: &RawSocket) -> io::Result<Address> {
    let address = socket.local_addr()?;
    #[cfg(unix)]
    if address.is_unix() {
        return Ok(match address.as_abstract_namespace() {
            Some(name) => Address::UnixAbstract(String::from_utf8_lossy(name).into_owned()),
            None => Address::UnixPath(address.as_pathname().map(Into::into).unwrap_or_default()),
        });
    }
    let ip = address.as_socket().map(to_canonical).map(Address::Ip);
    ip.ok_or_else(|| io::ErrorKind::Unsupported.into())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnyInterface(port) => write!(f, "[::]:{port}"),
            Self::Ip(address) => write!(f, "{address}"),
            Self::Host(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
            // A control character would end the line of a log or of a message to a service manager.
            Self::UnixPath(path) => {
                write!(f, "unix:{}", escape_control(&path.to_string_lossy()))
            }
            Self::UnixAbstract(name) => write!(f, "unix:@{}", escape_control(name)),
        }
    }
}

const EXPECTED: &str =
    "expected IP:PORT, HOST:PORT, [V6]:PORT, :PORT, PORT, unix:PATH or unix:@NAME";

/// The length of the longest host name that DNS allows.
const MAX_NAME: usize = 253;

/// The reason why a text is not a valid [`Address`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressError(String);

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for AddressError {}

impl FromStr for Address {
    type Err = AddressError;

    /// Parses `IP:PORT`, `HOST:PORT`, `[V6]:PORT`, `:PORT`, `PORT`, `unix:PATH` or `unix:@NAME`.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        parse(text).map_err(AddressError)
    }
}

fn parse(text: &str) -> Result<Address, String> {
    if text.trim() != text {
        return Err("blanks before and after an address are not allowed".to_owned());
    }
    if let Some(path) = text.strip_prefix("unix:") {
        return parse_unix(path);
    }
    if let Some((scheme, _)) = text.split_once("://") {
        let scheme = excerpt(scheme);
        return Err(format!("a URL is not an address: leave out '{scheme}://'"));
    }
    // A colon in brackets belongs to an IPv6 address.
    let parts = text
        .rsplit_once(':')
        .filter(|(_, port)| !port.contains(']'));
    let (host, port) = parts.unwrap_or(("", text));
    if is_ipv6(text) || is_ipv6(host) {
        return Err("an IPv6 address needs brackets, such as [::1]:5555".to_owned());
    }
    if parts.is_none() && text.parse::<i64>().is_err() {
        return Err(EXPECTED.to_owned());
    }
    let number = port.parse().ok().filter(|_| !port.starts_with('+'));
    let Some(port) = number else {
        let port = excerpt(port);
        return Err(format!("invalid port '{port}': expected 0 to 65535"));
    };
    if let Ok(address) = text.parse() {
        return Ok(Address::Ip(address));
    }
    let in_brackets = host.strip_prefix('[').and_then(|v6| v6.strip_suffix(']'));
    match in_brackets {
        None if host.is_empty() => Ok(Address::AnyInterface(port)),
        None if is_name(host) => Ok(Address::Host(host.to_owned(), port)),
        // Only the system's resolver knows the names of the zones.
        Some(v6) if is_ipv6(v6) => Ok(Address::Host(v6.to_owned(), port)),
        _ => Err(format!("invalid host '{}'", excerpt(host))),
    }
}

/// Returns whether `text` can be the name of a host or a zone.
fn is_name(text: &str) -> bool {
    // A resolver takes numbers for an abbreviated address: 127.1 is 127.0.0.1.
    let is_numeric = !text.contains(|c: char| c != '.' && !c.is_ascii_digit());
    let is_misplaced = |c: char| c.is_whitespace() || c.is_control() || "%*/:[]".contains(c);
    text.len() <= MAX_NAME && !is_numeric && !text.contains(is_misplaced)
}

/// Returns whether `text` is an IPv6 address, with or without a zone such as `%eth0`.
fn is_ipv6(text: &str) -> bool {
    let (address, zone) = text.split_once('%').unwrap_or((text, "zone"));
    is_name(zone) && address.parse::<Ipv6Addr>().is_ok()
}

fn parse_unix(path: &str) -> Result<Address, String> {
    let name = path.strip_prefix('@');
    let (length, max) = (name.unwrap_or(path).len(), platform::MAX_UNIX_PATH);
    match name {
        _ if length == 0 => Err("expected unix:PATH or unix:@NAME".to_owned()),
        _ if length > max => Err(format!(
            "the path of a Unix-domain socket has at most {max} bytes, not {length}"
        )),
        Some(name) => Ok(Address::UnixAbstract(name.to_owned())),
        None => Ok(Address::UnixPath(path.into())),
    }
}

#[cfg(test)]
mod tests;
