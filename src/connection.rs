//! One connection: a stream, its two buffers and its handler, as a state machine.
//!
//! It does no waiting and knows no clock, no thread and no event loop: it is told what the stream
//! may be ready for ([`Connection::notice`]), and then moves all the bytes it can
//! ([`Connection::run`]): stream, `input`, handler, `output`, stream.
//!
//! What is *noticed* is a hint; only the result of a system call is a fact. The one exception is the
//! short read: see [`Readiness::read_until_would_block`].
//!
//! Output goes first. While some of it is stuck, the connection neither reads nor calls its handler:
//! what the client sends then stays in the kernel, whose window closes and pushes back. So a client
//! that never reads costs at most two buffers, and in an echo no byte is ever copied between them.

pub(crate) mod buffer;
pub(crate) mod table;

use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use crate::connection::buffer::{Buffer, Buffers, Pool};
use crate::handler::{Action, Handler};
use crate::stats::{CloseReason, WorkerCounters};

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
    /// [`Readiness::read_until_would_block`].
    fn short_read_means_drained(&self) -> bool {
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
    /// [`Stream::short_read_means_drained`].)
    pub(crate) read_until_would_block: bool,
}

/// How a [run](Connection::run) ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// Nothing can move until the stream's readiness changes.
    Idle,
    /// Its rounds are spent, and there may be more to move.
    Runnable,
    /// It has ended; the stream is to be dropped.
    Closed(CloseReason),
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
    DrainingOutput,
    /// Nothing more is handled; what is in `output` is to be sent, and then the stream ended.
    Flushing(CloseReason),
    /// The stream was ended from this side. What still arrives is read and discarded until the
    /// client ends it too: closing with unread bytes would reset the connection, and a reset can
    /// destroy what is on its way to the client.
    Lingering(CloseReason),
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
    awaiting_input: bool,
    /// A byte has moved since [`Connection::take_progress`] was asked.
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
            awaiting_input: false,
            active: false,
        }
    }

    /// Takes note of what the stream may be ready for. It stays noted until a call tells otherwise.
    pub(crate) fn notice(&mut self, event: Readiness) {
        self.ready.readable |= event.readable;
        self.ready.writable |= event.writable;
        self.ready.read_until_would_block |= event.read_until_would_block;
    }

    /// From here on only what has arrived already is read, answered and flushed.
    pub(crate) fn drain(&mut self) {
        if self.stage == Stage::Serving {
            self.stage = Stage::Draining;
            // Only a read that would block tells that nothing more has arrived.
            self.notice(Readiness {
                readable: true,
                writable: false,
                read_until_would_block: true,
            });
        }
    }

    /// Ends a drain's reading, for a client that never stops sending.
    pub(crate) fn stop_reading(&mut self) {
        if let Stage::Serving | Stage::Draining = self.stage {
            self.stage = Stage::DrainingOutput;
        }
    }

    /// Ends it from this side: nothing more is read, and what is in `output` is still sent.
    pub(crate) fn finish(&mut self, reason: CloseReason) {
        if let Stage::Serving | Stage::Draining | Stage::DrainingOutput = self.stage {
            self.stage = Stage::Flushing(reason);
            self.awaiting_input = true;
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
    pub(crate) fn take_progress(&mut self) -> bool {
        mem::take(&mut self.active)
    }

    /// Whether all is sent, and only the client's own end is awaited; for what reason it will close.
    pub(crate) fn linger_reason(&self) -> Option<CloseReason> {
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
        if !pool.is_scratch_clean() {
            self.keep(pool.take_scratch(), 0, pool, counters);
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
    ) -> Result<Status, CloseReason> {
        if !buffers.output.is_empty() && !self.flush(&mut buffers.output, counters)? {
            return Ok(Status::Idle);
        }
        match self.serve(buffers, rounds, counters)? {
            Some(status) => Ok(status),
            None => self.discard_until_eof(&mut buffers.input, rounds, counters),
        }
    }

    /// Reads, handles and sends; `None` where all of that is done for good.
    #[inline(always)]
    fn serve(
        &mut self,
        buffers: &mut Buffers,
        rounds: u32,
        counters: &WorkerCounters,
    ) -> Result<Option<Status>, CloseReason> {
        for _ in 0..rounds {
            if self.awaiting_input {
                if self.stage != Stage::Serving && self.is_served() {
                    return Ok(None);
                }
                if !self.receive(&mut buffers.input, counters)? {
                    let drained = self.stage == Stage::Draining;
                    return Ok(if drained { None } else { Some(Status::Idle) });
                }
            }
            self.process(buffers, counters);
            if !self.flush(&mut buffers.output, counters)? {
                return Ok(Some(Status::Idle));
            }
        }
        Ok(Some(Status::Runnable))
    }

    /// Ends the stream from this side, then discards what still comes until the client ends its own.
    #[cold]
    #[inline(never)]
    fn discard_until_eof(
        &mut self,
        input: &mut Buffer,
        rounds: u32,
        counters: &WorkerCounters,
    ) -> Result<Status, CloseReason> {
        let reason = match self.stage {
            Stage::Lingering(reason) => reason,
            Stage::Flushing(reason) => self.end(reason)?,
            Stage::Serving | Stage::Draining | Stage::DrainingOutput => {
                self.end(CloseReason::Shutdown)?
            }
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
            Stage::DrainingOutput | Stage::Flushing(_) | Stage::Lingering(_) => true,
        }
    }

    fn end(&mut self, reason: CloseReason) -> Result<CloseReason, CloseReason> {
        self.stream.end().map_err(|error| {
            would_block_or_reason(&error)
                .err()
                .unwrap_or(CloseReason::Error)
        })?;
        self.stage = Stage::Lingering(reason);
        self.ready.readable = true;
        Ok(reason)
    }

    /// Sends what is in `output`; says whether all of it is gone.
    #[inline(always)]
    fn flush(
        &mut self,
        output: &mut Buffer,
        counters: &WorkerCounters,
    ) -> Result<bool, CloseReason> {
        while !output.is_empty() {
            if !self.ready.writable {
                return Ok(false);
            }
            match output.flush_into(&mut self.stream) {
                Ok(0) => return Err(CloseReason::Error),
                Ok(count) => {
                    self.bytes_out += count as u64;
                    self.active = true;
                    counters.bytes_out.add(count as u64);
                }
                Err(error) => {
                    self.ready.writable = would_block_or_reason(&error)?;
                }
            }
        }
        Ok(true)
    }

    /// Lets the handler work. `output` is empty: [`flush`](Self::flush) went before.
    #[inline(always)]
    fn process(&mut self, buffers: &mut Buffers, counters: &WorkerCounters) {
        let Buffers { input, output } = buffers;
        let before = input.len();
        output.clear_overflow();
        // After a panic the handler is never called again, only dropped.
        let action = catch_unwind(AssertUnwindSafe(|| self.handler.process(input, output)));
        let took_all = input.is_empty() && !output.overflowed();
        if took_all && output.len() == before && matches!(action, Ok(Action::Continue)) {
            // As an echo does it.
            self.awaiting_input = true;
        } else {
            self.after_process(action, before, buffers, counters);
        }
    }

    /// What follows from a handler's work: whether it is to be called again, and what it has made.
    #[inline(never)]
    fn after_process(
        &mut self,
        action: thread::Result<Action>,
        before: usize,
        buffers: &mut Buffers,
        counters: &WorkerCounters,
    ) {
        let Buffers { input, output } = buffers;
        let (left, made) = (input.len(), output.len());
        counters.bytes_generated.shift(before, left + made);
        match action {
            Ok(Action::Continue) => {
                let (idle, short) = (left == before && made == 0, output.overflowed());
                self.awaiting_input = idle || (left == 0 && !short && made <= before);
                if idle && (short || input.room() == 0) {
                    // A message that no input holds, or an answer that no output does.
                    self.finish(CloseReason::BufferFull);
                }
            }
            Ok(Action::Close) => self.finish(CloseReason::Handler),
            Err(panic) => {
                // The panic hook has told of it. What it left half made is nobody's answer.
                drop(panic);
                discard(output, CloseReason::Panic, counters);
                self.finish(CloseReason::Panic);
            }
        }
    }

    /// Reads once, if the stream may be readable; says whether bytes came.
    #[inline(always)]
    fn receive(
        &mut self,
        input: &mut Buffer,
        counters: &WorkerCounters,
    ) -> Result<bool, CloseReason> {
        while self.ready.readable {
            let room = input.room();
            match input.fill_from(&mut self.stream) {
                Ok(0) => return Err(self.eof_reason()),
                Ok(count) => {
                    self.bytes_in += count as u64;
                    self.active = true;
                    counters.bytes_in.add(count as u64);
                    let drained = count < room && self.stream.short_read_means_drained();
                    self.ready.readable = !drained || self.ready.read_until_would_block;
                    return Ok(true);
                }
                Err(error) => {
                    self.ready.readable = would_block_or_reason(&error)?;
                    self.ready.read_until_would_block &= self.ready.readable;
                }
            }
        }
        Ok(false)
    }

    /// Why it ends now that its client has ended the stream.
    #[cold]
    #[inline(never)]
    fn eof_reason(&self) -> CloseReason {
        match self.stage {
            Stage::Lingering(reason) => reason,
            // Everything before the end is handled and sent: a close now ends the stream in order.
            _ => CloseReason::PeerClosed,
        }
    }
}

/// Drops bytes that nobody will see.
#[cold]
#[inline(never)]
fn discard(input: &mut Buffer, reason: CloseReason, counters: &WorkerCounters) {
    counters.discarded[reason as usize].add(input.len() as u64);
    input.clear();
}

/// What a failed call means: to try again now, to wait for an edge (`false`), or the end.
#[cold]
#[inline(never)]
fn would_block_or_reason(error: &io::Error) -> Result<bool, CloseReason> {
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
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::rc::Rc;

    use super::*;
    use crate::handler::Echo;

    /// One call of the stream: what it must be, and what it then returns.
    #[derive(Clone, Copy, Debug)]
    enum Call {
        Read(Result<&'static [u8], ErrorKind>),
        /// Of these bytes, and how many of them are taken.
        Write(&'static [u8], Result<usize, ErrorKind>),
        End(Result<(), ErrorKind>),
    }
    use Call::{End, Read as Reads, Write as Writes};

    const BLOCKED: ErrorKind = ErrorKind::WouldBlock;
    const NOTHING: Call = Reads(Err(BLOCKED));
    const THE_END: Call = Reads(Ok(b""));

    #[derive(Clone, Debug, Default)]
    struct Scripted(Rc<RefCell<VecDeque<Call>>>);

    impl Scripted {
        fn next(&self) -> Option<Call> {
            self.0.borrow_mut().pop_front()
        }
    }

    impl Read for Scripted {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            match self.next() {
                Some(Reads(result)) => {
                    let result = result?;
                    bytes[..result.len()].copy_from_slice(result);
                    Ok(result.len())
                }
                expected => panic!("read, instead of {expected:?}"),
            }
        }
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.next() {
                Some(Writes(all, result)) if all == bytes => Ok(result?),
                expected => panic!("write of {bytes:?}, instead of {expected:?}"),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Stream for Scripted {
        fn end(&mut self) -> io::Result<()> {
            match self.next() {
                Some(End(result)) => Ok(result?),
                expected => panic!("end, instead of {expected:?}"),
            }
        }
    }

    const READABLE: Readiness = Readiness {
        readable: true,
        writable: false,
        read_until_would_block: false,
    };
    const WRITABLE: Readiness = Readiness {
        readable: false,
        writable: true,
        read_until_would_block: false,
    };
    const READ_CLOSED: Readiness = Readiness {
        readable: true,
        writable: false,
        read_until_would_block: true,
    };

    /// A connection with buffers of four bytes.
    struct Scene<H> {
        connection: Connection<Scripted, H>,
        script: Scripted,
        pool: Pool,
        counters: WorkerCounters,
        rounds: u32,
    }

    impl<H: Handler> Scene<H> {
        fn new(handler: H) -> Self {
            let script = Scripted::default();
            Self {
                connection: Connection::new(script.clone(), handler),
                script,
                pool: Pool::new(4),
                counters: WorkerCounters::default(),
                rounds: 1000,
            }
        }

        /// Runs the connection, which must make exactly these calls.
        fn run(&mut self, calls: &[Call]) -> Status {
            self.script.0.borrow_mut().extend(calls);
            let status = self
                .connection
                .run(&mut self.pool, self.rounds, &self.counters);
            let left = self.script.0.take();
            assert!(left.is_empty(), "calls not made: {left:?}");
            status
        }

        fn event(&mut self, event: Readiness, calls: &[Call]) -> Status {
            self.connection.notice(event);
            self.run(calls)
        }

        fn discarded(&self, reason: CloseReason) -> u64 {
            self.counters.discarded[reason as usize].get()
        }
    }

    /// A handler as a function.
    struct Does<F>(F);

    impl<F: FnMut(&mut Buffer, &mut Buffer) -> Action> Handler for Does<F> {
        fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
            (self.0)(input, output)
        }
    }

    /// Answers, and closes as soon as there is any input, of which it takes one byte.
    fn goodbye(input: &mut Buffer, output: &mut Buffer) -> Action {
        if input.is_empty() {
            return Action::Continue;
        }
        input.consume(1);
        assert!(output.push(b"bye"));
        Action::Close
    }

    #[test]
    fn a_message_costs_one_read_and_one_write() {
        let mut scene = Scene::new(Echo);
        let message = [Reads(Ok(b"abc")), Writes(b"abc", Ok(3))];
        for _ in 0..3 {
            assert_eq!(scene.event(READABLE, &message), Status::Idle);
        }
        assert_eq!(scene.connection.bytes_in(), 9);
        assert_eq!(scene.connection.bytes_out(), 9);
        assert!(scene.connection.take_progress());
        assert!(!scene.connection.take_progress(), "not since it was asked");
        assert_eq!(scene.counters.bytes_in.get(), 9);
        assert_eq!(scene.counters.bytes_out.get(), 9);
    }

    #[test]
    fn unannounced_it_makes_no_call_and_idle_it_holds_no_storage() {
        let mut scene = Scene::new(Echo);
        assert_eq!(scene.run(&[]), Status::Idle);
        assert_eq!(scene.event(WRITABLE, &[]), Status::Idle);
        scene.event(READABLE, &[Reads(Ok(b"abc")), Writes(b"abc", Ok(3))]);
        assert!(scene.connection.buffers.is_none());
    }

    #[test]
    fn a_read_that_fills_the_buffer_is_followed_by_another() {
        let mut scene = Scene::new(Echo);
        let calls = [Reads(Ok(b"abcd")), Writes(b"abcd", Ok(4)), NOTHING];
        assert_eq!(scene.event(READABLE, &calls), Status::Idle);
        assert_eq!(scene.run(&[]), Status::Idle);
    }

    #[test]
    fn a_short_read_proves_nothing_where_something_else_cuts_reads_short() {
        let mut scene = Scene::new(Echo);
        let short = [Reads(Ok(b"a")), Writes(b"a", Ok(1))];
        let mut calls = short.to_vec();
        calls.extend(short);
        calls.push(NOTHING);
        assert_eq!(scene.event(READ_CLOSED, &calls), Status::Idle);
        // The read that would have blocked has ended that: short reads are proof again.
        assert_eq!(scene.event(READABLE, &short), Status::Idle);
        assert_eq!(scene.run(&[]), Status::Idle);
    }

    #[test]
    fn data_and_the_end_in_one_event() {
        let mut scene = Scene::new(Echo);
        let calls = [Reads(Ok(b"ab")), Writes(b"ab", Ok(2)), THE_END];
        assert_eq!(
            scene.event(READ_CLOSED, &calls),
            Status::Closed(CloseReason::PeerClosed)
        );
    }

    #[test]
    fn while_output_is_stuck_nothing_is_read_and_no_write_is_tried() {
        let mut scene = Scene::new(Echo);
        let stuck = [
            Reads(Ok(b"abcd")),
            Writes(b"abcd", Ok(1)),
            Writes(b"bcd", Err(BLOCKED)),
        ];
        assert_eq!(scene.event(READABLE, &stuck), Status::Idle);
        assert_eq!(scene.connection.buffered(), 3);
        assert_eq!(scene.counters.buffered.get(), 3);
        assert_eq!(scene.event(READ_CLOSED, &[]), Status::Idle);
        let unstuck = [Writes(b"bcd", Ok(3)), THE_END];
        assert_eq!(
            scene.event(WRITABLE, &unstuck),
            Status::Closed(CloseReason::PeerClosed)
        );
    }

    #[test]
    fn the_end_awaits_the_output() {
        let mut scene = Scene::new(Does(|input: &mut Buffer, output: &mut Buffer| {
            // Twice what came.
            if output.push(&input.data().repeat(2)) {
                input.clear();
            }
            Action::Continue
        }));
        let calls = [
            Reads(Ok(b"ab")),
            Writes(b"abab", Ok(2)),
            Writes(b"ab", Err(BLOCKED)),
        ];
        assert_eq!(scene.event(READ_CLOSED, &calls), Status::Idle);
        let calls = [Writes(b"ab", Ok(2)), THE_END];
        assert_eq!(
            scene.event(WRITABLE, &calls),
            Status::Closed(CloseReason::PeerClosed)
        );
    }

    #[test]
    fn interrupted_calls_are_made_again() {
        let mut scene = Scene::new(Echo);
        let calls = [
            Reads(Err(ErrorKind::Interrupted)),
            Reads(Ok(b"ab")),
            Writes(b"ab", Err(ErrorKind::Interrupted)),
            Writes(b"ab", Ok(2)),
        ];
        assert_eq!(scene.event(READABLE, &calls), Status::Idle);
    }

    #[test]
    fn errors_are_a_reset_or_told_apart_from_it() {
        use ErrorKind as Kind;
        let resets = [
            Kind::ConnectionReset,
            Kind::ConnectionAborted,
            Kind::BrokenPipe,
            Kind::NotConnected,
            Kind::TimedOut,
            Kind::HostUnreachable,
            Kind::NetworkUnreachable,
        ];
        let errors = [Kind::Other, Kind::PermissionDenied];
        let outcomes = resets.iter().map(|kind| (*kind, CloseReason::Reset));
        for (kind, reason) in outcomes.chain(errors.map(|kind| (kind, CloseReason::Error))) {
            let closed = Status::Closed(reason);
            let reading = [Reads(Err(kind))];
            assert_eq!(Scene::new(Echo).event(READABLE, &reading), closed, "{kind}");
            let writing = [Reads(Ok(b"a")), Writes(b"a", Err(kind))];
            assert_eq!(Scene::new(Echo).event(READABLE, &writing), closed, "{kind}");
            let mut scene = Scene::new(Echo);
            scene.connection.finish(CloseReason::IdleTimeout);
            assert_eq!(scene.run(&[End(Err(kind))]), closed, "{kind}");
        }
    }

    #[test]
    fn a_write_that_takes_nothing_is_an_error() {
        let calls = [Reads(Ok(b"a")), Writes(b"a", Ok(0))];
        let status = Scene::new(Echo).event(READABLE, &calls);
        assert_eq!(status, Status::Closed(CloseReason::Error));
    }

    #[test]
    fn spent_rounds_leave_it_runnable_without_another_event() {
        let mut scene = Scene::new(Echo);
        scene.run(&[]);
        scene.rounds = 1;
        let calls = [Reads(Ok(b"abcd")), Writes(b"abcd", Ok(4))];
        assert_eq!(scene.event(READABLE, &calls), Status::Runnable);
        assert_eq!(scene.run(&calls), Status::Runnable);
        scene.rounds = 2;
        assert_eq!(scene.run(&[calls[0], calls[1], NOTHING]), Status::Idle);
    }

    #[test]
    fn a_greeting_goes_first() {
        let mut greeted = false;
        let mut scene = Scene::new(Does(|_: &mut Buffer, output: &mut Buffer| {
            if !greeted {
                greeted = output.push(b"hi");
            }
            Action::Continue
        }));
        assert_eq!(scene.run(&[Writes(b"hi", Ok(2))]), Status::Idle);
        assert_eq!(scene.counters.bytes_generated.get(), 2);
    }

    #[test]
    fn a_close_by_the_handler_sends_its_end_and_discards_what_still_comes() {
        let mut scene = Scene::new(Does(goodbye));
        let calls = [
            Reads(Ok(b"qxy")),
            Writes(b"bye", Ok(3)),
            End(Ok(())),
            NOTHING,
        ];
        assert_eq!(scene.event(READABLE, &calls), Status::Idle);
        assert_eq!(scene.connection.linger_reason(), Some(CloseReason::Handler));
        assert_eq!(scene.connection.buffered(), 0);
        assert_eq!(scene.discarded(CloseReason::Handler), 2, "x and y");

        assert_eq!(scene.event(READABLE, &[Reads(Ok(b"z"))]), Status::Idle);
        let calls = [Reads(Ok(b"z")), THE_END];
        let status = scene.event(READ_CLOSED, &calls);
        assert_eq!(status, Status::Closed(CloseReason::Handler));
        assert_eq!(scene.discarded(CloseReason::Handler), 4);
    }

    #[test]
    fn a_close_by_the_handler_awaits_its_output() {
        let mut scene = Scene::new(Does(goodbye));
        let calls = [Reads(Ok(b"q")), Writes(b"bye", Err(BLOCKED))];
        assert_eq!(scene.event(READABLE, &calls), Status::Idle);
        assert_eq!(scene.connection.linger_reason(), None);
        let calls = [Writes(b"bye", Ok(3)), End(Ok(())), THE_END];
        let status = scene.event(WRITABLE, &calls);
        assert_eq!(status, Status::Closed(CloseReason::Handler));
    }

    #[test]
    fn a_panic_of_the_handler_ends_it() {
        let mut scene = Scene::new(Does(|input: &mut Buffer, output: &mut Buffer| {
            assert!(output.push(b"h"));
            assert!(input.is_empty(), "a panic that a test wants");
            output.clear();
            Action::Continue
        }));
        // Answers that are on their way are not to be lost in a reset.
        let calls = [Reads(Ok(b"ab")), End(Ok(())), NOTHING];
        assert_eq!(scene.event(READABLE, &calls), Status::Idle);
        assert_eq!(scene.connection.linger_reason(), Some(CloseReason::Panic));
        assert_eq!(scene.discarded(CloseReason::Panic), 3);
    }

    #[test]
    fn a_message_that_exceeds_the_buffer_ends_it() {
        let mut scene = Scene::new(Does(|_: &mut Buffer, _: &mut Buffer| Action::Continue));
        assert_eq!(scene.event(READABLE, &[Reads(Ok(b"abc"))]), Status::Idle);
        let calls = [Reads(Ok(b"d")), End(Ok(())), NOTHING];
        assert_eq!(scene.event(READABLE, &calls), Status::Idle);
        assert_eq!(
            scene.connection.linger_reason(),
            Some(CloseReason::BufferFull)
        );
        assert_eq!(scene.discarded(CloseReason::BufferFull), 4);
    }

    #[test]
    fn an_answer_that_exceeds_the_buffer_ends_it() {
        let mut scene = Scene::new(Does(|input: &mut Buffer, output: &mut Buffer| {
            assert!(input.is_empty() || !output.push(b"too long"));
            Action::Continue
        }));
        let calls = [Reads(Ok(b"a")), End(Ok(())), NOTHING];
        assert_eq!(scene.event(READABLE, &calls), Status::Idle);
        assert_eq!(
            scene.connection.linger_reason(),
            Some(CloseReason::BufferFull)
        );
    }

    #[test]
    fn one_that_found_too_little_room_is_no_matter_to_the_next() {
        let mut scene = Scene::new(Does(|input: &mut Buffer, output: &mut Buffer| {
            if input.is_empty() || output.push(b"too long") {
                return Action::Continue;
            }
            Action::Close
        }));
        scene.event(READABLE, &[Reads(Ok(b"a")), End(Ok(())), THE_END]);
        let other = Scripted::default();
        let silent = Does(|_: &mut Buffer, _: &mut Buffer| Action::Continue);
        let mut other = Connection::new(other, silent);
        let status = other.run(&mut scene.pool, scene.rounds, &scene.counters);
        assert_eq!(status, Status::Idle, "with the same buffers");
    }

    #[test]
    fn who_has_put_more_than_it_took_is_called_again() {
        let mut left = 3;
        let mut scene = Scene::new(Does(move |_: &mut Buffer, output: &mut Buffer| {
            // Measures the room itself, so that nothing is ever refused.
            while left > 0 && output.room() >= 3 {
                assert!(output.push(b"abc"));
                left -= 1;
            }
            Action::Continue
        }));
        assert_eq!(scene.run(&[Writes(b"abc", Ok(3)); 3]), Status::Idle);
    }

    #[test]
    fn a_drain_answers_what_has_arrived_unannounced() {
        let mut scene = Scene::new(Echo);
        scene.connection.drain();
        let calls = [
            Reads(Ok(b"ab")),
            Writes(b"ab", Ok(2)),
            NOTHING,
            End(Ok(())),
            NOTHING,
        ];
        assert_eq!(scene.run(&calls), Status::Idle);
        assert_eq!(
            scene.connection.linger_reason(),
            Some(CloseReason::Shutdown)
        );
        let status = scene.event(READ_CLOSED, &[THE_END]);
        assert_eq!(status, Status::Closed(CloseReason::Shutdown));
    }

    #[test]
    fn a_deaf_drain_reads_nothing_more() {
        let mut scene = Scene::new(Echo);
        scene.run(&[]);
        scene.rounds = 1;
        scene.connection.drain();
        let flood = [Reads(Ok(b"abcd")), Writes(b"abcd", Ok(4))];
        assert_eq!(scene.run(&flood), Status::Runnable);
        scene.connection.stop_reading();
        let calls = [End(Ok(())), Reads(Ok(b"efgh"))];
        assert_eq!(scene.run(&calls), Status::Runnable);
        assert_eq!(scene.run(&[NOTHING]), Status::Idle);
        assert_eq!(scene.discarded(CloseReason::Shutdown), 4);
    }

    #[test]
    fn it_ends_for_the_first_reason_given() {
        let mut scene = Scene::new(Echo);
        scene.connection.finish(CloseReason::IdleTimeout);
        scene.connection.finish(CloseReason::Shutdown);
        scene.run(&[End(Ok(())), NOTHING]);
        assert_eq!(
            scene.connection.linger_reason(),
            Some(CloseReason::IdleTimeout)
        );
    }
}
