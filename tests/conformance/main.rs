//! What an echo server must bear, tried from outside: over TCP, on any server.
//!
//! `ECHO_TARGET=host:port cargo test --test conformance target` tries that server. Without a target
//! this project's own is started. A case that fails says in one line what went wrong.
//!
//! The cases themselves are tried as well: a plain server with a thread per connection must pass
//! them all, and each of a number of faulty servers must fail with its fault named.

#![cfg(unix)]

#[path = "../../src/bin/echoserver/check/cases.rs"]
mod cases;
#[path = "../../src/bin/echoserver/check/client.rs"]
mod client;
#[allow(dead_code, unused_imports, reason = "only processes are needed here")]
#[path = "../it/harness/mod.rs"]
mod harness;
mod servers;

use std::env;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;

use cases::Case;
use client::{PATIENCE, Verdict};
use harness::Process;
use servers::{Fault, ThreadPerConnection};

/// Declares each case as a test of the target, and of the plain server.
macro_rules! cases {
    ($($case:ident)*) => {
        mod target {
            $(#[test]
            fn $case() -> super::Verdict {
                super::try_target(stringify!($case), super::cases::$case)
            })*
        }

        mod thread_per_connection {
            $(#[test]
            fn $case() -> super::Verdict {
                super::try_plain_server(stringify!($case), super::cases::$case)
            })*
        }
    };
}

cases! {
    every_byte_value
    every_size
    burst
    byte_by_byte
    pieces_of_every_size
    bulk
    commands
    never_speaks_first

    half_close_at_once
    half_close_after_all_is_read
    half_close_with_the_data
    half_close_at_a_buffers_edge
    half_close_then_read_late
    half_close_then_read_late_by_a_small_window
    half_close_by_fifty_late_readers
    half_close_of_the_reading_side_first

    late_reader
    slow_reader
    backpressure

    urgent_data_with_bytes_behind
    urgent_data_in_a_stream

    resets_at_any_point
    close_with_unread_answers
    connect_and_run
    churn

    crowd
    crowd_in_bulk
    flood_beside_a_ping
    never_readers_beside_a_ping
}

/// Tries the server that `ECHO_TARGET` names, or else this project's: it must also end in order,
/// with nothing unaccounted for.
fn try_target(name: &str, case: Case) -> Verdict {
    raise_descriptor_limit();
    let verdict = match env::var("ECHO_TARGET") {
        Ok(target) => resolve(&target).and_then(case),
        Err(_) => try_own_server(case),
    };
    verdict.map_err(|fault| format!("{name}: {fault}"))
}

fn try_own_server(case: Case) -> Verdict {
    let server = Process::serve(&["--workers=2"]);
    case(server.address())?;
    server.terminate();
    Ok(())
}

fn try_plain_server(name: &str, case: Case) -> Verdict {
    raise_descriptor_limit();
    let server = ThreadPerConnection::start(Fault::None);
    case(server.address()).map_err(|fault| format!("{name}: {fault}"))
}

/// The first address of `target` at which anyone answers.
fn resolve(target: &str) -> Verdict<SocketAddr> {
    let addresses = target.to_socket_addrs();
    let addresses = addresses.map_err(|error| format!("ECHO_TARGET={target}: {error}"))?;
    let mut answering =
        addresses.filter(|address| TcpStream::connect_timeout(address, PATIENCE).is_ok());
    answering
        .next()
        .ok_or_else(|| format!("ECHO_TARGET={target}: nobody answers"))
}

/// Cases run side by side in one process, some with hundreds of connections.
fn raise_descriptor_limit() {
    // Where it stays low, a case will say that it cannot connect.
    let _limit = rlimit::increase_nofile_limit(u64::MAX);
}

#[test]
fn faults_are_named() {
    let faults: [(Fault, Case, &str); 13] = [
        (
            Fault::DropsTheTail,
            cases::half_close_then_read_late,
            "of 3,000,000 bytes came back, then EOF",
        ),
        (
            Fault::DropsTheTail,
            cases::half_close_then_read_late_by_a_small_window,
            "bytes came back, then EOF",
        ),
        (
            Fault::StallsAfterABurst,
            cases::burst,
            "16,384 of 20,000 bytes came back, then nothing for 8 s",
        ),
        (
            Fault::ObeysQuit,
            cases::commands,
            r#"after "quit\n": 0 of 5 bytes came back, then EOF"#,
        ),
        (
            Fault::SpeaksFirst,
            cases::never_speaks_first,
            r#"the server spoke first: "220 ready\r\n""#,
        ),
        (
            Fault::LosesThePartialWritesRest,
            cases::late_reader,
            "of 12,000,000 was sent as",
        ),
        (
            Fault::ChangesAByte,
            cases::bulk,
            "byte 100,001 of 20,000,000 was sent as",
        ),
        (
            Fault::ResetsOnClose,
            cases::half_close_after_all_is_read,
            "everything came back, then a reset instead of EOF",
        ),
        (
            Fault::NeverEnds,
            cases::half_close_at_once,
            "then nothing for 8 s instead of EOF",
        ),
        (
            Fault::KnowsNoBound,
            cases::backpressure,
            "no bound: 67,108,864 bytes were taken from a client that reads nothing",
        ),
        (
            Fault::LosesUrgentData,
            cases::urgent_data_with_bytes_behind,
            "the urgent byte behind 0 bytes did not come back in its place",
        ),
        (
            Fault::ServesOneAtATime,
            cases::crowd,
            "among 300 open connections: 0 of 399 bytes came back, then nothing for 8 s",
        ),
        (
            Fault::DiesOfAReset,
            cases::resets_at_any_point,
            "cannot connect | 0 of 1 bytes came back, then",
        ),
    ];
    raise_descriptor_limit();
    thread::scope(|scope| {
        for (fault, case, named) in faults {
            scope.spawn(move || {
                let server = ThreadPerConnection::start(fault);
                let said = case(server.address()).expect_err(&format!("{fault:?} was not noticed"));
                assert!(
                    named.split(" | ").any(|named| said.contains(named)),
                    "{fault:?} was called {said:?}, not {named:?}"
                );
            });
        }
    });
}
