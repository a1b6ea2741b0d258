//! One connection as a state machine: a stream, an input and an output buffer, and a handler.
//!
//! The state machine performs no polling and reads no clock. The event loop reports readiness with
//! [`Connection::add_readiness`] and then calls [`Connection::drive`], which transfers bytes until a
//! call would block or the budget is used.
//!
//! Readiness is only a hint. State changes are based on the results of system calls. The one exception
//! is the short read: see [`Readiness::read_until_would_block`].
//!
//! Pending output blocks input: while a write would block, the connection does not read. The client's data
//! then stays in the kernel's receive buffer, the TCP window closes, and backpressure reaches the client.
//! Memory per connection is therefore bounded by the two buffers, and an echo never copies a byte from one to
//! the other.
//!
//! ```text
//!             EOF            handler is done, output sent (in a shutdown: delivered)
//!  Serving ----------> Ended ----------------------------------> closed
//!   |   |                                                      ^
//!   |   | shutdown                                             |
//!   |   '------> Draining --read deadline--> DrainingRest      |
//!   |               |                          |   |           |
//!   |  nothing left |            nothing left  |   | more has  |
//!   |  to read, all |            to read, all  |   | arrived   |
//!   |  delivered    |            delivered     |   v           |
//!   |               |                          | Refusing -EOF-+ (reset)
//!   | Close, panic, '--------------.   .-------'   |           |
//!   | buffer full,                 v   v           | deadline  |
//!   | timeout                    Lingering <-------'           |
//!   '------> Flushing --sent-->  (write half  --EOF, deadline--'
//!                                 shut down)
//! ```
//!
//! In a shutdown the process may end before the kernel has delivered what it holds, so the connection
//! stays open until the peer has acknowledged all output ([`Stream::await_delivery`]).
//!
//! The handler can close a draining connection as well, and EOF ends it as it ends a serving one. A reset or
//! another error closes the connection from any state. Deadlines belong to the
//! [table](crate::server::table).

pub(crate) mod buffer;
pub(crate) mod handler;
pub(crate) mod waker;

use std::any::Any;
use std::io::{self, ErrorKind};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use crossbeam_utils::CachePadded;

use crate::connection::buffer::{Buffer, Buffers, Pool};
use crate::connection::handler::{Action, Context, Event, Extras, Handler, Input, Output, Tick};
use crate::connection::waker::{WakeQueue, Waker};
use crate::stats::{CloseReason, WorkerCounters};
use crate::system::{NEVER, Readiness, Stream};

#[cfg(test)]
pub(crate) const READABLE: Readiness = Readiness {
    readable: true,
    writable: false,
    read_until_would_block: false,
};

/// How a call to [`Connection::drive`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// The connection serves, and waits only for input; its handler has no timer and no waker.
    AwaitingInput,
    /// All further progress requires an event, for example room for the rest of a write, a wake-up or a timer.
    Idle,
    /// The [budget](BUDGET) is used; the connection can make progress without an event.
    Runnable,
    /// The connection has ended and can be dropped.
    Closed(CloseReason),
}

/// Bytes that a connection may read and send before other connections are served. What was read is still
/// answered, which can send as many bytes again.
///
/// When it was chosen, with 20 flooding connections on one worker, the p99 latency of another connection was 25 ms
/// with a budget of 1 MiB and 4.6 ms with this one; throughput was the same.
pub(crate) const BUDGET: usize = 64 << 10;

/// Rounds per budget, each a read or a call of the handler, followed by sends. It bounds the number of calls where
/// messages are small. Once the server has shut its write half down, as many reads again discard input.
pub(crate) const MAX_ROUNDS: usize = 64;

/// The part of a connection's life that determines its timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Bytes are read, handled and sent.
    Serving,
    /// All output is sent, and the handler has announced more.
    Waiting,
    /// In a shutdown: input that came too late is discarded.
    Refusing,
    /// The rest of the output is being sent.
    Flushing,
    /// All output is sent; only the client's EOF is awaited. The reason is that of the coming close.
    Lingering(CloseReason),
}

/// The states of the diagram above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Bytes are read and handled.
    Serving,
    /// The server shuts down. Data that has already arrived is read and handled, until a read would
    /// block.
    Draining,
    /// The same, but only until `read_limit` bytes were received in total, and an EOF after them.
    DrainingRest,
    /// The client has ended its half. The handler may still have output to append.
    Ended,
    /// In a shutdown, more input has arrived than is answered. It is discarded while the write half stays open. If the
    /// client sends EOF, the connection is reset, so that the client does not mistake an EOF for a complete answer.
    /// If it keeps sending, the write half is shut down at the deadline.
    Refusing,
    /// The handler is no longer called. `output` is sent, then the write half is shut down.
    Flushing(CloseReason),
    /// The write half is shut down. Input is read and discarded until EOF: closing a socket with unread
    /// input sends a reset, which can destroy output in flight.
    Lingering(CloseReason),
}

/// The event that the handler waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// [`Event::Open`], the first call.
    Open,
    /// New input.
    Input,
    /// [`Event::Sent`], due once `output` is empty.
    Sent,
    /// New input, a wake-up or a timer: an answer is still to come.
    Answer,
}

/// What a connection without pending output does next.
enum Step {
    Call(Event),
    Read,
    /// All further progress requires an event.
    Wait,
    /// Nothing more is to be read and handled.
    Finish,
}

/// What the connections of a worker share.
#[derive(Debug)]
pub(crate) struct Resources {
    pub(crate) pool: Pool,
    pub(crate) tick: Tick,
}

impl Resources {
    pub(crate) fn new(
        pool: Pool,
        wakes: WakeQueue,
        counters: Arc<CachePadded<WorkerCounters>>,
    ) -> Self {
        let tick = Tick {
            counters,
            wakes,
            token: 0,
            now: 0,
        };
        Self { pool, tick }
    }
}

#[derive(Debug)]
pub(crate) struct Connection<S, H> {
    stream: S,
    handler: H,
    /// Present only while they hold bytes.
    buffers: Option<Box<Buffers>>,
    extras: Option<Box<Extras>>,
    bytes_in: u64,
    bytes_out: u64,
    /// The last value of `bytes_in` in [`State::DrainingRest`]. As a field of the state it would cost 16 bytes, not 8.
    read_limit: u64,
    state: State,
    readiness: Readiness,
    wait: Wait,
    /// A byte was read or written since the last [`Connection::take_progress`].
    progress: bool,
    /// The server shuts down: the connection closes only after its output is delivered.
    shutting_down: bool,
}

impl<S: Stream, H: Handler> Connection<S, H> {
    /// Only a read that would block proves that nothing more has arrived.
    const UNKNOWN_INPUT: Readiness = Readiness {
        readable: true,
        writable: false,
        read_until_would_block: true,
    };

    /// A new connection: writable, and not known to be readable.
    pub(crate) fn new(stream: S, handler: H) -> Self {
        Self {
            stream,
            handler,
            buffers: None,
            extras: None,
            bytes_in: 0,
            bytes_out: 0,
            read_limit: 0,
            state: State::Serving,
            readiness: Readiness {
                writable: true,
                ..Readiness::default()
            },
            wait: Wait::Open,
            progress: false,
            shutting_down: false,
        }
    }

    /// Adds to the stream's readiness, which is kept until a system call would block.
    pub(crate) fn add_readiness(&mut self, event: Readiness) {
        self.readiness.readable |= event.readable;
        self.readiness.writable |= event.writable;
        self.readiness.read_until_would_block |= event.read_until_would_block;
    }

    /// Starts the shutdown: input is read and answered until a read would block.
    pub(crate) fn drain(&mut self) {
        self.shutting_down = true;
        if self.state == State::Serving {
            self.state = State::Draining;
            self.add_readiness(Self::UNKNOWN_INPUT);
        }
    }

    /// Limits reading to data that has already arrived, for a client that never stops sending. An EOF is read as well.
    pub(crate) fn limit_reading(&mut self) {
        if self.state == State::Draining {
            self.read_limit = self.bytes_in + self.stream.unread();
            self.state = State::DrainingRest;
            self.add_readiness(Self::UNKNOWN_INPUT);
        }
    }

    /// Stops reading and handling; the connection closes once `output` has been sent.
    pub(crate) fn close_after_flush(&mut self, reason: CloseReason) {
        if self.calls_handler() || self.state == State::Refusing {
            self.state = State::Flushing(reason);
        }
    }

    /// Has the handler called with [`Event::Wake`] or [`Event::Timer`] when the connection is driven next.
    pub(crate) fn request_call(&mut self, event: Event) {
        let extras = self.extras.get_or_insert_default();
        match event {
            Event::Timer => (extras.timer, extras.timer_is_due) = (NEVER, true),
            Event::Wake => extras.wake_is_due = true,
            _ => {}
        }
    }

    /// Whether `waker` is of this connection, and not of an earlier one with the same token.
    pub(crate) fn owns(&self, waker: &Waker) -> bool {
        let extras = self.extras.as_ref();
        let own = extras.and_then(|extras| extras.waker.as_ref());
        own.is_some_and(|own| own.is_same(waker))
    }

    pub(crate) fn extras_mut(&mut self) -> Option<&mut Extras> {
        self.extras.as_deref_mut()
    }

    /// Bytes in both buffers.
    pub(crate) fn buffered(&self) -> usize {
        self.buffers.as_ref().map_or(0, |buffers| buffers.len())
    }

    pub(crate) fn bytes_in(&self) -> u64 {
        self.bytes_in
    }

    pub(crate) fn bytes_out(&self) -> u64 {
        self.bytes_out
    }

    /// Whether a byte was read or written since the last call.
    pub(crate) fn take_progress(&mut self) -> bool {
        mem::take(&mut self.progress)
    }

    /// Bytes read and sent.
    fn transferred(&self) -> u64 {
        self.bytes_in + self.bytes_out
    }

    fn awaits_input(&self) -> bool {
        matches!(self.state, State::Serving) && matches!(self.wait, Wait::Input)
    }

    /// Whether the handler can be called.
    pub(crate) fn calls_handler(&self) -> bool {
        matches!(
            self.state,
            State::Serving | State::Draining | State::DrainingRest | State::Ended
        )
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.state {
            State::Refusing => Phase::Refusing,
            State::Flushing(_) => Phase::Flushing,
            State::Lingering(reason) => Phase::Lingering(reason),
            _ if self.wait == Wait::Answer && !self.has_output() => Phase::Waiting,
            _ => Phase::Serving,
        }
    }

    fn has_output(&self) -> bool {
        let buffers = self.buffers.as_ref();
        buffers.is_some_and(|buffers| !buffers.output.is_empty())
    }

    /// Call this before dropping. A connection is reset if its buffers still hold bytes, an answer is still to come
    /// or it refuses input, so that the client can tell a truncated stream from a complete one. Returns the number
    /// of buffered bytes.
    pub(crate) fn abort_if_incomplete(&mut self) -> usize {
        let buffered = self.buffered();
        let is_unanswered = self.calls_handler() && self.wait == Wait::Answer;
        if buffered > 0 || is_unanswered || self.state == State::Refusing {
            self.stream.abort();
        }
        buffered
    }

    /// Transfers bytes until a call would block or the [budget](BUDGET) is used.
    //
    // The path of a message is inlined into one function. To remove the attribute here or from any one of
    // `serve_or_finish`, `serve`, `flush`, `process`, `receive` and the table's `on_ready` adds 18 to 51 user instructions
    // to the 232 of a message.
    #[inline(always)]
    pub(crate) fn drive(&mut self, resources: &mut Resources) -> Status {
        let Resources { pool, tick } = resources;
        if let Some(buffers) = self.buffers.take() {
            return self.drive_with(buffers, pool, tick);
        }
        let result = match self.extras {
            None => {
                let limit = self.transferred() + BUDGET as u64;
                self.serve_or_finish(pool.scratch(), limit, tick)
            }
            Some(_) => self.advance(pool.scratch(), tick),
        };
        let status = result.unwrap_or_else(Status::Closed);
        if pool.is_scratch_clean() {
            return status;
        }
        self.retain_scratch(status, pool, &tick.counters)
    }

    /// [`drive`](Self::drive) for a connection that has retained its buffers.
    fn drive_with(&mut self, mut buffers: Box<Buffers>, pool: &mut Pool, tick: &Tick) -> Status {
        let before = buffers.len();
        let result = self.advance(&mut buffers, tick);
        tick.counters.buffered.adjust(before, buffers.len());
        if buffers.is_empty() {
            pool.recycle(buffers);
        } else {
            self.buffers = Some(buffers);
        }
        result.unwrap_or_else(Status::Closed)
    }

    /// Retains the scratch buffers, which hold bytes. If the connection has failed, or there is no memory for the
    /// replacement of the buffers, it closes with a reset, and its bytes are discarded.
    fn retain_scratch(
        &mut self,
        status: Status,
        pool: &mut Pool,
        counters: &WorkerCounters,
    ) -> Status {
        let reason = match status {
            Status::Closed(reason) => reason,
            _ => match pool.take_scratch() {
                Ok(buffers) => {
                    counters.buffered.adjust(0, buffers.len());
                    self.buffers = Some(buffers);
                    return status;
                }
                Err(_out_of_memory) => CloseReason::OutOfMemory,
            },
        };
        discard(&mut pool.scratch().input, reason, counters);
        discard(&mut pool.scratch().output, reason, counters);
        self.stream.abort();
        Status::Closed(reason)
    }

    /// Runs the state machine: sends pending output, makes the calls of the handler that are due, then serves.
    /// `Err` is the reason to close at once.
    fn advance(&mut self, buffers: &mut Buffers, tick: &Tick) -> Result<Status, CloseReason> {
        let limit = self.transferred() + BUDGET as u64;
        self.flush(&mut buffers.output, limit, tick)?;
        self.make_due_calls(buffers, limit, tick)?;
        if !buffers.output.is_empty() {
            return Ok(self.pending_output());
        }
        if self.transferred() >= limit {
            return Ok(Status::Runnable);
        }
        self.serve_or_finish(buffers, limit, tick)
    }

    /// Calls the handler for its timer and its waker.
    fn make_due_calls(
        &mut self,
        buffers: &mut Buffers,
        limit: u64,
        tick: &Tick,
    ) -> Result<(), CloseReason> {
        let Some(extras) = &mut self.extras else {
            return Ok(());
        };
        let timer = mem::take(&mut extras.timer_is_due).then_some(Event::Timer);
        let wake = mem::take(&mut extras.wake_is_due).then_some(Event::Wake);
        for event in timer.into_iter().chain(wake) {
            let is_done = self.state == State::Ended && self.wait == Wait::Input;
            if self.calls_handler() && !is_done {
                self.process(event, buffers, tick);
                self.flush(&mut buffers.output, limit, tick)?;
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn serve_or_finish(
        &mut self,
        buffers: &mut Buffers,
        limit: u64,
        tick: &Tick,
    ) -> Result<Status, CloseReason> {
        match self.serve(buffers, limit, tick)? {
            Some(status) => Ok(status),
            None => self.finish(&mut buffers.input, limit, tick),
        }
    }

    /// Reads, handles and sends. Returns `None` once no more is to be read, handled or sent.
    #[inline(always)]
    fn serve(
        &mut self,
        buffers: &mut Buffers,
        limit: u64,
        tick: &Tick,
    ) -> Result<Option<Status>, CloseReason> {
        for _ in 0..MAX_ROUNDS {
            let step = match self.awaits_input() {
                true => Step::Read,
                false => self.next_step(&buffers.input),
            };
            let event = match step {
                Step::Call(event) => event,
                Step::Read => match self.receive(&mut buffers.input, limit, tick)? {
                    Some(event) => event,
                    None if self.awaits_input() => return Ok(Some(self.idle_status())),
                    None => continue,
                },
                Step::Wait => return Ok(Some(Status::Idle)),
                Step::Finish => return Ok(None),
            };
            self.process(event, buffers, tick);
            self.flush(&mut buffers.output, limit, tick)?;
            if !buffers.output.is_empty() {
                return Ok(Some(self.pending_output()));
            }
            if self.awaits_input() && !self.readiness.readable {
                return Ok(Some(self.idle_status()));
            }
            if self.transferred() >= limit {
                break;
            }
        }
        Ok(Some(Status::Runnable))
    }

    /// The status of a connection that [awaits input](Self::awaits_input).
    fn idle_status(&self) -> Status {
        match self.extras {
            None => Status::AwaitingInput,
            Some(_) => Status::Idle,
        }
    }

    /// What comes next, unless the connection [awaits input](Self::awaits_input).
    #[cold]
    fn next_step(&self, input: &Buffer) -> Step {
        match self.wait {
            _ if !self.calls_handler() => Step::Finish,
            Wait::Open => Step::Call(Event::Open),
            Wait::Sent => Step::Call(Event::Sent),
            Wait::Input | Wait::Answer if self.may_read(input) => Step::Read,
            Wait::Input => Step::Finish,
            Wait::Answer => Step::Wait,
        }
    }

    /// Whether a read may return what the handler gets.
    fn may_read(&self, input: &Buffer) -> bool {
        let is_in_time = || match self.state {
            // The EOF is not among the unread bytes.
            State::DrainingRest if self.bytes_in == self.read_limit => self.stream.unread() == 0,
            State::DrainingRest => self.bytes_in < self.read_limit,
            state => state != State::Ended,
        };
        self.readiness.readable && input.room() > 0 && is_in_time()
    }

    /// The status of a connection with pending output: either a write would block or the budget is used.
    fn pending_output(&self) -> Status {
        match self.readiness.writable {
            true => Status::Runnable,
            false => Status::Idle,
        }
    }

    /// Ends a connection that has nothing left to read, handle or send: in a shutdown, waits for delivery; then shuts
    /// the write half down and discards input until EOF.
    #[cold]
    fn finish(
        &mut self,
        input: &mut Buffer,
        limit: u64,
        tick: &Tick,
    ) -> Result<Status, CloseReason> {
        if self.state == State::Ended {
            // What is left is an unfinished message.
            discard(input, CloseReason::PeerClosed, &tick.counters);
            self.state = State::Flushing(CloseReason::PeerClosed);
        }
        let is_discarding = matches!(self.state, State::Refusing | State::Lingering(_));
        if self.shutting_down && !is_discarding {
            // Delivery first: a client that a closed window has stopped sends the rest of its input before it
            // acknowledges our last output. After that acknowledgement, `unread` counts the rest.
            if !self.stream.await_delivery() {
                return Ok(Status::Idle);
            }
            if self.calls_handler() && self.stream.unread() > 0 {
                self.readiness.readable = true;
                if self.state == State::DrainingRest && self.bytes_in >= self.read_limit {
                    self.state = State::Refusing;
                }
                return Ok(Status::Runnable);
            }
        }
        let reason = match self.state {
            State::Refusing => CloseReason::DrainTimeout,
            // The client has ended its half, so a close ends the stream cleanly.
            State::Flushing(CloseReason::PeerClosed) => return Err(CloseReason::PeerClosed),
            State::Flushing(reason) | State::Lingering(reason) => reason,
            State::Serving | State::Draining | State::DrainingRest | State::Ended => {
                CloseReason::Shutdown
            }
        };
        if !is_discarding {
            self.shutdown_write(reason)?;
        }
        discard(input, reason, &tick.counters);
        for _ in 0..MAX_ROUNDS {
            if self.receive(input, limit, tick)?.is_none() {
                return Ok(Status::Idle);
            }
            discard(input, reason, &tick.counters);
            if self.transferred() >= limit {
                break;
            }
        }
        Ok(Status::Runnable)
    }

    fn shutdown_write(&mut self, reason: CloseReason) -> Result<(), CloseReason> {
        // It is not retried, so every failure is an error.
        self.stream
            .shutdown_write()
            .map_err(|error| can_retry_now(&error).err().unwrap_or(CloseReason::Error))?;
        self.state = State::Lingering(reason);
        self.readiness.readable = true;
        Ok(())
    }

    /// Sends `output` until all of it is sent, a write would block or the budget is used.
    #[inline(always)]
    fn flush(&mut self, output: &mut Buffer, limit: u64, tick: &Tick) -> Result<(), CloseReason> {
        while !output.is_empty() && self.readiness.writable {
            match output.flush_into(&mut self.stream, BUDGET) {
                Ok(0) => return Err(CloseReason::Error),
                Ok(count) => {
                    self.bytes_out += count as u64;
                    self.progress = true;
                    tick.counters.bytes_out.add(count as u64);
                }
                Err(error) => self.readiness.writable = can_retry_now(&error)?,
            }
            if !output.is_empty() && self.transferred() >= limit {
                break;
            }
        }
        Ok(())
    }

    /// Calls the handler.
    #[inline(always)]
    fn process(&mut self, event: Event, buffers: &mut Buffers, tick: &Tick) {
        let (before, unsent) = (buffers.len(), buffers.output.len());
        let mut context = Context {
            input: Input(&mut buffers.input),
            output: Output(&mut buffers.output),
            extras: &mut self.extras,
            tick,
        };
        let handler = &mut self.handler;
        // After a panic the handler is never called again, only dropped.
        let action = catch_unwind(AssertUnwindSafe(|| handler.process(event, &mut context)));
        // The fast path: all input became output, so no counter changes.
        let is_echo = buffers.input.is_empty() && buffers.output.len() == before;
        if is_echo && matches!(action, Ok(Action::Continue)) {
            self.wait = Wait::Input;
        } else {
            let generated = &tick.counters.bytes_generated;
            generated.adjust(before, buffers.len());
            self.after_process(action, unsent, buffers, &tick.counters);
        }
    }

    /// Acts on the result of a call of the handler, before which `unsent` bytes were in `output`.
    fn after_process(
        &mut self,
        action: thread::Result<Action>,
        unsent: usize,
        buffers: &mut Buffers,
        counters: &WorkerCounters,
    ) {
        let Buffers { input, output } = buffers;
        let has_ended = self.state == State::Ended;
        self.wait = Wait::Input;
        match action {
            Ok(Action::Continue) if input.room() == 0 && !has_ended => {
                self.close_after_flush(CloseReason::BufferFull);
            }
            Ok(Action::Flush) if output.is_empty() => {
                self.close_after_flush(CloseReason::BufferFull);
            }
            Ok(Action::Continue) => {}
            Ok(Action::Flush) => self.wait = Wait::Sent,
            Ok(Action::Pending) => self.wait = Wait::Answer,
            // After the client's EOF, a close and no further answer are the same.
            Ok(Action::Close) if has_ended => {}
            Ok(Action::Close) => self.close_after_flush(CloseReason::Handler),
            Err(panic) => {
                // Already reported by the panic hook. Discard the partial output.
                dispose(panic);
                let partial = output.len().saturating_sub(unsent);
                counters.discarded[CloseReason::Panic as usize].add(partial as u64);
                output.truncate(unsent);
                self.close_after_flush(CloseReason::Panic);
            }
        }
    }

    /// Reads once if the stream may be readable. Returns the event for the handler: there are new bytes, or the
    /// client has ended its half. The caller ensures that there is room and that budget is left.
    #[inline(always)]
    fn receive(
        &mut self,
        input: &mut Buffer,
        limit: u64,
        tick: &Tick,
    ) -> Result<Option<Event>, CloseReason> {
        while self.readiness.readable {
            let max = (limit - self.transferred()) as usize;
            match input.fill_from(&mut self.stream, max) {
                Ok((0, _)) => return self.on_eof().map(Some),
                Ok((count, is_short)) => {
                    self.bytes_in += count as u64;
                    self.progress = true;
                    tick.counters.bytes_in.add(count as u64);
                    let drained = is_short && self.stream.short_read_means_drained();
                    self.readiness.readable = !drained || self.readiness.read_until_would_block;
                    return Ok(Some(Event::Input));
                }
                Err(error) => {
                    self.readiness.readable = can_retry_now(&error)?;
                    self.readiness.read_until_would_block &= self.readiness.readable;
                }
            }
        }
        Ok(None)
    }

    /// Handles the client's EOF. `Err` is the reason to close at once.
    #[cold]
    fn on_eof(&mut self) -> Result<Event, CloseReason> {
        match self.state {
            State::Lingering(reason) => Err(reason),
            State::Refusing => {
                self.stream.abort();
                Err(CloseReason::DrainTimeout)
            }
            _ => {
                self.readiness.readable = false;
                self.state = State::Ended;
                Ok(Event::Eof)
            }
        }
    }
}

/// Discards the bytes of a buffer and counts them.
#[cold]
fn discard(buffer: &mut Buffer, reason: CloseReason, counters: &WorkerCounters) {
    counters.discarded[reason as usize].add(buffer.len() as u64);
    buffer.clear();
}

/// Drops the payload of a panic. The payload belongs to user code, so its drop can panic as well; that
/// second payload is leaked.
#[cold]
pub(crate) fn dispose(panic: Box<dyn Any + Send>) {
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        mem::forget(second);
    }
}

/// Whether a failed call can be retried now (`true`) or after an edge (`false`); otherwise the reason to
/// close.
#[cold]
#[inline(never)] // inlined, it adds 9 instructions to each message
fn can_retry_now(error: &io::Error) -> Result<bool, CloseReason> {
    match error.kind() {
        ErrorKind::Interrupted => Ok(true),
        ErrorKind::WouldBlock => Ok(false),
        ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe
        | ErrorKind::NotConnected
        | ErrorKind::TimedOut
        | ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable => Err(CloseReason::Reset),
        _ => Err(CloseReason::Error),
    }
}

#[cfg(test)]
mod tests;
