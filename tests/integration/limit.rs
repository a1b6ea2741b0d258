//! At the connection limit accepting pauses: clients wait in the backlog, and who is in notices
//! nothing.

use std::num::NonZeroUsize;

use echoserver::Config;

use crate::support::{Client, TestServer, config, ping_all, send_all, until};

fn limited(max_connections: usize, workers: usize) -> TestServer {
    TestServer::echo_with(Config {
        max_connections,
        workers: NonZeroUsize::new(workers).unwrap(),
        ..config()
    })
}

#[test]
fn clients_beyond_the_limit_wait_until_somebody_leaves() {
    let server = limited(10, 2);
    let mut clients = server.connect_many(50);
    send_all(&mut clients, b"question");
    // They are served in the order of their coming, each as soon as another has left.
    for mut client in clients {
        client.expect(b"question");
        assert!(server.stats().open() <= 10);
        client.close();
    }
    let stats = server.stop();
    assert_eq!(stats.accepted, 50);
    assert!(stats.accept_pauses > 0);
    assert_eq!(stats.accept_errors, 0);
}

#[test]
fn a_pause_costs_the_others_nothing() {
    let server = limited(5, 1);
    let mut clients = server.connect_many(5);
    ping_all(&mut clients, b"in");
    let mut waiting = server.connect_many(100);
    until("accepting pauses", || server.stats().accept_pauses == 1);
    let wakes = server.stats().total().wakes;
    for _ in 0..200 {
        for client in &mut clients {
            client.ping(b"ping");
        }
    }
    let stats = server.stats();
    assert_eq!((stats.accepted, stats.open()), (5, 5));
    assert_eq!(stats.total().wakes, wakes + 1000);
    assert_eq!(stats.accept_pauses, 1, "it does not try over and over");

    // One leaves, one comes in, by and by.
    for waiting in &mut waiting {
        clients.remove(0).close();
        waiting.ping(b"in");
        clients.push(Client(waiting.0.try_clone().unwrap()));
    }
    assert!(server.stop().accept_pauses > 1);
}

/// Resets free places too, and so do clients that had gone before they were accepted.
#[test]
fn every_way_to_leave_makes_room() {
    let server = limited(1, 1);
    for round in 0..100 {
        let mut first = server.connect();
        first.ping(b"in");
        let second = server.connect();
        let mut third = server.connect();
        match round % 2 {
            0 => first.reset(),
            _ => drop(first),
        }
        match round % 3 {
            0 => second.reset(),
            _ => drop(second),
        }
        third.ping(b"in");
        third.close();
    }
}

#[test]
fn one_connection_at_a_time_is_a_server_too() {
    let server = limited(1, 3);
    for _ in 0..100 {
        let mut client = server.connect();
        client.ping(b"ping");
        client.close();
    }
    assert_eq!(server.stop().accepted, 100);
}
