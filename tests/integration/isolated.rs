//! What goes wrong on one connection ends that one, and its neighbours on the same worker notice
//! nothing.

use std::io::Write;
use std::panic;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::{slice, thread};

use echoserver::{Action, CloseReason, Config, Echo, Handler, Stats};
use socket2::SockRef;

use crate::support::{
    BoundServer, Client, HeldServer, Protocol, TestServer, config, pattern, until, until_arrived,
};

/// A server whose first connection has the protocol that `odd` makes, and whose others echo.
fn serve_odd_one(odd: impl Fn() -> Protocol + Send + Sync + 'static) -> TestServer {
    let count = AtomicUsize::new(0);
    TestServer::serve(config(), move |_peer| {
        match count.fetch_add(1, Ordering::Relaxed) {
            0 => odd(),
            _ => Protocol::echo(),
        }
    })
}

/// Runs a test on the odd connection, beside one that echoes before, meanwhile and after; returns
/// what the server counted.
fn check_odd_one(
    odd: impl Fn() -> Protocol + Send + Sync + 'static,
    test: impl FnOnce(&TestServer, Client),
) -> Stats {
    let server = serve_odd_one(odd);
    let odd_one = server.connect();
    let mut neighbour = server.connect();
    neighbour.ping(b"before");
    test(&server, odd_one);
    neighbour.ping(b"after");
    neighbour.close();
    server.stop()
}

#[test]
fn a_panic_in_a_handler_ends_its_connection() {
    let panics = || {
        Protocol::new(|input, output| {
            assert_ne!(input.data(), b"panic", "as the test wants it");
            Echo.process(input, output)
        })
    };
    let stats = check_odd_one(panics, |_, mut client| {
        client.ping(b"one");
        client.send(b"panic");
        client.expect_gone();
    });
    assert_eq!(stats.total().closed_for(CloseReason::Panic), 1);
    assert_eq!(stats.total().total_discarded(), 5);
}

#[test]
fn a_panic_in_the_maker_of_handlers_ends_its_connection() {
    let stats = check_odd_one(
        || panic!("as the test wants it"),
        |_, mut client| {
            client.expect_gone();
        },
    );
    assert_eq!(stats.total().closed_for(CloseReason::Panic), 1);
}

#[test]
fn a_panic_in_the_drop_of_a_handler_ends_its_connection() {
    struct PanicsAtDrop;
    impl Drop for PanicsAtDrop {
        fn drop(&mut self) {
            panic!("as the test wants it");
        }
    }
    let panics = || {
        let at_drop = PanicsAtDrop;
        Protocol::new(move |input, output| {
            let _kept = &at_drop;
            Echo.process(input, output)
        })
    };
    let stats = check_odd_one(panics, |server, mut client| {
        client.ping(b"one");
        client.reset();
        until("it is closed", || server.stats().open() == 1);
    });
    assert_eq!(stats.total().closed_for(CloseReason::Reset), 1);
}

#[test]
fn a_handler_can_greet() {
    let greets = || {
        let mut greeting = Some(b"hello\n");
        Protocol::new(move |input, output| {
            if let Some(greeting) = greeting.take() {
                assert!(input.is_empty() && output.push(greeting));
            }
            Echo.process(input, output)
        })
    };
    let stats = check_odd_one(greets, |server, mut client| {
        client.expect(b"hello\n");
        client.ping(b"and hello to you");
        client.close();
        until("it is closed", || server.stats().open() == 1);
    });
    assert_eq!(stats.total().bytes_generated, 6);
}

/// Closing while bytes are unread would reset the connection, and could destroy the answer.
#[test]
fn a_handler_that_closes_is_heard_to_the_end() {
    let answer = pattern(1, 60_000);
    let closes = {
        let answer = answer.clone();
        move || {
            let answer = answer.clone();
            Protocol::new(move |input, output| {
                if input.is_empty() {
                    return Action::Continue;
                }
                assert!(output.push(&answer));
                Action::Close
            })
        }
    };
    let server = serve_odd_one(closes);
    let mut client = server.connect();
    client.send(&pattern(2, 60_000));
    // More of it comes when the server has ended its half already.
    client.expect(&answer);
    client.expect_end();
    client.send(&pattern(3, 60_000));
    client.end();
    until("it is closed", || server.stats().open() == 0);
    let total = server.stop().total();
    assert_eq!(total.closed_for(CloseReason::Handler), 1);
    assert_eq!(total.bytes_out, 60_000);
    assert_eq!(total.total_discarded(), 120_000);
}

/// It waits for the client's end, but not for ever.
#[test]
fn a_client_that_does_not_end_is_left_in_the_end() {
    let closes = || Protocol::new(|_, _| Action::Close);
    let stats = check_odd_one(closes, |server, mut client| {
        client.expect_end();
        until("it is closed", || server.stats().open() == 1);
    });
    assert_eq!(stats.total().closed_for(CloseReason::Handler), 1);
}

#[test]
fn a_message_that_fills_the_input_untaken_ends_its_connection() {
    let server = TestServer::serve(
        Config {
            buffer_size: 100,
            ..config()
        },
        |_peer| Protocol::new(|_, _| Action::Continue),
    );
    let (mut client, mut short) = (server.connect(), server.connect());
    short.send(&[1; 99]);
    client.send(&[1; 100]);
    client.expect_gone();
    short.close();
    let total = server.stop().total();
    assert_eq!(total.closed_for(CloseReason::BufferFull), 1);
    assert_eq!(total.total_discarded(), 199);
}

/// A handler that never comes to an end is a flood from within.
#[test]
fn a_handler_that_always_has_more_starves_nobody() {
    let generates = || {
        Protocol::new(|_, output| {
            // As much as fits, and it is noted that there was more.
            let room = output.room();
            assert_eq!(output.write(&vec![7; room + 1]).unwrap(), room);
            Action::Continue
        })
    };
    let stats = check_odd_one(generates, |server, client| {
        let mut neighbour = server.connect();
        let mut reader = client.twin();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    reader.read_some();
                }
            });
            until("it has spent its budget", || {
                server.stats().total().yields > 0
            });
            for _ in 0..100 {
                neighbour.ping(b"ping");
            }
            done.store(true, Ordering::Relaxed);
        });
        drop(reader);
        client.reset();
        neighbour.reset();
        until("both are closed", || server.stats().open() == 1);
    });
    assert_eq!(stats.total().closed_for(CloseReason::Reset), 2);
}

#[test]
fn resets_are_quiet_ends() {
    let server = TestServer::echo();
    let mut neighbour = server.connect();
    for round in 0..100 {
        let mut client = server.connect();
        client.send(&pattern(round, 100 * round as usize));
        client.reset();
        neighbour.ping(b"ping");
    }
    until("all are closed", || server.stats().open() == 1);
    neighbour.close();
    let total = server.stop().total();
    assert_eq!(total.closed_for(CloseReason::Reset), 100);
    assert_eq!(total.closed_for(CloseReason::PeerClosed), 1);
}

/// Sends `parts`, the last byte of each of them as urgent.
fn send_urgently(client: &mut Client, parts: &[Vec<u8>]) {
    for part in parts {
        let sent = SockRef::from(&client.0).send_out_of_band(part);
        assert_eq!(sent.expect("the server takes it"), part.len());
    }
}

/// A read stops at the urgent mark. The bytes behind it are there already: no event announces them.
#[test]
fn urgent_bytes_and_those_behind_them_belong_to_the_stream() {
    let parts: Vec<_> = (0..10).map(|seed| pattern(seed, 100)).collect();
    let waiting = BoundServer::new(config());
    let mut client = Client::connect(waiting.address());
    send_urgently(&mut client, &parts);
    client.send(b"behind");
    until_arrived(slice::from_ref(&client));
    let _server = waiting.run_echo();
    client.expect(&parts.concat());
    client.expect(b"behind");
    send_urgently(&mut client, &parts);
    client.send(b"behind");
    client.expect(&parts.concat());
    client.expect(b"behind");
    client.close();
}

#[test]
fn urgent_bytes_in_the_midst_of_a_busy_connection_are_no_end() {
    let parts: Vec<_> = (0..10).map(|seed| pattern(seed, 100)).collect();
    let (held, mut clients) = HeldServer::new(20);
    for client in &mut clients {
        send_urgently(client, &parts);
        client.send(b"behind");
        client.end();
    }
    until_arrived(&clients);
    let _server = held.release();
    for client in &mut clients {
        client.expect(&parts.concat());
        client.expect(b"behind");
        client.expect_end();
    }
}

/// The dropping of a panic's payload can panic, outside of what a worker can catch and go on after.
#[test]
fn a_worker_that_dies_ends_the_server_and_the_others_drain() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("the bomb went off");
        }
    }
    let server = TestServer::serve(
        Config {
            workers: 2.try_into().unwrap(),
            ..config()
        },
        |_peer| {
            Protocol::new(|input, output| {
                if input.data() == b"bomb" {
                    panic::panic_any(Bomb);
                }
                Echo.process(input, output)
            })
        },
    );
    let (mut victim, mut other) = (server.connect(), server.connect());
    victim.ping(b"one");
    other.ping(b"two");
    victim.send(b"bomb");
    victim.expect_gone();
    other.expect_end();
    drop(other);
    until("the server ends", || server.is_shut_down());
    let error = server.outcome().expect_err("a worker has died");
    assert_eq!(error.to_string(), "worker 0 panicked: the bomb went off");
}
