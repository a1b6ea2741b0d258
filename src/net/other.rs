//! The functions of `linux.rs` on other systems, where only mio and socket2 are used.

use std::io::{self, Read, Write};

use mio::Interest;
use mio::net::TcpStream;
use socket2::Socket as RawSocket;

pub(super) const MAX_UNIX_PATH: usize = 103;

pub(super) const INHERITS_OPTIONS: bool = false;

pub(super) const STREAM_EVENTS: Interest = Interest::READABLE.add(Interest::WRITABLE);

/// Urgent data ends a read early and raises no event.
pub(super) const SHORT_READ_MEANS_DRAINED: bool = false;

pub(super) fn receive(mut stream: &TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    stream.read(bytes)
}

pub(super) fn send(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    stream.write(bytes)
}

/// Unknown: it needs more than the standard library.
pub(super) fn unread(_stream: &TcpStream) -> u64 {
    0
}

/// Unknown.
pub(super) fn poll_delivery(_stream: &TcpStream) -> bool {
    true
}

/// Unknown without an `accept`.
pub(super) fn has_waiting_client(_listener: &RawSocket) -> bool {
    true
}

pub(super) fn stop_handshakes(_listener: &RawSocket) -> bool {
    false
}

/// Elsewhere the system gives all new clients to one of the listeners, or has no such option.
pub(super) fn reuse_port(_socket: &RawSocket) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Unknown.
pub(super) fn is_listening(_socket: &RawSocket) -> io::Result<bool> {
    Ok(true)
}

pub(super) fn limit_unsent(_socket: &RawSocket) -> io::Result<()> {
    Ok(())
}

/// Does nothing: of several servers that bind one path at once, more than one can succeed.
#[cfg(unix)]
pub(super) fn lock_directory(_path: &std::path::Path, _max_attempts: u32) -> Option<()> {
    None
}

pub(super) fn is_missing_family(error: &io::Error) -> bool {
    /// EAFNOSUPPORT of the BSDs and macOS, WSAEAFNOSUPPORT of Windows.
    const CODES: [i32; 2] = [47, 10047];
    error
        .raw_os_error()
        .is_some_and(|code| CODES.contains(&code))
}

pub(crate) fn is_network_error(_error: &io::Error) -> bool {
    false
}
