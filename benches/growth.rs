//! How the costs of a worker grow with the number of its connections. Prints a table, and fails if a message costs much
//! more instructions among a million connections than among a thousand.
//!
//! ```sh
//! cargo bench --features testing --bench growth
//! ```
//!
//! The connections are simulated, the worker is not: see `testing::growth`. In each round 1 % of them send 64 bytes, and
//! idle timeouts are on. Each number of connections is measured in two processes of its own: one counts memory and time,
//! and one, in callgrind, user instructions.

// Counts become figures to read.
#![allow(clippy::cast_precision_loss)]

use std::alloc::System;
use std::env;
use std::process::{Command, ExitCode};
use std::time::Instant;

use echoserver::testing::growth::ManyConnections;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CONNECTIONS: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];

/// In this many rounds each connection sends two messages, and its timer expires once.
const ROUNDS: u64 = 200;

/// How many times the instructions of a message among the fewest connections it may cost among the most. The heap of timers
/// is twice as high then, which makes 1.18. One instruction per connection in each tick would make 2.6.
const MAX_GROWTH: f64 = 1.3;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().collect();
    if let [_, option, count] = &arguments[..]
        && option == "--measure"
    {
        measure(count.parse().expect("a number of connections"));
        return ExitCode::SUCCESS;
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("skipped: valgrind is not installed");
        return ExitCode::SUCCESS;
    }
    println!(
        "| connections | instructions per message | bytes per connection | ns per message | longest tick, ms |"
    );
    println!("| --- | --- | --- | --- | --- |");
    let instructions = CONNECTIONS.map(report);
    let growth = instructions[CONNECTIONS.len() - 1] / instructions[0];
    println!(
        "\nA message costs {growth:.2} times the instructions; at most {MAX_GROWTH} are expected."
    );
    if growth > MAX_GROWTH {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Prints a row of the table, and returns the instructions per message.
fn report(connections: u64) -> f64 {
    let this = env::current_exe().expect("a benchmark has a path");
    let count = connections.to_string();
    let [native, _] = output(Command::new(&this).args(["--measure", &count]));
    let mut callgrind = Command::new("valgrind");
    callgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    callgrind
        .arg("--toggle-collect=*exchange_messages*")
        .arg(&this);
    let [_, log] = output(callgrind.args(["--measure", &count]));
    let collected = log.split("Collected : ").nth(1).expect("callgrind counts");
    let collected: f64 = collected
        .lines()
        .next()
        .and_then(|number| number.parse().ok())
        .expect("a number");
    let messages = (connections / 100 * ROUNDS) as f64;
    let instructions = collected / messages;
    println!("| {connections} | {instructions:.0} | {} |", native.trim());
    instructions
}

/// Prints the bytes that a connection keeps, the time per message, and the longest tick.
fn measure(connections: u64) {
    let region = Region::new(ALLOCATOR);
    let mut worker = ManyConnections::open(connections);
    let start = Instant::now();
    let longest_tick = worker.exchange_messages(ROUNDS);
    let time = start.elapsed();
    let change = region.change();
    let kept = change.bytes_allocated - change.bytes_deallocated;
    let bytes = kept as f64 / connections as f64;
    let time = time.as_nanos() as f64 / worker.messages() as f64;
    println!(
        "{bytes:.0} | {time:.0} | {:.1}",
        longest_tick.as_secs_f64() * 1e3
    );
}

/// Runs a process; returns what it has written to stdout and to stderr.
fn output(command: &mut Command) -> [String; 2] {
    let output = command.output().expect("it starts");
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{command:?}: {stderr}");
    [stdout, stderr]
}
