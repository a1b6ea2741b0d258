//! After the client's half-close, everything that it sent still comes back, however late it begins to read; then
//! EOF. The cases of `echoserver check` that half-close and read late are run by [`byte_exact`](super::byte_exact).

use std::slice;
use std::time::Duration;

use echoserver::{CloseReason, Config};

use crate::harness::{
    BlockedServer, Client, TestServer, address_of, bind, config, random_bytes, stuck_clients,
    wait_until_received,
};

/// Data and FIN arrive in one event, after which no other comes.
/// Rule 3 of the event loop.
#[test]
fn eof_that_arrives_with_data_is_handled() {
    let buffer_size = 4096;
    for size in [0, 1, 1000, 4095, 4096, 4097, 8192, 10_000] {
        let bytes = random_bytes(5, size);
        let server = bind(Config {
            buffer_size,
            ..config()
        });
        let client = Client::connect(address_of(&server));
        client.send(&bytes);
        client.shutdown_write();
        wait_until_received(slice::from_ref(&client));
        let server = TestServer::run_echo(server);
        client.expect(&bytes);
        client.expect_eof();
        assert_eq!(server.stop().total().closed.get(CloseReason::PeerClosed), 1);
    }
}

/// The same on connections that are served already, in one batch of events.
#[test]
fn eof_that_arrives_with_data_is_handled_in_a_batch() {
    let bytes = random_bytes(6, 10_000);
    let (blocked, clients) = BlockedServer::new(100);
    for client in &clients {
        client.send(&bytes);
        client.shutdown_write();
    }
    wait_until_received(&clients);
    let server = blocked.release();
    for client in &clients {
        client.expect(&bytes);
        client.expect_eof();
    }
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::PeerClosed), 101);
}

/// A truncated stream must not look complete.
/// Rule 9 of the event loop.
#[test]
fn truncated_stream_is_a_reset() {
    let server = TestServer::echo_with(Config {
        drain_timeout: Duration::from_millis(200),
        ..config()
    });
    let bytes = random_bytes(7, 40 << 20);
    let (client, _) = stuck_clients(&server, 1, &bytes).remove(0);
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::DrainTimeout), 1);
    assert!(total.discarded.get(CloseReason::DrainTimeout) > 0);
    client.expect_reset();
}

/// Without a deadline: connections that are complete end cleanly, the others with a reset.
#[test]
fn abort_resets_incomplete_streams_only() {
    let server = TestServer::echo_with(Config {
        drain_timeout: Duration::from_secs(3600),
        ..config()
    });
    let idle = server.connect();
    idle.ping(b"ping");
    let bytes = random_bytes(8, 40 << 20);
    let (stuck, _) = stuck_clients(&server, 1, &bytes).remove(0);
    server.handle.abort();
    stuck.expect_reset();
    idle.expect_eof();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::DrainTimeout), 1);
}
