//! The limit for the memory of all buffers, with two thousand clients that never read.
//!
//! The kernel has one limit for the memory of all TCP connections. This test comes near it, so other tests cannot run beside it.

#![cfg(all(target_os = "linux", feature = "cli"))]

#[allow(dead_code, unused_imports, reason = "only a part is needed")]
#[path = "it/harness/mod.rs"]
mod harness;

use std::thread;
use std::time::{Duration, Instant};

use harness::{
    Client, Process, never_readers, possible_connections, random_bytes, total, wait_until,
};

/// Sends messages one after the other, and reads each back.
fn send_messages(client: Client, count: usize, length: usize) {
    let bytes = random_bytes(4, length);
    (0..count).for_each(|_| client.ping(&bytes));
    client.close();
}

/// Peaks of clients that never read, and then clients that do, beside those that are stuck.
#[test]
fn clients_that_never_read_take_no_memory_from_others() {
    const LIMIT: u64 = 32 << 20;
    const OTHER_MEMORY: u64 = 20_000_000;
    /// More than it takes to count as stuck.
    const STUCK: Duration = Duration::from_millis(300);
    let server = Process::serve(&["--workers=2", "--buffer-memory=32MiB"]);
    let bytes = random_bytes(5, 20 << 20);
    for _ in 0..3 {
        let stuck = never_readers(server.address(), possible_connections(2000), 300_000);
        let last = Instant::now();
        wait_until("the clients are stuck", || last.elapsed() > STUCK);
        thread::scope(|scope| {
            for _ in 0..5 {
                for (count, length) in [(100, 64), (5, 1 << 20)] {
                    let client = Client::connect(server.address());
                    scope.spawn(move || send_messages(client, count, length));
                }
                let client = Client::connect(server.address());
                scope.spawn(|| client.check_echo(&bytes));
            }
        });
        drop(stuck);
    }
    let status = server.procfs().status().expect("it runs");
    let peak = status.vmhwm.expect("it has memory") * 1024;
    assert!(peak < LIMIT + OTHER_MEMORY, "{peak}");
    let log = server.terminate();
    assert_eq!(total(&log, "closed_peer_closed"), 3 * 15, "{log}");
    assert!(total(&log, "closed_buffer_memory") > 0, "{log}");
    assert_eq!(total(&log, "buffer_memory"), 0, "{log}");
}
