//! A flood starves nobody: not its neighbours on the same worker, and not those who want to connect.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{Client, TestServer, pattern, until};

/// Runs `beside` while one connection floods the server: writes and reads as fast as it can.
fn during_a_flood(server: &TestServer, beside: impl FnOnce()) {
    let bytes = pattern(1, 8 << 20);
    let over = AtomicBool::new(false);
    let mut reader = server.connect();
    let mut sender = reader.twin();
    thread::scope(|scope| {
        // Ends the flood even if `beside` fails.
        let _end = Raised(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                sender.send(&bytes);
            }
            sender.end();
        });
        scope.spawn(|| while reader.read_some() > 0 {});
        until("the flood has spent its budget", || {
            server.stats().total().yields > 0
        });
        let yields = server.stats().total().yields;
        beside();
        until("the flood has gone on", || {
            server.stats().total().yields > yields
        });
    });
}

/// Is raised at the end of its scope.
struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The slowest of some pings on each of the clients.
fn slowest_ping(clients: &mut [Client]) -> Duration {
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        for client in &mut *clients {
            let start = Instant::now();
            client.ping(b"ping");
            slowest = slowest.max(start.elapsed());
        }
    }
    slowest
}

#[test]
fn a_flood_starves_no_neighbour() {
    let server = TestServer::echo();
    let mut clients = server.connect_many(50);
    let quiet = slowest_ping(&mut clients);
    during_a_flood(&server, || {
        let flooded = slowest_ping(&mut clients);
        println!("slowest of 1,000 pings: {quiet:?}, and beside a flood {flooded:?}");
    });
    clients.into_iter().for_each(Client::close);
}

#[test]
fn a_flood_keeps_nobody_from_connecting() {
    let server = TestServer::echo();
    during_a_flood(&server, || {
        for _ in 0..50 {
            let mut client = server.connect();
            client.ping(b"ping");
            client.close();
        }
    });
}
