//! System calls per message and per connection: counted, since counts do not depend on the machine.
//!
//! Each is the difference of two runs that differ in the number of messages only, so that the
//! program's start and end, and the log, cancel out.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs, process};

use crate::support::{Client, Program, check_echo, expect_all, pattern, ping_all, send_all, until};

type Calls = BTreeMap<String, i64>;

/// Counts the calls of all threads. -D: the program is this process' child, and strace its grandchild.
const STRACE: [&str; 7] = ["-D", "-qq", "-f", "-c", "-U", "calls,name", "-o"];

/// Calls whose number depends on which thread was faster, for each other or for their stacks and
/// heaps; and a check of the standard library's that only debug builds make.
const NOISE: [&str; 7] = [
    "brk",
    "fcntl",
    "futex",
    "mmap",
    "mprotect",
    "munmap",
    "sched_yield",
];

/// Whether there is an strace, and it may trace.
fn can_trace() -> bool {
    let mut command = Command::new("strace");
    let tried = command.args(STRACE).args(["/dev/null", "true"]).status();
    let can = tried.is_ok_and(|status| status.success());
    if !can {
        println!("skipped: there is no strace, or it may not trace");
    }
    can
}

/// The system calls of a program with one worker, by name, while `load` is on it.
fn calls(name: &str, load: impl FnOnce(&Program)) -> Calls {
    let file = Scratch::new(name);
    let mut command = Command::new("strace");
    command.args(STRACE).arg(&file.0);
    command.args([env!("CARGO_BIN_EXE_echoserver"), "--workers", "1"]);
    let program = Program::start_by(command);
    load(&program);
    let (status, log) = program.stop();
    assert!(status.success(), "{log}");
    let mut counted = String::new();
    until("strace has counted", || {
        counted = fs::read_to_string(&file.0).unwrap_or_default();
        counted.ends_with("total\n")
    });
    let count = |line: &str| {
        let (count, name) = line.trim().split_once(char::is_whitespace)?;
        Some((name.trim().to_owned(), count.parse().ok()?))
    };
    counted.lines().filter_map(count).collect()
}

/// A file for strace to write to.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("echoserver-{name}-{}", process::id());
        Self(env::temp_dir().join(name))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _never_written = fs::remove_file(&self.0);
    }
}

/// The calls that the second run makes beyond the first.
fn difference(few: &Calls, many: &Calls) -> Calls {
    let mut difference = many.clone();
    difference.remove("total");
    for (name, count) in few.iter().filter(|(name, _)| *name != "total") {
        *difference.entry(name.clone()).or_default() -= count;
    }
    difference.retain(|name, count| *count != 0 && !NOISE.contains(&name.as_str()));
    difference
}

/// Calls that the opening and the end of connections may cost more or less, by who was faster.
const SLACK: i64 = 10;

/// That exactly these calls were made, give or take the slack.
fn assert_calls<const N: usize>(made: &Calls, expected: [(&str, i64); N]) {
    let near = |(name, count): &(&str, i64)| {
        let made = made.get(*name).copied().unwrap_or_default();
        made.abs_diff(*count) <= SLACK.unsigned_abs()
    };
    let known = |name: &String| expected.iter().any(|(known, _)| known == name);
    assert!(
        expected.iter().all(near) && made.keys().all(known),
        "{made:?}, instead of {expected:?}"
    );
}

fn ping_in_turn(program: &Program, count: usize) {
    let mut client = Client::connect(program.address());
    for _ in 0..count {
        client.ping(&[7; 64]);
    }
    client.close();
}

/// Nothing but the wait, the read and the answer.
#[test]
fn a_message_costs_three_calls() {
    if !can_trace() {
        return;
    }
    let few = calls("few-messages", |program| ping_in_turn(program, 100));
    let many = calls("many-messages", |program| ping_in_turn(program, 2_100));
    assert_calls(
        &difference(&few, &many),
        [
            ("epoll_wait", 2_000),
            ("recvfrom", 2_000),
            ("sendto", 2_000),
        ],
    );
}

/// In a crowd the wait is shared, and nothing is added to the other two.
#[test]
fn a_message_in_a_crowd_costs_two_calls_and_a_share() {
    if !can_trace() {
        return;
    }
    let rounds = |count: i64| {
        move |program: &Program| {
            let mut clients = crowd(program);
            for _ in 0..count {
                ping_all(&mut clients, &[7; 64]);
            }
            clients.into_iter().for_each(Client::close);
        }
    };
    let few = calls("few-rounds", rounds(2));
    let many = calls("many-rounds", rounds(42));
    let mut more = difference(&few, &many);
    // These depend on how many came at once, when they connected.
    more.retain(|name, _| !["accept4", "write"].contains(&name.as_str()));
    // How large a share depends on who was faster, too.
    let waits = more.remove("epoll_wait").unwrap_or_default();
    assert!(waits < 2_000, "{waits} waits for 2,000 messages");
    println!("2,000 messages: {} calls", 4_000 + waits);
    assert_calls(&more, [("recvfrom", 2_000), ("sendto", 2_000)]);
}

/// Connect, echo, close: all calls of all threads.
#[test]
fn a_connection_in_a_crowd_costs_at_most_eight_calls() {
    if !can_trace() {
        return;
    }
    let crowds = |count: i64| {
        move |program: &Program| {
            for _ in 0..count {
                // So that they come as a crowd, however fast the machine is.
                program.signal("STOP");
                let mut clients = crowd(program);
                send_all(&mut clients, &[7; 64]);
                program.signal("CONT");
                expect_all(&mut clients, &[7; 64]);
                clients.into_iter().for_each(Client::close);
            }
        }
    };
    let few = calls("few-crowds", crowds(1));
    let many = calls("many-crowds", crowds(21));
    let more = difference(&few, &many);
    let sum: i64 = more.values().sum();
    println!("1,000 connections: {sum} calls, {more:?}");
    assert!(sum <= 8_000, "{sum} calls for 1,000 connections: {more:?}");
    for name in ["epoll_ctl", "sendto", "close"] {
        assert_eq!(more[name], 1_000, "{name}: {more:?}");
    }
    // Options come from the listener.
    assert_eq!(more.get("setsockopt"), None);
}

/// Interest is told once. Being stuck, and going on, changes nothing about it.
#[test]
fn a_stuck_connection_costs_no_calls_for_interest() {
    if !can_trace() {
        return;
    }
    let bytes = pattern(1, 20 << 20);
    let transfers = |count: usize| {
        let bytes = &bytes;
        move |program: &Program| {
            for _ in 0..count {
                check_echo(program.address(), bytes);
            }
        }
    };
    let few = calls("few-transfers", transfers(1));
    let many = calls("many-transfers", transfers(5));
    let more = difference(&few, &many);
    println!("4 transfers of 20 MB: {more:?}");
    assert_eq!(more["epoll_ctl"], 4);
    // Some sends have found no room, and the rest was sent later.
    assert!(
        more["epoll_wait"] > 8,
        "the transfers were stuck at times: {more:?}"
    );
}

fn crowd(program: &Program) -> Vec<Client> {
    (0..50)
        .map(|_| Client::connect(program.address()))
        .collect()
}
