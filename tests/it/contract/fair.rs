//! A connection that floods starves neither the other connections of its worker nor those that are accepted.

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use echoserver::{Action, CloseReason};

use super::isolated::server_with_first;
use crate::harness::{Client, FnHandler, SetOnDrop, TestServer, random_bytes, wait_until};

/// Runs `test` while one connection writes and reads as fast as it can.
fn during_a_flood(server: &TestServer, test: impl FnOnce()) {
    let bytes = random_bytes(1, 8 << 20);
    let stop = AtomicBool::new(false);
    let flood = server.connect();
    thread::scope(|scope| {
        // Ends the flood even if `test` panics.
        let _end = SetOnDrop(&stop);
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                flood.send(&bytes);
            }
            flood.shutdown_write();
        });
        scope.spawn(|| while read_some(&flood) > 0 {});
        wait_until("the flood has used its budget", || {
            server.stats().total().bulk_turns > 0
        });
        let turns = server.stats().total().bulk_turns;
        test();
        wait_until("the flood has continued", || {
            server.stats().total().bulk_turns > turns
        });
    });
}

/// Reads some bytes and returns how many; 0 is EOF.
fn read_some(client: &Client) -> usize {
    (&client.0).read(&mut [0; 16 << 10]).expect("no reset")
}

/// Pings repeatedly on each connection, and returns the longest time that one took.
fn slowest_ping(clients: &[Client]) -> Duration {
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        for client in clients {
            let start = Instant::now();
            client.ping(b"ping");
            slowest = slowest.max(start.elapsed());
        }
    }
    slowest
}

/// Rule 2 of the event loop.
#[test]
fn flood_does_not_starve_other_connections() {
    let server = TestServer::echo();
    let clients = server.connect_many(50);
    let without = slowest_ping(&clients);
    during_a_flood(&server, || {
        let with = slowest_ping(&clients);
        println!("slowest of 1,000 pings: {without:?}, and {with:?} beside a flood");
    });
    clients.into_iter().for_each(Client::close);
}

#[test]
fn flood_does_not_delay_new_connections_forever() {
    let server = TestServer::echo();
    during_a_flood(&server, || {
        for _ in 0..50 {
            let client = server.connect();
            client.ping(b"ping");
            client.close();
        }
    });
}

/// A handler can flood its worker without any input.
#[test]
fn endless_output_does_not_starve_other_connections() {
    let generate = || {
        FnHandler::new(|_, context| {
            let room = context.output.room();
            assert!(context.output.push(&vec![7; room]));
            Action::Flush
        })
    };
    let server = server_with_first(generate);
    let (endless, other) = (server.connect(), server.connect());
    other.ping(b"before");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _end = SetOnDrop(&stop);
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                read_some(&endless);
            }
        });
        wait_until("it has used its budget", || {
            server.stats().total().bulk_turns > 0
        });
        for _ in 0..100 {
            other.ping(b"ping");
        }
    });
    endless.reset();
    wait_until("it is closed", || server.stats().open() == 1);
    other.ping(b"after");
    other.close();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::Reset), 1);
    assert_eq!(total.closed.get(CloseReason::PeerClosed), 1);
}
