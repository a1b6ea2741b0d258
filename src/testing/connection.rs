//! A connection in the simulated kernel: the queues in both directions, and what its client will do.
//!
//! From the client to the server there is one queue: bytes arrive, and the server reads them. In the other
//! direction the server writes, the kernel sends as much as the client's receive buffer holds, the client
//! acknowledges, and the client's application reads. Positions are byte offsets from the start of the
//! stream.

use super::random::Rng;
use crate::connection::handler::Action;
use crate::connection::waker::Waker;
use crate::stats::CloseReason;
use crate::system::{Millis, Readiness};

/// What a client has sent and its handler was told, from which a model tells the output.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Seen<'a> {
    /// What the client has sent.
    pub input: &'a [u8],
    /// The client has ended its half after it.
    pub ended: bool,
    /// How many bytes of the input had been read when the handler was called with
    /// [`Event::Shutdown`](crate::Event::Shutdown); `None` if it was not.
    pub shutdown_at: Option<usize>,
}

/// How a client ends its connection after it has sent everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ClosePolicy {
    /// Closes its side and waits for the server's EOF.
    #[default]
    HalfClose,
    /// Leaves the connection open.
    KeepOpen,
    /// Resets the connection, possibly before it has sent everything.
    Reset,
}

/// When a client reads the server's output, or acknowledges it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ReadPolicy {
    #[default]
    Immediately,
    /// Only after all other clients have done everything they can.
    Late,
    Never,
}

/// The server's close of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Close {
    pub(super) at: Millis,
    /// What the server had read.
    pub(super) read: usize,
    /// The close discarded what the kernel still held, and reset the connection.
    pub(super) reset: bool,
    /// The kernel had room for more output since before the worker's last poll.
    pub(super) had_room: bool,
    /// Data had arrived before the worker's last poll, and was not read.
    pub(super) had_input: bool,
    /// When its timeout was over, or would have been.
    pub(super) deadline: Millis,
    /// How many connections of the worker held bytes.
    pub(super) holders: usize,
    /// Whether it is the one to be closed where buffers are lacking.
    pub(super) victim: Result<(), &'static str>,
}

/// The server's end of its own half.
#[derive(Clone, Copy, Debug)]
pub(super) struct WriteShutdown {
    pub(super) at: Millis,
    /// What the server had read.
    pub(super) read: usize,
    /// The value of [`Close::had_input`] at this time.
    pub(super) had_input: bool,
    /// When its timeout was over, or would have been.
    pub(super) deadline: Millis,
    /// An event had reported input that was not read.
    pub(super) ignored_event: bool,
    /// Input had arrived before the server looked for it last, and was not read.
    pub(super) ignored_input: bool,
}

/// The moment from which the server discards the input of a connection in a shutdown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    /// What the server had read before.
    pub(super) read: usize,
}

#[derive(Debug, Default)]
// As in a kernel's socket, the flags are independent of each other.
#[allow(clippy::struct_excessive_bools)]
pub(super) struct SimConnection {
    // From the client to the server.
    /// Everything the client will send.
    pub(super) input: Vec<u8>,
    pub(super) arrived: usize,
    /// What had arrived when the server stopped accepting new data in a shutdown.
    pub(super) read_limit: Option<usize>,
    /// The EOF had arrived then.
    pub(super) ended_in_time: bool,
    pub(super) read: usize,
    pub(super) receive_buffer_size: usize,
    /// [`Kernel::sequence`] when the first byte, or the EOF, arrived in the empty receive queue.
    pub(super) unread_since: u64,
    /// The position of the last urgent byte. A read that starts before it also ends before it.
    pub(super) urgent: Option<usize>,
    pub(super) half_closed: bool,
    pub(super) reset_by_client: bool,
    /// The client does not reset: it has vanished, and keepalive or a retransmission has timed out.
    pub(super) vanishes: bool,
    pub(super) close_policy: ClosePolicy,
    // From the server to the client.
    /// The model's output for the whole input.
    pub(super) expected: Vec<u8>,
    pub(super) written: usize,
    pub(super) sent: usize,
    pub(super) acknowledged: usize,
    pub(super) received: usize,
    pub(super) send_buffer_size: usize,
    pub(super) client_buffer_size: usize,
    /// Unsent bytes from which on a write would block.
    pub(super) max_unsent: usize,
    /// The server has asked for delivery: the socket is writable only while nothing is in its queue.
    pub(super) reports_delivery: bool,
    /// Room raises an event, because a call would have blocked or a poll found no room.
    pub(super) awaits_writable: bool,
    /// A call of the server would have blocked, and no event has announced room since.
    pub(super) blocked: bool,
    /// Since when the kernel has room.
    pub(super) room_since: u64,
    pub(super) read_policy: ReadPolicy,
    pub(super) acknowledge_policy: ReadPolicy,
    // The server's side.
    /// The connection was accepted, at the time `connected` of [`Kernel::sequence`] at the earliest.
    pub(super) accepted: bool,
    pub(super) connected: u64,
    /// How many connections had been accepted by then, this one included.
    pub(super) number: u64,
    /// The connection could not be registered.
    pub(super) registration_failed: bool,
    /// The poller and the token.
    pub(super) registered: Option<(usize, usize)>,
    pub(super) registered_at: Millis,
    pub(super) in_ready_list: bool,
    pub(super) eof_reported: bool,
    /// The EOF was reported while the handler could still answer.
    pub(super) ended: bool,
    /// The handler was called for it.
    pub(super) end_handled: bool,
    pub(super) reset_reported: bool,
    /// What had arrived by the last event that the worker has handled.
    pub(super) reported: usize,
    /// What the handler has returned last, `None` before its first call.
    pub(super) action: Option<Action>,
    /// How many bytes the handler has consumed and appended.
    pub(super) consumed: usize,
    pub(super) appended: usize,
    /// When the handler's timer expires.
    pub(super) timer: Option<Millis>,
    pub(super) waker: Option<Waker>,
    /// The waker was used, and the handler was not called since.
    pub(super) is_woken: bool,
    /// What had been read when the handler was called for the shutdown.
    pub(super) shutdown_at: Option<usize>,
    /// Calls of the handler before the one that panics.
    pub(super) calls_before_panic: Option<usize>,
    pub(super) has_panicked: bool,
    /// When the handler has returned [`Action::Close`] or [`Action::Reset`], or panicked.
    pub(super) close_requested: Option<Millis>,
    pub(super) write_shutdown: Option<WriteShutdown>,
    pub(super) refusal: Option<Refusal>,
    /// The server has found the input that it refuses.
    pub(super) refuses: bool,
    /// When the server has last asked for the number of unread bytes, as a number of [`Kernel::sequence`].
    pub(super) asked_unread: u64,
    /// There were unread bytes then, and the server has not read since.
    pub(super) found_unread: bool,
    /// The server's last call has found that there were none.
    pub(super) found_empty: bool,
    /// The server's last call has found that all output is delivered.
    pub(super) found_delivered: bool,
    pub(super) abort_requested: bool,
    /// Since when nothing has happened that its timeout depends on.
    pub(super) quiet_since: Millis,
    /// The last turn has used the budget, so the connection can be in the run queue.
    pub(super) used_budget: bool,
    /// The last turn has used the budget, or so much of it that the connection is bulk.
    pub(super) moved_much: bool,
    /// An event has reported input, and the server has not made a call since.
    pub(super) is_unserved: bool,
    /// The connection is bulk, and in the run queue, as its table has said after the last tick.
    pub(super) is_bulk: bool,
    pub(super) is_queued: bool,
    /// The ticks of its last turn, and of its last turn from the run queue.
    pub(super) last_turn_tick: u64,
    pub(super) bulk_turn_tick: u64,
    /// The connections that had a turn from the run queue while this one waited for its turn.
    pub(super) waits_behind: Vec<usize>,
    /// What had arrived when the server was asked to shut down.
    pub(super) arrived_before_drain: usize,
    pub(super) close: Option<Close>,
    /// The connection was reset, by the server's close or by input that arrived after it.
    pub(super) reset_by_server: bool,
    pub(super) close_reason: Option<CloseReason>,
}

impl SimConnection {
    pub(super) fn new(rng: &mut Rng, input: Vec<u8>, scale: usize, connected: u64) -> Self {
        const READ_POLICIES: [ReadPolicy; 6] = [
            ReadPolicy::Immediately,
            ReadPolicy::Immediately,
            ReadPolicy::Immediately,
            ReadPolicy::Immediately,
            ReadPolicy::Late,
            ReadPolicy::Never,
        ];
        Self {
            input,
            receive_buffer_size: scale * rng.choose(&[1, 7, 64, 300, 2000]),
            close_policy: rng.choose(&[
                ClosePolicy::HalfClose,
                ClosePolicy::HalfClose,
                ClosePolicy::HalfClose,
                ClosePolicy::KeepOpen,
                ClosePolicy::Reset,
            ]),
            send_buffer_size: scale * rng.choose(&[1, 5, 40, 300, 2000]),
            client_buffer_size: scale * rng.choose(&[1, 5, 40, 300]),
            max_unsent: scale * rng.choose(&[1, 10, 2000, 2000]),
            read_policy: rng.choose(&READ_POLICIES),
            acknowledge_policy: rng.choose(&READ_POLICIES),
            vanishes: rng.one_in(4),
            calls_before_panic: rng.one_in(16).then(|| rng.below(6)),
            connected,
            ..Self::default()
        }
    }

    /// What the client has sent in the first `read` bytes.
    pub(super) fn seen(&self, read: usize, ended: bool) -> Seen<'_> {
        Seen {
            input: &self.input[..read],
            ended,
            shutdown_at: self.shutdown_at,
        }
    }

    /// All that the client will send.
    pub(super) fn seen_at_end(&self) -> Seen<'_> {
        let ended = self.close_policy == ClosePolicy::HalfClose;
        self.seen(self.input.len(), ended)
    }

    pub(super) fn unread(&self) -> usize {
        self.arrived - self.read
    }

    pub(super) fn unsent(&self) -> usize {
        self.written - self.sent
    }

    /// Free space in the client's receive buffer, in bytes.
    pub(super) fn window(&self) -> usize {
        self.client_buffer_size - (self.sent - self.received)
    }

    /// How many bytes a write takes now.
    pub(super) fn room(&self) -> usize {
        if self.reports_delivery {
            let is_delivered = self.acknowledged == self.written;
            return if is_delivered {
                self.send_buffer_size
            } else {
                0
            };
        }
        let free = self.send_buffer_size - (self.written - self.acknowledged);
        free.min(self.max_unsent.saturating_sub(self.unsent()))
    }

    /// As on Linux, a third of the send buffer must be free, and the unsent bytes below half of their limit.
    pub(super) fn is_writable(&self) -> bool {
        if self.reports_delivery {
            return self.acknowledged == self.written;
        }
        let free = self.send_buffer_size - (self.written - self.acknowledged);
        free * 3 >= self.send_buffer_size && self.unsent() * 2 < self.max_unsent
    }

    pub(super) fn is_readable(&self) -> bool {
        self.unread() > 0
            || (self.half_closed && !self.eof_reported)
            || (self.reset_by_client && !self.reset_reported)
    }

    /// Whether the server has input to read that arrived before `sequence`.
    pub(super) fn had_input(&self, sequence: u64) -> bool {
        (self.unread() > 0 || (self.half_closed && !self.eof_reported))
            && self.unread_since < sequence
    }

    pub(super) fn is_open(&self) -> bool {
        self.close.is_none()
    }

    /// Whether the handler can be called.
    pub(super) fn calls_handler(&self) -> bool {
        let is_closing = self.close_requested.is_some() || self.write_shutdown.is_some();
        self.is_open() && !self.is_done() && !is_closing && self.refusal.is_none()
    }

    /// Whether the handler has no further answer after the client's EOF. An unfinished message is discarded then.
    fn is_done(&self) -> bool {
        self.end_handled && matches!(self.action, Some(Action::Continue | Action::Close))
    }

    /// Whether the handler has announced an answer.
    pub(super) fn is_pending(&self) -> bool {
        self.calls_handler() && self.action == Some(Action::Pending)
    }

    /// Whether the handler has work left.
    pub(super) fn is_yielding(&self) -> bool {
        self.calls_handler() && self.action == Some(Action::Yield)
    }

    /// Whether the handler has announced an answer, and left so much input that no more can be read.
    pub(super) fn is_full(&self, buffer_size: usize) -> bool {
        self.is_pending() && self.read - self.consumed == buffer_size
    }

    /// Bytes in the buffers of the server. What it discards is not among them.
    pub(super) fn held(&self) -> usize {
        if self.refusal.is_some() || self.write_shutdown.is_some() {
            return 0;
        }
        let output = self.appended.saturating_sub(self.written);
        match self.is_done() {
            true => output,
            false => output + self.read.saturating_sub(self.consumed),
        }
    }

    /// Whether its buffers may hold bytes: a message that the client has not finished can stay until the connection closes.
    pub(super) fn may_hold(&self) -> bool {
        let is_over = self.refusal.is_some() || self.write_shutdown.is_some();
        self.has_panicked || self.held() > 0 || !is_over && self.read > self.consumed
    }

    /// Whether all output is written and the handler has announced more.
    pub(super) fn is_waiting(&self) -> bool {
        (self.is_pending() || self.is_yielding()) && self.written == self.appended
    }

    /// The action after which the connection waits for its handler.
    pub(super) fn waits_after(&self) -> Option<Action> {
        self.action.filter(|_| self.is_waiting())
    }

    /// Whether either side has reset the connection.
    pub(super) fn is_reset(&self) -> bool {
        self.reset_by_client || self.reset_by_server
    }

    /// Returns whether the connection is open or was closed without a reset or a timeout.
    pub(super) fn is_clean(&self) -> bool {
        let clean_reason = |reason| {
            matches!(
                reason,
                CloseReason::PeerClosed | CloseReason::Handler | CloseReason::Shutdown
            )
        };
        !self.is_reset() && self.close_reason.is_none_or(clean_reason)
    }

    /// How much of the input the server had read when it ended its half, refused more or closed the connection.
    pub(super) fn answered_input(&self) -> usize {
        match (self.refusal, self.write_shutdown, self.close) {
            (Some(refusal), _, _) => refusal.read,
            (None, Some(shutdown), _) => shutdown.read,
            (None, None, Some(close)) => close.read,
            (None, None, None) => self.read,
        }
    }

    /// Returns what an event would report now.
    pub(super) fn readiness(&self) -> Readiness {
        let read_closed = self.half_closed || self.reset_by_client;
        let closed = self.reset_by_client || (self.half_closed && self.write_shutdown.is_some());
        let priority = self
            .urgent
            .is_some_and(|urgent| (self.read..self.arrived).contains(&urgent));
        Readiness {
            readable: self.unread() > 0 || read_closed,
            writable: self.is_writable() || closed,
            read_until_would_block: read_closed || closed || priority,
        }
    }
}
