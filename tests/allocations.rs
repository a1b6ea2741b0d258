//! What the server allocates: nothing per message, and little for an idle connection.
//!
//! A single test in a crate of its own, because the allocator counts for the whole process. It includes the clients,
//! which therefore allocate nothing while it counts.

#![cfg(unix)]

#[allow(dead_code, unused_imports, reason = "only a part is needed")]
#[path = "it/harness/mod.rs"]
mod harness;

use std::alloc::System;

use harness::{TestServer, ping_all};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Fewer are tried if the descriptor limit is lower: each takes two in this process.
const CONNECTIONS_WANTED: usize = 10_000;
const OTHER_DESCRIPTORS: usize = 100;

/// Checks that 100,000 messages on 50 connections allocate nothing.
fn check_messages(server: &TestServer) {
    let clients = server.connect_many(50);
    ping_all(&clients, &[7; 64]);
    let region = Region::new(ALLOCATOR);
    for _ in 0..2_000 {
        ping_all(&clients, &[7; 64]);
    }
    let change = region.change();
    assert_eq!(
        (change.allocations, change.reallocations),
        (0, 0),
        "{change:?}"
    );
}

/// Checks what many connections keep after each has echoed once.
fn check_idle_connections(server: &TestServer) {
    let limit = rlimit::increase_nofile_limit(u64::MAX).expect("it can at least be read");
    let room = usize::try_from(limit).unwrap_or(usize::MAX) - OTHER_DESCRIPTORS;
    let count = CONNECTIONS_WANTED.min(room / 2);
    let mut clients = Vec::with_capacity(count);
    let region = Region::new(ALLOCATOR);
    for _ in 0..count {
        let client = server.connect();
        client.ping(&[7; 64]);
        clients.push(client);
    }
    let change = region.change();
    assert_eq!(server.stats().total().buffered, 0);
    let kept = change.bytes_allocated - change.bytes_deallocated;
    println!(
        "{count} idle connections keep {kept} bytes, {} each",
        kept / count
    );
    assert!(kept <= 200 * count, "{change:?}");
}

#[test]
fn messages_allocate_nothing_and_idle_connections_little() {
    let server = TestServer::echo();
    // In this order: the messages warm the server up for the connections.
    check_messages(&server);
    check_idle_connections(&server);
    server.stop();
}
