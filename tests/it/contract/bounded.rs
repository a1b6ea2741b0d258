//! A client that writes and never reads holds a bounded part of the server's memory, and costs no CPU.

use echoserver::Config;

use crate::harness::{TestServer, config, random_bytes, stuck_clients};

#[test]
fn clients_that_never_read_hold_at_most_two_buffers() {
    for buffer_size in [5000, 64 << 10] {
        let server = TestServer::echo_with(Config {
            buffer_size,
            ..config()
        });
        let bytes = random_bytes(1, 40 << 20);
        let clients = stuck_clients(&server, 50, &bytes);

        let buffered = server.stats().total().buffered;
        assert!(buffered > 0, "the server holds some of the bytes");
        assert!(buffered <= 50 * 2 * buffer_size as u64, "{buffered}");

        // Another connection of the same worker is served, and causes all of its wake-ups.
        let other = server.connect();
        other.ping(b"first");
        let wakes = server.stats().total().wakes;
        for _ in 0..100 {
            other.ping(b"ping");
        }
        assert_eq!(server.stats().total().wakes, wakes + 100);

        for (client, sent) in clients {
            client.shutdown_write();
            client.expect(&bytes[..sent]);
            client.expect_eof();
        }
        other.close();
    }
}

/// A full buffer pauses a connection; it does not end it.
#[test]
fn stuck_connection_continues_when_its_client_reads() {
    let server = TestServer::echo();
    let bytes = random_bytes(2, 40 << 20);
    let (client, mut sent) = stuck_clients(&server, 1, &bytes).remove(0);
    let mut read = 0;
    while read < 8 << 20 {
        client.expect(&bytes[read..read + 100_000]);
        read += 100_000;
        sent = client.fill(&bytes, sent);
    }
    client.shutdown_write();
    client.expect(&bytes[read..sent]);
    client.expect_eof();
}
