//! Listening addresses: their text form, and the socket addresses they resolve to.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
#[cfg(unix)]
use std::path::PathBuf;
use std::str::FromStr;

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
/// # #[cfg(unix)]
/// assert_eq!("unix:/run/echo".parse(), Ok(Address::UnixPath("/run/echo".into())));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// This TCP port on every interface, for IPv6 and IPv4. On a system without IPv6, for IPv4 only.
    AnyInterface(u16),
    /// One IP address and TCP port. With port 0 the system chooses a free port.
    Ip(SocketAddr),
    /// This TCP port on every IP address that a host name resolves to.
    Host(String, u16),
    /// A Unix-domain socket at a path in the file system. A stale socket file is replaced.
    #[cfg(unix)]
    UnixPath(PathBuf),
    /// A Unix-domain socket with a name in Linux's abstract namespace, which uses no file.
    #[cfg(any(target_os = "linux", target_os = "android"))]
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
            Self::Ip(address) => Ok((vec![*address], None)),
            Self::Host(host, port) => {
                let mut addresses: Vec<_> = (host.as_str(), *port).to_socket_addrs()?.collect();
                addresses.sort_unstable();
                addresses.dedup();
                Ok((addresses, None))
            }
            #[cfg(unix)]
            _ => Ok((Vec::new(), None)),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnyInterface(port) => write!(f, "[::]:{port}"),
            Self::Ip(address) => write!(f, "{address}"),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
            #[cfg(unix)]
            Self::UnixPath(path) => write!(f, "unix:{}", path.display()),
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Self::UnixAbstract(name) => write!(f, "unix:@{name}"),
        }
    }
}

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
        if let Some(path) = text.strip_prefix("unix:") {
            return parse_unix(path);
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Ip(address));
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        if host.contains(':') && !host.starts_with('[') {
            return Err(AddressError(format!(
                "an IPv6 address needs brackets: [{host}]:{port}, or [{text}]:PORT"
            )));
        }
        let port = port.parse().map_err(|_| {
            let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
            AddressError(match is_number {
                true => format!("port {port} is not between 0 and 65535"),
                false => {
                    "expected IP:PORT, HOST:PORT, [V6]:PORT, :PORT, PORT or unix:PATH".to_owned()
                }
            })
        })?;
        match host {
            "" => Ok(Self::AnyInterface(port)),
            _ if host.starts_with('[') => Err(AddressError(format!(
                "{host} is not an IPv6 address in brackets"
            ))),
            _ => Ok(Self::Host(host.to_owned(), port)),
        }
    }
}

#[cfg(unix)]
fn parse_unix(path: &str) -> Result<Address, AddressError> {
    if path.is_empty() || path == "@" {
        return Err(AddressError("expected unix:PATH or unix:@NAME".to_owned()));
    }
    match path.strip_prefix('@') {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        Some(name) => Ok(Address::UnixAbstract(name.to_owned())),
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        Some(_) => Err(AddressError(
            "abstract Unix sockets are supported on Linux only".to_owned(),
        )),
        None => Ok(Address::UnixPath(path.into())),
    }
}

#[cfg(not(unix))]
fn parse_unix(_path: &str) -> Result<Address, AddressError> {
    Err(AddressError(
        "Unix sockets are not supported on this system".to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_problem() {
        for (text, problem) in [
            ("", "expected IP:PORT"),
            ("99999", "port 99999 is not between 0 and 65535"),
            ("localhost:99999", "port 99999"),
            ("-1", "expected IP:PORT"),
            ("localhost", "expected IP:PORT"),
            ("127.0.0.1:", "expected IP:PORT"),
            ("::1", "needs brackets"),
            ("[zz]:1", "[zz] is not an IPv6 address"),
            #[cfg(unix)]
            ("unix:", "expected unix:PATH"),
            #[cfg(unix)]
            ("unix:@", "expected unix:PATH"),
        ] {
            let error = text.parse::<Address>().expect_err(text);
            assert!(error.to_string().contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn displayed_addresses_parse() {
        for text in ["[::]:5555", "127.0.0.1:0", "localhost:7", "[::1]:7"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        #[cfg(target_os = "linux")]
        for text in ["unix:/run/echo.sock", "unix:@echo"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }
}
