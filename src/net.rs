//! The operating system's side: addresses, listeners and streams, for TCP and Unix-domain sockets.

pub(crate) mod address;
pub(crate) mod listener;
pub(crate) mod stream;
#[cfg(unix)]
mod unix;
