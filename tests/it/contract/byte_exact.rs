//! Each connection gets back exactly the bytes it sent, in order, and nothing else.

use std::io::{ErrorKind, Read};
use std::num::NonZeroUsize;

use echoserver::Config;

use crate::harness::{Client, TestServer, config, random_bytes, wait_until};

#[test]
fn sizes_around_the_buffer_size_come_back() {
    let buffer_size = 4096;
    let server = TestServer::echo_with(Config {
        buffer_size,
        ..config()
    });
    for size in [0, 1, 2, 3, 100, 1000] {
        server.connect().check_echo(&random_bytes(1, size));
    }
    for multiple in [buffer_size, 2 * buffer_size, 16 * buffer_size] {
        for size in multiple - 2..=multiple + 2 {
            server.connect().check_echo(&random_bytes(2, size));
        }
    }
}

#[test]
fn tiny_buffers_lose_nothing() {
    for buffer_size in [1, 2, 7] {
        let server = TestServer::echo_with(Config {
            buffer_size,
            ..config()
        });
        server.connect().check_echo(&random_bytes(3, 10_000));
    }
}

#[test]
fn large_buffers_lose_nothing() {
    let server = TestServer::echo_with(Config {
        buffer_size: 4 << 20,
        ..config()
    });
    server.connect().check_echo(&random_bytes(4, 20 << 20));
}

#[test]
fn no_byte_is_interpreted() {
    let server = TestServer::echo();
    let client = server.connect();
    let every_byte: Vec<u8> = (0..=255).collect();
    for bytes in [
        &b"quit\n"[..],
        b"quit\r\nexit\r\nshutdown\r\n",
        b"\0\0\0\0",
        b"\x03\x04\x1a",
        b"\xff\xfd\x06",
        b"\xff\xf4\xff\xfd\x06",
        b"\xef\xbb\xbf\xc3\x28",
        &every_byte,
    ] {
        client.ping(bytes);
    }
    client.close();
    assert_eq!(server.stop().accepted, 1);
}

#[test]
fn messages_of_every_size_come_back_one_by_one() {
    let server = TestServer::echo();
    let client = server.connect();
    let bytes = random_bytes(5, 1000);
    for size in 1..bytes.len() {
        client.ping(&bytes[..size]);
    }
    client.close();
}

#[test]
fn connections_do_not_mix() {
    let server = TestServer::echo_with(Config {
        workers: NonZeroUsize::new(3).unwrap(),
        ..config()
    });
    let clients = server.connect_many(100);
    let bytes: Vec<_> = (0..100).map(|seed| random_bytes(seed, 10_000)).collect();
    for round in 0..10 {
        let part = round * 1000..(round + 1) * 1000;
        for (client, bytes) in clients.iter().zip(&bytes) {
            client.send(&bytes[part.clone()]);
        }
        for (client, bytes) in clients.iter().zip(&bytes) {
            client.expect(&bytes[part.clone()]);
        }
    }
    clients.into_iter().for_each(Client::close);
}

#[test]
fn server_never_sends_first() {
    let server = TestServer::echo();
    let client = server.connect();
    wait_until("the connection reaches its worker", || {
        server.stats().total().assigned == 1
    });
    // While it serves another connection, the worker could send on this one.
    server.connect().check_echo(b"x");
    client.0.set_nonblocking(true).unwrap();
    let error = (&client.0).read(&mut [0]).expect_err("nothing comes");
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    client.0.set_nonblocking(false).unwrap();
    client.close();
}

#[test]
#[cfg(all(unix, feature = "cli"))]
fn program_echoes() {
    let server = crate::harness::Process::serve(&["--workers=2"]);
    Client::connect(server.address()).check_echo(&random_bytes(6, 1 << 20));
    server.terminate();
}
