//! The client of a connection, as shown in logs and told by [`NewConnection`](crate::NewConnection).

use std::fmt;
use std::net::SocketAddr;

/// The client of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Peer {
    /// The IP address and port of a TCP client. A dual-stack listener reports IPv4 clients with
    /// their IPv4 address.
    Ip(SocketAddr),
    /// A client of a Unix-domain socket; such clients have no address.
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

#[cfg(test)]
mod tests;
