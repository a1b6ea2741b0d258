//! What Linux does for sockets, and other systems do differently or not at all; `other.rs` has the same functions.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use mio::Interest;
use mio::net::TcpStream;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::{SockFilter, SockRef, Socket as RawSocket};

/// The length of the longest path or abstract name of a Unix-domain socket, in bytes.
pub(super) const MAX_UNIX_PATH: usize = 107;

/// Whether accepted sockets inherit the options of their listener.
pub(super) const INHERITS_OPTIONS: bool = true;

/// Every event that a stream will ever need. A priority event tells when a read may end early at TCP's urgent mark.
pub(super) const STREAM_EVENTS: Interest = Interest::READABLE
    .add(Interest::WRITABLE)
    .add(Interest::PRIORITY);

/// Whether the events of a TCP stream tell everything that ends a read early.
pub(super) const SHORT_READ_MEANS_DRAINED: bool = true;

/// Unsent bytes that the kernel accepts for one connection. A small limit makes "written" mean nearly
/// "sent": a slow reader makes progress visibly, in small steps.
const MAX_UNSENT: u32 = 128 << 10;

/// The pause between attempts to lock a directory.
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// Receives with a raw system call. The wrapper in libc is a cancellation point: a message costs 346 user
/// instructions with the wrappers, and 232 without them.
pub(super) fn receive(stream: &TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    let received = rustix::net::recv(stream, bytes, RecvFlags::empty());
    received.map(|(count, _)| count).map_err(into_error)
}

/// Sends with a raw system call, and without SIGPIPE.
pub(super) fn send(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    rustix::net::send(stream, bytes, SendFlags::NOSIGNAL).map_err(into_error)
}

/// Kept out of line, away from the path of successful calls.
#[cold]
#[inline(never)] // 10 instructions per message
fn into_error(code: Errno) -> io::Error {
    code.into()
}

/// Returns the number of bytes that have arrived and were not read.
pub(super) fn unread(stream: &TcpStream) -> u64 {
    rustix::io::ioctl_fionread(stream).unwrap_or(0)
}

/// Returns whether the peer has acknowledged everything that was sent.
///
/// With the smallest send buffer and a limit of 1 for unsent bytes, a socket is writable only if everything is
/// sent and at most one or two small segments (3 KB, with the kernel's overhead) are unacknowledged. A poll
/// that finds it not writable arms the edge that reports it later. A Unix-domain socket refuses the limit: it
/// delivers at once.
pub(super) fn poll_delivery(stream: &TcpStream) -> bool {
    let socket = SockRef::from(stream);
    let set = socket.set_tcp_notsent_lowat(1);
    set.and_then(|()| socket.set_send_buffer_size(0)).is_err() || is_ready(stream, PollFlags::OUT)
}

/// Returns whether a client waits to be accepted.
pub(super) fn has_waiting_client(listener: &RawSocket) -> bool {
    is_ready(listener, PollFlags::IN)
}

/// Returns whether the socket has one of `events`, or its poll fails.
fn is_ready(socket: &impl AsFd, events: PollFlags) -> bool {
    let mut sockets = [PollFd::new(socket, events)];
    let poll = || rustix::event::poll(&mut sockets, Some(&Timespec::default()));
    rustix::io::retry_on_intr(poll) != Ok(0)
}

/// Attaches a filter that drops packets with the SYN flag. A client repeats its SYN after a second.
pub(super) fn stop_handshakes(listener: &RawSocket) -> bool {
    // Classic BPF: load the byte with TCP's flags; is SYN set? Then keep nothing, otherwise everything.
    const DROP_SYN: [SockFilter; 4] = [
        SockFilter::new(0x30, 0, 0, 13),
        SockFilter::new(0x45, 0, 1, 0x02),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, u32::MAX),
    ];
    listener.attach_filter(&DROP_SYN).is_ok()
}

/// Lets other processes of the same user listen on the same address; the system spreads new clients over them.
pub(super) fn reuse_port(socket: &RawSocket) -> io::Result<()> {
    socket.set_reuse_port(true)
}

pub(super) fn is_listening(socket: &RawSocket) -> io::Result<bool> {
    socket.is_listener()
}

pub(super) fn limit_unsent(socket: &RawSocket) -> io::Result<()> {
    socket.set_tcp_notsent_lowat(MAX_UNSENT)
}

/// Locks the directory that contains `path` until the returned file is dropped.
///
/// Returns nothing if that is not possible, for example in a directory that cannot be read or that another
/// program keeps locked. The server then starts without the lock.
pub(super) fn lock_directory(path: &Path, max_attempts: u32) -> Option<File> {
    let directory = File::open(Path::new(".").join(path).parent()?).ok()?;
    for _ in 0..max_attempts {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => thread::sleep(LOCK_INTERVAL),
            result => return result.is_ok().then_some(directory),
        }
    }
    log::warn!("cannot lock the directory of a socket: another program keeps it locked");
    None
}

/// Returns whether the system has no addresses of a family, such as IPv6.
pub(super) fn is_missing_family(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::AFNOSUPPORT)
}

/// Returns whether `error` is one of the network's that accept(2) passes on, and that have no [`io::ErrorKind`].
pub(crate) fn is_network_error(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::PROTO | Errno::NOPROTOOPT | Errno::OPNOTSUPP | Errno::HOSTDOWN | Errno::NONET)
    )
}
