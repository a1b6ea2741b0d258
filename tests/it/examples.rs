//! The examples, tested over sockets, and with the tools that know their protocol where these are installed.

mod memcached;

use std::path::{Path, PathBuf};
use std::{env, fs, net::Shutdown, thread};

#[cfg(unix)]
use rustix::process::Signal;

use crate::harness::{Client, Process, command};

/// Returns the executable of an example, which must be current: `cargo test` builds the examples, but
/// `cargo test --test it` does not.
fn example(name: &str) -> PathBuf {
    let test = env::current_exe().expect("a test has a path");
    let profile = test.parent().and_then(Path::parent);
    let folder = profile
        .expect("target/<profile>/deps/<test>")
        .join("examples");
    let path = folder.join(name).with_extension(env::consts::EXE_EXTENSION);
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let source = sources.join(name).with_extension("rs");
    let modified = |path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let is_current = modified(&path).is_some_and(|built| Some(built) >= modified(&source));
    let path_shown = path.display();
    assert!(
        is_current,
        "run `cargo build --examples`: {path_shown} is missing or old"
    );
    path
}

/// Starts an example that serves, and waits until it listens.
fn start(name: &str, arguments: &[&str]) -> Process {
    let mut command = command(example(name));
    let mut server = Process::launch_with_stdout(command.arg("127.0.0.1:0").args(arguments));
    server.wait_for_log("listening on ");
    server
}

fn connect(server: &Process) -> Client {
    Client::connect(server.address())
}

/// Sends `bytes` and half-closes while it reads until EOF.
fn exchange(client: &Client, bytes: &[u8]) -> Vec<u8> {
    thread::scope(|scope| {
        scope.spawn(|| {
            // A server that closes first does not take all of it.
            let sent = client.try_send(bytes);
            let _closed = sent.and_then(|()| client.0.shutdown(Shutdown::Write));
        });
        client.read_to_end()
    })
}

/// Sends a request, and reads exactly as many bytes as are expected.
fn check(client: &Client, request: &[u8], expected: &[u8]) {
    // Shown if the test fails.
    println!("request: {}", request.escape_ascii());
    client.send(request);
    client.expect(expected);
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).expect("text")
}

#[test]
fn upper_answers_complete_lines() {
    let server = start("upper", &[]);
    let client = connect(&server);
    check(&client, b"hel", b"");
    check(&client, b"lo\r\nwor", b"HELLO\r\n");
    check(&client, b"ld\none\ntwo\n", b"WORLD\nONE\nTWO\n");
    check(&client, b"last\nquit\nignored\n", b"LAST\n");
    client.expect_eof();
}

#[test]
fn upper_answers_more_than_its_buffers_hold() {
    let server = start("upper", &[]);
    let lines = b"a line of text\n".repeat(100_000);
    let answer = exchange(&connect(&server), &lines);
    assert!(answer == lines.to_ascii_uppercase());
}

/// A line with the digest of this many zero bytes.
fn digest_line(bytes: usize) -> String {
    let digest = <sha2::Sha256 as sha2::Digest>::digest(vec![0; bytes]);
    let digits: Vec<_> = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.concat() + "\n"
}

#[test]
fn digests_come_in_the_order_of_the_requests() {
    let server = start("digest_server", &["2"]);
    // The first one takes longest, and there are more than a connection may wait for.
    let sizes: Vec<usize> = [4_000_000, 0, 3].into_iter().chain(4..100).collect();
    let requests: Vec<_> = sizes.iter().map(|size| format!("{size}\n")).collect();
    let answers: Vec<_> = sizes.iter().map(|&size| digest_line(size)).collect();
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n";
    assert_eq!(digest_line(0), empty);
    let (requests, answers) = (requests.concat(), answers.concat());
    check(&connect(&server), requests.as_bytes(), answers.as_bytes());
}

#[test]
fn digests_of_many_clients_fill_the_queue() {
    let server = start("digest_server", &["1"]);
    let request = "100000\n".repeat(16);
    let answer = digest_line(100_000).repeat(16);
    let clients: Vec<_> = (0..20).map(|_| connect(&server)).collect();
    for client in &clients {
        client.send(request.as_bytes());
        client.0.shutdown(Shutdown::Write).unwrap();
    }
    for client in &clients {
        assert_eq!(text(&client.read_to_end()), answer);
    }
}

#[test]
fn digest_server_refuses_what_is_no_number() {
    let server = start("digest_server", &[]);
    for request in ["x\n", "-1\n", "10000000001\n"] {
        let problem = b"expected a number of bytes up to 10000000000\n";
        check(&connect(&server), request.as_bytes(), problem);
    }
}

/// Waits until a client has entered a chat in which there are `others`; returns its name too.
fn enter(client: Client, others: usize) -> (Client, String) {
    let name = client.local_address().to_string();
    let welcome = format!("* you are {name}, and {others} others are here\n");
    client.expect(welcome.as_bytes());
    (client, name)
}

#[test]
fn chat_brings_a_line_to_all_others() {
    let server = start("chat", &[]);
    let (first, name) = enter(connect(&server), 0);
    let (second, other) = enter(connect(&server), 1);
    first.expect(format!("* {other} has come\n").as_bytes());
    first.send(b"hel");
    first.send(b"lo\r\n");
    second.expect(format!("{name}: hello\n").as_bytes());
    second.send(b"bye\n");
    second.shutdown_write();
    first.expect(format!("{other}: bye\n* {other} has left\n").as_bytes());
    second.expect_eof();
}

/// Many lines at once, for clients that read them.
#[test]
fn chat_brings_a_burst_to_all_others() {
    let server = start("chat", &[]);
    let (author, name) = enter(connect(&server), 0);
    let (reader, other) = enter(connect(&server), 1);
    author.expect(format!("* {other} has come\n").as_bytes());
    let line = format!("{}\n", "x".repeat(100));
    thread::scope(|scope| {
        scope.spawn(|| author.send(line.repeat(5_000).as_bytes()));
        let expected = format!("{name}: {line}").repeat(5_000);
        reader.expect(expected.as_bytes());
    });
}

#[test]
fn chat_refuses_a_long_line_of_its_author_only() {
    for line in [[&[b'x'; 1000][..], b"\n"].concat(), vec![0xff; 1001]] {
        let server = start("chat", &[]);
        let (author, name) = enter(connect(&server), 0);
        let (other, other_name) = enter(connect(&server), 1);
        author.expect(format!("* {other_name} has come\n").as_bytes());
        author.send(&line);
        author.expect(b"* lines have at most 1000 bytes\n");
        author.expect_eof();
        other.expect(format!("* {name} has left\n").as_bytes());
    }
}

#[test]
fn chat_closes_a_silent_client() {
    let server = start("chat", &["1"]);
    let (client, _) = enter(connect(&server), 0);
    client.send(b"alone\n");
    client.expect(b"* you were silent for too long\n");
    client.expect_eof();
}

/// One client talks without end, and the other does not listen.
#[test]
fn chat_closes_a_client_that_does_not_read() {
    let server = start("chat", &[]);
    let (talker, _) = enter(connect(&server), 0);
    let silent = Client::connect_with_receive_buffer(server.address(), 8 << 10);
    let (_silent, name) = enter(silent, 1);
    talker.expect(format!("* {name} has come\n").as_bytes());
    let line = [&[b'x'; 900][..], b"\n"].concat();
    let mut heard = String::new();
    while !heard.contains("has left") {
        talker.send(&line);
        let mut chunk = [0; 1000];
        talker.0.set_nonblocking(true).unwrap();
        if let Ok(count) = std::io::Read::read(&mut &talker.0, &mut chunk) {
            heard += text(&chunk[..count]);
        }
        talker.0.set_nonblocking(false).unwrap();
    }
    assert_eq!(heard, format!("* {name} has left\n"));
}

#[cfg(unix)]
#[test]
fn chat_says_goodbye_when_it_ends() {
    let server = start("chat", &[]);
    let (client, _) = enter(connect(&server), 0);
    server.signal(Signal::INT);
    client.expect(b"* the chat ends\n");
    client.expect_eof();
}

#[cfg(unix)]
#[test]
fn examples_end_cleanly_at_ctrl_c() {
    for name in ["upper", "chat", "digest_server", "masked", "memcached"] {
        let server = start(name, &[]);
        let client = connect(&server);
        client.send(b"1\n");
        server.signal(Signal::INT);
        let _answer = client.read_to_end();
        drop(client);
        let (status, log) = server.wait();
        assert!(status.success(), "{name}: {log}");
    }
}
