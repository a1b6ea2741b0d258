//! A shutdown answers what has arrived, closes every connection cleanly, and takes a bounded time.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use echoserver::{CloseReason, Config};

use crate::harness::{
    BlockedServer, Client, TestServer, address_of, bind, config, ping_all, possible_connections,
    random_bytes, send_all, stuck_clients, wait_until, wait_until_received,
};

/// Each client gets back all that it sent, and then EOF.
fn expect_all_and_eof(clients: Vec<Client>, bytes: &[u8]) {
    for client in clients {
        client.expect(bytes);
        client.expect_eof();
    }
}

/// Checks that all of `count` connections were closed cleanly, by either side first.
fn check_all_answered(server: TestServer, count: usize) {
    let total = server.stop().total();
    let cleanly =
        [CloseReason::Shutdown, CloseReason::PeerClosed].map(|reason| total.closed.get(reason));
    assert_eq!(cleanly.iter().sum::<u64>(), count as u64, "{total:?}");
    assert_eq!(total.discarded.total(), 0);
}

#[test]
fn idle_connections_are_closed_cleanly() {
    let server = TestServer::echo();
    let clients = server.connect_many(50);
    ping_all(&clients, &random_bytes(1, 100));
    server.shut_down();
    expect_all_and_eof(clients, b"");
    assert_eq!(server.stop().total().closed.get(CloseReason::Shutdown), 50);
}

#[test]
fn bytes_in_receive_buffers_are_answered() {
    let count = possible_connections(1_000);
    let (blocked, clients) = BlockedServer::new(count);
    let bytes = random_bytes(1, 10_000);
    send_all(&clients, &bytes);
    wait_until_received(&clients);
    blocked.server.shut_down();
    let server = blocked.release();
    expect_all_and_eof(clients, &bytes);
    check_all_answered(server, count + 1);
}

#[test]
fn queued_connections_are_answered() {
    let (blocked, _) = BlockedServer::new(0);
    let clients = blocked.server.connect_many(100);
    let bytes = random_bytes(2, 10_000);
    send_all(&clients, &bytes);
    wait_until_received(&clients);
    wait_until("all are in the worker's queue", || {
        let stats = blocked.server.stats();
        (stats.accepted, stats.total().assigned) == (101, 1)
    });
    blocked.server.shut_down();
    let server = blocked.release();
    expect_all_and_eof(clients, &bytes);
    check_all_answered(server, 101);
}

#[test]
fn connections_in_the_backlog_are_answered() {
    let server = bind(config());
    let connect = |_| Client::connect(address_of(&server));
    let clients: Vec<_> = (0..100).map(connect).collect();
    let bytes = random_bytes(3, 10_000);
    send_all(&clients, &bytes);
    wait_until_received(&clients);
    server.handle().shut_down();
    let server = TestServer::run_echo(server);
    expect_all_and_eof(clients, &bytes);
    check_all_answered(server, 100);
}

/// Every client has more to send, and more to read, than the kernel holds.
#[test]
fn active_transfers_are_closed_cleanly() {
    let server = TestServer::echo();
    let bytes = random_bytes(4, 20 << 20);
    let clients = server.connect_many(20);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for client in &clients {
            scope.spawn(|| {
                let mut chunks = bytes.chunks(10_000);
                while let Some(chunk) = chunks.next().filter(|_| !stop.load(Relaxed)) {
                    client.send(chunk);
                }
            });
        }
        for client in &clients {
            client.expect(&bytes[..100_000]);
        }
        server.shut_down();
        let read_rest = |client| {
            let bytes = &bytes;
            scope.spawn(move || {
                Client::expect_prefix(client, &bytes[100_000..]);
                client.expect_eof();
            })
        };
        let readers: Vec<_> = clients.iter().map(read_rest).collect();
        for reader in readers {
            reader.join().expect("equal bytes, then EOF");
        }
        stop.store(true, Relaxed);
    });
    drop(clients);
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::Shutdown), 20, "{total:?}");
}

/// A client that always has sent more than it has read is answered for three quarters of the drain timeout, and then closed.
#[test]
fn endless_sender_is_closed() {
    let server = TestServer::echo_with(Config {
        // The last quarter is left to the client, so that it finds EOF on a busy machine.
        drain_timeout: Duration::from_secs(4),
        ..config()
    });
    // Sent over and over.
    let bytes = random_bytes(5, 40 << 20);
    let (client, mut sent) = stuck_clients(&server, 1, &bytes).remove(0);
    server.shut_down();
    let mut read = 0;
    wait_until("it is closed", || {
        let expected = &bytes[read..bytes.len().min(read + 100_000)];
        let count = client.expect_prefix(expected);
        read = (read + count) % bytes.len();
        sent = client.fill(&bytes, sent % bytes.len());
        count < expected.len()
    });
    drop(client);
    assert_eq!(server.stop().total().closed.get(CloseReason::Shutdown), 1);
}

#[test]
fn only_a_client_that_never_reads_is_reset() {
    let server = TestServer::echo_with(Config {
        drain_timeout: Duration::from_millis(300),
        ..config()
    });
    let bytes = random_bytes(6, 40 << 20);
    let client = Client::connect_with_receive_buffer(server.address, 64 << 10);
    let others = server.connect_many(10);
    ping_all(&others, b"ping");
    thread::scope(|scope| {
        let sending = scope.spawn(|| client.try_send(&bytes));
        server.wait_until_stuck();
        server.shut_down();
        expect_all_and_eof(others, b"");
        let sent = sending.join().unwrap();
        assert!(sent.is_err(), "it is reset before all is sent");
    });
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::Shutdown), 10);
    assert_eq!(total.closed.get(CloseReason::DrainTimeout), 1);
    assert!(total.discarded.total() > 0);
}

/// Within the drain timeout, a client that reads late gets all that the server had read.
#[test]
fn late_reader_gets_everything() {
    let server = TestServer::echo_with(Config {
        drain_timeout: Duration::from_secs(3600),
        ..config()
    });
    let bytes = random_bytes(7, 40 << 20);
    let client = Client::connect_with_receive_buffer(server.address, 64 << 10);
    thread::scope(|scope| {
        let sending = scope.spawn(|| client.try_send(&bytes));
        server.wait_until_stuck();
        let taken = server.stats().total().bytes_in as usize;
        server.shut_down();
        client.expect(&bytes[..taken]);
        client.expect_prefix(&bytes[taken..]);
        client.expect_eof();
        // The server discards the rest until it closes the connection for good.
        let _sent = sending.join().unwrap();
    });
    drop(client);
    assert_eq!(server.stop().total().closed.get(CloseReason::Shutdown), 1);
}

#[test]
fn draining_server_refuses_connections() {
    let server = TestServer::echo();
    let client = server.connect();
    client.ping(b"ping");
    server.shut_down();
    client.expect_eof();
    // The worker may see the shutdown before the acceptor.
    wait_until("connections are refused", || {
        TcpStream::connect(server.address).is_err()
    });
}

#[cfg(all(target_os = "linux", feature = "cli"))]
mod program {
    use std::io::Read;
    use std::slice;
    use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
    use std::thread;
    use std::time::{Duration, Instant};

    use rustix::process::Signal;

    use crate::harness::{
        Client, Process, SetOnDrop, ping_all, random_bytes, send_all, total, wait_until,
        wait_until_received,
    };

    /// Everything arrives while the program is stopped, the signal included, on open connections and new ones.
    #[test]
    fn sigterm_answers_everything_that_has_arrived() {
        let server = Process::serve(&["--workers=2", "--drain-timeout=60s"]);
        let bytes = random_bytes(1, 30_000);
        let connect = |_| Client::connect(server.address());
        let mut clients: Vec<Client> = (0..150).map(connect).collect();
        ping_all(&clients, b"open");
        server.pause();
        clients.extend((0..350).map(connect));
        send_all(&clients, &bytes);
        wait_until_received(&clients);
        server.signal(Signal::TERM);
        server.signal(Signal::CONT);
        super::expect_all_and_eof(clients, &bytes);
        let log = server.wait_for_success();
        assert_eq!(total(&log, "closed_shutdown"), 500, "{log}");
        assert_eq!(total(&log, "discarded"), 0, "{log}");
    }

    /// Clients that are sending get a part of their answer and then EOF, but no reset.
    #[test]
    fn sigterm_under_load_closes_every_connection_cleanly() {
        const CLIENTS: usize = 100;
        // A client that never stops sending is read for three quarters of it.
        let server = Process::serve(&["--workers=2", "--drain-timeout=8s"]);
        let echoes = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                let client = Client::connect(server.address());
                let echoes = &echoes;
                scope.spawn(move || send_until_eof(&client, echoes, u32::MAX));
            }
            wait_until("the clients are in mid-transfer", || {
                echoes.load(Relaxed) >= 3 * CLIENTS
            });
            server.signal(Signal::TERM);
        });
        let log = server.wait_for_success();
        assert_eq!(total(&log, "accepted"), CLIENTS as u64, "{log}");
        assert_eq!(total(&log, "closed_drain_timeout"), 0, "{log}");
    }

    /// How far a client sends ahead of what it has read. What the kernel holds of a slow reader grows without such a limit.
    const MAX_IN_FLIGHT: u64 = 1 << 20;

    /// Sends the same bytes over and over, checks what comes back until EOF, at most so many bytes a second, and counts each
    /// time that all came.
    fn send_until_eof(client: &Client, echoes: &AtomicUsize, bytes_per_second: u32) {
        let bytes = random_bytes(2, 50_000);
        let (start, read) = (Instant::now(), AtomicU64::new(0));
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _end = SetOnDrop(&stop);
            scope.spawn(|| {
                // The server may close while this sends.
                let mut sent = 0;
                while !stop.load(Relaxed) {
                    if sent > read.load(Relaxed) + MAX_IN_FLIGHT {
                        thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    if client.try_send(&bytes).is_err() {
                        break;
                    }
                    sent += bytes.len() as u64;
                }
                let _closed = client.0.shutdown(std::net::Shutdown::Write);
            });
            let mut position = 0;
            let mut chunk = vec![0; bytes.len()];
            loop {
                let due = Duration::from_secs(read.load(Relaxed)) / bytes_per_second;
                thread::sleep(due.saturating_sub(start.elapsed()));
                let room = bytes.len() - position;
                let count = (&client.0).read(&mut chunk[..room]).expect("no reset");
                if count == 0 {
                    break;
                }
                let expected = &bytes[position..position + count];
                assert!(chunk[..count] == *expected, "other bytes came back");
                read.fetch_add(count as u64, Relaxed);
                position = (position + count) % bytes.len();
                if position == 0 {
                    echoes.fetch_add(1, Relaxed);
                }
            }
        });
    }

    #[test]
    fn drain_timeout_resets_a_stuck_connection() {
        let server = Process::serve(&["--workers=1", "--drain-timeout=500ms"]);
        let client = Client::connect_with_receive_buffer(server.address(), 64 << 10);
        client.send_until_stuck(&random_bytes(3, 40 << 20));
        server.signal(Signal::TERM);
        let log = server.wait_for_success();
        assert_eq!(total(&log, "closed_drain_timeout"), 1, "{log}");
        assert!(total(&log, "discarded_drain_timeout") > 0, "{log}");
    }

    /// Sends `bytes` to a server whose client does not read yet, until all of them have arrived there.
    fn client_with_everything_sent(server: &Process, bytes: &[u8]) -> Client {
        let client = Client::connect_with_receive_buffer(server.address(), 8 << 10);
        client.send(bytes);
        wait_until_received(slice::from_ref(&client));
        client
    }

    /// What it has sent is in the kernel and in the server's buffers when the signal comes.
    #[test]
    fn slow_reader_gets_everything_and_the_process_waits() {
        let server = Process::serve(&["--workers=1", "--drain-timeout=30s"]);
        let bytes = random_bytes(4, 200_000);
        let client = client_with_everything_sent(&server, &bytes);
        server.signal(Signal::TERM);
        client.expect_slowly(&bytes[..100_000], 100_000);
        // More input during the drain must not end it.
        client.send(b"12345");
        client.expect_slowly(&bytes[100_000..], 100_000);
        assert_eq!(server.lines_with("ended:"), [""; 0]);
        client.expect(b"12345");
        client.expect_eof();
        drop(client);
        let log = server.wait_for_success();
        assert_eq!(total(&log, "discarded"), 0, "{log}");
    }

    /// The transfer takes three quarters of the drain timeout, and the client's FIN has arrived before.
    #[test]
    fn slow_reader_after_its_fin_gets_everything() {
        let server = Process::serve(&["--workers=1", "--drain-timeout=4s"]);
        let bytes = random_bytes(5, 200_000);
        let client = client_with_everything_sent(&server, &bytes);
        client.shutdown_write();
        wait_until_received(slice::from_ref(&client));
        server.signal(Signal::TERM);
        client.expect_slowly(&bytes, 66_000);
        client.expect_eof();
        drop(client);
        let log = server.wait_for_success();
        assert_eq!(total(&log, "closed_drain_timeout"), 0, "{log}");
        assert_eq!(total(&log, "discarded"), 0, "{log}");
    }

    /// Sends until both kernels are full, and ends its half: the rest waits in the client's kernel.
    fn client_with_more_than_has_arrived(server: &Process, bytes: &[u8]) -> (Client, usize) {
        let client = Client::connect_with_receive_buffer(server.address(), 8 << 10);
        let sent = client.send_until_stuck(bytes);
        client.shutdown_write();
        (client, sent)
    }

    /// The last part of the stream and its FIN wait in the client's kernel behind a closed window, and arrive in the second
    /// half of the drain timeout. The client has read everything after four fifths of it.
    #[test]
    fn slow_reader_whose_fin_arrives_late_gets_everything() {
        const BYTES_PER_SECOND: usize = 700_000;
        let server = Process::serve(&["--workers=1", "--drain-timeout=4s"]);
        let bytes = random_bytes(9, 4 * BYTES_PER_SECOND / 5 * 4);
        let (client, sent) = client_with_more_than_has_arrived(&server, &bytes);
        assert_eq!(sent, bytes.len(), "the client's kernel takes all");
        server.signal(Signal::TERM);
        client.expect_slowly(&bytes, BYTES_PER_SECOND);
        client.expect_eof();
        drop(client);
        let log = server.wait_for_success();
        assert_eq!(total(&log, "closed_drain_timeout"), 0, "{log}");
        assert_eq!(total(&log, "discarded"), 0, "{log}");
    }

    /// Refusal comes early enough for the delivery of what the kernels hold, and for the end of the stream.
    #[test]
    fn floods_that_read_slowly_end_without_a_reset() {
        const CLIENTS: usize = 20;
        const BYTES_PER_SECOND: u32 = 2_000_000;
        let server = Process::serve(&["--workers=1", "--drain-timeout=5s"]);
        let echoes = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                let client = Client::connect(server.address());
                let echoes = &echoes;
                scope.spawn(move || send_until_eof(&client, echoes, BYTES_PER_SECOND));
            }
            wait_until("the clients are in mid-transfer", || {
                echoes.load(Relaxed) >= 40 * CLIENTS
            });
            server.signal(Signal::TERM);
        });
        let log = server.wait_for_success();
        assert_eq!(total(&log, "closed_drain_timeout"), 0, "{log}");
    }

    #[test]
    fn data_in_the_clients_kernel_is_answered() {
        let server = Process::serve(&["--workers=1", "--drain-timeout=30s"]);
        let bytes = random_bytes(7, 40 << 20);
        let (client, sent) = client_with_more_than_has_arrived(&server, &bytes);
        server.signal(Signal::TERM);
        client.expect(&bytes[..sent]);
        client.expect_eof();
        drop(client);
        let log = server.wait_for_success();
        assert_eq!(total(&log, "discarded"), 0, "{log}");
    }

    /// When the client reads, the server has stopped accepting new data.
    #[test]
    fn stream_that_is_cut_is_reset() {
        let server = Process::serve(&["--workers=1", "--drain-timeout=4s"]);
        let bytes = random_bytes(8, 40 << 20);
        let (client, _) = client_with_more_than_has_arrived(&server, &bytes);
        server.signal(Signal::TERM);
        client.expect_slowly(&bytes[..340_000], 100_000);
        client.expect_reset();
        drop(client);
        let log = server.wait_for_success();
        assert_eq!(total(&log, "closed_drain_timeout"), 1, "{log}");
    }

    /// The kernel has taken all of the output, and the server's buffers are empty.
    #[test]
    fn process_waits_until_the_kernel_has_delivered() {
        let mut server = Process::serve(&["--workers=1", "--drain-timeout=30s"]);
        let bytes = random_bytes(6, 60_000);
        let client = client_with_everything_sent(&server, &bytes);
        server.signal(Signal::TERM);
        server.wait_for_log("draining");
        client.expect_slowly(&bytes, 100_000);
        assert_eq!(server.lines_with("ended:"), [""; 0]);
        client.expect_eof();
        drop(client);
        server.wait_for_success();
    }

    #[test]
    fn clients_beyond_the_limit_are_answered() {
        let server = Process::serve(&["--workers=2", "--max-connections=20"]);
        let connect = |_| Client::connect(server.address());
        let open: Vec<_> = (0..20).map(connect).collect();
        ping_all(&open, b"served");
        let waiting: Vec<_> = (0..200).map(connect).collect();
        send_all(&waiting, b"waiting");
        wait_until_received(&waiting);
        server.signal(Signal::TERM);
        super::expect_all_and_eof(open, b"");
        super::expect_all_and_eof(waiting, b"waiting");
        let log = server.wait_for_success();
        assert_eq!(total(&log, "accepted"), 220, "{log}");
        assert_eq!(total(&log, "closed"), 220, "{log}");
    }

    /// The only place never becomes free. One deadline holds for all.
    #[test]
    fn clients_that_get_no_place_are_reset_and_counted() {
        let server = Process::serve(&["-w1", "-c1", "--drain-timeout=500ms"]);
        let stuck = Client::connect_with_receive_buffer(server.address(), 8 << 10);
        stuck.send_until_stuck(&random_bytes(7, 40 << 20));
        let connect = |_| Client::connect(server.address());
        let waiting: Vec<_> = (0..5).map(connect).collect();
        send_all(&waiting, b"waiting");
        server.signal(Signal::TERM);
        for client in &waiting {
            client.expect_reset();
        }
        let log = server.wait_for_success();
        assert_eq!(total(&log, "closed_drain_timeout"), 6, "{log}");
    }
}
