//! A timeout ends a connection whose client does nothing, and no other: neither a client that reads slowly nor
//! one whose data waited while the server did not run.

use std::time::Duration;

use echoserver::{Action, CloseReason, Config, Event, NewConnection};

use crate::harness::{
    Client, FnHandler, TestServer, bind, config, random_bytes, stuck_clients, wait_until,
};

fn server_with_idle_timeout(timeout: Duration) -> TestServer {
    TestServer::echo_with(Config {
        idle_timeout: Some(timeout),
        ..config()
    })
}

/// The transfer takes several times the timeout, and the client never pauses.
fn check_slow_reader(receive_buffer: usize, length: usize, bytes_per_second: usize) {
    let server = server_with_idle_timeout(Duration::from_secs(2));
    let bytes = random_bytes(1, length);
    let client = Client::connect_with_receive_buffer(server.address, receive_buffer);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            client.send(&bytes);
            client.shutdown_write();
        });
        client.expect_slowly(&bytes, bytes_per_second);
        client.expect_eof();
    });
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::PeerClosed), 1);
}

#[test]
fn slow_reader_gets_everything() {
    check_slow_reader(64 << 10, 1_600_000, 200_000);
}

#[test]
fn slow_reader_with_a_small_window_gets_everything() {
    check_slow_reader(8 << 10, 400_000, 50_000);
}

/// Its output is truncated, so it must not look complete.
#[test]
fn reader_that_has_stopped_is_reset() {
    let server = server_with_idle_timeout(Duration::from_millis(400));
    let bytes = random_bytes(2, 40 << 20);
    let (client, _) = stuck_clients(&server, 1, &bytes).remove(0);
    wait_until("it has expired", || server.stats().open() == 0);
    client.expect_reset();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::IdleTimeout), 1);
    assert!(total.discarded.get(CloseReason::IdleTimeout) > 0);
}

#[test]
fn silent_client_gets_eof() {
    let server = server_with_idle_timeout(Duration::from_millis(100));
    let client = server.connect();
    client.ping(b"ping");
    client.expect_eof();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::IdleTimeout), 1);
    assert_eq!(total.discarded.total(), 0);
}

/// A client that does not read its refusal is not kept for ever, even without an idle timeout.
#[test]
fn refused_client_that_never_reads_is_reset() {
    let refuse = |_: &NewConnection<'_>| {
        FnHandler::new(|event, context| {
            if event == Event::Open {
                return Action::Continue;
            }
            // More than the kernel holds.
            assert!(context.output.push(&vec![b'x'; 4 << 20]));
            Action::Close
        })
    };
    let buffer_size = 4 << 20;
    let server = TestServer::run(
        bind(Config {
            buffer_size,
            ..config()
        }),
        refuse,
    );
    let client = Client::connect_with_receive_buffer(server.address, 8 << 10);
    client.send(b"hello");
    server.wait_until_stuck();
    wait_until("the flush has expired", || server.stats().open() == 0);
    client.expect_reset();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::IdleTimeout), 1);
}

#[cfg(all(target_os = "linux", feature = "cli"))]
mod program {
    use std::time::{Duration, Instant};

    use rustix::process::Signal;

    use crate::harness::{
        Client, Process, expect_all, ping_all, possible_connections, send_all, wait_until,
    };

    /// More clients than one batch of events holds.
    #[test]
    fn clients_that_sent_during_a_pause_are_answered() {
        let server = Process::serve(&["--workers=1", "--idle-timeout=1s"]);
        let connect = |_| Client::connect(server.address());
        let clients: Vec<_> = (0..possible_connections(3_000)).map(connect).collect();
        ping_all(&clients, b"before");
        server.pause();
        send_all(&clients, b"during");
        let start = Instant::now();
        wait_until("the timeout has passed", || {
            start.elapsed() > Duration::from_millis(1500)
        });
        server.signal(Signal::CONT);
        expect_all(&clients, b"during");
        drop(clients);
        server.terminate();
    }
}
