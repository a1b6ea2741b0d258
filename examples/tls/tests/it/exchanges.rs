//! Whole exchanges, with this and with other implementations of TLS.

use std::io::{Read, Write};
use std::mem::take;
use std::net::{Shutdown, TcpStream};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use echoserver::{Action, Config, Context, Echo, Event, Handler};

use crate::harness::{
    Client, DEADLINE, End, FnHandler, Identity, TestServer, config, random_bytes, tool,
};

/// Lines without the letters that s_client takes for commands.
fn lines() -> Vec<u8> {
    let lines = (0..20_000).map(|number| format!("line {number}\n"));
    lines.collect::<String>().into_bytes()
}

#[test]
fn openssl_exchanges_lines() {
    let (certificate, _key) = Identity::get().files("openssl");
    for version in ["-tls1_3", "-tls1_2"] {
        let Some(mut openssl) = tool("openssl") else {
            return;
        };
        let server = TestServer::start(config(), || Echo);
        openssl.args(["s_client", "-quiet", "-no_ign_eof", "-verify_return_error"]);
        openssl.args(["-servername", "localhost", "-verify_hostname", "localhost"]);
        openssl.args([version, "-CAfile", &certificate, "-connect"]);
        openssl.arg(server.address.to_string());
        openssl.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = openssl.stderr(Stdio::null()).spawn().unwrap();
        let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let lines = lines();
        let mut answer = vec![0; lines.len()];
        thread::scope(|scope| {
            // It ends at the end of its input, so that comes after the answer.
            let sending = scope.spawn(|| {
                input.write_all(&lines).unwrap();
                input
            });
            output.read_exact(&mut answer).expect("the whole answer");
            drop(sending.join().unwrap());
        });
        assert!(answer == lines);
        assert!(child.wait().unwrap().success(), "{version}");
    }
}

/// `unwrap` sends close_notify, and waits for that of the server.
const PYTHON: &str = "
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[2])
with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as tcp:
    with context.wrap_socket(tcp, server_hostname='localhost') as tls:
        for number in range(50):
            sent = bytes([number]) * (1 + 997 * number)
            tls.sendall(sent)
            answer = b''
            while len(answer) < len(sent):
                part = tls.recv(65536)
                assert part, 'EOF came early'
                answer += part
            assert answer == sent
        plain = tls.unwrap()
        assert plain.recv(1) == b''
        print('done', end='')
";

#[test]
fn python_exchanges_messages_and_close_notify() {
    let Some(mut python) = tool("python3") else {
        return;
    };
    let (certificate, _key) = Identity::get().files("python");
    let server = TestServer::start(config(), || Echo);
    let port = server.address.port().to_string();
    let output = python.args(["-c", PYTHON, &port, &certificate]).output();
    let output = output.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.stdout, b"done", "{errors}");
}

/// Each message of one byte is echoed in a way of its own. A conversation has the same events whether
/// its bytes are encrypted or not.
#[test]
fn inner_handler_is_called_as_without_tls() {
    const MESSAGES: &[u8] = b"efywt";
    let seen = Arc::new(Mutex::new(Vec::new()));
    let answer = |event, context: &mut Context<'_>| {
        let mode = context.input.data().first().copied();
        match (event, mode) {
            (Event::Input, Some(b'w')) => {
                context.waker().wake();
                return Action::Pending;
            }
            (Event::Input, Some(b't')) => {
                context.set_timer(Some(Duration::from_millis(1)));
                return Action::Pending;
            }
            _ => Echo.process(event, context),
        };
        match mode {
            Some(b'f') => Action::Flush,
            Some(b'y') => Action::Yield,
            _ => Action::Continue,
        }
    };
    let shared = Arc::clone(&seen);
    let handler = move || {
        let seen = Arc::clone(&shared);
        FnHandler(move |event, context: &mut Context<'_>| {
            seen.lock().unwrap().push(event);
            answer(event, context)
        })
    };

    let server = TestServer::start_without_tls(config(), handler.clone());
    let mut client = TcpStream::connect(server.address).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    for &message in MESSAGES {
        client.write_all(&[message]).unwrap();
        let mut answer = [0];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [message]);
    }
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    server.stop();
    let plain = take(&mut *seen.lock().unwrap());
    assert_eq!(plain.len(), 2 * MESSAGES.len() + 1, "{plain:?}");

    let server = TestServer::start(config(), handler);
    let mut client = server.connect();
    for message in MESSAGES {
        client.send(&[*message]);
        client.expect(&[*message]);
    }
    client.half_close();
    client.expect_end(&End::Clean);
    server.stop();
    assert_eq!(*seen.lock().unwrap(), plain);
}

#[test]
fn parallel_clients_get_their_bytes() {
    let server = TestServer::start(
        Config {
            workers: 2,
            ..config()
        },
        || Echo,
    );
    thread::scope(|scope| {
        for seed in 0..20 {
            let server = &server;
            scope.spawn(move || {
                let bytes = random_bytes(seed, 1_000_000);
                let mut client = server.connect();
                client.send(&bytes);
                client.half_close();
                client.expect(&bytes);
                client.expect_end(&End::Clean);
            });
        }
    });
    assert_eq!(server.stop().accepted, 20);
}

#[test]
fn late_reader_gets_everything() {
    let server = TestServer::start(config(), || Echo);
    let bytes = random_bytes(1, 20_000_000);
    let mut client = Client::connect(server.address, Some(64 << 10));
    let rest = client.send_until_stuck(&bytes);
    assert!(!rest.is_empty(), "the server takes everything");
    server.wait_until_stuck();
    assert!(server.handle.stats().total().buffered <= 2 * (64 << 10));
    client.send(rest);
    client.half_close();
    client.expect(&bytes);
    client.expect_end(&End::Clean);
}

/// A record does not fit into any of them.
#[test]
fn buffers_can_be_small() {
    for buffer_size in [1, 7, 1000] {
        let config = Config {
            buffer_size,
            ..config()
        };
        let server = TestServer::start(config, || Echo);
        let bytes = random_bytes(2, 20_000);
        let mut client = server.connect();
        client.send(&bytes);
        client.half_close();
        client.expect(&bytes);
        client.expect_end(&End::Clean);
    }
}
