//! The program at the far end of a slow link that loses and reorders packets, on the real kernel: a packet takes 20 to
//! 40 ms, and 1.5 % are lost in each direction.
//!
//! The tests need root, which may create network namespaces, and print that they are skipped without it.

mod link;

use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};
use socket2::{Socket, TcpKeepalive};

use crate::harness::{Process, program, random_bytes, send_all, total, wait_until};
use link::{CLIENTS, Network, SERVER};

/// Bytes that a client can send before it reads, even if all buffers have their initial sizes.
const UNREAD: usize = 200_000;

#[test]
fn every_byte_comes_back() {
    let Some(network) = Network::new() else {
        return;
    };
    let server = network.serve(program().arg("--workers=2"));
    let clients = network.connect_many(&server, 8);
    let bytes = random_bytes(1, 1_000_000);
    thread::scope(|scope| {
        for client in &clients {
            scope.spawn(|| client.send(&bytes));
            scope.spawn(|| client.expect(&bytes));
        }
    });
    drop(clients);
    let log = server.terminate();
    assert_eq!(total(&log, "bytes_out"), 8 * bytes.len() as u64, "{log}");
    network.check_faults();
}

/// The server reads EOF while most of its output is still to be sent.
#[test]
fn everything_sent_before_a_half_close_comes_back() {
    let Some(network) = Network::new() else {
        return;
    };
    let server = network.serve(program().arg("--workers=2"));
    let clients = network.connect_many(&server, 20);
    let bytes = random_bytes(2, UNREAD);
    send_all(&clients, &bytes);
    for client in &clients {
        client.shutdown_write();
    }
    network.wait_until_received(&clients);
    thread::scope(|scope| {
        for client in &clients {
            scope.spawn(|| {
                client.expect(&bytes);
                client.expect_eof();
            });
        }
    });
    let log = server.terminate();
    assert_eq!(total(&log, "closed_peer_closed"), 20, "{log}");
    network.check_faults();
}

/// Some clients begin to read when the drain begins, and another is still sending. Once the process has exited, the
/// link loses everything: what a client reads then has arrived before.
#[test]
fn drain_ends_after_delivery() {
    /// The output takes several times as long as the second for which a client with all its output is waited for.
    const BYTES_PER_SECOND: usize = 40_000;
    let Some(network) = Network::new() else {
        return;
    };
    let server = network.serve(program().args(["--workers=2", "--drain-timeout=12s"]));
    // What has arrived when the last quarter of the timeout begins has that quarter to be delivered. On this link, the
    // 6 MB to which a receive queue can grow take longer.
    let set = listener_of(&server).set_recv_buffer_size(128 << 10);
    set.expect("it is a socket");
    let clients = network.connect_many(&server, 5);
    let bytes = random_bytes(3, UNREAD);
    send_all(&clients, &bytes);
    network.wait_until_received(&clients);
    let endless = &random_bytes(4, 20 << 20);
    let sender = &network.connect_many(&server, 1)[0];
    let (log, echoed) = thread::scope(|scope| {
        // Its error is the end of the connection.
        scope.spawn(|| sender.try_send(endless));
        sender.expect(&endless[..100_000]);
        server.signal(Signal::TERM);
        for client in &clients {
            scope.spawn(|| {
                client.expect_slowly(&bytes, BYTES_PER_SECOND);
                client.expect_eof();
            });
        }
        let sender = scope.spawn(|| {
            let count = sender.expect_prefix(&endless[100_000..]);
            sender.expect_eof();
            // Ends the other thread's send, unless a reset has.
            let _reset = sender.0.shutdown(Shutdown::Write);
            100_000 + count
        });
        let log = server.wait_for_success();
        network.lose_packets_to(&[SERVER, CLIENTS]);
        (log, sender.join().expect("equal bytes, then EOF"))
    });
    let expected = 5 * bytes.len() + echoed;
    assert_eq!(total(&log, "bytes_out"), expected as u64, "{log}");
    assert_eq!(total(&log, "closed_shutdown"), 6, "{log}");
    network.check_faults();
}

/// A client that has vanished uses the only place until the kernel has found no answer to its probes.
#[test]
fn vanished_client_is_detected() {
    let Some(network) = Network::new() else {
        return;
    };
    let arguments = ["--max-connections=1", "--tcp-keepalive=1s", "-v"];
    let mut server = network.serve(program().args(arguments));
    shorten_keepalive_interval(&server);
    let vanished = network.connect_many(&server, 1);
    vanished[0].ping(b"there");
    wait_until("the output is delivered", || !has_unacknowledged(&server));
    network.lose_packets_to(&[SERVER, CLIENTS]);
    server.wait_for_log("reason=reset");
    network.lose_packets_to(&[]);
    let next = network.connect_many(&server, 1);
    next[0].ping(b"there is room");
    drop(next);
    let log = server.terminate();
    assert_eq!(total(&log, "closed_reset"), 1, "{log}");
    assert_eq!(total(&log, "accepted"), 2, "{log}");
}

/// The idle client lacks only the FIN. The other begins to read when its window updates no longer arrive.
#[test]
fn drain_into_a_black_hole_ends_at_its_deadline() {
    const TIMEOUT: Duration = Duration::from_secs(3);
    let Some(network) = Network::new() else {
        return;
    };
    let server = network.serve(program().args(["--workers=2", "--drain-timeout=3s"]));
    let clients = network.connect_many(&server, 2);
    clients[0].ping(b"ping");
    wait_until("the answer is delivered", || !has_unacknowledged(&server));
    let bytes = random_bytes(5, UNREAD);
    clients[1].send(&bytes);
    network.wait_until_received(&clients);
    network.lose_packets_to(&[SERVER, CLIENTS]);
    let start = Instant::now();
    let (log, count) = thread::scope(|scope| {
        let reader = scope.spawn(|| clients[1].expect_prefix(&bytes));
        let log = server.terminate();
        // No reset arrives: this ends the read.
        clients[1].0.shutdown(Shutdown::Both).expect("no reset");
        (log, reader.join().expect("equal bytes"))
    });
    assert!(start.elapsed() >= TIMEOUT, "it gave up early: {log}");
    assert_eq!(total(&log, "closed_shutdown"), 1, "{log}");
    assert_eq!(total(&log, "closed_drain_timeout"), 1, "{log}");
    assert!(count < bytes.len(), "all of it has crossed the link");
}

/// Returns whether the clients' kernel has yet to acknowledge bytes that `server` has sent.
fn has_unacknowledged(server: &Process) -> bool {
    let table = server.procfs().tcp().expect("it runs");
    table.iter().any(|entry| entry.tx_queue > 0)
}

/// Makes the kernel probe the clients of `server` every second: the six intervals of ten seconds are too long for a
/// test.
fn shorten_keepalive_interval(server: &Process) {
    let keepalive = TcpKeepalive::new().with_interval(Duration::from_secs(1));
    let set = listener_of(server).set_tcp_keepalive(&keepalive);
    set.expect("it is a TCP socket");
}

/// Returns the server's listener, whose options connections inherit.
fn listener_of(server: &Process) -> Socket {
    let process = pidfd_open(server.pid(), PidfdFlags::empty()).expect("it runs");
    let descriptors = server.procfs().fd().expect("it runs").flatten();
    let listener = descriptors
        .filter_map(|entry| pidfd_getfd(&process, entry.fd, PidfdGetfdFlags::empty()).ok())
        .map(Socket::from)
        .find(|socket| socket.is_listener().is_ok_and(|listens| listens));
    listener.expect("it listens")
}
