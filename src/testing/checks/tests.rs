use std::sync::Arc;

use super::*;
use crate::connection::shared::Timeouts;
use crate::server::table::Inspection;
use crate::stats::Counters;
use crate::system::NEVER;
use crate::testing::connection::{Seen, WriteShutdown};
use crate::testing::kernel::{Parameters, Shutdown, Source, TickPhase};
use crate::testing::random::Rng;

pub(in crate::testing) const WORKER: usize = 1;

/// The idle timeout of 100 ms, rounded up to a multiple of 12.
const DEADLINE: Millis = 108;

/// A server at rest with one connection, to whose client all output is delivered.
pub(in crate::testing) fn kernel_at_rest() -> Kernel<'static> {
    let mut rng = Rng::new(1);
    let parameters = Parameters {
        workers: 1,
        listeners: 1,
        buffer_size: 16,
        max_pairs: 2,
        max_connections: 1,
        timeouts: Timeouts {
            idle: Some(100),
            answer: Some(64),
            close: 200,
            linger: 50,
            stuck: 60,
            drain: 320,
        },
        lacks_memory: false,
        ..Parameters::random(&mut rng, 1)
    };
    let counters = Arc::new(Counters::new(1));
    let echo = &|seen: Seen<'_>| seen.input.to_vec();
    let mut kernel = Kernel::new(rng, parameters, echo, Arc::clone(&counters), false);
    kernel.connect(b"abc");
    kernel.listeners[0].waiting.clear();
    kernel.deregister(ACCEPTOR, Source::Listener(0));
    let connection = &mut kernel.connections[0];
    connection.accepted = true;
    connection.registered = Some((WORKER, 0));
    connection.read_policy = ReadPolicy::Immediately;
    connection.close_policy = ClosePolicy::KeepOpen;
    let positions = [
        &mut connection.arrived,
        &mut connection.read,
        &mut connection.written,
        &mut connection.sent,
        &mut connection.acknowledged,
        &mut connection.received,
    ];
    for position in positions {
        *position = 3;
    }
    kernel.descriptors = 1;
    (kernel.bytes_read, kernel.bytes_written) = (3, 3);
    kernel.pollers[WORKER].wake_at = Some(100);
    kernel.pollers[WORKER].ticks = 1;
    counters.acceptor.accepted.add(1);
    let worker = &counters.workers[0];
    worker.assigned.add(1);
    worker.bytes_in.add(3);
    worker.bytes_out.add(3);
    kernel
}

/// Checks a worker after its tick and at rest, and what its clients have received.
fn check_at_rest(kernel: &mut Kernel<'_>) {
    kernel.check_acceptor_tick();
    kernel.check_limit();
    let deadline = if kernel.pollers[WORKER].draining {
        NEVER
    } else {
        DEADLINE
    };
    let connection = &kernel.connections[0];
    let inspection = Inspection {
        deadline,
        is_bulk: connection.is_bulk,
        is_queued: connection.is_queued,
    };
    let token = connection.registered.map(|(_, token)| token);
    kernel.check_worker_tick(WORKER, 1, |wanted| {
        (token == Some(wanted) && wanted == 0).then_some(inspection)
    });
    kernel.check_balance();
    kernel.check_rest();
    kernel.check_complete();
}

/// Closes the connection for a reason, and checks it.
fn close(kernel: &mut Kernel<'_>, reason: CloseReason) {
    let (holders, victim) = (
        kernel.holders(WORKER).count(),
        kernel.check_victim(WORKER, 0),
    );
    kernel.connections[0].close = Some(Close {
        at: 50,
        read: 3,
        reset: false,
        had_room: false,
        had_input: false,
        deadline: NEVER,
        holders,
        victim,
    });
    kernel.pollers[WORKER].uncounted_drop = Some(0);
    kernel.counters.workers[0].closed[reason as usize].add(1);
    kernel.check_last_close(WORKER);
}

pub(in crate::testing) fn shut_down(kernel: &mut Kernel<'_>, deadline: Millis) {
    let sequence = kernel.sequence;
    kernel.shutdown = Some(Shutdown { deadline, sequence });
    kernel.pollers[WORKER].draining = true;
    kernel.pollers[WORKER].wake_at = Some(deadline);
}

pub(in crate::testing) fn end_write_half(kernel: &mut Kernel<'_>, at: Millis) {
    kernel.connections[0].write_shutdown = Some(WriteShutdown {
        at,
        read: 3,
        had_input: false,
        deadline: NEVER,
        ignored_event: false,
        ignored_input: false,
    });
}

#[test]
fn server_at_rest_keeps_its_promises() {
    let mut kernel = kernel_at_rest();
    check_at_rest(&mut kernel);
    assert_eq!(kernel.failure, None);
}

/// At 100 ms, a connection holds bytes, and has made no progress for some time. It is aborted.
fn hold(kernel: &mut Kernel<'_>, id: usize, quiet_since: Millis) {
    kernel.pollers[WORKER].now = 100;
    if id == kernel.connections.len() {
        kernel.connect(b"d");
    }
    let connection = &mut kernel.connections[id];
    connection.registered = Some((WORKER, id));
    connection.appended = connection.written + 1;
    (connection.quiet_since, connection.abort_requested) = (quiet_since, true);
}

/// Changes a kernel so that a promise is broken.
type Break = fn(&mut Kernel<'_>);

/// What [`check_at_rest`] must report, and how the kernel gets there.
const AT_REST: [(&str, Break); 28] = [
    (
        "its deadline is 108 ms; idle since 10 ms, it should be 120 ms",
        |kernel| {
            kernel.connections[0].quiet_since = 10;
        },
    ),
    ("130 accepts in one tick", |kernel| {
        kernel.pollers[ACCEPTOR].new_connections = 130;
    }),
    ("has number 2, and was accepted as number 1", |kernel| {
        kernel.connections[0].number = 1;
        kernel.check_number(0, 2);
    }),
    ("1 connections are open, 0 are allowed", |kernel| {
        kernel.parameters.max_connections = 0;
    }),
    ("4 bytes were read and 3 written, but 3 and 3", |kernel| {
        kernel.bytes_read += 1;
    }),
    ("130 connections were taken over in one tick", |kernel| {
        kernel.pollers[WORKER].new_connections = 130;
    }),
    ("130 handlers were woken in one tick", |kernel| {
        kernel.pollers[WORKER].wakes = 130;
    }),
    (
        "33 bytes are buffered for 1 connections, more than 32",
        |kernel| {
            kernel.counters.workers[0].buffered.add(33);
        },
    ),
    (
        "1 connections hold bytes, and the worker has 1 pairs",
        |kernel| {
            kernel.parameters.max_pairs = 1;
            kernel.connections[0].appended = 4;
        },
    ),
    ("has input and neither was served nor waits", |kernel| {
        kernel.connections[0].is_unserved = true;
    }),
    (
        "2 bulk turns in one tick, at most 1 are its share",
        |kernel| {
            kernel.counters.workers[0].bulk_turns.add(2);
        },
    ),
    ("the tick did not use its share", |kernel| {
        kernel.connections[0].is_queued = true;
    }),
    ("has work left and does not wait for its turn", |kernel| {
        let connection = &mut kernel.connections[0];
        connection.action = Some(Action::Yield);
        connection.appended = 3;
    }),
    ("is bulk, and its last turn has moved little", |kernel| {
        kernel.connections[0].is_bulk = true;
    }),
    ("is not in the table of its worker", |kernel| {
        kernel.connections[0].registered = Some((WORKER, 7));
    }),
    ("is still open after its deadline, 108 ms", |kernel| {
        kernel.pollers[WORKER].now = 112;
    }),
    (
        "worker sleeps beyond the deadline of connection 0",
        |kernel| {
            kernel.pollers[WORKER].wake_at = None;
        },
    ),
    (
        "the timer of connection 0, 5 ms, has not called",
        |kernel| {
            kernel.connections[0].timer = Some(5);
        },
    ),
    (
        "connection 0 was woken, and its handler was not",
        |kernel| {
            kernel.connections[0].is_woken = true;
        },
    ),
    ("is stalled: 1 unread bytes, and no event", |kernel| {
        kernel.connections[0].read = 2;
    }),
    (
        "is stalled: 0 unread bytes and EOF, and no event",
        |kernel| {
            kernel.connections[0].half_closed = true;
        },
    ),
    ("is stalled: 2 of 3 bytes of output written", |kernel| {
        kernel.connections[0].written = 2;
    }),
    ("and the drain has not closed it", |kernel| {
        shut_down(kernel, 1000);
        kernel.connections[0].shutdown_at = Some(3);
    }),
    (
        "4 bytes in, +0 generated by handlers, but 3 out",
        |kernel| {
            kernel.counters.workers[0].bytes_in.add(1);
            kernel.bytes_read += 1;
        },
    ),
    (
        "1 accepted connections wait, 1 are open, and every",
        |kernel| {
            kernel.counters.acceptor.accepted.add(1);
        },
    ),
    ("1 clients wait in the backlog, 1 are open", |kernel| {
        kernel.parameters.max_connections = 2;
        kernel.listeners[0].waiting.push_back(0);
        kernel.pollers[ACCEPTOR].wake_at = None;
    }),
    ("sent 3 of 3 bytes and received 2 of 3", |kernel| {
        kernel.connections[0].received = 2;
    }),
    (
        "closed its side, and the connection is still open",
        |kernel| {
            let connection = &mut kernel.connections[0];
            (connection.half_closed, connection.eof_reported) = (true, true);
        },
    ),
];

/// The same for the checks of a shutdown, which each entry runs.
const IN_A_SHUTDOWN: [(&str, Break); 10] = [
    ("was not called for the shutdown", |kernel| {
        shut_down(kernel, 1000);
        check_at_rest(kernel);
    }),
    ("has not refused input until its deadline", |kernel| {
        shut_down(kernel, 1000);
        kernel.note_refusal(0);
        kernel.check_refusal(0);
    }),
    ("thread 1 sleeps after the deadline", |kernel| {
        shut_down(kernel, 10);
        kernel.pollers[ACCEPTOR].ended = true;
        kernel.pollers[WORKER].wake_at = Some(20);
        kernel.check_expired();
    }),
    (
        "1 connections are open after the server has ended",
        |kernel| {
            kernel.check_ended();
        },
    ),
    ("1 connections assigned, but 0 closed", |kernel| {
        kernel.descriptors = 0;
        kernel.check_ended();
    }),
    ("client 0 was waiting when the shutdown began", |kernel| {
        shut_down(kernel, 1000);
        kernel.listeners[0].waiting.push_back(0);
        kernel.close_listener(0);
    }),
    ("is read from in the last quarter of a shutdown", |kernel| {
        kernel.current = WORKER;
        kernel.pollers[WORKER].stopped_reading = Some(0);
        kernel.connections[0].read_limit = Some(2);
        kernel.check_reading(0, 1, false);
    }),
    (
        "ends in a shutdown before its output is delivered",
        |kernel| {
            shut_down(kernel, 1000);
            kernel.current = WORKER;
            kernel.connections[0].acknowledged = 2;
            kernel.check_delivered(0);
        },
    ),
    ("the EOF of its client was not read", |kernel| {
        kernel.connections[0].ended_in_time = true;
        kernel.check_eof(0);
    }),
    ("the acceptor dropped client 0; expired: false", |kernel| {
        kernel.pollers[ACCEPTOR].uncounted_drop = Some(0);
        kernel.check_last_close(ACCEPTOR);
    }),
];

/// What [`close`] must report for a reason.
const AT_A_CLOSE: [(CloseReason, &str, Break); 28] = [
    (CloseReason::PeerClosed, "no EOF was read", |_| {}),
    (
        CloseReason::PeerClosed,
        "2 of 3 bytes of output were",
        |kernel| {
            kernel.connections[0].written = 2;
        },
    ),
    (
        CloseReason::PeerClosed,
        "its output was not delivered",
        |kernel| {
            shut_down(kernel, 1000);
            kernel.connections[0].eof_reported = true;
            kernel.connections[0].acknowledged = 2;
        },
    ),
    (CloseReason::PeerClosed, "it was reset", |kernel| {
        kernel.connections[0].abort_requested = true;
    }),
    (CloseReason::PeerClosed, "2 closes were counted", |kernel| {
        kernel.counters.workers[0].closed[0].add(1);
    }),
    (
        CloseReason::Handler,
        "the handler did not request it",
        |_| {},
    ),
    (
        CloseReason::Handler,
        "write side was not shut down first",
        |kernel| {
            kernel.connections[0].close_requested = Some(0);
        },
    ),
    (
        CloseReason::Handler,
        "it lingered for 10 ms only",
        |kernel| {
            kernel.connections[0].close_requested = Some(0);
            end_write_half(kernel, 40);
        },
    ),
    (
        CloseReason::Panic,
        "the reason is not that of the handler",
        |kernel| {
            kernel.connections[0].close_requested = Some(0);
        },
    ),
    (CloseReason::Shutdown, "it was not drained", |_| {}),
    (
        CloseReason::Shutdown,
        "not all input before the shutdown",
        |kernel| {
            shut_down(kernel, 1000);
            end_write_half(kernel, 40);
            kernel.connections[0].arrived_before_drain = 4;
        },
    ),
    (
        CloseReason::IdleTimeout,
        "not idle for the whole timeout",
        |_| {},
    ),
    (
        CloseReason::IdleTimeout,
        "not idle for the whole timeout",
        |kernel| {
            end_write_half(kernel, 40);
        },
    ),
    (
        CloseReason::IdleTimeout,
        "a shutdown has a deadline of",
        |kernel| {
            shut_down(kernel, 1000);
        },
    ),
    (
        CloseReason::DrainTimeout,
        "the shutdown had not expired",
        |_| {},
    ),
    (
        CloseReason::DrainTimeout,
        "was cut without a reset",
        |kernel| {
            kernel.connections[0].refusal = Some(Refusal { read: 3 });
            kernel.connections[0].eof_reported = true;
        },
    ),
    (CloseReason::AnswerTimeout, "no answer was to come", |_| {}),
    (
        CloseReason::AnswerTimeout,
        "not awaited for the whole timeout",
        |kernel| {
            kernel.connections[0].action = Some(Action::Pending);
            kernel.connections[0].appended = 3;
            kernel.connections[0].abort_requested = true;
        },
    ),
    (
        CloseReason::HandlerReset,
        "the handler did not request it",
        |kernel| {
            kernel.connections[0].abort_requested = true;
        },
    ),
    (
        CloseReason::HandlerReset,
        "the handler did not request it",
        |kernel| {
            kernel.connections[0].action = Some(Action::Reset);
        },
    ),
    (CloseReason::Reset, "the client did not reset it", |_| {}),
    (CloseReason::OutOfMemory, "no allocation failed", |_| {}),
    (
        CloseReason::BufferMemory,
        "there were buffers left",
        |kernel| {
            hold(kernel, 0, 0);
        },
    ),
    (
        CloseReason::BufferMemory,
        "neither stuck nor in need",
        |kernel| {
            kernel.parameters.max_pairs = 1;
            hold(kernel, 0, 90);
        },
    ),
    (
        CloseReason::BufferMemory,
        "another was stuck for longer",
        |kernel| {
            hold(kernel, 0, 20);
            hold(kernel, 1, 10);
        },
    ),
    (CloseReason::BufferMemory, "another was stuck", |kernel| {
        hold(kernel, 0, 90);
        hold(kernel, 1, 10);
        kernel.current = WORKER;
        kernel.note_turn(0);
    }),
    (CloseReason::Error, "no call failed", |_| {}),
    (
        CloseReason::BufferFull,
        "no message or answer exceeds",
        |_| {},
    ),
];

#[track_caller]
fn assert_reports(message: &str, break_promise: impl FnOnce(&mut Kernel<'_>)) {
    let mut kernel = kernel_at_rest();
    break_promise(&mut kernel);
    let failure = kernel.failure.unwrap_or_default();
    assert!(failure.contains(message), "{message:?}: {failure:?}");
}

#[test]
fn each_broken_promise_is_reported() {
    for (message, break_promise) in AT_REST {
        assert_reports(message, |kernel| {
            break_promise(kernel);
            check_at_rest(kernel);
        });
    }
    for (message, break_promise) in IN_A_SHUTDOWN {
        assert_reports(message, break_promise);
    }
    for (reason, message, break_promise) in AT_A_CLOSE {
        assert_reports(message, |kernel| {
            break_promise(kernel);
            close(kernel, reason);
        });
    }
}

/// What the calls of a worker in one tick must report.
#[test]
fn turns_in_the_wrong_order_are_reported() {
    let bulk_turn = |kernel: &mut Kernel<'_>| {
        kernel.counters.workers[0].bulk_turns.add(1);
        kernel.account(0, 1, 0);
    };
    let rows: [(&str, Break); 4] = [
        ("driven although it was not its turn: Events", |kernel| {
            kernel.pollers[WORKER].tick_phase = TickPhase::Events;
            kernel.connections[0].is_bulk = true;
            kernel.account(0, 1, 0);
        }),
        ("driven although it was not its turn: RunQueue", |kernel| {
            kernel.pollers[WORKER].tick_phase = TickPhase::RunQueue;
            kernel.account(0, 1, 0);
        }),
        ("was not served at once", |kernel| {
            kernel.pollers[WORKER].must_serve.push(0);
            kernel.start_turn(WORKER, None);
        }),
        ("has exceeded its budget", |kernel| {
            kernel.pollers[WORKER].tick_phase = TickPhase::Events;
            kernel.parameters.turns.interactive_budget = 4;
            kernel.account(0, 5, 4);
        }),
    ];
    for (message, happen) in rows {
        assert_reports(message, |kernel| {
            kernel.current = WORKER;
            happen(kernel);
        });
    }
    assert_reports("has two turns in the run queue", |kernel| {
        kernel.current = WORKER;
        bulk_turn(kernel);
        bulk_turn(kernel);
    });
    assert_reports("a second turn while connection 1 waits for one", |kernel| {
        kernel.current = WORKER;
        kernel.connect(b"abc");
        kernel.connections[1].registered = Some((WORKER, 1));
        kernel.connections[1].is_queued = true;
        bulk_turn(kernel);
        kernel.pollers[WORKER].ticks += 1;
        bulk_turn(kernel);
    });
}

/// A turn without a call can be that of any connection that waits for one.
#[test]
fn turn_that_makes_no_call_ends_the_wait_for_a_turn() {
    let mut kernel = kernel_at_rest();
    kernel.current = WORKER;
    kernel.connect(b"abc");
    kernel.connections[1].registered = Some((WORKER, 1));
    for turns in [1, 2] {
        kernel.connections[1].is_queued = true;
        kernel.counters.workers[0].bulk_turns.add(turns);
        kernel.account(0, 1, 0);
        kernel.pollers[WORKER].ticks += 1;
    }
    assert_eq!(kernel.failure, None);
}

/// A connection whose timer expires has a turn at once, and no longer waits for one in the run queue.
#[test]
fn turn_at_a_timer_ends_the_wait_for_a_turn() {
    let mut kernel = kernel_at_rest();
    kernel.current = WORKER;
    kernel.connect(b"abc");
    kernel.connections[1].registered = Some((WORKER, 1));
    let bulk_turn = |kernel: &mut Kernel<'_>| {
        kernel.counters.workers[0].bulk_turns.add(1);
        kernel.account(0, 1, 0);
    };
    for _tick in 0..2 {
        kernel.connections[1].is_queued = true;
        kernel.pollers[WORKER].tick_phase = TickPhase::AfterEvents;
        kernel.account(1, 1, 0);
        bulk_turn(&mut kernel);
        kernel.pollers[WORKER].ticks += 1;
    }
    // Once more without a turn at a timer.
    kernel.connections[1].is_queued = true;
    bulk_turn(&mut kernel);
    assert_eq!(kernel.failure, None);
}
