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

use std::io::{self, ErrorKind, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::buffer::{Buffer, Pool};
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
    /// urgent mark, at which every read stops; or a kind of stream that promises nothing.
    pub(crate) to_the_end: bool,
}

/// How a [run](Connection::run) ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// Nothing can move until the stream's readiness changes.
    Idle,
    /// The budget is spent, and there may be more to move.
    Runnable,
    /// It has ended; the stream is to be dropped.
    Closed(Reason),
}

/// Where a connection is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Bytes are read and handled.
    Serving,
    /// Nothing more is handled; what is in `output` is to be sent, and then the stream ended.
    Finishing(Reason),
    /// The stream was ended from this side. What still arrives is read and discarded until the
    /// client ends it too: closing with unread bytes would reset the connection, and a reset can
    /// destroy what is on its way to the client.
    Lingering(Reason),
}

/// How much more a connection takes in once the server shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drain {
    No,
    /// What has arrived already: up to the first moment that finds the stream drained.
    Arrived,
    /// Nothing.
    Deaf,
}

#[derive(Debug)]
pub(crate) struct Connection<S, H> {
    stream: S,
    handler: H,
    input: Buffer,
    output: Buffer,
    bytes_in: u64,
    bytes_out: u64,
    ready: Readiness,
    /// The handler has seen all there is: it neither took nor put a byte when last called.
    settled: bool,
    /// The client has ended its stream.
    ended: bool,
    drain: Drain,
    stage: Stage,
}

impl<S: Stream, H: Handler> Connection<S, H> {
    /// A connection at its start: able to write, and not known to be readable.
    pub(crate) fn new(stream: S, handler: H) -> Self {
        Self {
            stream,
            handler,
            input: Buffer::default(),
            output: Buffer::default(),
            bytes_in: 0,
            bytes_out: 0,
            ready: Readiness {
                writable: true,
                ..Readiness::default()
            },
            settled: false,
            ended: false,
            drain: Drain::No,
            stage: Stage::Serving,
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
        self.drain = Drain::Arrived;
        // Only a read that would block tells that nothing more has arrived.
        self.notice(Readiness {
            readable: true,
            writable: false,
            to_the_end: true,
        });
    }

    /// Ends a drain's reading, for a client that never stops sending.
    pub(crate) fn deafen(&mut self) {
        self.drain = Drain::Deaf;
    }

    /// Bytes in its buffers.
    pub(crate) fn buffered(&self) -> usize {
        self.input.len() + self.output.len()
    }

    pub(crate) fn bytes_in(&self) -> u64 {
        self.bytes_in
    }

    pub(crate) fn bytes_out(&self) -> u64 {
        self.bytes_out
    }

    /// Bytes that it has moved in all, in and out.
    pub(crate) fn moved(&self) -> u64 {
        self.bytes_in + self.bytes_out
    }

    /// Whether all is sent, and only the client's own end is awaited; for what reason it will close.
    pub(crate) fn lingers(&self) -> Option<Reason> {
        match self.stage {
            Stage::Lingering(reason) => Some(reason),
            Stage::Serving | Stage::Finishing(_) => None,
        }
    }

    /// Ends it from this side: what is in `output` is still sent, as far as it is taken at once.
    pub(crate) fn finish(&mut self, reason: Reason) {
        if self.stage == Stage::Serving {
            self.stage = Stage::Finishing(reason);
        }
    }

    /// Moves bytes until nothing more can move or `budget` of them have moved.
    pub(crate) fn run(
        &mut self,
        pool: &mut Pool,
        budget: u64,
        counters: &WorkerCounters,
    ) -> Status {
        pool.lend(&mut self.input);
        pool.lend(&mut self.output);
        let status = self
            .advance(budget, counters)
            .unwrap_or_else(Status::Closed);
        pool.reclaim(&mut self.input);
        pool.reclaim(&mut self.output);
        status
    }

    /// The state machine: all the branching is here. An error is the reason to close at once.
    fn advance(&mut self, budget: u64, counters: &WorkerCounters) -> Result<Status, Reason> {
        let enough = self.moved() + budget;
        loop {
            if !self.flush(counters)? {
                return Ok(Status::Idle);
            }
            if self.moved() >= enough {
                return Ok(Status::Runnable);
            }
            match self.stage {
                Stage::Serving if !self.settled => {
                    self.process(counters)?;
                    continue;
                }
                Stage::Serving if self.ended => return Err(Reason::Done),
                Stage::Serving if self.is_drained() => {
                    self.stage = Stage::Finishing(Reason::Drain);
                    continue;
                }
                // Everything was read up to the client's end: a close now ends the stream in order.
                Stage::Finishing(reason) if self.ended => return Err(reason),
                Stage::Finishing(reason) => {
                    self.stream.end().map_err(|error| broken(&error))?;
                    self.stage = Stage::Lingering(reason);
                    self.ready.readable = true;
                }
                Stage::Lingering(reason) if self.ended => return Err(reason),
                Stage::Serving | Stage::Lingering(_) => {}
            }
            if !self.receive(counters)? {
                return Ok(Status::Idle);
            }
        }
    }

    /// Sends what is in `output`; says whether all of it is gone.
    fn flush(&mut self, counters: &WorkerCounters) -> Result<bool, Reason> {
        while !self.output.is_empty() {
            if !self.ready.writable {
                return Ok(false);
            }
            match self.output.flush_into(&mut self.stream) {
                Ok(0) => return Err(Reason::Error),
                Ok(count) => {
                    self.bytes_out += count as u64;
                    counters.bytes_out.add(count as u64);
                    self.settled = false;
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => self.ready.writable = false,
                    ErrorKind::Interrupted => {}
                    _ => return Err(broken(&error)),
                },
            }
        }
        Ok(true)
    }

    /// Lets the handler work. `output` is empty: [`flush`](Self::flush) went before.
    fn process(&mut self, counters: &WorkerCounters) -> Result<(), Reason> {
        let before = self.input.len();
        let (handler, input, output) = (&mut self.handler, &mut self.input, &mut self.output);
        // After a panic the handler is never called again, only dropped.
        let action = catch_unwind(AssertUnwindSafe(|| handler.process(input, output)));
        let (after, made) = (self.input.len(), self.output.len());
        counters.bytes_made.shift(before, after + made);
        match action {
            Ok(Action::Continue) => self.settled = after == before && made == 0,
            Ok(Action::Close) => self.finish(Reason::Handler),
            Err(_) => return Err(Reason::Panic),
        }
        Ok(())
    }

    /// Reads once, if the stream may be readable; says whether anything came, be it the end.
    fn receive(&mut self, counters: &WorkerCounters) -> Result<bool, Reason> {
        if self.stage != Stage::Serving {
            self.discard(counters);
        }
        let room = self.input.room();
        if room == 0 {
            return Err(Reason::Limit);
        }
        while self.ready.readable {
            match self.input.fill_from(&mut self.stream) {
                Ok(0) => {
                    self.ended = true;
                    self.ready.readable = false;
                    return Ok(true);
                }
                Ok(count) => {
                    self.bytes_in += count as u64;
                    counters.bytes_in.add(count as u64);
                    self.ready.readable = count == room || self.ready.to_the_end;
                    self.settled = false;
                    return Ok(true);
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => {
                        self.ready.readable = false;
                        self.ready.to_the_end = false;
                        // To a drain, "nothing more has arrived" is news.
                        return Ok(self.drain == Drain::Arrived && self.stage == Stage::Serving);
                    }
                    ErrorKind::Interrupted => {}
                    _ => return Err(broken(&error)),
                },
            }
        }
        Ok(false)
    }

    /// Drops the input that no handler will see.
    fn discard(&mut self, counters: &WorkerCounters) {
        if let Stage::Finishing(reason) | Stage::Lingering(reason) = self.stage {
            counters.discarded[reason as usize].add(self.input.len() as u64);
            self.input.clear();
        }
    }

    /// Whether a drain has taken in all that it should.
    fn is_drained(&self) -> bool {
        match self.drain {
            Drain::No => false,
            Drain::Arrived => !self.ready.readable,
            Drain::Deaf => true,
        }
    }
}

/// The reason that an error of the stream is to a connection.
fn broken(error: &io::Error) -> Reason {
    match error.kind() {
        ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe
        | ErrorKind::NotConnected
        | ErrorKind::TimedOut
        | ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable => Reason::Reset,
        _ => Reason::Error,
    }
}
