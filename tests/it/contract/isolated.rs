//! An error on one connection closes only that one; others of the same worker are unaffected.

use std::slice;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use echoserver::{Action, CloseReason, Config, Echo, Event, Handler, Stats};

use crate::harness::{
    BlockedServer, Client, FnHandler, TestServer, address_of, bind, config, random_bytes,
    wait_until, wait_until_received,
};

/// Starts a server whose first connection has a handler made by `first`, and the others an echo.
pub(super) fn server_with_first(
    first: impl Fn() -> FnHandler + Send + Sync + 'static,
) -> TestServer {
    let is_first = AtomicBool::new(true);
    TestServer::run(bind(config()), move |_peer| {
        match is_first.swap(false, Relaxed) {
            true => first(),
            false => FnHandler::echo(),
        }
    })
}

/// Runs `test` on the first connection, beside one that echoes before and after; returns the final counters.
fn check_first(
    first: impl Fn() -> FnHandler + Send + Sync + 'static,
    test: impl FnOnce(&TestServer, Client),
) -> Stats {
    let server = server_with_first(first);
    let client = server.connect();
    let other = server.connect();
    other.ping(b"before");
    test(&server, client);
    other.ping(b"after");
    other.close();
    server.stop()
}

#[test]
fn handler_panic_closes_only_its_connection() {
    let panics = || {
        FnHandler::new(|event, context| {
            assert_ne!(context.input.data(), b"panic", "intended");
            Echo.process(event, context)
        })
    };
    let stats = check_first(panics, |_, client| {
        client.ping(b"one");
        client.send(b"panic");
        client.expect_closed();
    });
    assert_eq!(stats.total().closed.get(CloseReason::Panic), 1);
    assert_eq!(stats.total().discarded.total(), 5);
}

#[test]
fn handler_factory_panic_closes_only_its_connection() {
    let stats = check_first(|| panic!("intended"), |_, client| client.expect_closed());
    assert_eq!(stats.total().closed.get(CloseReason::Panic), 1);
}

#[test]
fn handler_drop_panic_closes_only_its_connection() {
    struct PanicsOnDrop;
    impl Drop for PanicsOnDrop {
        fn drop(&mut self) {
            panic!("intended");
        }
    }
    let panics = || {
        let on_drop = PanicsOnDrop;
        FnHandler::new(move |event, context| {
            let _owned = &on_drop;
            Echo.process(event, context)
        })
    };
    let stats = check_first(panics, |server, client| {
        client.ping(b"one");
        client.reset();
        wait_until("it is closed", || server.stats().open() == 1);
    });
    assert_eq!(stats.total().closed.get(CloseReason::Reset), 1);
}

#[test]
fn handler_can_send_a_greeting() {
    let greets = || {
        FnHandler::new(|event, context| {
            if event == Event::Open {
                assert!(context.output.push(b"hello\n"));
            }
            Echo.process(event, context)
        })
    };
    let stats = check_first(greets, |server, client| {
        client.expect(b"hello\n");
        client.ping(b"and hello to you");
        client.close();
        wait_until("it is closed", || server.stats().open() == 1);
    });
    assert_eq!(stats.total().bytes_generated, 6);
}

/// Closing a socket with unread input resets the connection, which could destroy the output.
/// Rule 9 of the event loop.
#[test]
fn output_before_a_close_reaches_the_client() {
    let answer = random_bytes(1, 60_000);
    let closes = {
        let answer = answer.clone();
        move || {
            let answer = answer.clone();
            FnHandler::new(move |event, context| {
                if event == Event::Open {
                    return Action::Continue;
                }
                assert!(context.output.push(&answer));
                Action::Close
            })
        }
    };
    let server = server_with_first(closes);
    let client = server.connect();
    client.send(&random_bytes(2, 60_000));
    client.expect(&answer);
    client.expect_eof();
    // More input arrives after the server has closed its half.
    client.send(&random_bytes(3, 60_000));
    client.shutdown_write();
    wait_until("it is closed", || server.stats().open() == 0);
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::Handler), 1);
    assert_eq!(total.bytes_out, 60_000);
    assert_eq!(total.discarded.total(), 120_000);
}

/// Rule 9 of the event loop.
#[test]
fn client_that_never_closes_its_half_is_closed_after_a_timeout() {
    let closes = || FnHandler::new(|_, _| Action::Close);
    let stats = check_first(closes, |server, client| {
        client.expect_eof();
        wait_until("it is closed", || server.stats().open() == 1);
    });
    assert_eq!(stats.total().closed.get(CloseReason::Handler), 1);
}

#[test]
fn unconsumed_input_that_fills_its_buffer_closes_the_connection() {
    let server = bind(Config {
        buffer_size: 100,
        ..config()
    });
    let server = TestServer::run(server, |_peer| FnHandler::new(|_, _| Action::Continue));
    let (client, shorter) = (server.connect(), server.connect());
    shorter.send(&[1; 99]);
    client.send(&[1; 100]);
    client.expect_closed();
    shorter.close();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::BufferFull), 1);
    assert_eq!(total.discarded.total(), 199);
}

/// Rule 6 of the event loop.
#[test]
fn reset_closes_only_its_connection() {
    let server = TestServer::echo();
    let other = server.connect();
    for round in 0..100 {
        let client = server.connect();
        client.send(&random_bytes(round, 100 * round as usize));
        client.reset();
        other.ping(b"ping");
    }
    wait_until("all are closed", || server.stats().open() == 1);
    other.close();
    let total = server.stop().total();
    assert_eq!(total.closed.get(CloseReason::Reset), 100);
    assert_eq!(total.closed.get(CloseReason::PeerClosed), 1);
}

/// Sends `parts`, the last byte of each as urgent data.
fn send_urgent(client: &Client, parts: &[Vec<u8>]) {
    for part in parts {
        let sent = client.0.send_out_of_band(part);
        assert_eq!(sent.expect("the server takes it"), part.len());
    }
}

/// A read stops at the urgent mark, and no event announces the bytes after it, which are there already.
/// Rule 3 of the event loop.
#[test]
fn urgent_bytes_and_bytes_after_them_come_back() {
    let parts: Vec<_> = (0..10).map(|seed| random_bytes(seed, 100)).collect();
    let server = bind(config());
    let client = Client::connect(address_of(&server));
    send_urgent(&client, &parts);
    client.send(b"after");
    wait_until_received(slice::from_ref(&client));
    let _server = TestServer::run_echo(server);
    client.expect(&parts.concat());
    client.expect(b"after");
    send_urgent(&client, &parts);
    client.send(b"after");
    client.expect(&parts.concat());
    client.expect(b"after");
    client.close();
}

#[test]
fn urgent_bytes_do_not_end_a_connection() {
    let parts: Vec<_> = (0..10).map(|seed| random_bytes(seed, 100)).collect();
    let (blocked, clients) = BlockedServer::new(20);
    for client in &clients {
        send_urgent(client, &parts);
        client.send(b"after");
        client.shutdown_write();
    }
    wait_until_received(&clients);
    let _server = blocked.release();
    for client in &clients {
        client.expect(&parts.concat());
        client.expect(b"after");
        client.expect_eof();
    }
}

#[cfg(target_os = "linux")]
mod keepalive {
    use std::fs;
    use std::net::{SocketAddr, TcpListener};
    use std::time::Duration;

    use echoserver::Config;
    use socket2::SockRef;

    use crate::harness::{Client, TestServer, bind, config, wait_for};

    /// Returns the idle time after which the server's kernel probes a new client, less the time that has passed.
    fn keepalive(server: SocketAddr) -> Option<Duration> {
        const KEEPALIVE: &str = "02";
        let client = Client::connect(server);
        client.ping(b"ping");
        // Two addresses in hexadecimal, the state, the queues, then the kind of timer and its hundredths of a second.
        let ports =
            [server, client.local_address()].map(|address| format!(":{:04X}", address.port()));
        wait_for("no retransmission is pending", || {
            let table = fs::read_to_string("/proc/net/tcp").expect("/proc is there");
            let rows = table.lines().map(|row| row.split_whitespace().collect());
            let mut rows = rows
                .filter(|row: &Vec<_>| row[1].ends_with(&ports[0]) && row[2].ends_with(&ports[1]));
            let row = rows.next().expect("the connection is there");
            let (kind, time) = row[5].split_once(':').expect("a kind and a time");
            let time = u64::from_str_radix(time, 16).expect("a number");
            let time = Duration::from_millis(10 * time);
            let is_retransmission = ["01", "04"].contains(&kind);
            (!is_retransmission).then_some((kind == KEEPALIVE).then_some(time))
        })
    }

    #[test]
    #[cfg(feature = "cli")]
    fn client_without_packets_is_probed() {
        for (arguments, seconds) in [
            (&[][..], 300),
            (&["--tcp-keepalive=100s"], 100),
            (&["--tcp-keepalive=32767s"], 32_767),
            (&["--tcp-keepalive=0s"], 0),
        ] {
            let server = crate::harness::Process::serve(arguments);
            let found = keepalive(server.address());
            let log = server.terminate();
            let shown = format!(" tcp_keepalive_ms={seconds}000 ");
            assert_eq!(log.contains(&shown), seconds > 0, "{log}");
            let Some(found) = found else {
                assert_eq!(seconds, 0, "{log}");
                continue;
            };
            let limit = Duration::from_secs(seconds);
            assert!(
                found <= limit && found + Duration::from_secs(20) > limit,
                "{arguments:?}: {found:?}"
            );
        }
    }

    #[test]
    fn keepalive_of_an_adopted_listener_is_that_of_the_config() {
        for (own, configured) in [(false, true), (true, false)] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            SockRef::from(&listener).set_keepalive(own).unwrap();
            let mut server = bind(Config {
                listen: vec![],
                tcp_keepalive: configured.then_some(Duration::from_secs(60)),
                ..config()
            });
            server.adopt_tcp(listener).unwrap();
            let server = TestServer::run_echo(server);
            assert_eq!(keepalive(server.address).is_some(), configured);
        }
    }
}
