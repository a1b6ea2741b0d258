//! The operating system's side: addresses, listeners and streams, TCP or Unix-domain.

pub(crate) mod address;
pub(crate) mod listener;
pub(crate) mod stream;
#[cfg(unix)]
mod unix;
