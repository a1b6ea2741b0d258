//! The protocol interface: one [`Handler`] per connection, which works on bytes only.

use std::cell::{Cell, OnceCell, RefCell};
use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use crate::connection::buffer::Buffer;
use crate::connection::shared::Shared;
use crate::connection::waker::Waker;
use crate::system::{Millis, NEVER, millis};

/// A protocol implementation. One value per connection, created when a worker takes it over
/// and dropped on close.
///
/// A handler consumes bytes from the front of [`input`](Context::input) and appends its answer to
/// [`output`](Context::output). It has no access to the socket: reading, writing, scheduling and closing are
/// done for it.
///
/// ```text
///             Open      Input, Sent, Resumed, Timer, Wake, Shutdown
///   accept ---------> open ---------------.
///                      | ^                |
///                      | '----------------'
///          Close,      |
///          a limit     | Eof      Sent, Resumed, Timer, Wake, Shutdown
///            .---------+----> ended ------.
///            |                 | ^        |
///            |                 | '--------'  while Flush, Yield or Pending is returned
///            v                 v
///        output is sent, the connection is closed, the handler is dropped
/// ```
///
/// A handler must not block, because its worker serves many other connections on the same thread. Slow work
/// belongs on a [`WorkQueue`](crate::WorkQueue). The job sends its result through a channel and uses the connection's
/// [`Waker`] to have the handler called.
pub trait Handler {
    /// Called for each [`Event`]. The returned [`Action`] replaces the previous one, with one exception.
    ///
    /// [`Event::Timer`], [`Event::Wake`] and [`Event::Shutdown`] come in between: if [`Action::Continue`] is returned for one
    /// of them, an earlier [`Action::Flush`] or [`Action::Yield`] stays, and so does an [`Action::Pending`] unless the call has
    /// consumed or appended bytes, which is taken for the answer: to go on waiting, return `Pending` again.
    ///
    /// # Panics
    ///
    /// A panic ends this connection ([`CloseReason::Panic`](crate::CloseReason::Panic)) and no other. What the
    /// call has appended is discarded, and the handler is dropped without being called again.
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action;
}

/// For handlers of different types, as `Box<dyn Handler>`.
impl<H: Handler + ?Sized> Handler for Box<H> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        (**self).process(event, context)
    }
}

/// Why a handler is called. A handler returns [`Action::Continue`] for an event that it does not know, and one that contains
/// another handler passes it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The connection has opened. This is the first call. Both buffers are empty; a greeting is appended now.
    Open,
    /// Bytes have arrived at the end of `input`, which holds them and what earlier calls have left. `output` is
    /// empty: while output is pending, the server does not read.
    Input,
    /// The output of a call that returned [`Action::Flush`] has been sent. `output` is empty.
    Sent,
    /// The client has ended its half of the connection, so no more input arrives. It comes also while an answer is
    /// [pending](Action::Pending). `input` holds an unfinished
    /// message, if any, which is discarded when the connection closes; `output` is empty. The connection closes
    /// when its handler returns [`Action::Continue`] in this call or in a later one.
    Eof,
    /// The timer that [`Context::set_timer`] has set has expired. Both buffers can hold bytes.
    Timer,
    /// The connection's [`Waker`] was used, at least once since the last call with this event. Both buffers can
    /// hold bytes. To send much, return [`Action::Yield`] first: many small turns delay other connections more.
    Wake,
    /// The server shuts down. A handler that is not done is called with this once: when the shutdown begins, and if the
    /// connection opens later, after [`Open`](Self::Open). Both buffers can hold bytes, and more input can follow.
    ///
    /// A handler need not do anything: after [`Action::Continue`] the server waits for an answer that is still to come, handles
    /// what has arrived, and closes the connection. For a farewell, and for protocols that announce the end. After a farewell
    /// that comes before an answer, return [`Action::Pending`] again. An unfinished message in `input` is discarded; to wait for
    /// its rest, return [`Action::Pending`] in this call and in the later ones until it is complete, and
    /// [`Action::Continue`] at [`Eof`](Self::Eof). It must arrive before the last part of the drain, in which nothing is read.
    Shutdown,
    /// The last call returned [`Action::Yield`], and others have had a turn. `output` is empty.
    Resumed,
}

/// What the server does after [`Handler::process`]. One that contains another handler must know them all, so a further one
/// comes with a new major version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send `output`, and wait for the next event. What is left in `input` is an unfinished message: the handler is not called
    /// for it until more input arrives, and at the client's EOF it is discarded.
    ///
    /// If it fills `input` completely, no event can finish it, and the connection is closed
    /// ([`CloseReason::BufferFull`](crate::CloseReason::BufferFull)).
    Continue,
    /// Send all of `output`, then call the handler with [`Event::Sent`], without waiting for input. For an
    /// answer that does not fit into `output`, and for one that is sent in parts.
    ///
    /// With an empty `output` there is nothing to send: an answer that does not fit then is larger than the
    /// whole buffer, and the connection is closed
    /// ([`CloseReason::BufferFull`](crate::CloseReason::BufferFull)).
    Flush,
    /// An answer is still to come, in a call for [`Event::Wake`], [`Event::Timer`] or [`Event::Input`]. What is in `output` is
    /// sent.
    ///
    /// Until then the connection is not closed by the client's EOF, by an idle timeout (unless the client does not
    /// accept pending output) or by a shutdown before its deadline. Input is still read, until `input` is full. Only the
    /// [`answer_timeout`](crate::Config::answer_timeout), if there is one, bounds the wait: then the connection is reset.
    ///
    /// A call for [`Event::Wake`] that finds an answer without a byte, and no input to consume, returns
    /// [`Yield`](Self::Yield) to end the wait.
    Pending,
    /// Send all of `output`, let other connections have a turn, then call the handler with [`Event::Resumed`].
    ///
    /// The connection waits in the run queue, as one that floods: few of them have a turn in a tick.
    ///
    /// For long work in slices: the server is fair in bytes, and cannot divide a call. A handler that needs more than a
    /// millisecond for what one read brings does a part, remembers where it is and returns this, again and again, and
    /// [`Continue`](Self::Continue) at the end. Shorter work is done at once. Also for [`Event::Wake`], if much is to be sent. Until then nothing is read, and the connection is not closed by the
    /// client's EOF, by an idle timeout (unless the client does not accept pending output) or by a shutdown before its
    /// deadline.
    Yield,
    /// Send all of `output`, then close the connection. Input that was not consumed is discarded.
    ///
    /// A client that accepts no output for 10 s is reset
    /// ([`CloseReason::IdleTimeout`](crate::CloseReason::IdleTimeout)). After the output is sent, the server waits up to
    /// 1 s for the client's EOF, and discards what it sends; a client that sends for longer is reset and may lose the answer. The
    /// handler is not called again, and is dropped only then: it must remove itself from shared state *before* it returns this.
    ///
    /// After the client's EOF this is the same as [`Continue`](Self::Continue): the idle timeout applies, and the reason
    /// is [`CloseReason::PeerClosed`](crate::CloseReason::PeerClosed).
    Close,
    /// Close the connection at once with a reset ([`CloseReason::HandlerReset`](crate::CloseReason::HandlerReset)): what is in
    /// the buffers and what the kernel has not delivered are discarded, and the client sees an error instead of a complete
    /// answer. A Unix-domain socket has no reset; there the client sees EOF.
    ///
    /// For a client that does not read its output, or that breaks the protocol.
    Reset,
}

/// A handler's view of its connection during one call.
#[derive(Debug)]
pub struct Context<'a> {
    /// Bytes from the client.
    pub input: Input<'a>,
    /// Bytes to the client.
    pub output: Output<'a>,
    pub(crate) extras: &'a OnceCell<Box<Extras>>,
    pub(crate) shared: &'a Shared,
}

impl Context<'_> {
    /// Returns the time since the server was bound. It is read once per tick, so all calls of a tick see the same time, and
    /// never goes back. The resolution is a millisecond.
    ///
    /// In `testing::simulate` it is the simulated time, so measure time with this and not with a clock.
    #[must_use]
    pub fn now(&self) -> Duration {
        Duration::from_millis(self.shared.now)
    }

    /// Returns a context with other buffers, for a handler that contains another one and changes its bytes, such as one for
    /// TLS. Time, timer and waker are those of this context. There is one timer, so only one of the two handlers can use it.
    ///
    /// The containing handler moves bytes between the buffers and calls the inner one. It keeps the action that is in force
    /// there, by the rules of [`Handler::process`], for the bytes of the inner buffers:
    ///
    /// * [`Open`](Event::Open), [`Timer`](Event::Timer), [`Wake`](Event::Wake) and [`Shutdown`](Event::Shutdown) are passed on
    ///   at once, except after [`Action::Close`]. [`Sent`](Event::Sent) is passed on if `Flush` is in force and both outputs are
    ///   empty, [`Resumed`](Event::Resumed) if `Yield` is.
    /// * [`Input`](Event::Input) is due when bytes were added to the inner input, and [`Eof`](Event::Eof) when all bytes before
    ///   it were: both only while `Continue` or `Pending` is in force, and while the inner output is empty.
    /// * [`Action::Reset`] is returned at once.
    /// * While inner output, or input that the inner handler could take, waits for the outer output to be sent,
    ///   [`Action::Flush`] is returned. There would be no call otherwise.
    /// * Then the action in force is returned. But if it was in force before this `Timer`, `Wake` or `Shutdown`, `Continue` is.
    ///   And if such a call has ended a `Pending` without a byte for the client, [`Action::Yield`] is: `Continue` would leave the
    ///   `Pending` in force.
    /// * If `Continue` is in force and the inner input is full, no event can go on: [`Action::Close`].
    ///
    /// `examples/masked.rs` is a complete one:
    ///
    /// ```no_run
    #[doc = include_str!("../../examples/masked.rs")]
    /// ```
    #[must_use]
    pub fn with<'b>(&'b self, input: &'b mut Buffer, output: &'b mut Buffer) -> Context<'b> {
        Context {
            input: Input(input),
            output: Output(output),
            extras: self.extras,
            shared: self.shared,
        }
    }

    /// Sets the connection's timer: after this time the handler is called once with [`Event::Timer`]. A
    /// connection has one timer; a new time replaces the old one, and `None` stops it.
    ///
    /// The resolution is a millisecond, rounded up, and zero means one: to be called again without a delay, return
    /// [`Action::Yield`]. Time is counted from the start of the worker's tick, so the call can come early by the
    /// duration of one tick, and late by as much. Data that has arrived before the timer expires is handled first, up to
    /// 64 KiB, also after a pause of the process. Data that the server does not read because output is pending is not:
    /// a client is idle by this timer if it does not read its answers.
    pub fn set_timer(&self, timeout: Option<Duration>) {
        if let Some(timeout) = timeout {
            // Not in this tick, which would never end if each call set such a timer.
            let at = self.shared.now.saturating_add(millis(timeout).max(1));
            self.extras().timer.set(Some(at.min(NEVER - 1)));
        } else if let Some(extras) = self.extras.get() {
            extras.timer.set(None);
        }
    }

    /// Returns a waker for this connection, which other threads can use to have its handler called with
    /// [`Event::Wake`]. The first call allocates it; later calls return clones.
    #[must_use]
    pub fn waker(&self) -> Waker {
        let waker = &self.extras().waker;
        let new_waker = || self.shared.wake_queue.waker(self.shared.token);
        waker.get_or_init(new_waker).clone()
    }

    /// Sets a note for the log record of the connection's end, which has it as the field `note`. A new note replaces the old one.
    pub fn set_note(&self, note: &str) {
        self.extras().note.replace(Some(note.into()));
    }

    fn extras(&self) -> &Extras {
        self.extras.get_or_init(Box::default)
    }
}

/// What a connection has only once its handler has asked for it.
#[derive(Debug, Default)]
pub(crate) struct Extras {
    pub(crate) waker: OnceCell<Waker>,
    /// When the handler's timer expires.
    pub(crate) timer: Cell<Option<Millis>>,
    /// What the handler says about the connection.
    pub(crate) note: RefCell<Option<Box<str>>>,
}

/// The bytes that have arrived and were not consumed, at most the server's
/// [`buffer_size`](crate::Config::buffer_size). They are contiguous.
#[derive(Debug)]
pub struct Input<'a>(pub(crate) &'a mut Buffer);

impl Input<'_> {
    /// Returns the bytes.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        self.0.data()
    }

    /// Returns the bytes, to be changed in place.
    #[must_use]
    pub fn data_mut(&mut self) -> &mut [u8] {
        self.0.data_mut()
    }

    /// Returns the number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the largest number of bytes that the buffer can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// Removes the first `count` bytes.
    ///
    /// # Panics
    ///
    /// Panics if there are fewer bytes.
    pub fn consume(&mut self, count: usize) {
        self.0.consume(count);
    }

    /// Returns the first line with its line feed, or `None` if no whole line has arrived. It is not consumed.
    ///
    /// The search goes on where that of an earlier call has ended, unless [`data_mut`](Self::data_mut) was called since.
    #[must_use]
    pub fn line(&self) -> Option<&[u8]> {
        self.line_within(usize::MAX).unwrap_or_default()
    }

    /// As [`line`](Self::line), for a line of at most `max` bytes with its line feed.
    ///
    /// # Errors
    ///
    /// If the line is longer, as soon as that is known.
    pub fn line_within(&self, max: usize) -> Result<Option<&[u8]>, TooLong> {
        match self.0.line_length() {
            Some(length) if length <= max => Ok(Some(&self.data()[..length])),
            None if self.len() < max => Ok(None),
            _ => Err(TooLong),
        }
    }

    /// Returns the first frame with its header, or `None` if no whole frame has arrived. It is not consumed.
    ///
    /// A frame is the length of its contents in four bytes, the most significant first, and the contents. One that
    /// does not fit into the buffer never arrives completely.
    #[must_use]
    pub fn frame(&self) -> Option<&[u8]> {
        self.frame_within(usize::MAX).unwrap_or_default()
    }

    /// As [`frame`](Self::frame), for a frame of at most `max` bytes with its header.
    ///
    /// # Errors
    ///
    /// If the frame is longer, as soon as its header has arrived.
    pub fn frame_within(&self, max: usize) -> Result<Option<&[u8]>, TooLong> {
        let Some((header, _)) = self.data().split_first_chunk() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*header) as usize;
        match length.checked_add(header.len()) {
            Some(length) if length <= max => Ok(self.data().get(..length)),
            _ => Err(TooLong),
        }
    }
}

/// A line or a frame is longer than is allowed: see [`Input::line_within`] and [`Input::frame_within`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message is longer than is allowed")
    }
}

impl Error for TooLong {}

/// The bytes that are to be sent, at most the server's [`buffer_size`](crate::Config::buffer_size).
#[derive(Debug)]
pub struct Output<'a>(pub(crate) &'a mut Buffer);

impl Output<'_> {
    /// Appends all of `bytes` if they fit, otherwise nothing. Returns whether they fit.
    ///
    /// After `false`, return [`Action::Flush`] to be called again once `output` is empty.
    #[must_use = "if this is false, nothing was appended"]
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        self.0.push(bytes)
    }

    /// Appends as many of `bytes` as fit, and returns their number.
    pub fn push_some(&mut self, bytes: &[u8]) -> usize {
        self.0.push_some(bytes)
    }

    /// Returns the free space, to be filled in place: [`commit`](Self::commit) appends what was written.
    ///
    /// It is not cleared. It can contain bytes of other connections, so commit only what was written.
    #[must_use]
    pub fn spare(&mut self) -> &mut [u8] {
        self.0.spare()
    }

    /// Appends the first `count` bytes of [`spare`](Self::spare).
    ///
    /// # Panics
    ///
    /// Panics if `spare` is shorter.
    pub fn commit(&mut self, count: usize) {
        self.0.commit(count);
    }

    /// Removes bytes from the end, so that at most `len` are left. It takes back what this call has appended; of what earlier
    /// calls have appended, a part may have been sent.
    pub fn truncate(&mut self, len: usize) {
        self.0.truncate(len);
    }

    /// Moves as many bytes as fit from the front of `input`, whichever message they belong to, to the end of this buffer, and
    /// returns their number.
    ///
    /// If this buffer is empty and both have the same capacity, as those of the server have, they swap their storage and no byte
    /// is copied.
    pub fn append(&mut self, input: &mut Input<'_>) -> usize {
        self.0.append(input.0)
    }

    /// Returns how many more bytes fit.
    #[must_use]
    pub fn room(&self) -> usize {
        self.0.room()
    }

    /// Returns the number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the largest number of bytes that the buffer can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.0.capacity()
    }
}

/// Lets `write!` append to the output.
///
/// A `write!` that does not fit is truncated and fails. To append an answer whole or not at all, format
/// it elsewhere and [`push`](Output::push) it, or check [`room`](Output::room) first.
impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(self.0.push_some(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The echo protocol: sends every byte back.
#[derive(Clone, Copy, Debug, Default)]
pub struct Echo;

impl Handler for Echo {
    fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
        context.output.append(&mut context.input);
        Action::Continue
    }
}

#[cfg(test)]
mod tests;
