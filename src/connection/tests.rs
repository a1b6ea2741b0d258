use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::mem;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::connection::buffer::OUT_OF_MEMORY;
use crate::connection::handler::Echo;
use crate::connection::shared::{Timeouts, Turns};
use crate::connection::waker::WakeQueue;

impl<S, H> Connection<S, H> {
    /// For tests of what contains connections.
    pub(crate) fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }
}

impl Resources {
    /// Resources with buffers of this many bytes, whose wakers wake no worker.
    pub(crate) fn for_tests(buffer_size: usize) -> Self {
        let (wakes, _no_worker) = WakeQueue::new(|| {});
        let pool = Pool::new(buffer_size).expect("memory for a test");
        let shared = Shared::new(TIMEOUTS, wakes, Arc::default());
        Self { pool, shared }
    }

    /// Refills the pool, as a table does.
    fn refill(&mut self) {
        self.pool.refill().expect("memory for a test");
    }
}

/// An expected call of the stream and its result.
#[derive(Clone, Copy, Debug)]
enum Call {
    Read(Result<&'static [u8], ErrorKind>),
    /// These bytes are offered, this many are accepted.
    Write(&'static [u8], Result<usize, ErrorKind>),
    ShutdownWrite(Result<(), ErrorKind>),
    PollDelivery(bool),
    Unread(u64),
    Abort,
}
use Call::{Abort, PollDelivery, Read as ReadCall, ShutdownWrite, Unread, Write as WriteCall};

const TIMEOUTS: Timeouts = Timeouts {
    idle: Some(800),
    answer: None,
    close: 80,
    linger: 400,
    stuck: 1000,
    drain: 1000,
};

const WOULD_BLOCK: ErrorKind = ErrorKind::WouldBlock;
const WOULD_BLOCK_READ: Call = ReadCall(Err(WOULD_BLOCK));
const EOF: Call = ReadCall(Ok(b""));

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
            Some(ReadCall(result)) => {
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
            Some(WriteCall(all, result)) if all == bytes => Ok(result?),
            expected => panic!("write of {bytes:?}, instead of {expected:?}"),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Scripted {
    fn shutdown_write(&mut self) -> io::Result<()> {
        match self.next() {
            Some(ShutdownWrite(result)) => Ok(result?),
            expected => panic!("shutdown_write, instead of {expected:?}"),
        }
    }

    fn poll_delivery(&mut self) -> bool {
        match self.next() {
            Some(PollDelivery(result)) => result,
            expected => panic!("is_delivered, instead of {expected:?}"),
        }
    }

    fn unread(&self) -> u64 {
        match self.next() {
            Some(Unread(count)) => count,
            expected => panic!("unread, instead of {expected:?}"),
        }
    }

    fn reset_on_close(&mut self) {
        match self.next() {
            Some(Abort) => {}
            expected => panic!("abort, instead of {expected:?}"),
        }
    }
}

const READABLE: Readiness = Readiness::READABLE;
const WRITABLE: Readiness = Readiness::WRITABLE;
const READ_CLOSED: Readiness = Readiness {
    readable: true,
    writable: false,
    read_until_would_block: true,
};

/// A connection with buffers of four bytes.
struct Harness<H> {
    connection: Connection<Scripted, H>,
    script: Scripted,
    resources: Resources,
}

impl<H: Handler> Harness<H> {
    fn new(handler: H) -> Self {
        let script = Scripted::default();
        Self {
            connection: Connection::new(script.clone(), handler, 0),
            script,
            resources: Resources::for_tests(4),
        }
    }

    /// Drives the connection, which must make exactly these calls.
    fn run(&mut self, calls: &[Call]) -> Status {
        self.script.0.borrow_mut().extend(calls);
        let status = self.connection.drive(&mut self.resources);
        self.resources.refill();
        let left = self.script.0.take();
        assert!(left.is_empty(), "calls not made: {left:?}");
        status
    }

    fn event(&mut self, event: Readiness, calls: &[Call]) -> Status {
        self.connection.add_readiness(event);
        self.run(calls)
    }

    /// Starts a shutdown.
    fn drain(&mut self) {
        self.resources.shared.drain = Drain::Answering { deadline: 1000 };
        self.connection.begin_drain();
    }

    /// Ends reading in a shutdown.
    fn limit_reading(&mut self) {
        self.resources.shared.drain = Drain::Finishing { deadline: 1000 };
        self.connection.set_read_limit();
    }

    fn discarded(&self, reason: CloseReason) -> u64 {
        self.resources.shared.counters.discarded[reason as usize].get()
    }
}

/// A handler made from a function.
struct FnHandler<F>(F);

impl<F: FnMut(Event, &mut Context<'_>) -> Action> Handler for FnHandler<F> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        (self.0)(event, context)
    }
}

fn handler<F: FnMut(Event, &mut Context<'_>) -> Action>(process: F) -> FnHandler<F> {
    FnHandler(process)
}

/// Consumes one byte of the first input, answers and closes.
fn close_with_bye(event: Event, context: &mut Context<'_>) -> Action {
    if event == Event::Open {
        return Action::Continue;
    }
    context.input.consume(1);
    assert!(context.output.push(b"bye"));
    Action::Close
}

/// Rule 3 of the event loop.
#[test]
fn a_message_costs_one_read_and_one_write() {
    let mut harness = Harness::new(Echo);
    let message = [ReadCall(Ok(b"abc")), WriteCall(b"abc", Ok(3))];
    for _ in 0..3 {
        assert_eq!(harness.event(READABLE, &message), Status::Idle);
    }
    assert_eq!(harness.connection.bytes_in, 9);
    assert_eq!(harness.connection.bytes_out, 9);
    assert_eq!(harness.resources.shared.counters.bytes_in.get(), 9);
    assert_eq!(harness.resources.shared.counters.bytes_out.get(), 9);
}

#[test]
fn last_note_of_a_handler_is_kept() {
    let mut harness = Harness::new(handler(|event, context| {
        if event == Event::Input {
            context.set_note("first");
            context.set_note("last");
        }
        Echo.process(event, context)
    }));
    assert_eq!(harness.run(&[]), Status::Idle);
    assert_eq!(harness.connection.take_note(), None);
    harness.event(READABLE, &[ReadCall(Ok(b"abc")), WriteCall(b"abc", Ok(3))]);
    assert_eq!(harness.connection.take_note().as_deref(), Some("last"));
}

#[test]
fn without_readiness_no_call_is_made_and_no_buffer_is_held() {
    let mut harness = Harness::new(Echo);
    assert_eq!(harness.run(&[]), Status::Idle);
    assert_eq!(harness.event(WRITABLE, &[]), Status::Idle);
    harness.event(READABLE, &[ReadCall(Ok(b"abc")), WriteCall(b"abc", Ok(3))]);
    assert!(harness.connection.buffers.is_none());
}

/// Rule 2 of the event loop.
#[test]
fn full_read_is_followed_by_another_read() {
    let mut harness = Harness::new(Echo);
    let calls = [
        ReadCall(Ok(b"abcd")),
        WriteCall(b"abcd", Ok(4)),
        WOULD_BLOCK_READ,
    ];
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
    assert_eq!(harness.run(&[]), Status::Idle);
}

/// Rule 3 of the event loop.
#[test]
fn short_read_is_not_trusted_after_eof_or_urgent_data() {
    let mut harness = Harness::new(Echo);
    let short = [ReadCall(Ok(b"a")), WriteCall(b"a", Ok(1))];
    let mut calls = short.to_vec();
    calls.extend(short);
    calls.push(WOULD_BLOCK_READ);
    assert_eq!(harness.event(READ_CLOSED, &calls), Status::Idle);
    // After a read that would block, short reads are trusted again.
    assert_eq!(harness.event(READABLE, &short), Status::Idle);
    assert_eq!(harness.run(&[]), Status::Idle);
}

#[test]
fn eof_in_the_same_event_as_data_is_seen() {
    let mut harness = Harness::new(Echo);
    let calls = [ReadCall(Ok(b"ab")), WriteCall(b"ab", Ok(2)), EOF];
    assert_eq!(
        harness.event(READ_CLOSED, &calls),
        Status::Closed(CloseReason::PeerClosed)
    );
}

#[test]
fn pending_output_blocks_reads_and_retries() {
    let mut harness = Harness::new(Echo);
    let stuck = [
        ReadCall(Ok(b"abcd")),
        WriteCall(b"abcd", Ok(1)),
        WriteCall(b"bcd", Err(WOULD_BLOCK)),
    ];
    assert_eq!(harness.event(READABLE, &stuck), Status::Idle);
    assert_eq!(harness.connection.buffered(), 3);
    assert_eq!(harness.resources.shared.counters.buffered.get(), 3);
    assert_eq!(harness.event(READ_CLOSED, &[]), Status::Idle);
    let unstuck = [WriteCall(b"bcd", Ok(3)), EOF];
    assert_eq!(
        harness.event(WRITABLE, &unstuck),
        Status::Closed(CloseReason::PeerClosed)
    );
}

/// Rules 1 and 4 of the event loop.
#[test]
fn eof_waits_for_pending_output() {
    let mut harness = Harness::new(handler(|_, context| {
        // Answers twice the input.
        let bytes = context.input.data().repeat(2);
        assert!(context.output.push(&bytes));
        context.input.consume(bytes.len() / 2);
        Action::Continue
    }));
    let calls = [
        ReadCall(Ok(b"ab")),
        WriteCall(b"abab", Ok(2)),
        WriteCall(b"ab", Err(WOULD_BLOCK)),
    ];
    assert_eq!(harness.event(READ_CLOSED, &calls), Status::Idle);
    let calls = [WriteCall(b"ab", Ok(2)), EOF];
    assert_eq!(
        harness.event(WRITABLE, &calls),
        Status::Closed(CloseReason::PeerClosed)
    );
}

/// Rule 6 of the event loop.
#[test]
fn interrupted_calls_are_retried() {
    let mut harness = Harness::new(Echo);
    let calls = [
        ReadCall(Err(ErrorKind::Interrupted)),
        ReadCall(Ok(b"ab")),
        WriteCall(b"ab", Err(ErrorKind::Interrupted)),
        WriteCall(b"ab", Ok(2)),
    ];
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
}

#[test]
fn resets_are_distinguished_from_other_errors() {
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
        let reading = [ReadCall(Err(kind))];
        assert_eq!(
            Harness::new(Echo).event(READABLE, &reading),
            closed,
            "{kind}"
        );
        let writing = [ReadCall(Ok(b"a")), WriteCall(b"a", Err(kind)), Abort];
        assert_eq!(
            Harness::new(Echo).event(READABLE, &writing),
            closed,
            "{kind}"
        );
        let mut harness = Harness::new(Echo);
        harness
            .connection
            .close_after_flush(CloseReason::IdleTimeout, 0);
        assert_eq!(harness.run(&[ShutdownWrite(Err(kind))]), closed, "{kind}");
    }
}

/// No memory is needed to discard what a failed connection holds.
#[test]
fn failed_connection_without_memory_has_its_own_reason() {
    let mut harness = Harness::new(Echo);
    OUT_OF_MEMORY.set(true);
    let reset = Err(ErrorKind::ConnectionReset);
    let calls = [ReadCall(Ok(b"ab")), WriteCall(b"ab", reset), Abort];
    let status = harness.event(READABLE, &calls);
    OUT_OF_MEMORY.set(false);
    assert_eq!(status, Status::Closed(CloseReason::Reset));
    assert_eq!(harness.discarded(CloseReason::Reset), 2);
    harness.connection.abort_if_incomplete();
}

#[test]
fn write_of_zero_bytes_is_an_error() {
    let calls = [ReadCall(Ok(b"a")), WriteCall(b"a", Ok(0)), Abort];
    let status = Harness::new(Echo).event(READABLE, &calls);
    assert_eq!(status, Status::Closed(CloseReason::Error));
}

/// Messages of four bytes until the budget is used.
fn used_budget() -> Vec<Call> {
    let message = [ReadCall(Ok(b"abcd")), WriteCall(b"abcd", Ok(4))];
    message.repeat(MAX_ROUNDS)
}

#[test]
fn used_budget_leaves_the_connection_runnable() {
    let mut harness = Harness::new(Echo);
    harness.run(&[]);
    assert_eq!(harness.event(READABLE, &used_budget()), Status::Runnable);
    assert_eq!(harness.run(&used_budget()), Status::Runnable);
    assert_eq!(harness.run(&[WOULD_BLOCK_READ]), Status::Idle);
}

#[test]
fn budget_that_ends_with_the_last_message_leaves_the_connection_idle() {
    let mut harness = Harness::new(Echo);
    harness.run(&[]);
    let mut calls = used_budget();
    calls.truncate(calls.len() - 2);
    calls.extend([ReadCall(Ok(b"abc")), WriteCall(b"abc", Ok(3))]);
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
}

/// With a timer, the end of the last round does not look for the wait first.
#[test]
fn connection_that_waits_at_the_end_of_its_rounds_is_idle() {
    let process = |event, context: &mut Context<'_>| {
        context.set_timer(Some(Duration::from_secs(1)));
        Echo.process(event, context)
    };
    for result in [Ok(3), Err(WOULD_BLOCK)] {
        let mut harness = Harness::new(handler(process));
        harness.run(&[]);
        let mut calls = used_budget();
        calls.truncate(calls.len() - 2);
        calls.extend([ReadCall(Ok(b"abc")), WriteCall(b"abc", result)]);
        assert_eq!(harness.event(READABLE, &calls), Status::Idle);
    }
}

/// A stream of any length that counts the bytes of each call.
#[derive(Clone, Default)]
struct Endless(Rc<RefCell<Vec<usize>>>);

impl Read for Endless {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().push(bytes.len());
        Ok(bytes.len())
    }
}

impl Write for Endless {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.read(&mut bytes.to_vec())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Endless {
    fn shutdown_write(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn poll_delivery(&mut self) -> bool {
        true
    }

    fn unread(&self) -> u64 {
        0
    }

    fn reset_on_close(&mut self) {}
}

#[test]
fn budget_limits_reads_and_sends_for_any_buffer_size() {
    for buffer_size in [1, 1 << 10, 64 << 10, 16 << 20] {
        let stream = Endless::default();
        let mut connection = Connection::new(stream.clone(), Echo, 0);
        connection.add_readiness(READABLE);
        let mut resources = Resources::for_tests(buffer_size);
        for turn in 1..=3 {
            let status = connection.drive(&mut resources);
            assert_eq!(status, Status::Runnable, "{buffer_size}");
            resources.refill();
            assert!(
                connection.bytes_in <= turn * Turns::DEFAULT.interactive_budget,
                "{buffer_size}"
            );
            assert!(
                connection.bytes_out <= turn * Turns::DEFAULT.interactive_budget,
                "{buffer_size}"
            );
            assert!(stream.0.take().len() <= 2 * MAX_ROUNDS);
        }
    }
}

#[test]
fn budget_limits_the_sends_of_a_handler_without_input() {
    let stream = Endless::default();
    let fill = handler(|_, context| {
        let bytes = vec![7; context.output.room()];
        assert!(context.output.push(&bytes));
        Action::Flush
    });
    let mut connection = Connection::new(stream, fill, 0);
    let mut resources = Resources::for_tests(16 << 20);
    for turn in 1..=3 {
        let status = connection.drive(&mut resources);
        assert_eq!(status, Status::Runnable);
        resources.refill();
        assert_eq!(
            connection.bytes_out,
            turn * Turns::DEFAULT.interactive_budget
        );
    }
}

#[test]
fn greeting_is_sent_before_any_input() {
    let mut harness = Harness::new(handler(|event, context| {
        assert!(event != Event::Open || context.output.push(b"hi"));
        Action::Continue
    }));
    assert_eq!(harness.run(&[WriteCall(b"hi", Ok(2))]), Status::Idle);
    assert_eq!(harness.resources.shared.counters.bytes_generated.get(), 2);
}

#[test]
fn handler_close_shuts_down_writes_and_discards_input() {
    let mut harness = Harness::new(FnHandler(close_with_bye));
    let calls = [
        ReadCall(Ok(b"qxy")),
        WriteCall(b"bye", Ok(3)),
        ShutdownWrite(Ok(())),
        WOULD_BLOCK_READ,
    ];
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
    assert_eq!(
        harness.connection.state,
        State::Lingering(CloseReason::Handler)
    );
    assert_eq!(harness.connection.buffered(), 0);
    assert_eq!(harness.discarded(CloseReason::Handler), 2, "x and y");

    assert_eq!(harness.event(READABLE, &[ReadCall(Ok(b"z"))]), Status::Idle);
    let calls = [ReadCall(Ok(b"z")), EOF];
    let status = harness.event(READ_CLOSED, &calls);
    assert_eq!(status, Status::Closed(CloseReason::Handler));
    assert_eq!(harness.discarded(CloseReason::Handler), 4);
}

#[test]
fn handler_close_waits_for_its_output() {
    let mut harness = Harness::new(FnHandler(close_with_bye));
    let calls = [ReadCall(Ok(b"q")), WriteCall(b"bye", Err(WOULD_BLOCK))];
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
    assert_eq!(
        harness.connection.state,
        State::Closing(CloseReason::Handler)
    );
    let calls = [WriteCall(b"bye", Ok(3)), ShutdownWrite(Ok(())), EOF];
    let status = harness.event(WRITABLE, &calls);
    assert_eq!(status, Status::Closed(CloseReason::Handler));
}

/// Whatever is in the buffers, and also after the client's EOF.
#[test]
fn handler_can_reset_the_connection() {
    let reset = Status::Closed(CloseReason::HandlerReset);
    let process = |event, context: &mut Context<'_>| match event {
        Event::Open | Event::Wake => {
            assert!(context.output.push(b"ab"));
            Action::Continue
        }
        _ => Action::Reset,
    };
    let mut harness = Harness::new(handler(process));
    harness.run(&[WriteCall(b"ab", Ok(2))]);
    let calls = [ReadCall(Ok(b"cd")), Abort, Abort];
    assert_eq!(harness.event(READABLE, &calls), reset);
    assert_eq!(harness.discarded(CloseReason::HandlerReset), 2);

    let mut harness = Harness::new(handler(process));
    harness.run(&[WriteCall(b"ab", Ok(2))]);
    assert_eq!(harness.event(READ_CLOSED, &[EOF, Abort]), reset);

    let mut harness = Harness::new(handler(process));
    harness.run(&[WriteCall(b"ab", Ok(1)), WriteCall(b"b", Err(WOULD_BLOCK))]);
    harness.connection.timer_expired();
    assert_eq!(harness.run(&[Abort, Abort]), reset);
    assert_eq!(harness.discarded(CloseReason::HandlerReset), 1);
}

#[test]
fn handler_panic_closes_the_connection() {
    let mut harness = Harness::new(handler(|_, context| {
        assert!(context.output.push(b"h"));
        assert!(context.input.is_empty(), "deliberate panic");
        Action::Continue
    }));
    harness.run(&[WriteCall(b"h", Ok(1))]);
    // No reset, which could destroy answers in flight.
    let calls = [ReadCall(Ok(b"ab")), ShutdownWrite(Ok(())), WOULD_BLOCK_READ];
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
    assert_eq!(
        harness.connection.state,
        State::Lingering(CloseReason::Panic)
    );
    assert_eq!(harness.discarded(CloseReason::Panic), 3);
}

#[test]
fn message_larger_than_the_buffer_closes_the_connection() {
    let mut harness = Harness::new(handler(|_, _| Action::Continue));
    assert_eq!(
        harness.event(READABLE, &[ReadCall(Ok(b"abc"))]),
        Status::Idle
    );
    let calls = [ReadCall(Ok(b"d")), ShutdownWrite(Ok(())), WOULD_BLOCK_READ];
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
    assert_eq!(
        harness.connection.state,
        State::Lingering(CloseReason::BufferFull)
    );
    assert_eq!(harness.discarded(CloseReason::BufferFull), 4);
}

#[test]
fn answer_larger_than_the_buffer_closes_the_connection() {
    let mut harness = Harness::new(handler(|event, context| {
        assert!(event == Event::Open || !context.output.push(b"too long"));
        match event {
            Event::Open => Action::Continue,
            _ => Action::Flush,
        }
    }));
    let calls = [ReadCall(Ok(b"a")), ShutdownWrite(Ok(())), WOULD_BLOCK_READ];
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
    assert_eq!(
        harness.connection.state,
        State::Lingering(CloseReason::BufferFull)
    );
}

#[test]
fn handler_that_flushes_is_called_when_its_output_is_sent() {
    let mut left = 3;
    let mut harness = Harness::new(handler(move |event, context| {
        assert_eq!(event == Event::Open, left == 3, "{event:?}");
        // Checks the room itself, so that no push is ever refused.
        while left > 0 && context.output.room() >= 3 {
            assert!(context.output.push(b"abc"));
            left -= 1;
        }
        match left {
            0 => Action::Continue,
            _ => Action::Flush,
        }
    }));
    assert_eq!(harness.run(&[WriteCall(b"abc", Ok(3)); 3]), Status::Idle);
}

#[test]
fn handler_that_continues_is_called_for_input_only() {
    let mut calls = 0;
    let mut harness = Harness::new(handler(|event, context| {
        calls += 1;
        assert!(event == Event::Open || context.output.push(b"abc"));
        Action::Continue
    }));
    let script = [ReadCall(Ok(b"a")), WriteCall(b"abc", Ok(3))];
    assert_eq!(harness.event(READABLE, &script), Status::Idle);
    assert_eq!(harness.event(WRITABLE, &[]), Status::Idle);
    drop(harness);
    assert_eq!(calls, 2);
}

/// A handler that does as the test says, and records its events.
#[derive(Clone)]
struct ScriptedHandler(Rc<RefCell<HandlerScript>>);

struct HandlerScript {
    output: &'static [u8],
    action: Action,
    /// Whether a call that announces no answer consumes the input.
    consumes: bool,
    events: Vec<Event>,
}

impl ScriptedHandler {
    fn new() -> Self {
        Self(Rc::new(RefCell::new(HandlerScript {
            output: b"",
            action: Action::Continue,
            consumes: true,
            events: Vec::new(),
        })))
    }

    /// Determines what the next calls append and return.
    fn set(&self, output: &'static [u8], action: Action) {
        let mut script = self.0.borrow_mut();
        (script.output, script.action) = (output, action);
    }

    fn take_events(&self) -> Vec<Event> {
        mem::take(&mut self.0.borrow_mut().events)
    }
}

impl Handler for ScriptedHandler {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        let mut script = self.0.borrow_mut();
        script.events.push(event);
        assert!(context.output.push(script.output), "deliberate panic");
        if script.action != Action::Pending && script.consumes {
            let len = context.input.len();
            context.input.consume(len);
        }
        script.action
    }
}

/// A connection whose handler waits for an answer to the input `a`.
fn with_a_pending_answer() -> (Harness<ScriptedHandler>, ScriptedHandler) {
    let handler = ScriptedHandler::new();
    let mut harness = Harness::new(handler.clone());
    harness.run(&[]);
    handler.set(b"", Action::Pending);
    let status = harness.event(READABLE, &[ReadCall(Ok(b"a"))]);
    assert_eq!(status, Status::Idle);
    assert_eq!(handler.take_events(), [Event::Open, Event::Input]);
    assert_eq!(harness.connection.state, State::Pending);
    (harness, handler)
}

#[test]
fn pending_answer_keeps_the_connection_open_after_eof() {
    let (mut harness, handler) = with_a_pending_answer();
    assert_eq!(harness.event(READ_CLOSED, &[EOF]), Status::Idle);
    assert_eq!(handler.take_events(), [Event::Eof]);
    assert_eq!(harness.connection.state, State::Pending);
    handler.set(b"part", Action::Pending);
    harness.connection.woken();
    assert_eq!(harness.run(&[WriteCall(b"part", Ok(4))]), Status::Idle);
    handler.set(b"rest", Action::Continue);
    harness.connection.timer_expired();
    let status = harness.run(&[WriteCall(b"rest", Ok(4))]);
    assert_eq!(status, Status::Closed(CloseReason::PeerClosed));
    assert_eq!(handler.take_events(), [Event::Wake, Event::Timer]);
}

#[test]
fn pending_answer_keeps_the_connection_open_in_a_drain() {
    let (mut harness, handler) = with_a_pending_answer();
    harness.drain();
    assert_eq!(harness.run(&[WOULD_BLOCK_READ]), Status::Idle);
    assert_eq!(harness.connection.state, State::Pending);
    handler.set(b"yes", Action::Continue);
    harness.connection.woken();
    let calls = [
        WriteCall(b"yes", Ok(3)),
        PollDelivery(true),
        Unread(0),
        ShutdownWrite(Ok(())),
        WOULD_BLOCK_READ,
    ];
    assert_eq!(harness.run(&calls), Status::Idle);
    let lingering = State::Lingering(CloseReason::Shutdown);
    assert_eq!(harness.connection.state, lingering);
}

#[test]
fn connection_with_a_pending_answer_is_reset_when_it_is_closed() {
    let (mut harness, handler) = with_a_pending_answer();
    handler.set(b"", Action::Continue);
    harness.connection.woken();
    harness.run(&[]);
    harness.connection.abort_if_incomplete();
    handler.set(b"", Action::Pending);
    harness.connection.woken();
    harness.run(&[]);
    harness.script.0.borrow_mut().push_back(Abort);
    harness.connection.abort_if_incomplete();
    assert!(harness.script.0.borrow().is_empty());
}

#[test]
fn call_in_between_leaves_a_pending_answer() {
    let (mut harness, handler) = with_a_pending_answer();
    handler.0.borrow_mut().consumes = false;
    handler.set(b"", Action::Continue);
    harness.connection.timer_expired();
    harness.connection.woken();
    assert_eq!(harness.run(&[]), Status::Idle);
    assert_eq!(handler.take_events(), [Event::Timer, Event::Wake]);
    assert_eq!(harness.connection.state, State::Pending);
    // Input can bring the answer, even one without a byte.
    let status = harness.event(READABLE, &[ReadCall(Ok(b"b"))]);
    assert_eq!(status, Status::Idle);
    assert_eq!(harness.connection.state, State::Reading);
}

#[test]
fn call_in_between_ends_the_wait_if_it_consumes_or_appends() {
    for (answer, consumes) in [("", true), ("yes", false)] {
        let (mut harness, handler) = with_a_pending_answer();
        handler.0.borrow_mut().consumes = consumes;
        handler.set(answer.as_bytes(), Action::Continue);
        harness.connection.woken();
        let sent = [WriteCall(answer.as_bytes(), Ok(answer.len()))];
        harness.run(&sent[..usize::from(!answer.is_empty())]);
        assert_eq!(harness.connection.state, State::Reading, "{answer:?}");
    }
}

#[test]
fn call_in_between_leaves_the_call_for_sent_output() {
    let (mut harness, handler) = with_a_pending_answer();
    handler.set(b"ab", Action::Flush);
    harness.connection.woken();
    harness.run(&[WriteCall(b"ab", Err(WOULD_BLOCK))]);
    // Even if it appends more.
    handler.set(b"c", Action::Continue);
    harness.connection.woken();
    harness.run(&[]);
    handler.set(b"", Action::Continue);
    let status = harness.event(WRITABLE, &[WriteCall(b"abc", Ok(3))]);
    assert_eq!(status, Status::Idle);
    let events = [Event::Wake, Event::Wake, Event::Sent];
    assert_eq!(handler.take_events(), events);
}

#[test]
fn full_input_stops_reading_while_an_answer_is_pending() {
    let (mut harness, handler) = with_a_pending_answer();
    // The handler leaves everything in a buffer of four bytes.
    let status = harness.event(READABLE, &[ReadCall(Ok(b"bcd"))]);
    assert_eq!(status, Status::Idle);
    assert_eq!(harness.event(READABLE, &[]), Status::Idle, "no room");
    handler.set(b"yes", Action::Continue);
    harness.connection.woken();
    let calls = [
        WriteCall(b"yes", Ok(3)),
        ReadCall(Ok(b"e")),
        WriteCall(b"yes", Ok(3)),
    ];
    assert_eq!(harness.run(&calls), Status::Idle);
    let events = [Event::Input, Event::Wake, Event::Input];
    assert_eq!(handler.take_events(), events);
}

#[test]
fn wake_up_calls_the_handler_while_output_is_pending() {
    let (mut harness, handler) = with_a_pending_answer();
    handler.set(b"ab", Action::Continue);
    harness.connection.woken();
    let status = harness.run(&[WriteCall(b"ab", Err(WOULD_BLOCK))]);
    assert_eq!(status, Status::Idle);
    assert_eq!(harness.connection.state, State::Reading);
    harness.connection.woken();
    assert_eq!(harness.run(&[]), Status::Idle);
    let status = harness.event(WRITABLE, &[WriteCall(b"abab", Ok(4))]);
    assert_eq!(status, Status::Idle);
    assert_eq!(handler.take_events(), [Event::Wake, Event::Wake]);
}

#[test]
fn panic_keeps_the_output_of_earlier_calls() {
    let (mut harness, handler) = with_a_pending_answer();
    handler.set(b"abc", Action::Pending);
    harness.connection.woken();
    harness.run(&[WriteCall(b"abc", Err(WOULD_BLOCK))]);
    // The second answer does not fit.
    harness.connection.woken();
    assert_eq!(harness.run(&[]), Status::Idle);
    let calls = [
        WriteCall(b"abc", Ok(3)),
        ShutdownWrite(Ok(())),
        WOULD_BLOCK_READ,
    ];
    assert_eq!(harness.event(WRITABLE, &calls), Status::Idle);
    let lingering = State::Lingering(CloseReason::Panic);
    assert_eq!(harness.connection.state, lingering);
}

#[test]
fn closing_connection_calls_its_handler_no_more() {
    let (mut harness, handler) = with_a_pending_answer();
    handler.set(b"", Action::Close);
    harness.connection.woken();
    harness.run(&[ShutdownWrite(Ok(())), WOULD_BLOCK_READ]);
    harness.connection.woken();
    assert_eq!(harness.run(&[]), Status::Idle);
    assert_eq!(handler.take_events(), [Event::Wake]);
}

#[test]
fn close_after_eof_is_the_end_of_the_client() {
    let handler = ScriptedHandler::new();
    let mut harness = Harness::new(handler.clone());
    harness.run(&[]);
    handler.set(b"bye", Action::Close);
    let status = harness.event(READ_CLOSED, &[EOF, WriteCall(b"bye", Ok(3))]);
    assert_eq!(status, Status::Closed(CloseReason::PeerClosed));
}

#[test]
fn handler_that_yields_is_called_in_its_next_turn() {
    let handler = ScriptedHandler::new();
    let mut harness = Harness::new(handler.clone());
    harness.run(&[]);
    handler.set(b"a", Action::Yield);
    let calls = [ReadCall(Ok(b"x")), WriteCall(b"a", Ok(1))];
    assert_eq!(harness.event(READABLE, &calls), Status::Runnable);
    // The rest of the input waits.
    let status = harness.event(READABLE, &[WriteCall(b"a", Ok(1))]);
    assert_eq!(status, Status::Runnable);
    handler.set(b"b", Action::Continue);
    let calls = [
        WriteCall(b"b", Ok(1)),
        ReadCall(Ok(b"y")),
        WriteCall(b"b", Ok(1)),
    ];
    assert_eq!(harness.run(&calls), Status::Idle);
    let events = [
        Event::Open,
        Event::Input,
        Event::Resumed,
        Event::Resumed,
        Event::Input,
    ];
    assert_eq!(handler.take_events(), events);
}

#[test]
fn handler_that_yields_is_called_when_its_output_is_sent() {
    let handler = ScriptedHandler::new();
    let mut harness = Harness::new(handler.clone());
    harness.run(&[]);
    handler.set(b"a", Action::Yield);
    let calls = [ReadCall(Ok(b"x")), WriteCall(b"a", Err(WOULD_BLOCK))];
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
    assert_eq!(harness.run(&[]), Status::Idle);
    let status = harness.event(WRITABLE, &[WriteCall(b"a", Ok(1))]);
    assert_eq!(status, Status::Runnable, "not in this turn");
    assert_eq!(handler.take_events(), [Event::Open, Event::Input]);
    // A wake-up comes first, and leaves it as it was.
    handler.set(b"", Action::Continue);
    harness.connection.woken();
    assert_eq!(harness.run(&[]), Status::Idle);
    assert_eq!(handler.take_events(), [Event::Wake, Event::Resumed]);
}

#[test]
fn output_of_a_call_in_between_is_sent_before_the_turn() {
    let handler = ScriptedHandler::new();
    let mut harness = Harness::new(handler.clone());
    harness.run(&[]);
    handler.set(b"", Action::Yield);
    let status = harness.event(READABLE, &[ReadCall(Ok(b"x"))]);
    assert_eq!(status, Status::Runnable);
    handler.set(b"a", Action::Continue);
    harness.connection.woken();
    let status = harness.run(&[WriteCall(b"a", Err(WOULD_BLOCK))]);
    assert_eq!(status, Status::Idle);
    let status = harness.event(WRITABLE, &[WriteCall(b"a", Ok(1))]);
    assert_eq!(status, Status::Runnable);
    handler.set(b"", Action::Continue);
    assert_eq!(harness.run(&[]), Status::Idle);
    let events = [Event::Open, Event::Input, Event::Wake, Event::Resumed];
    assert_eq!(handler.take_events(), events);
}

#[test]
fn handler_that_yields_keeps_the_connection_open() {
    let handler = ScriptedHandler::new();
    let mut harness = Harness::new(handler.clone());
    handler.set(b"", Action::Yield);
    harness.connection.add_readiness(READ_CLOSED);
    assert_eq!(harness.run(&[]), Status::Runnable);
    harness.drain();
    assert_eq!(harness.run(&[]), Status::Runnable);
    harness.script.0.borrow_mut().push_back(Abort);
    harness.connection.abort_if_incomplete();
    assert!(harness.script.0.borrow().is_empty());
    handler.set(b"", Action::Continue);
    let status = harness.run(&[EOF, PollDelivery(true)]);
    assert_eq!(status, Status::Closed(CloseReason::PeerClosed));
    let events = [Event::Open, Event::Shutdown, Event::Resumed, Event::Eof];
    assert_eq!(handler.take_events(), events);
}

#[test]
fn part_of_an_answer_is_reset_when_it_is_closed() {
    let (mut harness, handler) = with_a_pending_answer();
    handler.set(b"ab", Action::Flush);
    harness.connection.woken();
    harness.resources.shared.budget = 2;
    // The budget ends with the output, before the call for it.
    assert_eq!(harness.run(&[WriteCall(b"ab", Ok(2))]), Status::Runnable);
    harness.script.0.borrow_mut().push_back(Abort);
    harness.connection.abort_if_incomplete();
    assert!(harness.script.0.borrow().is_empty());
}

/// Before what has arrived is read, and in a connection that is opened later, after its first call.
#[test]
fn drain_calls_the_handler_once() {
    let handler = ScriptedHandler::new();
    let mut harness = Harness::new(handler.clone());
    harness.drain();
    let calls = [ReadCall(Ok(b"ab")), WOULD_BLOCK_READ, PollDelivery(false)];
    assert_eq!(harness.run(&calls), Status::Idle);
    let events = [Event::Open, Event::Shutdown, Event::Input];
    assert_eq!(handler.take_events(), events);
    handler.set(b"bye", Action::Close);
    let calls = [
        ReadCall(Ok(b"c")),
        WriteCall(b"bye", Ok(3)),
        PollDelivery(true),
        ShutdownWrite(Ok(())),
        EOF,
    ];
    harness.event(READABLE, &calls);
    assert_eq!(handler.take_events(), [Event::Input]);
}

#[test]
fn drain_calls_no_handler_that_is_done() {
    let handler = ScriptedHandler::new();
    let mut harness = Harness::new(handler.clone());
    harness.run(&[]);
    handler.set(b"bye", Action::Close);
    let calls = [ReadCall(Ok(b"a")), WriteCall(b"bye", Err(WOULD_BLOCK))];
    harness.event(READABLE, &calls);
    harness.drain();
    assert_eq!(harness.run(&[]), Status::Idle);
    assert_eq!(handler.take_events(), [Event::Open, Event::Input]);
}

#[test]
fn call_for_a_shutdown_leaves_an_answer_that_is_to_come() {
    let (mut harness, handler) = with_a_pending_answer();
    handler.0.borrow_mut().consumes = false;
    handler.set(b"", Action::Continue);
    harness.drain();
    assert_eq!(harness.run(&[WOULD_BLOCK_READ]), Status::Idle);
    assert_eq!(handler.take_events(), [Event::Shutdown]);
    assert_eq!(harness.connection.state, State::Pending);
}

#[test]
fn drain_answers_data_that_arrived_without_an_event() {
    let mut harness = Harness::new(Echo);
    harness.drain();
    let calls = [
        ReadCall(Ok(b"ab")),
        WriteCall(b"ab", Ok(2)),
        WOULD_BLOCK_READ,
        PollDelivery(true),
        Unread(0),
        ShutdownWrite(Ok(())),
        WOULD_BLOCK_READ,
    ];
    assert_eq!(harness.run(&calls), Status::Idle);
    let lingering = State::Lingering(CloseReason::Shutdown);
    assert_eq!(harness.connection.state, lingering);
    let status = harness.event(READ_CLOSED, &[EOF]);
    assert_eq!(status, Status::Closed(CloseReason::Shutdown));
}

#[test]
fn drain_waits_for_delivery_and_answers_meanwhile() {
    let mut harness = Harness::new(Echo);
    harness.drain();
    let calls = [WOULD_BLOCK_READ, PollDelivery(false)];
    assert_eq!(harness.run(&calls), Status::Idle);
    let calls = [
        ReadCall(Ok(b"ab")),
        WriteCall(b"ab", Ok(2)),
        PollDelivery(false),
    ];
    assert_eq!(harness.event(READABLE, &calls), Status::Idle);
    assert_eq!(harness.connection.state, State::Reading);
    let calls = [
        PollDelivery(true),
        Unread(0),
        ShutdownWrite(Ok(())),
        WOULD_BLOCK_READ,
    ];
    assert_eq!(harness.event(WRITABLE, &calls), Status::Idle);
}

#[test]
fn drain_reads_what_has_arrived_before_the_acknowledgement() {
    let mut harness = Harness::new(Echo);
    harness.drain();
    let calls = [WOULD_BLOCK_READ, PollDelivery(true), Unread(2)];
    assert_eq!(harness.run(&calls), Status::Runnable);
    let calls = [
        ReadCall(Ok(b"ab")),
        WriteCall(b"ab", Ok(2)),
        PollDelivery(false),
    ];
    assert_eq!(harness.run(&calls), Status::Idle);
    assert_eq!(harness.connection.state, State::Reading);
}

#[test]
fn drain_after_eof_waits_for_delivery() {
    let mut harness = Harness::new(Echo);
    harness.drain();
    let calls = [EOF, PollDelivery(false)];
    assert_eq!(harness.event(READ_CLOSED, &calls), Status::Idle);
    let status = harness.event(WRITABLE, &[PollDelivery(true)]);
    assert_eq!(status, Status::Closed(CloseReason::PeerClosed));
}

/// A draining connection whose read deadline has passed: four bytes were answered, and it refuses more.
fn refusing() -> Harness<Echo> {
    let mut harness = Harness::new(Echo);
    harness.run(&[]);
    harness.drain();
    // The call for the shutdown is a round, too.
    assert_eq!(harness.run(&used_budget()[2..]), Status::Runnable);
    harness.script.0.borrow_mut().push_back(Unread(4));
    harness.limit_reading();
    let calls = [
        ReadCall(Ok(b"abcd")),
        WriteCall(b"abcd", Ok(4)),
        Unread(4),
        PollDelivery(true),
        Unread(4),
    ];
    assert_eq!(harness.run(&calls), Status::Runnable);
    let calls = [ReadCall(Ok(b"more")), WOULD_BLOCK_READ];
    assert_eq!(harness.run(&calls), Status::Idle);
    assert_eq!(harness.connection.state, State::Refusing);
    assert_eq!(harness.discarded(CloseReason::DrainTimeout), 4);
    harness
}

#[test]
fn client_that_goes_on_sending_after_the_read_deadline_gets_an_eof() {
    let mut harness = refusing();
    harness
        .connection
        .close_after_flush(CloseReason::Shutdown, 0);
    let calls = [PollDelivery(true), ShutdownWrite(Ok(())), WOULD_BLOCK_READ];
    assert_eq!(harness.run(&calls), Status::Idle);
    let lingering = State::Lingering(CloseReason::Shutdown);
    assert_eq!(harness.connection.state, lingering);
}

#[test]
fn stream_that_ends_after_the_read_deadline_is_reset() {
    let mut harness = refusing();
    let calls = [ReadCall(Ok(b"rest")), EOF, Abort];
    let status = harness.event(READ_CLOSED, &calls);
    assert_eq!(status, Status::Closed(CloseReason::DrainTimeout));
    assert_eq!(harness.discarded(CloseReason::DrainTimeout), 8);
}

#[test]
fn connection_that_refuses_at_the_deadline_of_a_drain_is_reset() {
    let mut harness = refusing();
    harness.script.0.borrow_mut().push_back(Abort);
    harness.connection.abort_if_incomplete();
    assert!(harness.script.0.borrow().is_empty());
}

#[test]
fn drain_after_the_read_deadline_answers_what_has_arrived() {
    let mut harness = Harness::new(Echo);
    harness.run(&[]);
    harness.drain();
    // The call for the shutdown is a round, too.
    assert_eq!(harness.run(&used_budget()[2..]), Status::Runnable);
    harness.script.0.borrow_mut().push_back(Unread(6));
    harness.limit_reading();
    let calls = [
        ReadCall(Ok(b"abcd")),
        WriteCall(b"abcd", Ok(4)),
        ReadCall(Ok(b"efgh")),
        WriteCall(b"efgh", Ok(4)),
        PollDelivery(true),
        Unread(0),
        ShutdownWrite(Ok(())),
        WOULD_BLOCK_READ,
    ];
    assert_eq!(harness.run(&calls), Status::Idle);
    let lingering = State::Lingering(CloseReason::Shutdown);
    assert_eq!(harness.connection.state, lingering);
}

#[test]
fn eof_that_had_arrived_is_answered_after_the_read_deadline() {
    let process = |event, context: &mut Context<'_>| {
        if event == Event::Eof {
            assert!(context.output.push(b"bye"));
        }
        Echo.process(event, context)
    };
    for ends in [true, false] {
        let mut harness = Harness::new(handler(process));
        harness.run(&[]);
        harness.drain();
        harness.script.0.borrow_mut().push_back(Unread(2));
        harness.limit_reading();
        let answer = [ReadCall(Ok(b"ab")), WriteCall(b"ab", Ok(2)), Unread(0)];
        let (rest, status): (&[_], _) = match ends {
            true => (
                &[EOF, WriteCall(b"bye", Ok(3)), PollDelivery(true)],
                Status::Closed(CloseReason::PeerClosed),
            ),
            false => (
                &[
                    WOULD_BLOCK_READ,
                    PollDelivery(true),
                    Unread(0),
                    ShutdownWrite(Ok(())),
                    WOULD_BLOCK_READ,
                ],
                Status::Idle,
            ),
        };
        assert_eq!(harness.run(&[&answer, rest].concat()), status);
    }
}

#[test]
fn connection_with_pending_output_is_reset() {
    let mut harness = Harness::new(Echo);
    let calls = [ReadCall(Ok(b"ab")), WriteCall(b"ab", Err(WOULD_BLOCK))];
    harness.event(READABLE, &calls);
    harness.script.0.borrow_mut().push_back(Abort);
    assert_eq!(harness.connection.buffered(), 2);
    harness.connection.abort_if_incomplete();
    assert!(harness.script.0.borrow().is_empty());
    let mut empty = Harness::new(Echo);
    empty.connection.abort_if_incomplete();
}

#[test]
fn unfinished_message_is_discarded_at_eof() {
    let wait = handler(|_, _| Action::Continue);
    let mut harness = Harness::new(wait);
    let status = harness.event(READ_CLOSED, &[ReadCall(Ok(b"a")), EOF]);
    assert_eq!(status, Status::Closed(CloseReason::PeerClosed));
    assert_eq!(harness.discarded(CloseReason::PeerClosed), 1);
    harness.connection.abort_if_incomplete();
}

/// Panics with a payload whose drop panics.
struct PanicTwice;

impl Drop for PanicTwice {
    fn drop(&mut self) {
        panic!("deliberate panic of a payload");
    }
}

#[test]
fn panic_of_a_panic_payload_is_contained() {
    let mut harness = Harness::new(handler(|_, _| std::panic::panic_any(PanicTwice)));
    let calls = [ShutdownWrite(Ok(())), WOULD_BLOCK_READ];
    harness.connection.add_readiness(READABLE);
    assert_eq!(harness.run(&calls), Status::Idle);
    let lingering = State::Lingering(CloseReason::Panic);
    assert_eq!(harness.connection.state, lingering);
}

#[test]
fn first_close_reason_wins() {
    let mut harness = Harness::new(Echo);
    harness
        .connection
        .close_after_flush(CloseReason::IdleTimeout, 0);
    harness
        .connection
        .close_after_flush(CloseReason::Shutdown, 0);
    harness.run(&[ShutdownWrite(Ok(())), WOULD_BLOCK_READ]);
    assert_eq!(
        harness.connection.state,
        State::Lingering(CloseReason::IdleTimeout)
    );
}

/// Each state has its timeout; in a shutdown, only those that wait for the client's EOF.
#[test]
fn deadline_depends_on_the_state() {
    let mut harness = Harness::new(Echo);
    harness.resources.shared.timeouts.linger = 80;
    harness.resources.shared.timeouts.drain = 1600;
    harness.resources.shared.timeouts.answer = Some(160);
    harness.connection.since = 100;
    let mut deadlines = |drain| {
        harness.resources.shared.drain = drain;
        [
            State::Reading,
            State::Flushing,
            State::Pending,
            State::Yielding,
            State::Yielded,
            State::Closing(CloseReason::PeerClosed),
            State::Closing(CloseReason::Handler),
            State::Lingering(CloseReason::Handler),
            State::Refusing,
        ]
        .map(|state| {
            harness.connection.state = state;
            harness.connection.deadline(&harness.resources.shared)
        })
    };
    let (idle, answer, flush, linger) = (900, 260, 180, 180);
    assert_eq!(
        deadlines(Drain::Off),
        [
            idle, idle, answer, NEVER, NEVER, idle, flush, linger, linger
        ]
    );
    let draining = Drain::Answering { deadline: 5000 };
    assert_eq!(
        deadlines(draining),
        [
            NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, linger, linger
        ]
    );
    // Refusing ends after a sixteenth of the shutdown at most.
    harness.resources.shared.timeouts.linger = 200;
    harness.connection.state = State::Refusing;
    let deadline = harness.connection.deadline(&harness.resources.shared);
    assert_eq!(deadline, deadline_after(100, 100));
}
