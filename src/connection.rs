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
//!            the handler has closed, panicked, exceeded a limit,
//!            or is done after the client's EOF; a timeout with empty buffers
//!  Serving ---------------------------------------------------> Closing
//!   |   |                                                        |   |
//!   |   | shutdown: nothing is left                  output sent |   | output sent
//!   |   | to read, all is delivered                              |   | after EOF
//!   |   '------------------------------> Lingering <-------------'   |
//!   |                                     ^     |                    v
//!   | shutdown: more has                  |     | EOF, timeout     closed
//!   | arrived than is answered            |     '------------------> ^
//!   '---------------------------------> Refusing ---- EOF (reset) ---'
//! ```
//!
//! When the timeout of Refusing expires, it goes to Lingering by way of Closing.
//!
//! In a shutdown the process may end before the kernel has delivered what it holds, so a connection ends only
//! when the peer has acknowledged all output ([`Stream::poll_delivery`]). A reset, another
//! error, any other timeout or the deadline of a shutdown closes it in any state.
//!
//! The deadline is a timeout that depends on the state, see [`Connection::deadline`]. It counts from the time in
//! `Connection::since`.

pub(crate) mod buffer;
pub(crate) mod handler;
pub(crate) mod shared;
pub(crate) mod waker;

use std::cell::OnceCell;
use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use crate::connection::buffer::{Buffer, Buffers, Pool};
use crate::connection::handler::{Action, Context, Event, Extras, Handler, Input, Output};
use crate::connection::shared::{Drain, Shared, deadline_after};
use crate::connection::waker::Waker;
use crate::error::dispose;
use crate::stats::{CloseReason, WorkerCounters};
use crate::system::{Millis, NEVER, Readiness, Stream};

/// How a call to [`Connection::drive`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// All further progress requires an event, for example input, room for the rest of a write, a wake-up or a timer.
    Idle,
    /// The connection can make progress without an event: the [budget](Shared::budget) or the rounds of the turn are used, its
    /// handler has yielded, or more has arrived in a shutdown.
    Runnable,
    /// The connection has ended and can be dropped.
    Closed(CloseReason),
}

/// Rounds per turn: a read, a call of the handler, or both, followed by sends. It bounds the number of calls where messages
/// are small. While a connection refuses or lingers, as many reads again discard input.
pub(crate) const MAX_ROUNDS: usize = 64;

/// The states of the diagram above. In the first five, which it calls *Serving*, the handler can be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Bytes are read, handled and sent.
    Reading,
    /// [`Event::Sent`] is due once `output` is empty.
    Flushing,
    /// An answer is still to come, after new input, a wake-up or a timer.
    Pending,
    /// The handler has work left. Once `output` is empty, the connection waits for its turn in the run queue.
    Yielding,
    /// The connection waits there; then [`Event::Resumed`] is due.
    Yielded,
    /// In a shutdown, more input has arrived than is answered. It is discarded while the write half stays open. If the
    /// client sends EOF, the connection is reset, so that the client does not mistake an EOF for a complete answer.
    /// A client that keeps sending has not ended its stream and expects no complete answer: when the timeout of this state
    /// expires, the write half is shut down.
    Refusing,
    /// The handler is no longer called. `output` is sent, then the write half is shut down.
    Closing(CloseReason),
    /// The write half is shut down. Input is read and discarded until EOF: closing a socket with unread
    /// input sends a reset, which can destroy output in flight.
    Lingering(CloseReason),
}

impl State {
    /// Whether the handler can be called.
    pub(crate) fn is_serving(self) -> bool {
        !matches!(self, Self::Refusing | Self::Closing(_) | Self::Lingering(_))
    }
}

/// What a connection does next.
enum Step {
    Call(Event),
    Read,
    /// All further progress requires an event, unless the budget has ended in the middle of the output.
    Wait,
    /// The next call of the handler comes in a turn of its own.
    Yield,
    /// Nothing is left to handle or to send: take the next step towards the end, from which a shutdown can lead back to reading.
    Finish,
}

/// What a worker lends to each turn of a connection: the pool, and what handlers may see as well.
#[derive(Debug)]
pub(crate) struct Resources {
    pub(crate) pool: Pool,
    pub(crate) shared: Shared,
}

#[derive(Debug)]
pub(crate) struct Connection<S, H> {
    stream: S,
    handler: H,
    /// Present only while they hold bytes.
    buffers: Option<Box<Buffers>>,
    extras: OnceCell<Box<Extras>>,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    /// No read starts once this many bytes were read in total, except one that looks for the EOF; a read that has started can
    /// go beyond it. Unlimited until a shutdown stops reading.
    read_limit: u64,
    /// The time from which the deadline counts. Set when bytes are moved (but not by input in `Pending`, nor by bytes that are
    /// discarded, unless the connection lingers in a shutdown), when the wait for the handler begins, changes or ends, and
    /// by [`enter`](Self::enter). Other changes of the state leave it, and so does an EOF, which is no progress.
    pub(crate) since: Millis,
    pub(crate) state: State,
    /// The client has ended its half.
    ended: bool,
    /// Calls of the handler that are due in any state in which it can be called: a [bit](due_bit) for each.
    due: u8,
    readiness: Readiness,
}

/// The calls that do not depend on the state, in the order in which they are made.
const DUE: [Event; 4] = [Event::Open, Event::Timer, Event::Wake, Event::Shutdown];

fn due_bit(event: Event) -> u8 {
    1 << event as u8
}

impl<S: Stream, H: Handler> Connection<S, H> {
    /// A new connection: writable, and not known to be readable.
    pub(crate) fn new(stream: S, handler: H, now: Millis) -> Self {
        Self {
            stream,
            handler,
            buffers: None,
            extras: OnceCell::new(),
            bytes_in: 0,
            bytes_out: 0,
            read_limit: u64::MAX,
            since: now,
            state: State::Reading,
            ended: false,
            due: due_bit(Event::Open),
            readiness: Readiness::WRITABLE,
        }
    }

    /// Adds to the stream's readiness, which is kept until a system call would block.
    pub(crate) fn add_readiness(&mut self, event: Readiness) {
        self.readiness.readable |= event.readable;
        self.readiness.writable |= event.writable;
        self.readiness.read_until_would_block |= event.read_until_would_block;
    }

    /// Begins a shutdown: the next turn calls the handler with [`Event::Shutdown`], and reads what has arrived.
    pub(crate) fn begin_drain(&mut self) {
        self.due |= due_bit(Event::Shutdown);
        self.expect_unread_input();
    }

    /// Makes the next turn read until a read would block, which alone proves that nothing more has arrived.
    fn expect_unread_input(&mut self) {
        self.readiness.readable = true;
        self.readiness.read_until_would_block = true;
    }

    /// Limits reading to data that has already arrived, for a client that never stops sending. An EOF is read as well.
    pub(crate) fn set_read_limit(&mut self) {
        self.read_limit = self.bytes_in + self.stream.unread();
        self.expect_unread_input();
    }

    /// Stops reading and handling; the connection closes once `output` has been sent.
    pub(crate) fn close_after_flush(&mut self, reason: CloseReason, now: Millis) {
        if self.state.is_serving() || self.state == State::Refusing {
            self.enter(State::Closing(reason), now);
        }
    }

    /// Changes the state, and starts its timeout.
    fn enter(&mut self, state: State, now: Millis) {
        (self.state, self.since) = (state, now);
    }

    /// Makes the next turn call the handler with [`Event::Timer`].
    pub(crate) fn timer_expired(&mut self) {
        if let Some(extras) = self.extras.get() {
            extras.timer.set(None);
        }
        self.due |= due_bit(Event::Timer);
    }

    /// Makes the next turn call the handler with [`Event::Wake`].
    pub(crate) fn woken(&mut self) {
        self.due |= due_bit(Event::Wake);
    }

    /// Whether `waker` is of this connection, and not of an earlier one with the same token.
    pub(crate) fn owns(&self, waker: &Waker) -> bool {
        let own = self.extras.get().and_then(|extras| extras.waker.get());
        own.is_some_and(|own| own.is_same(waker))
    }

    /// When the handler's timer expires, or [`NEVER`].
    pub(crate) fn timer(&self) -> Millis {
        let extras = self.extras.get();
        extras
            .and_then(|extras| extras.timer.get())
            .unwrap_or(NEVER)
    }

    /// Takes what the handler has said about the connection.
    pub(crate) fn take_note(&self) -> Option<Box<str>> {
        self.extras.get()?.note.take()
    }

    /// When the connection expires unless it makes progress, or [`NEVER`].
    pub(crate) fn deadline(&self, shared: &Shared) -> Millis {
        let timeouts = &shared.timeouts;
        let timeout = match self.state {
            State::Lingering(_) => Some(timeouts.linger),
            // Long enough for a client to send what our closed receive window has held back.
            State::Refusing => Some(timeouts.linger.min(timeouts.finish() / 4)),
            // A shutdown has a deadline of its own.
            _ if shared.drain != Drain::Off => None,
            State::Pending if !self.has_output() => timeouts.answer,
            State::Yielding | State::Yielded if !self.has_output() => None,
            State::Closing(reason) if reason != CloseReason::PeerClosed => Some(timeouts.close),
            // Also after the client's EOF.
            _ => timeouts.idle,
        };
        timeout.map_or(NEVER, |timeout| deadline_after(self.since, timeout))
    }

    /// Bytes in both buffers.
    pub(crate) fn buffered(&self) -> usize {
        self.buffers.as_ref().map_or(0, |buffers| buffers.len())
    }

    /// Whether the connection has buffers of its own.
    pub(crate) fn holds_buffers(&self) -> bool {
        self.buffers.is_some()
    }

    /// Discards what the buffers hold, and gives them back to the pool. Returns how many bytes that was.
    pub(crate) fn release_buffers(&mut self, pool: &mut Pool) -> usize {
        let count = self.buffered();
        if let Some(mut buffers) = self.buffers.take() {
            buffers.input.clear();
            buffers.output.clear();
            pool.give_back(buffers);
        }
        count
    }

    /// Whether the deadline is that of an answer.
    pub(crate) fn awaits_answer(&self) -> bool {
        self.state == State::Pending && !self.has_output()
    }

    fn has_output(&self) -> bool {
        let buffers = self.buffers.as_ref();
        buffers.is_some_and(|buffers| !buffers.output.is_empty())
    }

    /// Bytes read and sent.
    pub(crate) fn transferred(&self) -> u64 {
        self.bytes_in + self.bytes_out
    }

    /// Whether the connection only reads, and its handler has never asked for a timer or a waker. Then only the idle timeout
    /// applies, so progress moves the deadline to a later time.
    pub(crate) fn is_plain(&self) -> bool {
        self.state == State::Reading && self.extras.get().is_none()
    }

    /// Call this before dropping. A connection is reset if its buffers still hold bytes, more is to come from its handler
    /// or it refuses input, so that the client can tell a truncated stream from a complete one.
    pub(crate) fn abort_if_incomplete(&mut self) {
        let is_complete = matches!(
            self.state,
            State::Reading | State::Closing(_) | State::Lingering(_)
        );
        if !is_complete || self.buffered() > 0 {
            self.stream.reset_on_close();
        }
    }

    /// Transfers bytes until a call would block or the [budget](Shared::budget) is used.
    ///
    /// A connection without buffers of its own uses a pair of the pool, and keeps it if bytes are left. Then the pool can be
    /// [empty](Pool::is_empty), and must be [refilled](Pool::refill) before another connection is driven.
    //
    // The path of a message is inlined into one function. To remove the attribute here or from any one of `advance`,
    // `next_step`, `flush`, `receive`, `process` and the table's `on_ready` adds 15 to 50 user instructions to each message.
    #[inline(always)]
    pub(crate) fn drive(&mut self, resources: &mut Resources) -> Status {
        let Resources { pool, shared } = resources;
        let mut buffers = match self.buffers.take() {
            Some(own) => {
                shared.counters.buffered.adjust(own.len(), 0);
                own
            }
            None => pool.take(),
        };
        let result = self.advance(&mut buffers, shared);
        if buffers.is_empty() {
            pool.give_back(buffers);
            result.unwrap_or_else(Status::Closed)
        } else {
            self.keep_or_reset(buffers, result, pool, shared)
        }
    }

    /// Keeps buffers that hold bytes. If the connection has failed, it closes with a reset, and the bytes are discarded.
    #[inline(never)]
    fn keep_or_reset(
        &mut self,
        mut buffers: Box<Buffers>,
        result: Result<Status, CloseReason>,
        pool: &mut Pool,
        shared: &Shared,
    ) -> Status {
        let reason = match result {
            Ok(status) => {
                shared.counters.buffered.adjust(0, buffers.len());
                self.buffers = Some(buffers);
                return status;
            }
            Err(reason) => reason,
        };
        discard(&mut buffers.input, reason, &shared.counters);
        discard(&mut buffers.output, reason, &shared.counters);
        pool.give_back(buffers);
        self.stream.reset_on_close();
        Status::Closed(reason)
    }

    /// Runs the state machine: sends pending output, makes the calls of the handler that are due, reads and handles.
    /// `Err` is every close, the clean one included, with a reset if the buffers still hold bytes; `Ok` is `Idle` or
    /// `Runnable`.
    #[inline(always)]
    fn advance(&mut self, buffers: &mut Buffers, shared: &Shared) -> Result<Status, CloseReason> {
        let limit = self.transferred() + shared.budget;
        if !buffers.output.is_empty() {
            self.flush(&mut buffers.output, limit, shared)?;
            if self.transferred() >= limit {
                return Ok(self.end_turn(buffers, shared));
            }
        }
        let mut rounds = 0;
        loop {
            let event = match self.next_step(buffers, shared) {
                Step::Read => match self.receive(&mut buffers.input, limit, shared)? {
                    Some(event) => {
                        // Input is no answer.
                        if event == Event::Input && self.state == State::Reading {
                            self.since = shared.now;
                        }
                        event
                    }
                    None => continue,
                },
                Step::Call(event) => {
                    self.due &= !due_bit(event);
                    event
                }
                Step::Wait => return Ok(Status::Idle),
                Step::Yield => return Ok(self.end_turn(buffers, shared)),
                Step::Finish => return self.finish(&mut buffers.input, limit, shared),
            };
            self.process(event, buffers, shared)?;
            self.flush(&mut buffers.output, limit, shared)?;
            // The next step would find this too, for 30 instructions more of each message.
            if buffers.output.is_empty() && self.awaits_event(shared) {
                return Ok(Status::Idle);
            }
            rounds += 1;
            if rounds == MAX_ROUNDS || self.transferred() >= limit {
                return Ok(self.end_turn(buffers, shared));
            }
        }
    }

    /// Whether a plain connection waits for an event. No call is due after another one: a timer or a wake-up needs extras, and
    /// `Shutdown` a drain.
    fn awaits_event(&self, shared: &Shared) -> bool {
        self.is_plain() && !self.readiness.readable && shared.drain == Drain::Off
    }

    /// Ends a turn that has used its budget, or that the handler leaves to others. In the second case the connection is
    /// `Yielded` from now on. With pending output, only a write that would block has to wait.
    #[cold]
    fn end_turn(&mut self, buffers: &Buffers, shared: &Shared) -> Status {
        match self.next_step(buffers, shared) {
            Step::Yield => {
                self.state = State::Yielded;
                Status::Runnable
            }
            Step::Wait if buffers.output.is_empty() || !self.readiness.writable => Status::Idle,
            // Also `Wait` with output for which there is room: the budget ended in the middle of it.
            _ => Status::Runnable,
        }
    }

    /// What comes next within the budget.
    #[inline(always)]
    fn next_step(&self, buffers: &Buffers, shared: &Shared) -> Step {
        if let Some(event) = self.due_call() {
            return Step::Call(event);
        }
        if !buffers.output.is_empty() {
            // A write would block, unless the budget has ended in the middle of the output.
            return Step::Wait;
        }
        let takes_input = self.state == State::Reading || self.state == State::Pending;
        if takes_input && self.may_read(&buffers.input) {
            return Step::Read;
        }
        match self.state {
            State::Reading if shared.drain == Drain::Off => Step::Wait,
            State::Pending => Step::Wait,
            State::Flushing => Step::Call(Event::Sent),
            State::Yielding => Step::Yield,
            State::Yielded => Step::Call(Event::Resumed),
            // `Reading` gets here only in a shutdown.
            State::Reading | State::Refusing | State::Closing(_) | State::Lingering(_) => {
                Step::Finish
            }
        }
    }

    /// The next call of the handler that is due, in any state in which it can be called.
    fn due_call(&self) -> Option<Event> {
        if self.due == 0 || !self.state.is_serving() {
            return None;
        }
        let is_due = |event: &Event| self.due & due_bit(*event) != 0;
        DUE.into_iter().find(is_due)
    }

    /// Whether a read may return what the handler gets.
    fn may_read(&self, input: &Buffer) -> bool {
        self.readiness.readable
            && !self.ended
            && input.room() > 0
            && (self.bytes_in < self.read_limit
                // The EOF does not count as unread: one more read looks for it.
                || (self.bytes_in == self.read_limit && self.stream.unread() == 0))
    }

    /// Ends a connection that has nothing left to handle or send, and goes on with that in each further turn.
    ///
    /// In a shutdown it first waits for delivery. If more input has arrived by then, it goes back to reading, or refuses it.
    /// Otherwise it shuts the write half down. While it refuses or lingers, it discards input until EOF. `Err` is the reason
    /// to close, also after the client's EOF, when all is well.
    #[cold]
    fn finish(
        &mut self,
        input: &mut Buffer,
        limit: u64,
        shared: &Shared,
    ) -> Result<Status, CloseReason> {
        let is_discarding = matches!(self.state, State::Refusing | State::Lingering(_));
        if self.state == State::Closing(CloseReason::PeerClosed) {
            // What is left is an unfinished message. Empty buffers make the close clean.
            discard(input, CloseReason::PeerClosed, &shared.counters);
        }
        if shared.drain != Drain::Off && !is_discarding {
            // Delivery first: the client's kernel sends what our closed receive window has held back no later than it
            // acknowledges our last output. After that, `unread` counts it.
            // From now on the send buffer is small.
            if !self.stream.poll_delivery() {
                return Ok(Status::Idle);
            }
            if self.state.is_serving() && self.stream.unread() > 0 {
                self.readiness.readable = true;
                if self.bytes_in >= self.read_limit {
                    self.enter(State::Refusing, shared.now);
                }
                return Ok(Status::Runnable);
            }
        }
        let reason = match self.state {
            // The client has ended its half, so a close ends the stream cleanly.
            State::Closing(CloseReason::PeerClosed) => return Err(CloseReason::PeerClosed),
            State::Closing(reason) | State::Lingering(reason) => reason,
            State::Refusing => CloseReason::DrainTimeout,
            _ => CloseReason::Shutdown,
        };
        if !is_discarding {
            self.shutdown_write(reason, shared.now)?;
        }
        discard(input, reason, &shared.counters);
        for _ in 0..MAX_ROUNDS {
            if self.receive(input, limit, shared)?.is_none() {
                return Ok(Status::Idle);
            }
            discard(input, reason, &shared.counters);
            // In a shutdown a client that keeps sending is waited for: the deadline of the shutdown bounds that. Otherwise
            // nothing would, so input does not extend the wait for the EOF.
            if shared.drain != Drain::Off && self.state != State::Refusing {
                self.since = shared.now;
            }
            if self.transferred() >= limit {
                break;
            }
        }
        Ok(Status::Runnable)
    }

    fn shutdown_write(&mut self, reason: CloseReason, now: Millis) -> Result<(), CloseReason> {
        // It is not retried, so every failure is an error.
        self.stream
            .shutdown_write()
            .map_err(|error| can_retry_now(&error).err().unwrap_or(CloseReason::Error))?;
        self.enter(State::Lingering(reason), now);
        self.readiness.readable = true;
        Ok(())
    }

    /// Sends `output` until all of it is sent, a write would block or the budget is used. The last write can be as large as
    /// the budget, because what was read within it is answered.
    #[inline(always)]
    fn flush(
        &mut self,
        output: &mut Buffer,
        limit: u64,
        shared: &Shared,
    ) -> Result<(), CloseReason> {
        while !output.is_empty() && self.readiness.writable {
            // Not only the rest of the budget: see above.
            match output.flush_into(&mut self.stream, shared.budget as usize) {
                Ok(0) => return Err(CloseReason::Error),
                Ok(count) => {
                    self.bytes_out += count as u64;
                    self.since = shared.now;
                    shared.counters.bytes_out.add(count as u64);
                }
                Err(error) => self.readiness.writable = can_retry_now(&error)?,
            }
            if !output.is_empty() && self.transferred() >= limit {
                break;
            }
        }
        Ok(())
    }

    /// Calls the handler, and acts on the result. `Err` is the reason to close at once.
    #[inline(always)]
    fn process(
        &mut self,
        event: Event,
        buffers: &mut Buffers,
        shared: &Shared,
    ) -> Result<(), CloseReason> {
        let (before, unsent) = (buffers.len(), buffers.output.len());
        let mut context = Context {
            input: Input(&mut buffers.input),
            output: Output(&mut buffers.output),
            extras: &self.extras,
            shared,
        };
        let handler = &mut self.handler;
        // After a panic the handler is never called again, only dropped.
        let action = catch_unwind(AssertUnwindSafe(|| handler.process(event, &mut context)));
        shared
            .counters
            .bytes_generated
            .adjust(before, buffers.len());
        let goes_on = matches!(action, Ok(Action::Continue)) && self.state == State::Reading;
        if !goes_on || self.ended || buffers.input.room() == 0 {
            return self.act(action, event, (before, unsent), buffers, shared);
        }
        Ok(())
    }

    /// Acts on the result of a call of the handler, where that is more than to go on reading. Before the call there were
    /// `before` bytes in both buffers, of them `unsent` in `output`.
    #[inline(never)]
    fn act(
        &mut self,
        result: thread::Result<Action>,
        event: Event,
        (before, unsent): (usize, usize),
        buffers: &mut Buffers,
        shared: &Shared,
    ) -> Result<(), CloseReason> {
        let awaited_before = self.state_awaiting_handler(unsent == 0);
        let has_moved = buffers.output.len() != unsent || buffers.len() != before;
        let Buffers { input, output } = buffers;
        match result {
            Ok(Action::Continue) if self.keeps_action(event, has_moved) => {
                if self.state == State::Yielded && !output.is_empty() {
                    self.state = State::Yielding;
                }
            }
            Ok(Action::Flush) if output.is_empty() => {
                self.close_after_flush(CloseReason::BufferFull, shared.now);
            }
            Ok(Action::Flush) => self.state = State::Flushing,
            Ok(Action::Pending) => self.state = State::Pending,
            Ok(Action::Yield) => self.state = State::Yielding,
            // After the client's EOF, a close and no further answer are the same. That is no progress of the client.
            Ok(Action::Continue | Action::Close) if self.ended => {
                self.state = State::Closing(CloseReason::PeerClosed);
            }
            Ok(Action::Continue) if input.room() > 0 => self.state = State::Reading,
            // `input` is full.
            Ok(Action::Continue) => self.close_after_flush(CloseReason::BufferFull, shared.now),
            Ok(Action::Close) => self.close_after_flush(CloseReason::Handler, shared.now),
            Ok(Action::Reset) => {
                self.stream.reset_on_close();
                return Err(CloseReason::HandlerReset);
            }
            Err(panic) => {
                // Already reported by the panic hook. Discard the partial output.
                dispose(panic);
                let partial = output.len().saturating_sub(unsent);
                shared.counters.discarded[CloseReason::Panic as usize].add(partial as u64);
                output.truncate(unsent);
                self.close_after_flush(CloseReason::Panic, shared.now);
            }
        }
        if self.state_awaiting_handler(output.is_empty()) != awaited_before {
            self.since = shared.now;
        }
        Ok(())
    }

    /// Whether [`Action::Continue`] leaves what an earlier call has announced: the call came in between, and did not bring
    /// the answer.
    fn keeps_action(&self, event: Event, has_moved: bool) -> bool {
        let is_between = matches!(event, Event::Timer | Event::Wake | Event::Shutdown);
        is_between
            && match self.state {
                State::Flushing | State::Yielding | State::Yielded => true,
                State::Pending => !has_moved,
                _ => false,
            }
    }

    /// The state, if the connection waits for its handler and not for the client. Not only whether it does: a `Pending` after a
    /// `Yield` starts its own time.
    fn state_awaiting_handler(&self, is_sent: bool) -> Option<State> {
        let has_announced = matches!(
            self.state,
            State::Pending | State::Yielding | State::Yielded
        );
        (has_announced && is_sent).then_some(self.state)
    }

    /// Reads once if the stream may be readable. Returns the event for the handler: there are new bytes, or the
    /// client has ended its half. The caller ensures that there is room and that budget is left.
    #[inline(always)]
    fn receive(
        &mut self,
        input: &mut Buffer,
        limit: u64,
        shared: &Shared,
    ) -> Result<Option<Event>, CloseReason> {
        while self.readiness.readable {
            let max = (limit - self.transferred()) as usize;
            match input.fill_from(&mut self.stream, max) {
                Ok((0, _)) => return self.on_eof().map(Some),
                Ok((count, is_short)) => {
                    self.bytes_in += count as u64;
                    shared.counters.bytes_in.add(count as u64);
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
                self.stream.reset_on_close();
                Err(CloseReason::DrainTimeout)
            }
            _ => {
                (self.readiness.readable, self.ended) = (false, true);
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
