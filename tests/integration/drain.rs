//! A shutdown answers what has arrived, ends every connection in order, and takes a bounded time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use echoserver::{CloseReason, Config};

use crate::support::{
    BoundServer, Client, HeldServer, TestServer, config, connections_possible, pattern, ping_all,
    send_all, stuffed, until, until_arrived,
};

/// Each gets back all that it sent, and then the end: no reset.
fn expect_all_and_end(clients: Vec<Client>, bytes: &[u8]) {
    for mut client in clients {
        client.expect(bytes);
        client.expect_end();
    }
}

/// Whoever was first, the client's end or the server's: nothing was cut off.
fn check_all_answered(server: TestServer, count: usize) {
    let total = server.stop().total();
    let in_order =
        total.closed_for(CloseReason::Shutdown) + total.closed_for(CloseReason::PeerClosed);
    assert_eq!(in_order, count as u64, "{total:?}");
    assert_eq!(total.total_discarded(), 0);
}

#[test]
fn idle_connections_end_in_order() {
    let server = TestServer::echo();
    let mut clients = server.connect_many(50);
    ping_all(&mut clients, &pattern(1, 100));
    server.shut_down();
    expect_all_and_end(clients, b"");
    assert_eq!(server.stop().total().closed_for(CloseReason::Shutdown), 50);
}

#[test]
fn what_is_in_the_kernel_is_answered() {
    let count = connections_possible(1_000);
    let (held, mut clients) = HeldServer::new(count);
    let bytes = pattern(1, 10_000);
    send_all(&mut clients, &bytes);
    until_arrived(&clients);
    held.server.shut_down();
    let server = held.release();
    expect_all_and_end(clients, &bytes);
    check_all_answered(server, count + 1);
}

#[test]
fn who_is_in_a_mailbox_is_answered() {
    let (held, _) = HeldServer::new(0);
    let mut clients = held.server.connect_many(100);
    let bytes = pattern(2, 10_000);
    send_all(&mut clients, &bytes);
    until_arrived(&clients);
    until("all wait in the mailbox", || {
        let stats = held.server.stats();
        (stats.accepted, stats.total().assigned) == (101, 1)
    });
    held.server.shut_down();
    let server = held.release();
    expect_all_and_end(clients, &bytes);
    check_all_answered(server, 101);
}

#[test]
fn who_is_in_the_backlog_is_answered() {
    let waiting = BoundServer::new(config());
    let mut clients: Vec<_> = (0..100)
        .map(|_| Client::connect(waiting.address()))
        .collect();
    let bytes = pattern(3, 10_000);
    send_all(&mut clients, &bytes);
    until_arrived(&clients);
    waiting.handle().shut_down();
    let server = waiting.run_echo();
    expect_all_and_end(clients, &bytes);
    check_all_answered(server, 100);
}

/// In mid-transfer: everyone still has more to send, and more to read, than the kernel holds.
#[test]
fn transfers_under_way_end_in_order() {
    let server = TestServer::echo();
    let bytes = pattern(4, 20 << 20);
    let count = 20;
    let mut readers = server.connect_many(count);
    let mut senders: Vec<_> = readers.iter().map(Client::twin).collect();
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        for sender in &mut senders {
            scope.spawn(|| {
                for chunk in bytes.chunks(10_000) {
                    if ended.load(Ordering::Relaxed) {
                        break;
                    }
                    sender.send(chunk);
                }
            });
        }
        for reader in &mut readers {
            reader.expect(&bytes[..100_000]);
        }
        server.shut_down();
        let reading: Vec<_> = readers
            .iter_mut()
            .map(|reader| {
                scope.spawn(|| {
                    reader.expect_prefix(&bytes[100_000..]);
                    reader.expect_end();
                })
            })
            .collect();
        for reader in reading {
            reader.join().expect("a part in order, then the end");
        }
        ended.store(true, Ordering::Relaxed);
    });
    drop((readers, senders));
    let total = server.stop().total();
    assert_eq!(
        total.closed_for(CloseReason::Shutdown),
        count as u64,
        "{total:?}"
    );
}

/// Who always has sent more than it has read back is answered for half of the drain's time, and then
/// ended.
#[test]
fn an_endless_sender_is_ended() {
    let server = TestServer::echo_with(Config {
        // Half of it is left for a busy client to find the end.
        drain_timeout: Duration::from_secs(4),
        ..config()
    });
    // Sent over and over.
    let bytes = pattern(5, 40 << 20);
    let (mut client, mut sent) = stuffed(&server, 1, &bytes).remove(0);
    server.shut_down();
    let mut read = 0;
    until("it is ended", || {
        let wanted = &bytes[read..bytes.len().min(read + 100_000)];
        let count = client.expect_prefix(wanted);
        read = (read + count) % bytes.len();
        sent = client.stuff(&bytes, sent % bytes.len());
        count < wanted.len()
    });
    drop(client);
    assert_eq!(server.stop().total().closed_for(CloseReason::Shutdown), 1);
}

#[test]
fn who_never_reads_is_cut_off_and_nobody_else() {
    let server = TestServer::echo_with(Config {
        drain_timeout: Duration::from_millis(300),
        ..config()
    });
    let bytes = pattern(6, 40 << 20);
    let deaf = Client::connect_narrow(server.address());
    let mut sender = deaf.twin();
    let mut others = server.connect_many(10);
    ping_all(&mut others, b"ping");
    thread::scope(|scope| {
        let sending = scope.spawn(|| sender.try_send(&bytes));
        server.until_stuck();
        server.shut_down();
        expect_all_and_end(others, b"");
        let cut = sending.join().unwrap();
        assert!(cut.is_err(), "it is reset, with bytes unread");
    });
    let total = server.stop().total();
    assert_eq!(total.closed_for(CloseReason::Shutdown), 10);
    assert_eq!(total.closed_for(CloseReason::DrainTimeout), 1);
    assert!(total.total_discarded() > 0);
    drop(deaf);
}

/// Within the drain's time, whoever reads late still gets all that the server had taken in.
#[test]
fn who_reads_late_still_gets_everything() {
    let server = TestServer::echo_with(Config {
        drain_timeout: Duration::from_secs(3600),
        ..config()
    });
    let bytes = pattern(7, 40 << 20);
    let mut reader = Client::connect_narrow(server.address());
    let mut sender = reader.twin();
    thread::scope(|scope| {
        let sending = scope.spawn(|| sender.try_send(&bytes));
        server.until_stuck();
        let taken = server.stats().total().bytes_in as usize;
        server.shut_down();
        reader.expect(&bytes[..taken]);
        reader.expect_prefix(&bytes[taken..]);
        // The rest is discarded, until it is closed for good.
        drop(reader);
        let _gone = sending.join().unwrap();
    });
    drop(sender);
    assert_eq!(server.stop().total().closed_for(CloseReason::Shutdown), 1);
}

#[test]
fn nobody_can_connect_to_a_server_that_drains() {
    let server = TestServer::echo();
    let mut client = server.connect();
    client.ping(b"ping");
    let address = server.address();
    server.shut_down();
    client.expect_end();
    assert!(std::net::TcpStream::connect(address).is_err());
}
