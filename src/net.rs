//! Sockets: addresses, listeners and streams, TCP and Unix-domain.

use std::io;

use mio::{Registry, Token};

pub(crate) mod address;
#[cfg(any(target_os = "linux", target_os = "android"))]
mod directory_lock;
pub(crate) mod listener;
pub(crate) mod poller;
pub(crate) mod stream;
#[cfg(unix)]
mod unix;

/// A socket that a poll can watch.
pub(crate) trait Register {
    fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()>;
}
