use super::*;
use crate::connection::handler::Action;
use crate::testing::checks::tests::{WORKER, end_write_half, kernel_at_rest, shut_down};
use crate::testing::kernel::TickPhase;

/// Something that happens to connection 0, which is idle since 0 ms.
type Happen = fn(&mut Kernel<'_>);

/// A worker in a tick at 40 ms, in which something has happened.
fn kernel_after(happen: Happen) -> Kernel<'static> {
    let mut kernel = kernel_at_rest();
    kernel.current = WORKER;
    kernel.pollers[WORKER].now = 40;
    happen(&mut kernel);
    kernel
}

/// Checks a deadline, for which the worker wakes up, as it does for a shutdown.
fn check(kernel: &mut Kernel<'_>, held: Millis) -> Option<String> {
    kernel.pollers[WORKER].wake_at = Some(held.min(1000));
    kernel.check_deadline(WORKER, 0, held);
    kernel.failure.take()
}

fn answer_later(kernel: &mut Kernel<'_>) {
    let connection = &mut kernel.connections[0];
    connection.action = Some(Action::Pending);
    connection.appended = connection.written;
}

fn refuse(kernel: &mut Kernel<'_>, at: Millis) {
    shut_down(kernel, 1000);
    kernel.pollers[WORKER].now = at;
    kernel.note_refusal(0);
    kernel.pollers[WORKER].now = 40;
}

/// What the connection does in each row of the model and since when, its deadline, and how the kernel gets there.
const DEADLINES: [(&str, Millis, Happen); 24] = [
    ("idle since 0 ms", 108, |_| {}),
    ("idle since 0 ms", NEVER, |kernel| {
        kernel.parameters.timeouts.idle = None;
    }),
    ("idle since 40 ms", 144, |kernel| kernel.account(0, 1, 0)),
    ("idle since 40 ms", 144, |kernel| kernel.account(0, 0, 1)),
    // A call that would block or finds the EOF, and input that is not read.
    ("idle since 0 ms", 108, |kernel| {
        kernel.account(0, 0, 0);
        kernel.connections[0].arrived += 1;
    }),
    ("waiting for its answer since 0 ms", 64, answer_later),
    ("waiting for its answer since 0 ms", NEVER, |kernel| {
        kernel.parameters.timeouts.answer = None;
        answer_later(kernel);
    }),
    ("waiting for its turn since 0 ms", NEVER, |kernel| {
        answer_later(kernel);
        kernel.connections[0].action = Some(Action::Yield);
    }),
    // Input is no answer, but a part of one is.
    ("waiting for its answer since 0 ms", 64, |kernel| {
        answer_later(kernel);
        kernel.account(0, 1, 0);
    }),
    ("waiting for its answer since 40 ms", 104, |kernel| {
        answer_later(kernel);
        kernel.account(0, 0, 1);
    }),
    ("idle since 0 ms", 108, |kernel| {
        answer_later(kernel);
        kernel.connections[0].appended += 1;
    }),
    ("idle since 40 ms", 144, |kernel| {
        answer_later(kernel);
        kernel.connections[0].action = Some(Action::Continue);
        kernel.note_call(0, Some(Action::Pending));
    }),
    // Neither a call without a wait nor one that goes on waiting is a sign of life.
    ("idle since 0 ms", 108, |kernel| kernel.note_call(0, None)),
    ("flushing since 0 ms", 200, |kernel| {
        kernel.connections[0].close_requested = Some(0);
    }),
    ("flushing since 40 ms", 250, |kernel| {
        kernel.connections[0].close_requested = Some(0);
        kernel.account(0, 0, 1);
    }),
    ("lingering since 0 ms", 54, |kernel| {
        end_write_half(kernel, 0);
        kernel.account(0, 1, 0);
    }),
    ("lingering since 0 ms", 54, |kernel| {
        end_write_half(kernel, 0);
        shut_down(kernel, 1000);
    }),
    ("lingering since 40 ms", 90, |kernel| {
        end_write_half(kernel, 0);
        shut_down(kernel, 1000);
        kernel.account(0, 1, 0);
    }),
    // The tick that begins the shutdown discards input before it, and after it.
    ("lingering since 0 ms", 54, |kernel| {
        end_write_half(kernel, 0);
        kernel.pollers[WORKER].sees_shutdown = true;
        kernel.pollers[WORKER].tick_phase = TickPhase::Events;
        kernel.account(0, 1, 0);
    }),
    ("lingering since 40 ms", 90, |kernel| {
        end_write_half(kernel, 0);
        kernel.pollers[WORKER].sees_shutdown = true;
        kernel.account(0, 1, 0);
    }),
    ("in a shutdown and quiet since 0 ms", NEVER, |kernel| {
        shut_down(kernel, 1000);
    }),
    ("in a shutdown and quiet since 0 ms", NEVER, |kernel| {
        kernel.connections[0].close_requested = Some(0);
        shut_down(kernel, 1000);
    }),
    ("refusing since 30 ms", 50, |kernel| {
        refuse(kernel, 30);
        kernel.account(0, 1, 0);
    }),
    ("refusing since 30 ms", 42, |kernel| {
        refuse(kernel, 30);
        kernel.parameters.timeouts.linger = 12;
    }),
];

#[test]
fn only_the_promised_deadline_is_accepted() {
    for (action, due, happen) in DEADLINES {
        assert_eq!(check(&mut kernel_after(happen), due), None, "{action}");
        for held in [due - 1, due.saturating_add(1), 41, NEVER] {
            if held == due {
                continue;
            }
            let (held_text, due) = (show(held), show(due));
            let message =
                format!("connection 0: its deadline is {held_text}; {action}, it should be {due}");
            assert_eq!(check(&mut kernel_after(happen), held), Some(message));
        }
    }
}

#[test]
fn only_a_connection_in_the_run_queue_outlives_its_deadline() {
    let linger: Happen = |kernel| end_write_half(kernel, 0);
    let refuse: Happen = |kernel| refuse(kernel, 0);
    let idle: Happen = |_| {};
    for (held, happen, waits_for_its_turn) in
        [(54, linger, false), (20, refuse, true), (108, idle, true)]
    {
        for is_queued in [false, true] {
            let mut kernel = kernel_after(happen);
            kernel.connections[0].is_queued = is_queued;
            kernel.pollers[WORKER].now = held;
            let message = format!("connection 0 is still open after its deadline, {held} ms");
            let failure = (!is_queued || !waits_for_its_turn).then_some(message);
            assert_eq!(check(&mut kernel, held), failure);
        }
    }
}

#[test]
fn refusal_that_is_over_waits_in_the_run_queue_without_a_deadline() {
    let mut kernel = kernel_after(|kernel| refuse(kernel, 0));
    assert_ne!(check(&mut kernel, NEVER), None);
    kernel.connections[0].is_queued = true;
    assert_eq!(check(&mut kernel, NEVER), None);
    kernel.pollers[WORKER].now = 19;
    assert_ne!(check(&mut kernel, NEVER), None);
}

#[test]
fn worker_must_be_awake_at_a_deadline() {
    for (deadline, held, happen) in [
        (108, 108, (|_| {}) as Happen),
        (90, NEVER, |kernel| shut_down(kernel, 90)),
    ] {
        for (wake_at, is_late) in [(deadline, false), (deadline + 1, true)] {
            let mut kernel = kernel_after(happen);
            kernel.pollers[WORKER].wake_at = Some(wake_at);
            kernel.check_deadline(WORKER, 0, held);
            assert_eq!(kernel.failure.is_some(), is_late, "{deadline}, {wake_at}");
        }
    }
}
