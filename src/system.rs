//! What the server asks of the operating system: streams, listeners, wakers, polls and time.
//!
//! The sockets and the poll of `net` answer it, and so does the simulated kernel of `testing`. Everything between these
//! traits and the handler is the same code in both.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use crate::peer::Peer;

/// Milliseconds: a duration, or the time since a fixed moment.
pub(crate) type Millis = u64;

/// No deadline.
pub(crate) const NEVER: Millis = Millis::MAX;

/// Converts to milliseconds, rounded up so that no deadline is early.
pub(crate) fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(NEVER)
}

/// What the stream is possibly ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Readiness {
    /// A read may return bytes, EOF or an error.
    pub(crate) readable: bool,
    /// A write may accept bytes or return an error.
    pub(crate) writable: bool,
    /// Reading must continue until a read would block.
    ///
    /// Otherwise a read that does not fill the buffer has emptied the receive queue, and the next bytes
    /// raise a new edge. This saves the second `recv` of each message. It proves nothing after EOF or urgent data was
    /// reported, because both end a read early, nor on streams without
    /// [`Stream::short_read_means_drained`].
    pub(crate) read_until_would_block: bool,
}

impl Readiness {
    pub(crate) const WRITABLE: Self = Self {
        readable: false,
        writable: true,
        read_until_would_block: false,
    };

    #[cfg(test)]
    pub(crate) const READABLE: Self = Self {
        readable: true,
        writable: false,
        read_until_would_block: false,
    };
}

/// A bidirectional byte stream whose write half can be shut down on its own.
///
/// Reads and writes never block: they fail with [`ErrorKind::WouldBlock`].
pub(crate) trait Stream: Read + Write {
    /// Shuts the write half down. TCP sends a FIN.
    ///
    /// # Errors
    ///
    /// If the peer has reset the connection.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// Returns whether the peer has acknowledged everything that was written, except for one or two segments of at most 3 KB
    /// in all. After `false`, a readiness event for writing follows once it has. A failed connection counts as delivered.
    ///
    /// To that end the kernel's send buffer is made as small as possible, so later writes are slow. Always true except for
    /// TCP on Linux.
    fn poll_delivery(&mut self) -> bool;

    /// The number of bytes that have arrived and were not read. Always 0 except on Linux.
    fn unread(&self) -> u64;

    /// Makes the coming close a reset, which discards what the kernel still holds. Unix-domain sockets have none.
    fn reset_on_close(&mut self);

    /// Whether a read that does not fill the buffer proves that the receive queue is empty; see
    /// [`Readiness::read_until_would_block`].
    fn short_read_means_drained(&self) -> bool {
        true
    }
}

/// A source of connections.
pub(crate) trait Listen {
    type Stream: Stream;

    /// Accepts the next connection. Never blocks.
    fn accept(&self) -> io::Result<(Self::Stream, Peer)>;

    /// Whether a client waits to be accepted. After `false`, the next client raises an event.
    fn has_waiting_client(&self) -> bool;

    /// Tries to make the kernel ignore new clients, while handshakes in progress still complete. Returns
    /// whether it does.
    fn stop_handshakes(&self) -> bool {
        false
    }
}

/// Wakes a thread that waits in a poll.
pub(crate) trait Wake {
    /// Raises an event in the poll. May be called by any thread.
    fn wake(&self);
}

impl<W: Wake> Wake for Arc<W> {
    fn wake(&self) {
        W::wake(self);
    }
}

/// An event that a poll has reported.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PollEvent {
    /// The waker was used.
    Wake,
    /// The source with this token is possibly ready.
    Ready(usize, Readiness),
}

/// Waits for events of sources of type `S`.
pub(crate) trait Poller<S> {
    /// Waits for events, for at most `timeout` milliseconds or without a limit. Returns whether more
    /// events may be pending: the batch is full, or the wait was interrupted.
    fn poll(&mut self, timeout: Option<Millis>) -> io::Result<bool>;

    /// The most events that a poll reports.
    fn max_events(&self) -> usize;

    /// The events of the last poll.
    fn events(&self) -> impl Iterator<Item = PollEvent>;

    /// The time since a fixed moment, which all threads share.
    fn now(&self) -> Millis;

    /// The time since `since`, in milliseconds. By default 0, for polls without a real clock.
    fn elapsed(&self, since: Millis) -> Millis {
        let _ = since;
        0
    }

    /// Registers a source, edge-triggered, for all events that may ever matter. What it is ready for already is reported as an
    /// event as well.
    fn register(&mut self, source: &mut S, token: usize) -> io::Result<()>;
}

/// Returns the size of a page of memory.
pub(crate) fn page_size() -> u64 {
    #[cfg(target_os = "linux")]
    return rustix::param::page_size() as u64;
    // Of macOS on Apple's processors; others have less.
    #[cfg(not(target_os = "linux"))]
    return 16 << 10;
}

#[cfg(test)]
mod tests;
