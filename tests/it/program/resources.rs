//! What the program uses: system calls per message and per connection, and threads.
//!
//! Counts do not depend on the machine. Each count of system calls is the difference of two runs that differ only
//! in the number of messages, so that the program's start and end, and its log, cancel out.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;

use crate::harness::{
    Client, Process, command, expect_all, installed, ping_all, possible_connections, program,
    random_bytes, send_all, total, wait_until,
};

/// System calls by name.
type Calls = BTreeMap<String, i64>;

/// Counts the calls of all threads. With -D the program is this process' child, and strace its grandchild.
const STRACE: [&str; 7] = ["-D", "-qq", "-f", "-c", "-U", "calls,name", "-o"];

/// Calls whose number depends on which thread is faster, for synchronisation, stacks and heaps; and a check of
/// the standard library that only debug builds make.
const NOISE: [&str; 7] = [
    "brk",
    "fcntl",
    "futex",
    "mmap",
    "mprotect",
    "munmap",
    "sched_yield",
];

/// Returns whether strace is installed and allowed to trace, and prints if not.
pub(crate) fn can_trace() -> bool {
    let tried = command("strace")
        .args(STRACE)
        .args(["/dev/null", "true"])
        .status();
    let can = tried.is_ok_and(|status| status.success());
    if !can {
        println!("skipped: strace is not installed, or not allowed to trace");
    }
    can
}

/// Returns a command that runs the program, in which no thread can start more than `count` others. Needs [`can_trace`].
pub(crate) fn with_few_threads(count: usize) -> Command {
    let mut strace = command("strace");
    strace.args(["-D", "-qq", "-f", "-o", "/dev/null"]);
    strace.args(["-e", "trace=clone,clone3", "-e"]);
    let first = count + 1;
    strace.arg(format!("inject=clone,clone3:error=EAGAIN:when={first}+"));
    strace.arg(program().get_program());
    strace
}

/// Ends the strace that delays a thread of `process`. The thread could not end before.
pub(crate) fn end_tracer(process: &Process) {
    let tracer = process.procfs().status().expect("it runs").tracerpid;
    let tracer = Pid::from_raw(tracer).expect("it is traced");
    kill_process(tracer, Signal::KILL).expect("it runs");
}

/// Returns the system calls of a program with one worker that serves `load`.
fn count_calls(load: impl FnOnce(&Process)) -> Calls {
    let file = NamedTempFile::new().unwrap();
    let mut strace = command("strace");
    strace
        .args(STRACE)
        .arg(file.path())
        .arg(program().get_program());
    let server = Process::start(strace.args(["--listen=127.0.0.1:0", "--workers=1"]));
    load(&server);
    server.terminate();
    let mut counts = String::new();
    wait_until("strace has written its counts", || {
        counts = fs::read_to_string(file.path()).unwrap_or_default();
        counts.ends_with("total\n")
    });
    let count = |line: &str| {
        let (count, name) = line.trim().split_once(char::is_whitespace)?;
        // Strace also reports threads that it leaves, after their number: `???( <detached ...>`.
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let name = Some(name.trim()).filter(|name| name.bytes().all(is_part))?;
        Some((name.to_owned(), count.parse().ok()?))
    };
    counts.lines().filter_map(count).collect()
}

/// Returns the calls that `many` has in excess of `few`.
fn difference(few: &Calls, many: &Calls) -> Calls {
    let mut difference = many.clone();
    for (name, count) in few {
        *difference.entry(name.clone()).or_default() -= count;
    }
    difference
        .retain(|name, count| *count != 0 && name != "total" && !NOISE.contains(&name.as_str()));
    difference
}

/// Checks that exactly these calls were made, except for a few that connecting and closing cost more or less,
/// depending on which thread is faster.
fn assert_calls<const N: usize>(made: &Calls, expected: [(&str, i64); N]) {
    const SLACK: u64 = 10;
    let is_near = |(name, count): &(&str, i64)| {
        let made = made.get(*name).copied().unwrap_or_default();
        made.abs_diff(*count) <= SLACK
    };
    let is_expected = |name: &String| expected.iter().any(|(expected, _)| expected == name);
    assert!(
        expected.iter().all(is_near) && made.keys().all(is_expected),
        "{made:?}, instead of {expected:?}"
    );
}

fn connect_fifty(server: &Process) -> Vec<Client> {
    let connect = |_| Client::connect(server.address());
    (0..50).map(connect).collect()
}

/// A wait, a read and a write.
/// Rule 5 of the event loop.
#[test]
fn message_costs_three_system_calls() {
    if !can_trace() {
        return;
    }
    let calls = |messages: usize| {
        count_calls(|server| {
            let client = Client::connect(server.address());
            for _ in 0..messages {
                client.ping(&[7; 64]);
            }
            client.close();
        })
    };
    let mut more = difference(&calls(100), &calls(2_100));
    // Whether a thread must be woken at the start and at the end depends on which one is faster.
    more.retain(|name, count| name != "write" || count.abs() > 2);
    assert_calls(
        &more,
        [
            ("epoll_wait", 2_000),
            ("recvfrom", 2_000),
            ("sendto", 2_000),
        ],
    );
}

#[test]
fn messages_of_many_connections_share_a_wait() {
    if !can_trace() {
        return;
    }
    let calls = |rounds: usize| {
        count_calls(|server| {
            let clients = connect_fifty(server);
            for _ in 0..rounds {
                ping_all(&clients, &[7; 64]);
            }
            clients.into_iter().for_each(Client::close);
        })
    };
    let mut more = difference(&calls(2), &calls(42));
    // These depend on how many clients came at once when they connected.
    more.retain(|name, _| !["accept4", "write"].contains(&name.as_str()));
    // How many messages share a wait depends on which thread is faster.
    let waits = more.remove("epoll_wait").unwrap_or_default();
    assert!(waits < 2_000, "{waits} waits for 2,000 messages");
    println!("2,000 messages: {} calls", 4_000 + waits);
    assert_calls(&more, [("recvfrom", 2_000), ("sendto", 2_000)]);
}

/// Connect, echo and close: the calls of all threads.
/// Rule 11 of the event loop.
#[test]
fn connection_costs_at_most_eight_system_calls() {
    if !can_trace() {
        return;
    }
    let calls = |rounds: usize| {
        count_calls(|server| {
            for _ in 0..rounds {
                // While the server is stopped, so that all come at once however fast the machine is.
                server.signal(Signal::STOP);
                let clients = connect_fifty(server);
                send_all(&clients, &[7; 64]);
                server.signal(Signal::CONT);
                expect_all(&clients, &[7; 64]);
                clients.into_iter().for_each(Client::close);
            }
        })
    };
    let more = difference(&calls(1), &calls(21));
    let sum: i64 = more.values().sum();
    println!("1,000 connections: {sum} calls, {more:?}");
    assert!(sum <= 8_000, "{sum} calls for 1,000 connections: {more:?}");
    for name in ["epoll_ctl", "sendto", "close"] {
        assert_eq!(more[name], 1_000, "{name}: {more:?}");
    }
    // Options are inherited from the listener.
    assert_eq!(more.get("setsockopt"), None);
}

/// Interest is registered once, and does not change when a connection gets stuck and continues.
/// Rule 5 of the event loop.
#[test]
fn stuck_connection_changes_no_interest() {
    if !can_trace() {
        return;
    }
    let bytes = random_bytes(1, 20 << 20);
    let calls = |transfers: usize| {
        count_calls(|server| {
            for _ in 0..transfers {
                let client = Client::connect_with_receive_buffer(server.address(), 64 << 10);
                let sent = client.send_until_stuck(&bytes);
                assert!(sent < bytes.len(), "it never got stuck");
                client.shutdown_write();
                client.expect(&bytes[..sent]);
                client.expect_eof();
            }
        })
    };
    let more = difference(&calls(1), &calls(5));
    println!("4 stuck transfers: {more:?}");
    assert_eq!(more["epoll_ctl"], 4);
}

#[test]
fn one_worker_serves_thousands_of_connections() {
    /// The acceptor, which is the main thread, the log's thread and that of signals.
    const OTHER_THREADS: i64 = 3;
    let server = Process::serve(&["--workers=1"]);
    let count = possible_connections(5_000);
    let connect = |_| Client::connect(server.address());
    let clients: Vec<_> = (0..count).map(connect).collect();
    // All of them send before the first one reads.
    for round in 0..3 {
        let messages = random_bytes(round, 8 * count);
        for (client, message) in clients.iter().zip(messages.chunks(8)) {
            client.send(message);
        }
        for (client, message) in clients.iter().zip(messages.chunks(8)) {
            client.expect(message);
        }
    }
    let threads = server.procfs().stat().expect("it runs").num_threads;
    assert_eq!(threads, 1 + OTHER_THREADS);
    clients.into_iter().for_each(Client::close);
    let log = server.terminate();
    assert_eq!(total(&log, "accepted"), count as u64, "{log}");
    assert_eq!(total(&log, "open"), 0, "{log}");
    println!("{log}");
}

/// A debugger of memory hides what the kernel maps, and with it what a program must not read.
#[test]
fn debug_build_runs_under_valgrind() {
    if !installed(&["valgrind"]) {
        return;
    }
    let mut valgrind = command("valgrind");
    valgrind.args(["-q", "--tool=none"]);
    valgrind.arg(program().get_program());
    let server = Process::start(valgrind.args(["--listen=127.0.0.1:0", "-w1"]));
    Client::connect(server.address()).check_echo(b"slowly");
    server.terminate();
}
