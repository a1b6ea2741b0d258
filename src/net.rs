//! Sockets: addresses, listeners and streams, TCP and Unix-domain.

use std::io;

use mio::{Registry, Token};

pub(crate) mod address;
pub(crate) mod listener;
#[cfg(target_os = "linux")]
#[path = "net/linux.rs"]
mod platform;
#[cfg(not(target_os = "linux"))]
#[path = "net/other.rs"]
mod platform;
pub(crate) mod poller;
pub(crate) mod stream;
#[cfg(unix)]
mod unix_socket;

pub(crate) use platform::is_network_error;

/// A socket that a poll can watch.
pub(crate) trait Register {
    fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()>;
}
