//! `accepted = open + closed` and `bytes_in = bytes_out + buffered + discarded`: counted, shown, and checked when the
//! server ends.
//!
//! [`TestServer`](crate::harness::TestServer) checks the balances in every test that uses it, and
//! `Process::wait_for_success` that the program found them balanced.

use echoserver::{Action, CloseReason, Config, Echo, Handler};

use crate::harness::{FnHandler, TestServer, bind, config, wait_until};

#[test]
fn every_connection_and_byte_is_counted_once() {
    let server = bind(Config {
        buffer_size: 100,
        ..config()
    });
    let server = TestServer::run(server, |_peer| {
        FnHandler::new(|event, context| match context.input.data() {
            b"close" => Action::Close,
            b"panic" => panic!("intended"),
            // Never consumed, until it fills the buffer.
            [b'x', ..] => Action::Continue,
            _ => Echo.process(event, context),
        })
    });
    let open = server.connect();
    open.ping(b"open");
    for message in [&b"close"[..], b"panic", &[b'x'; 100]] {
        let client = server.connect();
        client.send(message);
        client.expect_closed();
    }
    server.connect().check_echo(b"half-close");
    let reset = server.connect();
    reset.ping(b"reset");
    reset.reset();
    wait_until("one connection is open", || server.stats().open() == 1);
    let stats = server.stats();
    assert_eq!(stats.accepted, 6);
    assert_eq!(stats.check_balance(), None);
    server.shut_down();
    open.expect_eof();
    drop(open);

    let total = server.stop().total();
    for reason in CloseReason::ALL {
        use CloseReason::{BufferFull, Handler, Panic, PeerClosed, Reset, Shutdown};
        let expected = [Shutdown, Handler, Panic, BufferFull, PeerClosed, Reset].contains(reason);
        assert_eq!(total.closed.get(*reason), u64::from(expected), "{reason:?}");
    }
    assert_eq!(total.bytes_in, 4 + 5 + 5 + 100 + 10 + 5);
    assert_eq!(total.bytes_out, 4 + 10 + 5);
    assert_eq!(total.discarded.total(), 5 + 5 + 100);
}

#[cfg(all(target_os = "linux", feature = "cli"))]
mod program {
    use std::thread;

    use rustix::process::Signal;

    use crate::harness::{Client, Process, random_bytes, total, wait_until};

    #[test]
    fn totals_count_closed_connections_by_reason() {
        let mut server = Process::serve(&["-v", "--workers=1"]);
        let connect = || Client::connect(server.address());
        let open = connect();
        open.ping(b"open");
        connect().check_echo(b"one");
        connect().check_echo(b"two");
        let reset = connect();
        reset.ping(b"three");
        reset.reset();
        server.wait_for_log("reason=reset");
        server.signal(Signal::TERM);
        open.expect_eof();
        open.shutdown_write();
        let log = server.wait_for_success();
        for (name, value) in [
            ("accepted", 4),
            ("open", 0),
            ("closed", 4),
            ("closed_peer_closed", 2),
            ("closed_reset", 1),
            ("closed_shutdown", 1),
            ("bytes_in", 15),
            ("bytes_out", 15),
        ] {
            assert_eq!(total(&log, name), value, "{name}: {log}");
        }
    }

    /// In a process of its own, because other tests open descriptors in this one at the same time.
    #[test]
    fn every_connection_is_counted_and_its_descriptor_closed() {
        let server = Process::serve(&["--workers=2"]);
        let address = server.address();
        let descriptors = || server.procfs().fd_count().expect("it runs");
        // Afterwards everything is open that the server opens once and keeps.
        Client::connect(address).check_echo(b"x");
        let other = Client::connect(address);
        other.ping(b"still here");
        let before = descriptors();

        let bytes = random_bytes(1, 200_000);
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..4_000 {
                    Client::connect(address).reset();
                }
            });
            scope.spawn(|| {
                for _ in 0..4_000 {
                    drop(Client::connect(address));
                }
            });
            scope.spawn(|| {
                for round in 0..2_000 {
                    let client = Client::connect(address);
                    client.send(&bytes[..round * 100]);
                    if round % 2 == 0 {
                        client.reset();
                    }
                }
            });
        });

        wait_until("every descriptor is closed", || descriptors() == before);
        other.ping(b"still here");
        other.close();
        let log = server.terminate();
        for (name, value) in [("accepted", 10_002), ("open", 0), ("closed", 10_002)] {
            assert_eq!(total(&log, name), value, "{name}: {log}");
        }
    }
}
