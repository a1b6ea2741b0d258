//! What the server allocates: nothing per message, and little for an idle connection.
//!
//! A single test in a crate of its own, because the allocator counts for the whole process. It includes the clients,
//! which therefore allocate nothing while it counts.

#![cfg(unix)]

use std::alloc::System;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

use echoserver::{Address, Config, Echo, Handle, Server};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const DEADLINE: Duration = Duration::from_secs(30);

/// Fewer are tried if the descriptor limit is lower: each takes two in this process.
const CONNECTIONS_WANTED: usize = 10_000;
const OTHER_DESCRIPTORS: usize = 100;

fn connect(address: SocketAddr) -> TcpStream {
    let client = TcpStream::connect_timeout(&address, DEADLINE).expect("it listens");
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client.set_nodelay(true).unwrap();
    client
}

/// Sends a message on each connection and reads it back.
fn ping(clients: &[TcpStream]) {
    for mut client in clients {
        client.write_all(&[7; 64]).unwrap();
    }
    for mut client in clients {
        let mut answer = [0; 64];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [7; 64]);
    }
}

/// Checks that 100,000 messages on 50 connections allocate nothing.
fn check_messages(address: SocketAddr) {
    let clients: Vec<_> = (0..50).map(|_| connect(address)).collect();
    ping(&clients);
    let region = Region::new(ALLOCATOR);
    for _ in 0..2_000 {
        ping(&clients);
    }
    let change = region.change();
    assert_eq!(
        (change.allocations, change.reallocations),
        (0, 0),
        "{change:?}"
    );
}

/// Checks what many connections keep after each has echoed once.
fn check_idle_connections(address: SocketAddr, server: &Handle) {
    let limit = rlimit::increase_nofile_limit(u64::MAX).expect("it can at least be read");
    let room = usize::try_from(limit).unwrap_or(usize::MAX) - OTHER_DESCRIPTORS;
    let count = CONNECTIONS_WANTED.min(room / 2);
    let mut clients = Vec::with_capacity(count);
    let region = Region::new(ALLOCATOR);
    for index in 0..count {
        clients.push(connect(address));
        ping(&clients[index..]);
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
    let server = Server::bind(Config {
        listen: vec![Address::Ip(([127, 0, 0, 1], 0).into())],
        workers: NonZeroUsize::MIN,
        ..Config::default()
    })
    .unwrap();
    let [Address::Ip(address)] = *server.addresses() else {
        panic!("not one IP address")
    };
    let handle = server.handle();
    let serving = thread::spawn(move || server.run(|_peer| Echo));
    // In this order: the messages warm the server up for the connections.
    check_messages(address);
    check_idle_connections(address, &handle);
    handle.shut_down();
    assert_eq!(serving.join().unwrap().unwrap().check_balance(), None);
}
