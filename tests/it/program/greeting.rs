//! `--greeting`: what a client gets before its own bytes.

use std::fs;
use std::net::SocketAddr;

use tempfile::tempdir;

use crate::harness::{Client, Process, command, installed, program, random_bytes};

#[test]
fn greeting_is_sent_once_and_then_bytes_come_back() {
    let greeting = r"--greeting=I am {hostname} ({pid}) at {local}, you are {peer}\\\n";
    let server = Process::start(program().args(["--listen=:0", greeting]));
    let hostname = gethostname::gethostname();
    let (hostname, pid) = (hostname.to_string_lossy(), server.pid().as_raw_nonzero());
    // A dual-stack listener has an IPv6 address.
    let local = SocketAddr::from(([127, 0, 0, 1], server.address().port()));
    for seed in 0..3 {
        let client = Client::connect(local);
        let peer = client.local_address();
        let expected = format!("I am {hostname} ({pid}) at {local}, you are {peer}\\\n");
        client.expect(expected.as_bytes());
        client.check_echo(&random_bytes(seed, 300_000));
    }
    server.terminate();
}

#[test]
fn greeting_of_a_unix_socket_names_its_path() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    let listen = format!("--listen=unix:{}", path.display());
    let server = Process::start(program().args([&listen, "--greeting={peer} {local}|"]));
    let client = Client::connect_unix(&path);
    client.expect(format!("unix unix:{}|", path.display()).as_bytes());
    client.check_echo(b"echo");
    server.terminate();
}

#[test]
fn greeting_longer_than_the_buffer_precedes_all_bytes() {
    let text = "0123456789".repeat(400);
    let server = Process::serve(&["--buffer-size=1", &format!("--greeting={text}")]);
    let client = Client::connect(server.address());
    client.send(b"early");
    client.expect(format!("{text}early").as_bytes());
    client.close();
    server.terminate();
}

/// A client that sends nothing gets the greeting, and then EOF.
#[test]
fn greeting_reaches_a_client_that_has_half_closed() {
    let server = Process::serve(&["--greeting=hello"]);
    let client = Client::connect(server.address());
    client.shutdown_write();
    assert_eq!(client.read_to_end(), b"hello");
    server.terminate();
}

/// Only a greeting with the local address, and a log with it, cost a system call.
#[test]
fn local_address_costs_a_system_call_only_where_it_is_used() {
    if !installed(&["strace"]) {
        return;
    }
    let calls = |argument: &str, clients: usize| {
        let folder = tempdir().unwrap();
        let file = folder.path().join("calls");
        let mut strace = command("strace");
        strace.args([
            "-D",
            "-qq",
            "-f",
            "-e",
            "trace=getsockname,getpeername",
            "-o",
        ]);
        strace.arg(&file).arg(program().get_program());
        strace.args(["--listen=127.0.0.1:0", argument]);
        let server = Process::start(&mut strace);
        for _ in 0..clients {
            let client = Client::connect(server.address());
            client.send(b"!");
            client.shutdown_write();
            assert!(client.read_to_end().ends_with(b"!"));
        }
        server.terminate();
        fs::read_to_string(&file)
            .unwrap()
            .matches("getsockname(")
            .count()
    };
    let without_clients = calls("-v", 0);
    for (argument, calls_per_client) in [
        ("-v", 0),
        ("--greeting={peer}", 0),
        ("--greeting={local}", 1),
        ("-vv", 1),
    ] {
        let expected = without_clients + 5 * calls_per_client;
        assert_eq!(calls(argument, 5), expected, "{argument}");
    }
}

#[test]
fn opened_connections_are_logged_with_their_local_address() {
    let mut server = Process::serve(&["-vv"]);
    let client = Client::connect(server.address());
    let (peer, local) = (client.local_address(), server.address());
    server.wait_for_log(&format!("opened peer={peer} local={local}"));
    client.check_echo(b"logged");
    server.terminate();
}
