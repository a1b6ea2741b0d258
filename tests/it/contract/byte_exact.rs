//! Each connection gets back exactly the bytes it sent, in order, and nothing else.
//!
//! The program passes every case of `echoserver check --strict`, with buffers smaller and larger than its messages, one
//! worker and several, over TCP and a Unix-domain socket. The suite `conformance` shows that the cases detect faults.
#![cfg(all(unix, feature = "cli"))]

use crate::harness::{Process, cases_with, report, total};

/// Cases that send few bytes. A server with a buffer of one byte makes two system calls for each.
const SMALL: [&str; 8] = [
    "every-byte-value",
    "byte-by-byte",
    "commands",
    "never-speaks-first",
    "half-close-at-once",
    "half-close-after-all-is-read",
    "connect-and-leave",
    "churn",
];

/// How many cases there are, and how many of them need TCP.
const ALL: usize = 29;
const TCP_ONLY: usize = 2;

/// Runs the cases `only`, or all, on a server with these buffers and workers, and checks that it has lost nothing.
fn check_passes(buffer_size: &str, workers: &str, only: &[&str]) {
    let options = ["--buffer-size", buffer_size, "--workers", workers];
    let server = Process::serve(&options);
    check_address(&server.address().to_string(), only, 0);
    check_counters(server);
}

fn check_address(address: &str, only: &[&str], skipped: usize) {
    let only: Vec<_> = only.iter().map(|case| format!("--only={case}")).collect();
    let mut arguments = vec!["--strict", "--jobs=8"];
    arguments.extend(only.iter().map(String::as_str));
    let (status, report) = report("check", address, &arguments);
    assert_eq!(cases_with(&report, "fail"), [], "{address}");
    let count = if only.is_empty() { ALL } else { only.len() };
    assert_eq!(cases_with(&report, "ok").len(), count - skipped);
    assert_eq!(cases_with(&report, "skip").len(), skipped);
    assert_eq!(status, 0);
}

/// The only bytes that do not come back are those of clients that reset.
fn check_counters(server: Process) {
    let log = server.terminate();
    let count = |name| total(&log, name);
    let by_clients = count("closed_peer_closed") + count("closed_reset");
    assert_eq!(by_clients, count("closed"), "{log}");
    assert_eq!(count("discarded_reset"), count("discarded"), "{log}");
}

#[test]
fn check_passes_with_one_worker() {
    for buffer_size in ["4096", "64K"] {
        check_passes(buffer_size, "1", &[]);
    }
}

#[test]
fn check_passes_with_four_workers() {
    for buffer_size in ["4096", "64K", "4M"] {
        check_passes(buffer_size, "4", &[]);
    }
}

#[test]
fn check_passes_with_tiny_buffers() {
    for (buffer_size, workers) in [("1", "1"), ("1", "4"), ("7", "1"), ("7", "4")] {
        check_passes(buffer_size, workers, &SMALL);
    }
}

#[test]
fn check_passes_over_a_unix_domain_socket() {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("unix:{}/echo", folder.path().display());
    let server = Process::serve(&["--workers=4", "--listen", &address]);
    check_address(&address, &[], TCP_ONLY);
    check_counters(server);
}
