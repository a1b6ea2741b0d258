//! What the program holds: descriptors for as long as a connection lasts, and a fixed number of threads.
//!
//! Counted on the program, in a process of its own: here other tests open sockets meanwhile.

use std::thread;

use crate::support::{Client, Program, check_echo, connections_possible, pattern, until};

/// Threads beside the workers: the acceptor, which is the main one, the log's, and the signals'.
const THREADS_BESIDE: usize = 3;

#[test]
fn every_descriptor_is_given_back() {
    let program = Program::start(&["--workers", "2"]);
    let address = program.address();
    // Once round first: what is opened once and kept is open then. A stream that has ended was closed.
    check_echo(address, b"x");
    let mut witness = Client::connect(address);
    witness.ping(b"still here");
    let before = program.descriptors();

    let bulk = pattern(1, 200_000);
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
                let mut client = Client::connect(address);
                client.send(&bulk[..round * 100]);
                if round % 2 == 0 {
                    client.reset();
                }
            }
        });
    });

    until("every descriptor is back", || {
        program.descriptors() == before
    });
    witness.ping(b"still here");
    witness.close();
    let (status, log) = program.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("accepted=10002 open=0 closed=10002"), "{log}");
    assert!(log.contains("counters balance: "), "{log}");
}

#[test]
fn thousands_are_served_by_one_worker() {
    let program = Program::start(&["--workers", "1"]);
    let count = connections_possible(5_000);
    let mut clients: Vec<_> = (0..count)
        .map(|_| Client::connect(program.address()))
        .collect();
    // Interleaved: nobody's answer is awaited before everybody has asked.
    for round in 0..3_u64 {
        let messages = pattern(round, 8 * count);
        for (client, message) in clients.iter_mut().zip(messages.chunks(8)) {
            client.send(message);
        }
        for (client, message) in clients.iter_mut().zip(messages.chunks(8)) {
            client.expect(message);
        }
    }
    assert_eq!(program.threads(), 1 + THREADS_BESIDE);
    clients.into_iter().for_each(Client::close);
    let (status, log) = program.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains(&format!("accepted={count} open=0")), "{log}");
    println!("{log}");
}
