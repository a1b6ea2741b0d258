//! The examples, run: by raw sockets, and by the programs that know best, where these are installed.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Its own tests: no real file makes a job panic.
#[allow(dead_code, reason = "the tests call parts of it only")]
#[path = "../examples/checksum.rs"]
mod checksum;

/// Nothing here takes nearly as long; whatever does has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// The executable of an example. `cargo test` builds them beside the tests, but only if it isn't told
/// what to build: an old one must not be taken for the present one.
fn example(name: &str) -> PathBuf {
    let test = env::current_exe().expect("a test has a path");
    let profile = test.parent().and_then(Path::parent);
    let path = profile
        .expect("target/<profile>/deps/<test>")
        .join("examples");
    let path = path.join(name).with_extension(env::consts::EXE_EXTENSION);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let source = source.join(name).with_extension("rs");
    let modified = |path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let is_new = modified(&path).is_some_and(|built| Some(built) >= modified(&source));
    assert!(
        is_new,
        "run `cargo build --examples`: {} is missing or old",
        path.display()
    );
    path
}

/// An example that serves, until this is dropped.
struct Running {
    child: Child,
    address: String,
}

impl Running {
    fn start(name: &str, more: &[&str]) -> Self {
        let mut child = Command::new(example(name))
            .arg("127.0.0.1:0")
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the example starts");
        let stdout = child.stdout.take().expect("it was piped");
        let mut running = Self {
            child,
            address: String::new(),
        };
        let (sender, first_line) = mpsc::channel();
        let reader = thread::spawn(move || {
            let mut line = String::new();
            let _count = BufReader::new(stdout).read_line(&mut line);
            let _late = sender.send(line);
        });
        let line = first_line
            .recv_timeout(DEADLINE)
            .expect("it says where it listens");
        reader.join().expect("it does not panic");
        let address = line.trim().strip_prefix("listening on ");
        running.address = match address {
            Some(address) => address.into(),
            None => panic!("{name} said {line:?}"),
        };
        running
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("not zero");
        stream.set_write_timeout(Some(DEADLINE)).expect("not zero");
        stream.set_nodelay(true).expect("a TCP socket");
        stream
    }

    fn port(&self) -> &str {
        self.address
            .rsplit(':')
            .next()
            .expect("an address ends in a port")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already.
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

/// Sends `bytes` and ends the stream, and reads to the end meanwhile.
fn exchange(stream: &TcpStream, bytes: &[u8]) -> Vec<u8> {
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = stream;
            // A server that has said its last word need not take all of it.
            let sent = stream.write_all(bytes);
            let _refused = sent.and_then(|()| stream.shutdown(Shutdown::Write));
        });
        read_to_end(stream)
    })
}

/// Reads to the end, or more than any test expects.
fn read_to_end(stream: &TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    let read = stream.take(16 << 20).read_to_end(&mut answer);
    read.expect("an end in order");
    answer
}

/// Sends a request, and reads exactly as much as is expected in return.
fn check(mut stream: impl Read + Write, request: &[u8], expected: &[u8]) {
    stream.write_all(request).expect("still connected");
    let mut answer = vec![0; expected.len()];
    stream
        .read_exact(&mut answer)
        .expect("as many bytes as expected");
    let shown = |bytes: &[u8]| bytes.escape_ascii().to_string();
    assert_eq!(shown(&answer), shown(expected), "to {}", shown(request));
}

/// Runs a program to its end; `None`, and a line that says so, where it is not installed.
fn run(program: impl AsRef<OsStr>, arguments: &[&OsStr], directory: &Path) -> Option<Output> {
    let program = program.as_ref();
    match Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output()
    {
        Ok(output) => Some(output),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("skipped: {} is not installed", program.display());
            None
        }
        Err(error) => panic!("{}: {error}", program.display()),
    }
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).expect("text")
}

/// A directory of its own, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("echoserver-examples-{}-{count}", std::process::id());
        let path = env::temp_dir().join(name);
        fs::create_dir(&path).expect("a new directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _left = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn upper_answers_each_line_once_it_has_ended() {
    let server = Running::start("upper", &[]);
    let stream = server.connect();
    check(&stream, b"hel", b"");
    check(&stream, b"lo\r\nwor", b"HELLO\r\n");
    check(&stream, b"ld\none\ntwo\n", b"WORLD\nONE\nTWO\n");
    check(&stream, b"last\nquit\nunheard\n", b"LAST\n");
    assert_eq!(read_to_end(&stream), b"");
}

#[test]
fn upper_answers_more_than_its_buffers_hold() {
    let server = Running::start("upper", &[]);
    let lines = b"a line of text\n".repeat(100_000);
    let answer = exchange(&server.connect(), &lines);
    assert!(answer == lines.to_ascii_uppercase());
}

/// A command as programs send it.
fn command(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend(bulk(word));
    }
    bytes
}

fn bulk(bytes: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

/// A conversation: what is sent, and what Redis answers.
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
    let programs = table.map(|(words, reply)| (command(words), reply.as_bytes().to_vec()));
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
fn resp_answers_as_expected() {
    let server = Running::start("resp_server", &[]);
    let stream = server.connect();
    for (request, reply) in conversation() {
        check(&stream, &request, &reply);
    }
}

#[test]
fn resp_takes_messages_in_any_pieces() {
    let server = Running::start("resp_server", &[]);
    let (requests, replies): (Vec<_>, Vec<_>) = conversation().into_iter().unzip();
    let (requests, replies) = (requests.concat(), replies.concat());
    for size in [requests.len(), 1, 7] {
        let mut stream = server.connect();
        for piece in requests.chunks(size) {
            stream.write_all(piece).expect("still connected");
        }
        check(&stream, b"", &replies);
    }
}

/// The expectations themselves are checked.
#[cfg(unix)]
#[test]
fn resp_answers_as_redis_does() {
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    let scratch = Scratch::new();
    let path = scratch.0.join("redis");
    let redis = Command::new("redis-server")
        .args([
            "--port",
            "0",
            "--save",
            "",
            "--appendonly",
            "no",
            "--unixsocket",
        ])
        .arg(&path)
        .current_dir(&scratch.0)
        .stdout(Stdio::null())
        .spawn();
    let Ok(child) = redis else {
        return println!("skipped: redis-server is not installed");
    };
    let _redis = Running {
        child,
        address: String::new(),
    };
    let deadline = Instant::now() + DEADLINE;
    let stream = loop {
        match UnixStream::connect(&path) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "redis-server: {error}"),
        }
        thread::yield_now();
    };
    stream.set_read_timeout(Some(DEADLINE)).expect("not zero");
    for (request, reply) in conversation() {
        check(&stream, &request, &reply);
    }
}

#[test]
fn resp_answers_protocol_errors_and_closes() {
    let server = Running::start("resp_server", &[]);
    for (request, fault) in [
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
        let stream = server.connect();
        check(&stream, b"PING\r\n", b"+PONG\r\n");
        check(
            &stream,
            request.as_bytes(),
            format!("-ERR {fault}\r\n").as_bytes(),
        );
        assert_eq!(read_to_end(&stream), b"", "closed after {request:?}");
    }
    check(
        server.connect(),
        b"nonsense\r\nPING\r\n",
        b"-ERR unknown command 'nonsense'\r\n+PONG\r\n",
    );
    check(
        server.connect(),
        b"HELLO 3\r\nPING\r\n",
        b"-NOPROTO unsupported protocol version\r\n+PONG\r\n",
    );
}

#[test]
fn resp_quits_after_its_last_reply() {
    let server = Running::start("resp_server", &[]);
    let answer = exchange(&server.connect(), b"PING\r\nQUIT\r\nPING\r\n");
    assert_eq!(text(&answer), "+PONG\r\n+OK\r\n");
}

#[test]
fn resp_cuts_no_reply_and_repeats_no_command() {
    let server = Running::start("resp_server", &[]);
    let value = vec![b'v'; 30_000];
    let stream = server.connect();
    check(&stream, &command(&[b"SET", b"long", &value]), b"+OK\r\n");
    let turns = 200;
    let requests = b"GET long\r\nINCR turn\r\n".repeat(turns);
    let reply = |turn| [&*bulk(&value), format!(":{turn}\r\n").as_bytes()].concat();
    let replies = (1..=turns).map(reply).collect::<Vec<_>>().concat();
    let answer = exchange(&stream, &requests);
    assert!(
        answer == replies,
        "{} bytes of {}",
        answer.len(),
        replies.len()
    );
}

#[test]
fn resp_loses_no_small_reply_where_they_outgrow_their_commands() {
    let server = Running::start("resp_server", &[]);
    let answer = exchange(&server.connect(), &b"PING\n".repeat(100_000));
    assert!(answer == b"+PONG\r\n".repeat(100_000));
}

#[test]
fn resp_refuses_what_its_buffer_cannot_hold() {
    let server = Running::start("resp_server", &[]);
    let value = vec![b'v'; 100_000];
    let answer = exchange(&server.connect(), &command(&[b"SET", b"large", &value]));
    assert_eq!(text(&answer), "-ERR command exceeds 65536 bytes\r\n");

    // A line that fits, but asks for a reply that does not.
    let line = [b"ECHO ", &*vec![b'e'; 65_530], b"\n"].concat();
    let answer = exchange(&server.connect(), &[&*line, b"PING\n"].concat());
    assert_eq!(text(&answer), "-ERR the reply is too large\r\n+PONG\r\n");
}

#[test]
fn resp_workers_share_one_store() {
    let server = Running::start("resp_server", &["2"]);
    let increments = b"INCR shared\r\n".repeat(1000);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| exchange(&server.connect(), &increments));
        }
    });
    check(server.connect(), b"GET shared\r\n", b"$4\r\n8000\r\n");
}

#[test]
fn redis_cli_is_content() {
    let server = Running::start("resp_server", &[]);
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
        let words = ["-p", server.port()].into_iter().chain(words.split(' '));
        let words: Vec<_> = words.map(OsStr::new).collect();
        let Some(output) = run("redis-cli", &words, Path::new(".")) else {
            return;
        };
        assert_eq!(text(&output.stdout), expected, "{words:?}");
        assert_eq!(text(&output.stderr), "", "{words:?}");
    }
}

#[test]
fn redis_benchmark_is_content() {
    let server = Running::start("resp_server", &["2"]);
    for pipelined in ["1", "16"] {
        let words = [
            "-p",
            server.port(),
            "-P",
            pipelined,
            "-t",
            "ping,set,get,incr",
        ];
        let words = words.into_iter().chain(["-c", "50", "-n", "5000", "--csv"]);
        let words: Vec<_> = words.map(OsStr::new).collect();
        let Some(output) = run("redis-benchmark", &words, Path::new(".")) else {
            return;
        };
        let results = text(&output.stdout);
        assert!(output.status.success(), "{results}");
        assert_eq!(text(&output.stderr), "");
        assert_eq!(
            results.lines().count(),
            1 + 5,
            "a head and five tests: {results}"
        );
    }
    // It does not look at what it is told. So its work is counted: twice 5000, and a few that were in
    // flight at the end.
    check(
        server.connect(),
        b"GET counter:__rand_int__\r\n",
        b"$5\r\n100",
    );
}

/// Files of many sizes, and with names that need care, in `directory`.
fn files(directory: &Path) -> Vec<&'static str> {
    let mut names = vec!["empty", "abc", "a block", "more than a block"];
    if cfg!(unix) {
        names.extend(["back\\slash", "new\nline"]);
    }
    for (name, length) in names.iter().zip([0, 3, 64 << 10, 300_001, 1, 2]) {
        let bytes: Vec<u8> = (b'a'..=b'z').cycle().take(length).collect();
        fs::write(directory.join(name), bytes).expect("a new file");
    }
    names
}

fn checksum(names: &[&str], directory: &Path) -> Output {
    let names: Vec<_> = names.iter().map(OsStr::new).collect();
    run(example("checksum"), &names, directory).expect("it was built")
}

#[test]
fn checksum_knows_the_standard_s_own_examples() {
    let scratch = Scratch::new();
    files(&scratch.0);
    let output = checksum(&["abc", "empty"], &scratch.0);
    assert_eq!(
        text(&output.stdout),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  abc\n\
         e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  empty\n"
    );
    assert_eq!((text(&output.stderr), output.status.code()), ("", Some(0)));
}

#[test]
fn checksum_prints_as_sha256sum_does() {
    let scratch = Scratch::new();
    let names = files(&scratch.0).repeat(20);
    let arguments: Vec<_> = names.iter().map(OsStr::new).collect();
    if let Some(expected) = run("sha256sum", &arguments, &scratch.0) {
        let output = checksum(&names, &scratch.0);
        assert_eq!(text(&output.stdout), text(&expected.stdout));
        assert_eq!((text(&output.stderr), output.status.code()), ("", Some(0)));
    }
}

#[test]
fn checksum_names_what_it_cannot_read_and_does_the_others() {
    let scratch = Scratch::new();
    files(&scratch.0);
    let output = checksum(&["abc", "nothing", ".", "empty"], &scratch.0);
    assert_eq!(output.status.code(), Some(1));
    let names: Vec<_> = text(&output.stdout)
        .lines()
        .map(|line| &line[66..])
        .collect();
    assert_eq!(names, ["abc", "empty"]);
    let faults: Vec<_> = text(&output.stderr).lines().collect();
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(faults[0].starts_with("checksum: nothing: "), "{faults:?}");
    assert!(faults[1].starts_with("checksum: .: "), "{faults:?}");
}

#[test]
fn checksum_says_how_it_is_used() {
    let output = checksum(&[], Path::new("."));
    assert_eq!(text(&output.stderr), "usage: checksum FILE...\n");
    assert_eq!(output.status.code(), Some(2));
}
