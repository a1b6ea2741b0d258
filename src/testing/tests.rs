use std::time::Duration;

use self::faults::{Fault, Faulty, Kind, Pipeline, Plan, Random, When};
use self::masked::Masked;
use super::*;
use crate::connection::handler::{Action, Context, Echo, Event};

#[allow(dead_code)] // it is a program
#[path = "../../examples/masked.rs"]
mod masked;

/// The faults of the program.
#[allow(dead_code)] // the program uses the rest
#[path = "../bin/echoserver/serve/faults/handler.rs"]
mod faults;

const SCHEDULES: u64 = 2000;

#[test]
fn repeats_in_a_trace_are_folded() {
    let lines = |events: &str| -> Vec<String> {
        let lines = events.chars().enumerate();
        lines
            .map(|(time, event)| format!("{time:>6} ms  {event}"))
            .collect()
    };
    let folded = fold_repeats(&lines("xababababyzz"));
    let shown: Vec<_> = folded.iter().map(|line| line[11..].trim()).collect();
    assert_eq!(
        shown,
        [
            "x",
            "a",
            "b",
            "... the last 2 lines 3 times more",
            "y",
            "z",
            "z"
        ]
    );
}

#[test]
fn failure_names_the_command_and_shows_the_bytes() {
    let wrong_model = |input: &[u8], _| input.to_ascii_uppercase();
    let failure = catch_unwind(|| simulate(|| Echo, &[b"a"], wrong_model, 100));
    let message = failure.expect_err("it must fail");
    let message = message.downcast_ref::<String>().expect("it is formatted");
    for part in [
        r#"expected "A"#,
        r#"written "a"#,
        "Input: the handler consumes",
        " cargo test testing::tests::failure_names_the_command_and_shows_the_bytes\n",
    ] {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

/// Rules 1 and 7 of the event loop.
#[test]
fn simulation_of_echo() {
    simulate(|| Echo, &[], |input, _| input.to_vec(), SCHEDULES);
}

/// Answers each byte with zero to three copies of it, depending on its value.
struct Repeat;

impl Handler for Repeat {
    fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
        while let Some(&byte) = context.input.data().first() {
            if !context.output.push(&repeat(&[byte], false)) {
                return Action::Flush;
            }
            context.input.consume(1);
        }
        Action::Continue
    }
}

fn repeat(input: &[u8], _ended: bool) -> Vec<u8> {
    let copies = |&byte: &u8| std::iter::repeat_n(byte, usize::from(byte % 4));
    input.iter().flat_map(copies).collect()
}

#[test]
fn simulation_of_a_handler_that_changes_lengths() {
    let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
    let vocabulary: Vec<&[u8]> = bytes.iter().map(|byte| &byte[..]).collect();
    let scenario = Scenario {
        handler: &|| Repeat,
        vocabulary: &vocabulary,
        model: &|seen| repeat(seen.input, seen.ended),
        min_buffer_size: 3,
        has_bulk: true,
    };
    run_scenario(&scenario, SCHEDULES);
}

/// Sends a greeting, echoes whole lines, closes after the line `quit`, resets after the line `drop`, and says farewell to a
/// client that ends.
struct Lines;

impl Handler for Lines {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        if event == Event::Open {
            assert!(context.output.push(b"hi\n"));
        }
        if event == Event::Eof {
            assert!(context.output.push(b"bye\n"));
        }
        while let Some(line) = context.input.line() {
            if line == b"drop\n" {
                return Action::Reset;
            }
            if !context.output.push(line) {
                return Action::Flush;
            }
            let (length, quit) = (line.len(), line == b"quit\n");
            context.input.consume(length);
            if quit {
                return Action::Close;
            }
        }
        Action::Continue
    }
}

fn lines(input: &[u8], ended: bool) -> Vec<u8> {
    let mut output = b"hi\n".to_vec();
    for line in input.split_inclusive(|&byte| byte == b'\n') {
        if line == b"drop\n" {
            return output;
        }
        if line.ends_with(b"\n") {
            output.extend_from_slice(line);
        }
        if line == b"quit\n" {
            return output;
        }
    }
    if ended {
        output.extend_from_slice(b"bye\n");
    }
    output
}

#[test]
fn simulation_of_a_handler_that_greets_and_closes() {
    let vocabulary: [&[u8]; 5] = [b"\n", b"hello\n", b"a longer line\n", b"quit\n", b"drop\n"];
    simulate(|| Lines, &vocabulary, lines, SCHEDULES);
}

/// Answers each byte later: an even one when it is woken, an odd one when its timer expires. A multiple of three has no
/// answer.
#[derive(Default)]
struct Later {
    waits_for: Option<Event>,
}

impl Handler for Later {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        match self.waits_for {
            Some(waits_for) if waits_for == event => {}
            // Leaves the one or the other as it was.
            Some(_) if matches!(event, Event::Wake | Event::Timer | Event::Shutdown) => {
                return Action::Continue;
            }
            Some(Event::Sent) => return Action::Flush,
            Some(_) => return Action::Pending,
            None => {}
        }
        if self.waits_for.is_some() {
            let Some(byte) = context.input.data().first().copied() else {
                unreachable!("the byte is still there")
            };
            if byte % 3 != 0 && !context.output.push(&[byte]) {
                // The same event again, after the output was sent.
                self.waits_for = Some(Event::Sent);
                return Action::Flush;
            }
            context.input.consume(1);
            self.waits_for = None;
        }
        match context.input.data().first() {
            None => return Action::Continue,
            Some(byte) if byte % 2 == 0 => {
                let _made_for_the_simulation = context.waker();
                self.waits_for = Some(Event::Wake);
            }
            Some(&byte) => {
                let timeout = Duration::from_millis(u64::from(byte / 2 % 4));
                context.set_timer(Some(timeout));
                self.waits_for = Some(Event::Timer);
            }
        }
        Action::Pending
    }
}

#[test]
fn simulation_of_a_handler_that_answers_later() {
    simulate(Later::default, &[], later, SCHEDULES);
}

fn later(input: &[u8], _ended: bool) -> Vec<u8> {
    input.iter().copied().filter(|byte| byte % 3 != 0).collect()
}

/// Echoes at most three bytes in a millisecond.
#[derive(Default)]
struct Limited {
    /// The current millisecond, and how many bytes may still be echoed in it.
    since: Duration,
    allowance: usize,
}

impl Handler for Limited {
    fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
        let now = context.now();
        assert!(now >= self.since, "time goes back");
        if now > self.since {
            (self.since, self.allowance) = (now, 3);
        }
        let count = context.input.len().min(context.output.room());
        let count = count.min(self.allowance);
        assert!(context.output.push(&context.input.data()[..count]));
        context.input.consume(count);
        self.allowance -= count;
        if context.input.is_empty() {
            Action::Continue
        } else if self.allowance > 0 {
            Action::Flush
        } else {
            context.set_timer(Some(Duration::from_millis(1)));
            Action::Pending
        }
    }
}

#[test]
fn simulation_of_a_handler_with_a_rate_limit() {
    simulate(Limited::default, &[], |input, _| input.to_vec(), SCHEDULES);
}

/// Answers a byte in each call, and then leaves the turn to others. Wakes itself for nothing.
struct Sliced;

impl Handler for Sliced {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        let _used_by_the_simulation = context.waker();
        if matches!(event, Event::Wake | Event::Shutdown) {
            return Action::Continue;
        }
        if let Some(&byte) = context.input.data().first() {
            if !context.output.push(&[byte]) {
                return Action::Flush;
            }
            context.input.consume(1);
        }
        match context.input.is_empty() {
            true => Action::Continue,
            false => Action::Yield,
        }
    }
}

#[test]
fn simulation_of_a_handler_that_yields() {
    simulate(|| Sliced, &[], |input, _| input.to_vec(), SCHEDULES);
}

/// Echoes, and sets its timer for nothing.
struct Timed;

impl Handler for Timed {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        if event == Event::Input {
            context.set_timer(Some(Duration::from_millis(5)));
        }
        Echo.process(event, context)
    }
}

#[test]
fn simulation_of_a_handler_with_a_timer() {
    simulate(|| Timed, &[], |input, _| input.to_vec(), SCHEDULES);
}

/// Wraps a handler, with buffers of their own in each case.
fn masked<H: Handler>(inner: H, capacity: usize) -> Masked<H> {
    Masked::new(inner, capacity).expect("memory for a test")
}

fn invert(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| !byte).collect()
}

/// The inner handler's [`Action::Pending`], [`Action::Flush`], timer and waker.
#[test]
fn simulation_of_a_wrapped_handler_that_answers_later() {
    let model = |input: &[u8], ended| invert(&later(&invert(input), ended));
    simulate(|| masked(Later::default(), 2), &[], model, SCHEDULES);
}

/// The inner handler's [`Action::Yield`].
#[test]
fn simulation_of_a_wrapped_handler_that_yields() {
    simulate(
        || masked(Sliced, 3),
        &[],
        |input, _| input.to_vec(),
        SCHEDULES,
    );
}

/// The inner handler's [`Action::Close`], [`Action::Reset`] and [`Event::Eof`].
#[test]
fn simulation_of_a_wrapped_handler_that_greets_and_closes() {
    let lines_of_clients = [
        &b"\n"[..],
        b"hello\n",
        b"a longer line\n",
        b"quit\n",
        b"drop\n",
    ];
    let inverted = lines_of_clients.map(invert);
    let vocabulary = inverted.each_ref().map(|line| &line[..]);
    let model = |input: &[u8], ended| invert(&lines(&invert(input), ended));
    simulate(|| masked(Lines, 14), &vocabulary, model, SCHEDULES);
}

/// Echoes whole lines, and in a shutdown those that have arrived and a farewell.
#[derive(Default)]
struct Polite {
    leaves: bool,
}

impl Handler for Polite {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        self.leaves |= event == Event::Shutdown;
        while let Some(line) = context.input.line() {
            if !context.output.push(line) {
                return Action::Flush;
            }
            let length = line.len();
            context.input.consume(length);
        }
        match self.leaves {
            false => Action::Continue,
            true if context.output.push(b"bye\n") => Action::Close,
            true => Action::Flush,
        }
    }
}

fn polite(seen: Seen<'_>) -> Vec<u8> {
    let read = &seen.input[..seen.shutdown_at.unwrap_or(seen.input.len())];
    let whole = read.iter().rposition(|&byte| byte == b'\n');
    let farewell = seen.shutdown_at.map_or(&b""[..], |_| b"bye\n");
    [&read[..whole.map_or(0, |end| end + 1)], farewell].concat()
}

#[test]
fn simulation_of_a_handler_that_says_goodbye() {
    let options = Options {
        vocabulary: &[b"\n", b"hello\n", b"a longer line\n"],
        min_buffer_size: None,
        schedules: SCHEDULES,
    };
    simulate_with(Polite::default, polite, options);
}

/// Answers each byte with its two digits, which need not fit into the buffer.
#[derive(Default)]
struct Digits {
    unsent: Vec<u8>,
}

impl Handler for Digits {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        let _used_by_the_simulation = context.waker();
        if matches!(event, Event::Wake | Event::Shutdown) {
            return Action::Continue;
        }
        loop {
            let sent = context.output.push_some(&self.unsent);
            self.unsent.drain(..sent);
            if !self.unsent.is_empty() {
                return Action::Flush;
            }
            let Some(byte) = context.input.data().first() else {
                return Action::Continue;
            };
            self.unsent = format!("{byte:02x}").into_bytes();
            context.input.consume(1);
        }
    }
}

#[test]
fn simulation_of_answers_that_are_larger_than_the_buffer() {
    let options = Options {
        vocabulary: &[b"a", b"some longer message"],
        min_buffer_size: Some(1),
        schedules: SCHEDULES,
    };
    simulate_with(Digits::default, |seen| digits(seen.input), options);
    // The inner handler's `Sent`.
    let wrapped = || masked(Digits::default(), 3);
    let model = |seen: Seen<'_>| invert(&digits(&invert(seen.input)));
    simulate_with(wrapped, model, options);
}

fn digits(input: &[u8]) -> Vec<u8> {
    let digits = input.iter().map(|byte| format!("{byte:02x}"));
    digits.collect::<String>().into_bytes()
}

/// A byte at a time, such messages need more than ten thousand ticks.
#[test]
fn simulation_of_long_messages() {
    let message = [b'x'; 3000];
    let options = Options {
        vocabulary: &[&message],
        min_buffer_size: Some(1),
        schedules: 40,
    };
    simulate_with(|| Echo, |seen| seen.input.to_vec(), options);
}

/// Misbehaves if the first byte is odd, which its model knows as well.
struct HalfFaulty<'a> {
    plan: &'a Plan,
    inner: Option<Faulty<'a>>,
}

impl Handler for HalfFaulty<'_> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        if self.inner.is_none() {
            let Some(&byte) = context.input.data().first() else {
                return Action::Continue;
            };
            let random = Random::new(0, byte.into());
            let pipeline = || (self.plan, Pipeline::new(self.plan, random));
            self.inner = Some(Faulty((byte % 2 == 1).then(pipeline)));
        }
        let inner = self.inner.as_mut().expect("it is set");
        inner.process(event, context)
    }
}

/// What a faulty connection answers. A close at a number of bytes answers what was read, so it has no model.
fn faulty(plan: &Plan, input: &[u8]) -> Vec<u8> {
    if input.first().is_none_or(|byte| byte % 2 == 0) {
        return input.to_vec();
    }
    let faults = |at: usize| {
        let when = When::Received(at as u64);
        let faults = plan.faults.iter().filter(move |it| it.when == when);
        faults.map(|fault| fault.kind)
    };
    let mut output = Vec::new();
    for (at, &byte) in input.iter().enumerate() {
        if faults(at).any(|kind| !kind.changes_a_byte()) {
            break;
        }
        match faults(at).next() {
            Some(Kind::Corrupt) => output.push(byte ^ (1 << (at % 8))),
            Some(Kind::Repeat) => output.extend([byte, byte]),
            Some(Kind::Drop) => {}
            _ => output.push(byte),
        }
    }
    output
}

fn simulate_faults(plan: &Plan, schedules: u64) {
    let handler = || HalfFaulty { plan, inner: None };
    let options = Options {
        vocabulary: &[],
        min_buffer_size: Some(1),
        schedules,
    };
    simulate_with(handler, |seen| faulty(plan, seen.input), options);
    for fault in &plan.faults {
        let count = plan.counts[fault.kind as usize].load(Ordering::Relaxed);
        let is_one_schedule = env_number("SIMULATION_SEED").is_some();
        assert!(count > 0 || is_one_schedule, "{fault:?} never happens");
    }
}

fn fault(kind: Kind, when: When) -> Fault {
    Fault { kind, when }
}

#[test]
fn simulation_of_faults_that_change_bytes() {
    let plan = Plan {
        faults: vec![
            fault(Kind::Corrupt, When::Received(2)),
            fault(Kind::Repeat, When::Received(4)),
            fault(Kind::Drop, When::Received(5)),
            fault(Kind::Drop, When::Received(0)),
        ],
        ..Plan::default()
    };
    simulate_faults(&plan, SCHEDULES / 2);
}

#[test]
fn simulation_of_delays_throttles_and_slices() {
    let plan = Plan {
        delay: Some(0..=20),
        throttle: Some(3000),
        slice: Some((1..=5, 3)),
        faults: vec![
            fault(Kind::Repeat, When::Received(1)),
            fault(Kind::Close, When::Eof),
        ],
        ..Plan::default()
    };
    simulate_faults(&plan, SCHEDULES / 2);
}

#[test]
fn simulation_of_faults_that_end_the_answers() {
    for kind in [Kind::Cut, Kind::Reset, Kind::Stall, Kind::Blackhole] {
        for delay in [None, Some(0..=9)] {
            let plan = Plan {
                delay,
                faults: vec![fault(kind, When::Received(6))],
                hold: 30,
                ..Plan::default()
            };
            simulate_faults(&plan, SCHEDULES / 8);
        }
    }
}

#[test]
fn simulation_of_resets_after_a_time() {
    let plan = Plan {
        throttle: Some(100),
        faults: vec![fault(Kind::Reset, When::Elapsed(15))],
        ..Plan::default()
    };
    simulate_faults(&plan, SCHEDULES / 2);
}
