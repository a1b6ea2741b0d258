//! One connection: a stream, its two buffers and its handler, as a state machine.
//!
//! It does no waiting and knows no clock, no thread and no event loop: it is told what the stream
//! may be ready for ([`Connection::notice`]), and then moves all the bytes it can
//! ([`Connection::run`]): stream, `input`, handler, `output`, stream.
//!
//! What is *noticed* is a hint; only the result of a system call is a fact. The one exception is the
//! short read: see [`Readiness::to_the_end`].
//!
//! Output goes first. While some of it is stuck, the connection neither reads nor calls its handler:
//! what the client sends then stays in the kernel, whose window closes and pushes back. So a client
//! that never reads costs at most two buffers, and in an echo no byte is ever copied between them.

use std::any::Any;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::buffer::{Buffer, Buffers, Pool};
use crate::handler::{Action, Handler};
use crate::stats::{Reason, WorkerCounters};

/// A two-way stream of bytes whose writing half can be ended on its own.
///
/// Reads and writes never block: they fail with [`ErrorKind::WouldBlock`].
pub(crate) trait Stream: Read + Write {
    /// Tells the peer that no more bytes will come: a FIN, in TCP.
    ///
    /// # Errors
    ///
    /// Where the peer is gone already.
    fn end(&mut self) -> io::Result<()>;

    /// Whether a read that does not fill the buffer has drained the stream; see
    /// [`Readiness::to_the_end`].
    fn is_drained_by_short_read(&self) -> bool {
        true
    }
}

/// What a stream may be ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Readiness {
    /// A read may return bytes, the end, or an error.
    pub(crate) readable: bool,
    /// A write may take bytes, or return an error.
    pub(crate) writable: bool,
    /// Reading must go on until a read would block.
    ///
    /// Otherwise a read that does not fill the buffer has drained the stream, and an edge announces
    /// whatever comes next: one system call in three is saved. That does not hold where something
    /// else cuts a read short: the stream's end, which comes in one event with the last data; TCP's
    /// urgent mark, at which every read stops. (And some kinds of stream promise nothing at all:
    /// [`Stream::is_drained_by_short_read`].)
    pub(crate) to_the_end: bool,
}

/// How a [run](Connection::run) ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// Nothing can move until the stream's readiness changes.
    Idle,
    /// Its rounds are spent, and there may be more to move.
    Runnable,
    /// It has ended; the stream is to be dropped.
    Closed(Reason),
}

/// Where a connection is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Bytes are read and handled.
    Serving,
    /// The server shuts down: what has arrived already is read and handled, up to the first moment
    /// that finds the stream drained.
    Draining,
    /// The same, but nothing more is read.
    Deaf,
    /// Nothing more is handled; what is in `output` is to be sent, and then the stream ended.
    Finishing(Reason),
    /// The stream was ended from this side. What still arrives is read and discarded until the
    /// client ends it too: closing with unread bytes would reset the connection, and a reset can
    /// destroy what is on its way to the client.
    Lingering(Reason),
}

#[derive(Debug)]
pub(crate) struct Connection<S, H> {
    stream: S,
    handler: H,
    /// Only while they hold bytes.
    buffers: Option<Box<Buffers>>,
    bytes_in: u64,
    bytes_out: u64,
    stage: Stage,
    ready: Readiness,
    /// The handler has nothing to do until input comes.
    settled: bool,
    /// A byte has moved since [`Connection::take_active`] was asked.
    active: bool,
}

impl<S: Stream, H: Handler> Connection<S, H> {
    /// A connection at its start: able to write, and not known to be readable.
    pub(crate) fn new(stream: S, handler: H) -> Self {
        Self {
            stream,
            handler,
            buffers: None,
            bytes_in: 0,
            bytes_out: 0,
            stage: Stage::Serving,
            ready: Readiness {
                writable: true,
                ..Readiness::default()
            },
            settled: false,
            active: false,
        }
    }

    /// Takes note of what the stream may be ready for. It stays noted until a call tells otherwise.
    pub(crate) fn notice(&mut self, event: Readiness) {
        self.ready.readable |= event.readable;
        self.ready.writable |= event.writable;
        self.ready.to_the_end |= event.to_the_end;
    }

    /// From here on only what has arrived already is read, answered and flushed.
    pub(crate) fn drain(&mut self) {
        if self.stage == Stage::Serving {
            self.stage = Stage::Draining;
            // Only a read that would block tells that nothing more has arrived.
            self.notice(Readiness {
                readable: true,
                writable: false,
                to_the_end: true,
            });
        }
    }

    /// Ends a drain's reading, for a client that never stops sending.
    pub(crate) fn deafen(&mut self) {
        if let Stage::Serving | Stage::Draining = self.stage {
            self.stage = Stage::Deaf;
        }
    }

    /// Ends it from this side: nothing more is read, and what is in `output` is still sent.
    pub(crate) fn finish(&mut self, reason: Reason) {
        if let Stage::Serving | Stage::Draining | Stage::Deaf = self.stage {
            self.stage = Stage::Finishing(reason);
            self.settled = true;
        }
    }

    /// Bytes in its buffers.
    pub(crate) fn buffered(&self) -> usize {
        self.buffers.as_ref().map_or(0, |buffers| buffers.len())
    }

    pub(crate) fn bytes_in(&self) -> u64 {
        self.bytes_in
    }

    pub(crate) fn bytes_out(&self) -> u64 {
        self.bytes_out
    }

    /// Whether a byte has moved since this was last asked.
    pub(crate) fn take_active(&mut self) -> bool {
        mem::take(&mut self.active)
    }

    /// Whether all is sent, and only the client's own end is awaited; for what reason it will close.
    pub(crate) fn lingers(&self) -> Option<Reason> {
        match self.stage {
            Stage::Lingering(reason) => Some(reason),
            _ => None,
        }
    }

    /// Moves bytes until nothing more can move, or for `rounds` rounds, in each of which at most one
    /// buffer is read and one sent.
    #[inline(always)]
    pub(crate) fn run(
        &mut self,
        pool: &mut Pool,
        rounds: u32,
        counters: &WorkerCounters,
    ) -> Status {
        if let Some(own) = self.buffers.take() {
            return self.run_on(own, pool, rounds, counters);
        }
        let status = self
            .advance(pool.hand(), rounds, counters)
            .unwrap_or_else(Status::Closed);
        if !pool.is_hand_free() {
            self.keep(pool.take_hand(), 0, pool, counters);
        }
        status
    }

    /// The same for one that has kept its buffers.
    #[inline(never)]
    fn run_on(
        &mut self,
        mut own: Box<Buffers>,
        pool: &mut Pool,
        rounds: u32,
        counters: &WorkerCounters,
    ) -> Status {
        let before = own.len();
        let status = self
            .advance(&mut own, rounds, counters)
            .unwrap_or_else(Status::Closed);
        self.keep(own, before, pool, counters);
        status
    }

    /// Keeps buffers that are left with bytes, and only those.
    #[inline(never)]
    fn keep(
        &mut self,
        buffers: Box<Buffers>,
        before: usize,
        pool: &mut Pool,
        counters: &WorkerCounters,
    ) {
        counters.buffered.shift(before, buffers.len());
        if buffers.is_empty() {
            pool.reclaim(buffers);
        } else {
            self.buffers = Some(buffers);
        }
    }

    /// The state machine, from what was stuck to the end. An error is the reason to close at once.
    #[inline(always)]
    fn advance(
        &mut self,
        buffers: &mut Buffers,
        rounds: u32,
        counters: &WorkerCounters,
    ) -> Result<Status, Reason> {
        if !buffers.output.is_empty() && !self.flush(&mut buffers.output, counters)? {
            return Ok(Status::Idle);
        }
        match self.serve(buffers, rounds, counters)? {
            Some(status) => Ok(status),
            None => self.wind_up(&mut buffers.input, rounds, counters),
        }
    }

    /// Reads, handles and sends; `None` where all of that is done for good.
    #[inline(always)]
    fn serve(
        &mut self,
        buffers: &mut Buffers,
        rounds: u32,
        counters: &WorkerCounters,
    ) -> Result<Option<Status>, Reason> {
        for _ in 0..rounds {
            if self.settled {
                if self.stage != Stage::Serving && self.is_served() {
                    return Ok(None);
                }
                if !self.receive(&mut buffers.input, counters)? {
                    let drained = self.stage == Stage::Draining;
                    return Ok(if drained { None } else { Some(Status::Idle) });
                }
            }
            self.process(buffers, counters)?;
            if !self.flush(&mut buffers.output, counters)? {
                return Ok(Some(Status::Idle));
            }
        }
        Ok(Some(Status::Runnable))
    }

    /// Ends the stream from this side, then discards what still comes until the client ends its own.
    #[cold]
    #[inline(never)]
    fn wind_up(
        &mut self,
        input: &mut Buffer,
        rounds: u32,
        counters: &WorkerCounters,
    ) -> Result<Status, Reason> {
        let reason = match self.stage {
            Stage::Lingering(reason) => reason,
            Stage::Finishing(reason) => self.end(reason)?,
            Stage::Serving | Stage::Draining | Stage::Deaf => self.end(Reason::Drain)?,
        };
        discard(input, reason, counters);
        for _ in 0..rounds {
            if !self.receive(input, counters)? {
                return Ok(Status::Idle);
            }
            discard(input, reason, counters);
        }
        Ok(Status::Runnable)
    }

    /// Whether nothing more is to be read and handled.
    #[cold]
    #[inline(never)]
    fn is_served(&self) -> bool {
        match self.stage {
            Stage::Serving => false,
            Stage::Draining => !self.ready.readable,
            Stage::Deaf | Stage::Finishing(_) | Stage::Lingering(_) => true,
        }
    }

    fn end(&mut self, reason: Reason) -> Result<Reason, Reason> {
        self.stream
            .end()
            .map_err(|error| is_retry(&error).err().unwrap_or(Reason::Error))?;
        self.stage = Stage::Lingering(reason);
        self.ready.readable = true;
        Ok(reason)
    }

    /// Sends what is in `output`; says whether all of it is gone.
    #[inline(always)]
    fn flush(&mut self, output: &mut Buffer, counters: &WorkerCounters) -> Result<bool, Reason> {
        while !output.is_empty() {
            if !self.ready.writable {
                return Ok(false);
            }
            match output.flush_into(&mut self.stream) {
                Ok(0) => return Err(Reason::Error),
                Ok(count) => {
                    self.bytes_out += count as u64;
                    self.active = true;
                    counters.bytes_out.add(count as u64);
                }
                Err(error) => {
                    self.ready.writable = is_retry(&error)?;
                }
            }
        }
        Ok(true)
    }

    /// Lets the handler work. `output` is empty: [`flush`](Self::flush) went before.
    #[inline(always)]
    fn process(&mut self, buffers: &mut Buffers, counters: &WorkerCounters) -> Result<(), Reason> {
        let Buffers { input, output } = buffers;
        let before = input.len();
        // After a panic the handler is never called again, only dropped.
        let action = catch_unwind(AssertUnwindSafe(|| self.handler.process(input, output)));
        let (left, made) = (input.len(), output.len());
        counters.bytes_made.shift(before, left + made);
        match action {
            Ok(Action::Continue) => {
                let (idle, short) = (left == before && made == 0, output.take_short());
                if left == 0 && !short {
                    self.settled = true;
                } else if idle && (short || input.room() == 0) {
                    // A message that no input holds, or an answer that no output does.
                    return Err(Reason::Limit);
                } else {
                    self.settled = idle;
                }
            }
            Ok(Action::Close) => self.finish(Reason::Handler),
            Err(panic) => return Err(panicked(panic)),
        }
        Ok(())
    }

    /// Reads once, if the stream may be readable; says whether bytes came.
    #[inline(always)]
    fn receive(&mut self, input: &mut Buffer, counters: &WorkerCounters) -> Result<bool, Reason> {
        while self.ready.readable {
            let room = input.room();
            match input.fill_from(&mut self.stream) {
                Ok(0) => return Err(self.reason_of_end()),
                Ok(count) => {
                    self.bytes_in += count as u64;
                    self.active = true;
                    counters.bytes_in.add(count as u64);
                    let drained = count < room && self.stream.is_drained_by_short_read();
                    self.ready.readable = !drained || self.ready.to_the_end;
                    return Ok(true);
                }
                Err(error) => {
                    self.ready.readable = is_retry(&error)?;
                    self.ready.to_the_end &= self.ready.readable;
                }
            }
        }
        Ok(false)
    }

    /// Why it ends now that its client has ended the stream.
    #[cold]
    #[inline(never)]
    fn reason_of_end(&self) -> Reason {
        match self.stage {
            Stage::Lingering(reason) => reason,
            // Everything before the end is handled and sent: a close now ends the stream in order.
            _ => Reason::Done,
        }
    }
}

/// Drops what a panic left behind; the panic hook has told of it.
#[cold]
#[inline(never)]
fn panicked(panic: Box<dyn Any + Send>) -> Reason {
    drop(panic);
    Reason::Panic
}

/// Drops input that no handler will see.
fn discard(input: &mut Buffer, reason: Reason, counters: &WorkerCounters) {
    counters.discarded[reason as usize].add(input.len() as u64);
    input.clear();
}

/// What a failed call means: to try again now, to wait for an edge (`false`), or the end.
#[cold]
#[inline(never)]
fn is_retry(error: &io::Error) -> Result<bool, Reason> {
    match error.kind() {
        ErrorKind::Interrupted => Ok(true),
        ErrorKind::WouldBlock => Ok(false),
        ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe
        | ErrorKind::NotConnected
        | ErrorKind::TimedOut
        | ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable => Err(Reason::Reset),
        _ => Err(Reason::Error),
    }
}
