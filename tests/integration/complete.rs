//! After the client has ended its half, everything that it sent still comes back, however late it
//! begins to read; and then the end.

use std::{slice, thread};

use echoserver::{CloseReason, Config};

use crate::support::{BoundServer, Client, HeldServer, TestServer, config, pattern, until_arrived};

/// Sends everything and ends the stream, on each of many connections; begins to read once the server
/// has got rid of what it can, and stands still.
fn check_late_readers(count: usize, bytes: &[u8]) {
    let server = TestServer::echo();
    let mut readers: Vec<_> = (0..count)
        .map(|_| Client::connect_narrow(server.address()))
        .collect();
    let mut senders: Vec<_> = readers.iter().map(Client::twin).collect();
    thread::scope(|scope| {
        for sender in &mut senders {
            scope.spawn(|| {
                sender.send(bytes);
                sender.end();
            });
        }
        server.until_still();
        for reader in &mut readers {
            reader.expect(bytes);
            reader.expect_end();
        }
    });
    let total = server.stop().total();
    assert_eq!(total.closed_for(CloseReason::PeerClosed), count as u64);
    assert_eq!(total.bytes_out, (count * bytes.len()) as u64);
}

#[test]
fn a_late_reader_gets_every_byte() {
    check_late_readers(1, &pattern(1, 3_000_000));
}

#[test]
fn a_late_reader_gets_more_than_the_kernel_holds() {
    check_late_readers(1, &pattern(2, 20_000_000));
}

#[test]
fn many_late_readers_get_every_byte() {
    check_late_readers(50, &pattern(3, 3_000_000));
}

/// Data and the end in one event: who stops at the short read never sees the end.
#[test]
fn an_end_that_arrives_with_the_data_is_seen() {
    let buffer_size = 4096;
    for size in [0, 1, 1000, 4095, 4096, 4097, 8192, 10_000] {
        let bytes = pattern(5, size);
        let waiting = BoundServer::new(Config {
            buffer_size,
            ..config()
        });
        let mut client = Client::connect(waiting.address());
        client.send(&bytes);
        client.end();
        until_arrived(slice::from_ref(&client));
        let server = waiting.run_echo();
        client.expect(&bytes);
        client.expect_end();
        assert_eq!(server.stop().total().closed_for(CloseReason::PeerClosed), 1);
    }
}

/// The same for connections that are served already: it all comes in one batch of events.
#[test]
fn ends_that_arrive_with_the_data_are_seen_by_a_busy_worker() {
    let bytes = pattern(6, 10_000);
    let (held, mut clients) = HeldServer::new(100);
    for client in &mut clients {
        client.send(&bytes);
        client.end();
    }
    until_arrived(&clients);
    let server = held.release();
    for client in &mut clients {
        client.expect(&bytes);
        client.expect_end();
    }
    assert_eq!(
        server.stop().total().closed_for(CloseReason::PeerClosed),
        101
    );
}
