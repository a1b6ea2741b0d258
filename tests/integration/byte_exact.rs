//! Each connection gets back exactly the bytes it sent, in order, and nothing else.

use std::io::{ErrorKind, Read};
use std::num::NonZeroUsize;

use echoserver::Config;

use crate::support::{Client, Program, TestServer, check_echo, config, pattern, until};

#[test]
fn any_size_round_the_buffers_comes_back() {
    let buffer_size = 4096;
    let server = TestServer::echo_with(Config {
        buffer_size,
        ..config()
    });
    for size in [0, 1, 2, 3, 100, 1000] {
        check_echo(server.address(), &pattern(1, size));
    }
    for whole in [buffer_size, 2 * buffer_size, 16 * buffer_size] {
        for size in whole - 2..=whole + 2 {
            check_echo(server.address(), &pattern(2, size));
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
        check_echo(server.address(), &pattern(3, 10_000));
    }
}

#[test]
fn large_buffers_lose_nothing() {
    let server = TestServer::echo_with(Config {
        buffer_size: 4 << 20,
        ..config()
    });
    check_echo(server.address(), &pattern(4, 20 << 20));
}

#[test]
fn no_byte_has_a_meaning() {
    let server = TestServer::echo();
    let mut client = server.connect();
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
fn messages_come_back_one_by_one() {
    let server = TestServer::echo();
    let mut client = server.connect();
    let data = pattern(5, 1000);
    for size in 1..data.len() {
        client.ping(&data[..size]);
    }
    client.close();
}

#[test]
fn connections_do_not_mix() {
    let server = TestServer::echo_with(Config {
        workers: NonZeroUsize::new(3).unwrap(),
        ..config()
    });
    let mut clients = server.connect_many(100);
    let data: Vec<_> = (0..100).map(|seed| pattern(seed, 10_000)).collect();
    for round in 0..10 {
        let part = round * 1000..(round + 1) * 1000;
        for (client, data) in clients.iter_mut().zip(&data) {
            client.send(&data[part.clone()]);
        }
        for (client, data) in clients.iter_mut().zip(&data) {
            client.expect(&data[part.clone()]);
        }
    }
    clients.into_iter().for_each(Client::close);
}

#[test]
fn the_server_never_speaks_first() {
    let server = TestServer::echo();
    let mut client = server.connect();
    until("the connection is taken", || {
        server.stats().total().assigned == 1
    });
    // Others are served meanwhile, so the server has had its chance.
    check_echo(server.address(), b"x");
    client.0.set_nonblocking(true).unwrap();
    let silence = client.0.read(&mut [0]).expect_err("not a word");
    assert_eq!(silence.kind(), ErrorKind::WouldBlock);
    client.0.set_nonblocking(false).unwrap();
    client.close();
}

#[test]
fn the_program_echoes() {
    let program = Program::start(&["--workers", "2"]);
    check_echo(program.address(), &pattern(6, 1 << 20));
    let (status, log) = program.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("counters balance: "), "{log}");
}
