//! The examples, tested over sockets, and with the tools that know their protocol where these are installed.

use std::path::{Path, PathBuf};
use std::{env, fs, net::Shutdown, thread};

#[cfg(unix)]
use rustix::process::Signal;
#[cfg(unix)]
use tempfile::tempdir;

#[cfg(unix)]
use crate::harness::wait_until;
use crate::harness::{Client, Process, command, installed, run};

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

/// Returns a command as programs send it.
fn array(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend(bulk(word));
    }
    bytes
}

fn bulk(bytes: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

/// Returns requests, and the replies of Redis.
fn conversation() -> Vec<(Vec<u8>, Vec<u8>)> {
    let table: [(&[&[u8]], &str); 27] = [
        (&[b"PING"], "+PONG\r\n"),
        (&[b"PING", b"hello"], "$5\r\nhello\r\n"),
        (&[b"ping"], "+PONG\r\n"),
        (&[b"ECHO", b""], "$0\r\n\r\n"),
        (&[b"ECHO", b"two\r\nlines"], "$10\r\ntwo\r\nlines\r\n"),
        (&[b"GET", b"key"], "$-1\r\n"),
        (&[b"SET", b"key", b"value"], "+OK\r\n"),
        (&[b"GET", b"key"], "$5\r\nvalue\r\n"),
        (&[b"SET", b"key", b"other"], "+OK\r\n"),
        (&[b"GET", b"key"], "$5\r\nother\r\n"),
        (&[b"SET", b"key", b""], "+OK\r\n"),
        (&[b"GET", b"key"], "$0\r\n\r\n"),
        (
            &[b"INCR", b"key"],
            "-ERR value is not an integer or out of range\r\n",
        ),
        (&[b"INCR", b"count"], ":1\r\n"),
        (&[b"INCR", b"count"], ":2\r\n"),
        (&[b"SET", b"count", b"-1"], "+OK\r\n"),
        (&[b"INCR", b"count"], ":0\r\n"),
        (&[b"SET", b"count", b"9223372036854775806"], "+OK\r\n"),
        (&[b"INCR", b"count"], ":9223372036854775807\r\n"),
        (
            &[b"INCR", b"count"],
            "-ERR increment or decrement would overflow\r\n",
        ),
        (&[b"DEL", b"key", b"nothing", b"count", b"key"], ":2\r\n"),
        (&[b"GET", b"count"], "$-1\r\n"),
        (&[b"SET", b"\0\r\n", b"$3\r\n"], "+OK\r\n"),
        (&[b"GET", b"\0\r\n"], "$4\r\n$3\r\n\r\n"),
        (&[b"DEL", b"\0\r\n"], ":1\r\n"),
        (
            &[b"GET"],
            "-ERR wrong number of arguments for 'get' command\r\n",
        ),
        (
            &[b"Incr", b"a", b"b"],
            "-ERR wrong number of arguments for 'incr' command\r\n",
        ),
    ];
    let programs = table.map(|(words, reply)| (array(words), reply.as_bytes().to_vec()));
    let people = [
        ("PING\r\n", "+PONG\r\n"),
        ("  set   word  typed\n", "+OK\r\n"),
        ("\r\n", ""),
        ("get word\r\n", "$5\r\ntyped\r\n"),
        ("*0\r\n", ""),
        ("del word\r\n", ":1\r\n"),
    ];
    let people = people.map(|(line, reply)| (line.into(), reply.into()));
    programs.into_iter().chain(people).collect()
}

#[test]
fn resp_answers_commands() {
    let server = start("resp_server", &[]);
    let client = connect(&server);
    for (request, reply) in conversation() {
        check(&client, &request, &reply);
    }
}

#[test]
fn resp_parses_fragmented_commands() {
    let server = start("resp_server", &[]);
    let (requests, replies): (Vec<_>, Vec<_>) = conversation().into_iter().unzip();
    let (requests, replies) = (requests.concat(), replies.concat());
    for size in [requests.len(), 1, 7] {
        let client = connect(&server);
        for piece in requests.chunks(size) {
            client.send(piece);
        }
        check(&client, b"", &replies);
    }
}

/// Checks the expectations themselves.
#[cfg(unix)]
#[test]
fn resp_answers_as_redis_does() {
    if !installed(&["redis-server"]) {
        return;
    }
    let folder = tempdir().unwrap();
    let path = folder.path().join("redis");
    let mut redis = command("redis-server");
    redis.args(["--port", "0", "--save", "", "--appendonly", "no"]);
    redis.arg("--unixsocket").arg(&path).current_dir(&folder);
    let _redis = Process::launch_with_stdout(&mut redis);
    wait_until("redis-server listens", || {
        std::os::unix::net::UnixStream::connect(&path).is_ok()
    });
    let client = Client::connect_unix(&path);
    for (request, reply) in conversation() {
        check(&client, &request, &reply);
    }
}

#[test]
fn resp_answers_protocol_errors_and_closes() {
    let server = start("resp_server", &[]);
    for (request, error) in [
        (
            "*1\r\n:4\r\nPING\r\n",
            "Protocol error: expected '$', got ':'",
        ),
        ("*1\r\n$x\r\n", "Protocol error: invalid bulk length"),
        ("*1\r\n$-1\r\n", "Protocol error: invalid bulk length"),
        (
            "*1\r\n$99999999999999999999\r\n",
            "Protocol error: invalid bulk length",
        ),
        ("*x\r\n", "Protocol error: invalid multibulk length"),
        ("*9999999\r\n", "Protocol error: invalid multibulk length"),
        (
            "*1\r\n$4\r\nPINGPONG",
            "Protocol error: bulk string is longer than its length",
        ),
    ] {
        let client = connect(&server);
        check(&client, b"PING\r\n", b"+PONG\r\n");
        let reply = format!("-ERR {error}\r\n");
        check(&client, request.as_bytes(), reply.as_bytes());
        client.expect_eof();
    }
    check(
        &connect(&server),
        b"nonsense\r\nPING\r\n",
        b"-ERR unknown command 'nonsense'\r\n+PONG\r\n",
    );
    check(
        &connect(&server),
        b"HELLO 3\r\nPING\r\n",
        b"-NOPROTO unsupported protocol version\r\n+PONG\r\n",
    );
}

#[test]
fn resp_quits_after_its_last_reply() {
    let server = start("resp_server", &[]);
    let answer = exchange(&connect(&server), b"PING\r\nQUIT\r\nPING\r\n");
    assert_eq!(text(&answer), "+PONG\r\n+OK\r\n");
}

#[test]
fn resp_truncates_no_reply_and_repeats_no_command() {
    let server = start("resp_server", &[]);
    let value = vec![b'v'; 30_000];
    let client = connect(&server);
    check(&client, &array(&[b"SET", b"long", &value]), b"+OK\r\n");
    let rounds = 200;
    let requests = b"GET long\r\nINCR round\r\n".repeat(rounds);
    let reply = |round| [&*bulk(&value), format!(":{round}\r\n").as_bytes()].concat();
    let replies = (1..=rounds).map(reply).collect::<Vec<_>>().concat();
    let answer = exchange(&client, &requests);
    assert!(
        answer == replies,
        "{} bytes of {}",
        answer.len(),
        replies.len()
    );
}

#[test]
fn resp_sends_replies_that_are_longer_than_their_commands() {
    let server = start("resp_server", &[]);
    let answer = exchange(&connect(&server), &b"PING\n".repeat(100_000));
    assert!(answer == b"+PONG\r\n".repeat(100_000));
}

#[test]
fn resp_rejects_commands_that_exceed_its_buffer() {
    let server = start("resp_server", &[]);
    let value = vec![b'v'; 100_000];
    let answer = exchange(&connect(&server), &array(&[b"SET", b"large", &value]));
    assert_eq!(text(&answer), "-ERR command exceeds 65536 bytes\r\n");

    // The line fits, and its reply does not.
    let line = [b"ECHO ", &*vec![b'e'; 65_530], b"\n"].concat();
    let answer = exchange(&connect(&server), &[&*line, b"PING\n"].concat());
    assert_eq!(text(&answer), "-ERR the reply is too large\r\n+PONG\r\n");
}

#[test]
fn resp_workers_share_one_store() {
    let server = start("resp_server", &["2"]);
    let increments = b"INCR shared\r\n".repeat(1000);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| exchange(&connect(&server), &increments));
        }
    });
    check(&connect(&server), b"GET shared\r\n", b"$4\r\n8000\r\n");
}

#[test]
fn resp_works_with_redis_cli() {
    if !installed(&["redis-cli"]) {
        return;
    }
    let server = start("resp_server", &[]);
    let port = server.address().port().to_string();
    for (words, expected) in [
        ("ping", "PONG\n"),
        ("set greeting hello", "OK\n"),
        ("get greeting", "hello\n"),
        ("get nothing", "\n"),
        ("incr count", "1\n"),
        (
            "incr greeting",
            "ERR value is not an integer or out of range\n\n",
        ),
        ("del greeting nothing", "1\n"),
        ("hello 2", "server\nresp_server\nproto\n2\n"),
    ] {
        let mut redis_cli = command("redis-cli");
        let output = run(redis_cli.args(["-p", &port]).args(words.split(' ')));
        assert_eq!(text(&output.stdout), expected, "{words}");
        assert_eq!(text(&output.stderr), "", "{words}");
    }
}

#[test]
fn resp_works_with_redis_benchmark() {
    if !installed(&["redis-benchmark"]) {
        return;
    }
    let server = start("resp_server", &["2"]);
    let port = server.address().port().to_string();
    for pipelined in ["1", "16"] {
        let mut benchmark = command("redis-benchmark");
        benchmark.args(["-p", &port, "-P", pipelined, "-t", "ping,set,get,incr"]);
        let output = run(benchmark.args(["-c", "50", "-n", "5000", "--csv"]));
        let results = text(&output.stdout);
        assert!(output.status.success(), "{results}");
        assert_eq!(text(&output.stderr), "");
        let lines = results.lines().count();
        assert_eq!(lines, 1 + 5, "a head and five tests: {results}");
    }
    // It does not check the replies, so its increments are counted: twice 5000, and a few that were in flight at
    // the end.
    let counter = b"GET counter:__rand_int__\r\n";
    check(&connect(&server), counter, b"$5\r\n100");
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
    for name in ["upper", "chat", "digest_server", "masked"] {
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
