//! An idle connection holds no buffer and causes no wake-up, and is closed only by an idle timeout.

use std::thread;
use std::time::Duration;

use echoserver::{CloseReason, Config};

use crate::harness::{
    BlockedServer, Client, TestServer, config, ping_all, possible_connections, random_bytes,
    wait_until,
};

/// One client pings beside many idle ones: the worker wakes up once per ping, and for nothing else.
fn check_wakeups(config: Config) {
    let server = TestServer::echo_with(config);
    let idle = server.connect_many(possible_connections(1_000));
    ping_all(&idle, b"once");
    let busy = server.connect();
    busy.ping(b"first");
    assert_eq!(server.stats().total().buffered, 0);
    let ticks = server.stats().total().ticks;
    for _ in 0..1_000 {
        busy.ping(b"ping");
    }
    assert_eq!(server.stats().total().ticks, ticks + 1_000);
}

#[test]
fn idle_connections_cause_no_wakeups() {
    check_wakeups(config());
}

/// Rule 13 of the event loop.
#[test]
fn idle_timeout_causes_no_early_wakeups() {
    check_wakeups(Config {
        idle_timeout: Some(Duration::from_secs(3600)),
        ..config()
    });
}

/// A busy poll that finds no event does not count as a wake-up.
#[test]
fn busy_polling_wakes_for_events_only() {
    check_wakeups(Config {
        busy_poll: Duration::from_millis(1),
        ..config()
    });
}

/// Rule 12 of the event loop.
#[test]
fn many_ready_connections_are_served_after_one_wakeup() {
    let (blocked, clients) = BlockedServer::new(possible_connections(1_000));
    let messages = random_bytes(1, 8 * clients.len());
    for (client, message) in clients.iter().zip(messages.chunks(8)) {
        client.send(message);
    }
    let before = blocked.server.stats().total().ticks;
    let server = blocked.release();
    for (client, message) in clients.iter().zip(messages.chunks(8)) {
        client.expect(message);
    }
    // One for all of them, and two for the connection that blocked the worker, which has been closed.
    let ticks = server.stats().total().ticks - before;
    let count = clients.len();
    assert!(ticks <= 3, "{ticks} ticks for {count} connections");
    clients.into_iter().for_each(Client::close);
}

#[test]
fn idle_timeout_closes_only_idle_connections() {
    let server = TestServer::echo_with(Config {
        idle_timeout: Some(Duration::from_secs(1)),
        ..config()
    });
    let (busy, silent, quiet) = (server.connect(), server.connect(), server.connect());
    quiet.ping(b"once");
    let waiting = thread::spawn(move || {
        silent.expect_eof();
        quiet.expect_eof();
    });
    while !waiting.is_finished() {
        busy.ping(b"ping");
    }
    waiting.join().unwrap();
    busy.close();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::IdleTimeout), 2);
    assert_eq!(total.closed.get(CloseReason::PeerClosed), 1);
}

#[test]
fn idle_timeout_closes_a_client_that_never_reads() {
    let server = TestServer::echo_with(Config {
        idle_timeout: Some(Duration::from_millis(100)),
        ..config()
    });
    let bytes = random_bytes(2, 40 << 20);
    let client = Client::connect_with_receive_buffer(server.address, 64 << 10);
    // It is reset before all is sent, because the server has not read all that was.
    assert!(client.try_send(&bytes).is_err());
    wait_until("it is closed", || server.stats().open() == 0);
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::IdleTimeout), 1);
    assert!(total.discarded.total() > 0);
}
