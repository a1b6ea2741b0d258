//! A client that writes and never reads holds a bounded part of the server's memory, costs no CPU,
//! and hinders nobody.

use echoserver::Config;

use crate::support::{TestServer, config, pattern, stuffed};

#[test]
fn clients_that_never_read_hold_what_is_promised_and_no_more() {
    for buffer_size in [5000, 64 << 10] {
        let server = TestServer::echo_with(Config {
            buffer_size,
            ..config()
        });
        let bytes = pattern(1, 40 << 20);
        let clients = stuffed(&server, 50, &bytes);

        let buffered = server.stats().total().buffered;
        assert!(buffered > 0, "somebody's bytes are held");
        assert!(buffered <= 50 * 2 * buffer_size as u64, "{buffered}");

        // Others on the same worker are served, and are all that it wakes for: the stuck ones cost
        // nothing.
        let mut other = server.connect();
        other.ping(b"first");
        let wakes = server.stats().total().wakes;
        for _ in 0..100 {
            other.ping(b"ping");
        }
        assert_eq!(server.stats().total().wakes, wakes + 100);

        for (mut client, sent) in clients {
            client.end();
            client.expect(&bytes[..sent]);
            client.expect_end();
        }
        other.close();
    }
}

/// Who reads a little is sent a little more: a full buffer is a pause, and no end.
#[test]
fn a_stuck_client_goes_on_where_it_stopped() {
    let server = TestServer::echo();
    let bytes = pattern(2, 40 << 20);
    let (mut client, mut sent) = stuffed(&server, 1, &bytes).remove(0);
    let mut read = 0;
    while read < 8 << 20 {
        client.expect(&bytes[read..read + 100_000]);
        read += 100_000;
        sent = client.stuff(&bytes, sent);
    }
    client.end();
    client.expect(&bytes[read..sent]);
    client.expect_end();
}
