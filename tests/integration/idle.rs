//! An idle connection costs no wake-up, and is left alone unless it was said otherwise.

use std::io::Write;
use std::thread;
use std::time::Duration;

use echoserver::{CloseReason, Config};

use crate::support::{
    Client, HeldServer, TestServer, config, connections_possible, pattern, ping_all, until,
};

/// One client pings beside many idle ones: the worker wakes once for each ping, and for nothing else.
fn check_wakes(config: Config) {
    let server = TestServer::echo_with(config);
    let mut idle = server.connect_many(connections_possible(1_000));
    ping_all(&mut idle, b"once");
    let mut busy = server.connect();
    busy.ping(b"first");
    assert_eq!(server.stats().total().buffered, 0);
    let wakes = server.stats().total().wakes;
    for _ in 0..1_000 {
        busy.ping(b"ping");
    }
    assert_eq!(server.stats().total().wakes, wakes + 1_000);
}

#[test]
fn idle_connections_wake_nobody() {
    check_wakes(config());
}

#[test]
fn an_idle_timeout_wakes_nobody_before_its_time() {
    check_wakes(Config {
        idle_timeout: Some(Duration::from_secs(3600)),
        ..config()
    });
}

/// A busy poll that finds nothing is no wake either.
#[test]
fn busy_polling_wakes_for_events_only() {
    check_wakes(Config {
        busy_poll: Duration::from_millis(1),
        ..config()
    });
}

/// A worker that finds many connections ready serves them all after one wake.
#[test]
fn a_crowd_is_served_in_one_turn() {
    let (held, mut clients) = HeldServer::new(connections_possible(1_000));
    let messages = pattern(1, 8 * clients.len());
    for (client, message) in clients.iter_mut().zip(messages.chunks(8)) {
        client.send(message);
    }
    let wakes = held.server.stats().total().wakes;
    let server = held.release();
    for (client, message) in clients.iter_mut().zip(messages.chunks(8)) {
        client.expect(message);
    }
    // One for the crowd, and two for the connection that had held the worker, which has ended.
    let woken = server.stats().total().wakes - wakes;
    assert!(
        woken <= 3,
        "{woken} wakes for {} connections",
        clients.len()
    );
    clients.into_iter().for_each(Client::close);
}

#[test]
fn the_idle_timeout_ends_idle_connections_only() {
    let server = TestServer::echo_with(Config {
        idle_timeout: Some(Duration::from_secs(1)),
        ..config()
    });
    let (mut busy, mut silent, mut quiet) = (server.connect(), server.connect(), server.connect());
    quiet.ping(b"once");
    let waiting = thread::spawn(move || {
        silent.expect_end();
        quiet.expect_end();
    });
    while !waiting.is_finished() {
        busy.ping(b"ping");
    }
    waiting.join().unwrap();
    busy.close();
    let total = server.stop().total();
    assert_eq!(total.closed_for(CloseReason::IdleTimeout), 2);
    assert_eq!(total.closed_for(CloseReason::PeerClosed), 1);
}

#[test]
fn the_idle_timeout_ends_a_client_that_does_not_read() {
    let server = TestServer::echo_with(Config {
        idle_timeout: Some(Duration::from_millis(100)),
        ..config()
    });
    let bytes = pattern(2, 40 << 20);
    let mut client = Client::connect_narrow(server.address());
    // It is reset in the midst of this: what it has sent is not all read.
    assert!(client.0.write_all(&bytes).is_err());
    until("it is closed", || server.stats().open() == 0);
    let total = server.stop().total();
    assert_eq!(total.closed_for(CloseReason::IdleTimeout), 1);
    assert!(total.total_discarded() > 0);
}
