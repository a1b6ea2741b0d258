//! Listening addresses: their text form, and the socket addresses they resolve to.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use socket2::Socket;

use crate::error::escape_control;
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
    /// Returns the socket addresses to bind, and an IPv4 address to bind instead if the system has no
    /// IPv6.
    pub(crate) fn resolve(&self) -> io::Result<(Vec<SocketAddr>, Option<SocketAddr>)> {
        match self {
            Self::AnyInterface(port) => {
                let v6 = (Ipv6Addr::UNSPECIFIED, *port).into();
                let v4 = (Ipv4Addr::UNSPECIFIED, *port).into();
                Ok((vec![v6], Some(v4)))
            }
            Self::Ip(address) => Ok((vec![to_canonical(*address)], None)),
            Self::Host(host, port) => {
                let addresses = (host.as_str(), *port).to_socket_addrs()?;
                let mut addresses: Vec<_> = addresses.map(to_canonical).collect();
                addresses.sort_unstable();
                addresses.dedup();
                Ok((addresses, None))
            }
            Self::UnixPath(_) | Self::UnixAbstract(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Replaces an IPv4-mapped IPv6 address by its IPv4 address. The system cannot bind the former to an IPv6
/// socket that accepts IPv6 clients only.
pub(super) fn to_canonical(mut address: SocketAddr) -> SocketAddr {
    address.set_ip(address.ip().to_canonical());
    address
}

/// Returns the local address of a socket.
pub(super) fn address_of(socket: &Socket) -> io::Result<Address> {
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
        parse(text).map_err(|problem| AddressError(escape_control(&problem)))
    }
}

fn parse(text: &str) -> Result<Address, String> {
    if text.is_empty() {
        return Err("an address is missing; is there a blank after a comma?".to_owned());
    }
    if text.trim() != text {
        return Err("blanks before and after an address are not allowed".to_owned());
    }
    if let Some(path) = text.strip_prefix("unix:") {
        return parse_unix(path);
    }
    if let Ok(address) = text.parse() {
        return Ok(Address::Ip(address));
    }
    if let Some((scheme, address)) = text.split_once("://") {
        return Err(format!(
            "a URL is not an address: '{address}' without '{scheme}://'"
        ));
    }
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    if let Some(hint) = brackets_hint(text, host, port) {
        return Err(hint);
    }
    let port = port.parse().map_err(|_| {
        let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        match is_number {
            true => format!("port {port} is not between 0 and 65535"),
            false => EXPECTED.to_owned(),
        }
    })?;
    let in_brackets = host.strip_prefix('[').and_then(|v6| v6.strip_suffix(']'));
    match in_brackets {
        // Only the system's resolver knows the names of the zones.
        Some(v6) if is_ipv6(v6) => Ok(Address::Host(v6.to_owned(), port)),
        Some(_) => Err(format!("{host} is not an IPv6 address in brackets")),
        None if host.is_empty() => Ok(Address::AnyInterface(port)),
        None => match host_problem(host, port) {
            Some(problem) => Err(problem),
            None => Ok(Address::Host(host.to_owned(), port)),
        },
    }
}

/// Returns why `host` is not a host name.
fn host_problem(host: &str, port: u16) -> Option<String> {
    let is_misplaced = |c: char| c.is_whitespace() || c.is_control() || c == '/';
    if host == "*" {
        Some(format!(
            "'*' is not a host: ':{port}' means every interface"
        ))
    } else if host.contains([':', '[']) {
        Some(EXPECTED.to_owned())
    } else if host
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
    {
        // A resolver could take it for an abbreviated address: 127.1 is 127.0.0.1.
        Some(format!("{host} is not an IPv4 address"))
    } else if host.contains(is_misplaced) {
        Some(format!("'{host}' is not a host name"))
    } else {
        None
    }
}

/// Returns how to write `text`, which is `host:port`, if it is an IPv6 address without brackets.
fn brackets_hint(text: &str, host: &str, port: &str) -> Option<String> {
    let with_port = is_ipv6(host) && port.parse::<u16>().is_ok();
    let forms = match (with_port, is_ipv6(text)) {
        (true, true) => format!("[{host}]:{port}, or [{text}]:PORT"),
        (true, false) => format!("[{host}]:{port}"),
        (false, true) => format!("[{text}]:PORT"),
        (false, false) => return None,
    };
    Some(format!("an IPv6 address needs brackets: {forms}"))
}

/// Returns whether `text` is an IPv6 address, with or without a zone such as `%eth0`.
fn is_ipv6(text: &str) -> bool {
    let (address, zone) = text.split_once('%').unwrap_or((text, "zone"));
    let is_zone = !zone.is_empty() && !zone.contains([':', '%', '[', ']']);
    is_zone && address.parse::<Ipv6Addr>().is_ok()
}

fn parse_unix(path: &str) -> Result<Address, String> {
    let name = path.strip_prefix('@');
    let length = name.unwrap_or(path).len();
    if length == 0 {
        return Err("expected unix:PATH or unix:@NAME".to_owned());
    }
    let max = platform::MAX_UNIX_PATH;
    if length > max {
        return Err(format!(
            "the path of a Unix-domain socket has at most {max} bytes, not {length}"
        ));
    }
    match name {
        Some(name) => Ok(Address::UnixAbstract(name.to_owned())),
        None => Ok(Address::UnixPath(path.into())),
    }
}

#[cfg(test)]
mod tests;
