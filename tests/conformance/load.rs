//! `load` on servers that go silent, never accept, accept a single client or send too much; and what it reports.

use std::collections::BTreeSet;
use std::io::{self, PipeWriter, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Output;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use rustix::process::Signal;
use serde_json::Value;
use socket2::{SockAddr, SockRef, Socket, Type};

use crate::harness::{
    DEADLINE, Process, error_line, installed, program, program_after, report, run,
};
use crate::servers::listen;

const MESSAGE: usize = 64;

/// Starts a server that runs `serve` on a thread of its own for each connection, with the number of the connection.
/// Returns its address, and what `serve` has returned.
fn start<R: Send + 'static>(
    serve: impl Fn(usize, TcpStream) -> R + Send + Sync + 'static,
) -> (String, mpsc::Receiver<R>) {
    let (listener, address) = listen();
    SockRef::from(&listener).listen(1_024).expect("it listens");
    let (results, received) = mpsc::channel();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let (serve, results) = (Arc::clone(&serve), results.clone());
            stream.set_nodelay(true).expect("it is open");
            // The test may have ended.
            thread::spawn(move || results.send(serve(number, stream)));
        }
    });
    (address, received)
}

/// Reads a message of the load. Returns false at the end of the connection.
fn read_message(mut stream: &TcpStream) -> Option<[u8; MESSAGE]> {
    let mut message = [0; MESSAGE];
    stream.read_exact(&mut message).ok().map(|()| message)
}

/// Answers one message after the other as long as `answers` says so; then reads on and sends nothing.
fn answer_while(stream: &TcpStream, mut answers: impl FnMut() -> bool) {
    while let Some(message) = read_message(stream) {
        if answers() && (&*stream).write_all(&message).is_err() {
            return;
        }
    }
}

fn number(report: &Value, name: &str) -> u64 {
    let value = report[name].as_u64();
    value.unwrap_or_else(|| panic!("no {name} in {report}"))
}

fn failure(report: &Value) -> &str {
    report["failure"].as_str().unwrap_or_default()
}

/// Starts a server that answers `count` messages in all.
fn answer_then_hang(count: usize) -> String {
    let answered = AtomicUsize::new(0);
    let serve = move |_, stream: TcpStream| {
        answer_while(&stream, || answered.fetch_add(1, SeqCst) < count);
    };
    start(serve).0
}

#[test]
fn silence_after_some_answers_is_counted_in_every_mode() {
    let modes = [
        "--duration=1",
        "--duration=1 --rate=20",
        "--duration=1 --connect",
        "--duration=1 --messages=10",
        "--duration=1 --flood --size=64",
    ];
    thread::scope(|scope| {
        for answers in [0, 1, 3] {
            for mode in modes {
                scope.spawn(move || load_a_server_that_hangs(mode, answers));
            }
        }
    });
}

fn load_a_server_that_hangs(mode: &str, answers: usize) {
    let address = answer_then_hang(answers);
    let arguments: Vec<_> = mode.split(' ').collect();
    let (status, report) = report("load", &address, &arguments);
    let answers = answers as u64;
    assert_eq!(status, 1, "{mode}: {report}");
    assert_eq!(number(&report, "messages"), answers, "{mode}: {report}");
    let unanswered = number(&report, "unanswered");
    let is_right = if mode.contains("flood") {
        unanswered > 0
    } else if mode.contains("rate") {
        unanswered == 20 - answers
    } else {
        unanswered == 1
    };
    assert!(is_right, "{mode}: {report}");
    let expected = format!("{unanswered} messages unanswered");
    let failure = failure(&report).replace(',', "");
    assert!(failure.contains(&expected), "{mode}: {report}");
    // The age of those in flight is in the percentiles.
    let [least, most] = [&report["least_age_ns"], &report["rtt_ns"]["max"]].map(Value::as_u64);
    let is_right = least >= Some(1_000_000_000) && most >= least;
    assert!(is_right, "{mode}: {report}");
    assert_eq!(number(&report, "lost"), 0, "{mode}");
}

#[test]
fn messages_that_are_not_reached_are_a_failure() {
    for answers in [0, 1, 3] {
        let address = answer_then_hang(answers);
        let (status, report) = report("load", &address, &["-n=10", "--timeout=0.3"]);
        let counts = ["messages", "failed", "unanswered"].map(|name| number(&report, name));
        assert_eq!((status, counts), (1, [answers as u64, 1, 1]), "{report}");
        let reached = format!("; {answers} of 10 messages were complete");
        assert!(failure(&report).ends_with(&reached), "{report}");
    }
}

/// Also when the connection is given up during the run, and the next one answers.
#[test]
fn stall_that_fails_a_connection_is_in_the_percentiles() {
    let serve = |number, stream: TcpStream| answer_while(&stream, || number > 0);
    let (address, _) = start(serve);
    let arguments = ["--rate=100", "-d=3", "--timeout=1"];
    let (status, report) = report("load", &address, &arguments);
    let counts = ["failed", "lost", "unanswered"].map(|name| number(&report, name));
    assert_eq!((status, counts[0]), (1, 1), "{report}");
    // Those that were sent in the first moments have waited for a second, the others not.
    assert!(counts[1] > 0 && counts[2] > 0, "{report}");
    let [least, most] = [&report["least_age_ns"], &report["rtt_ns"]["max"]].map(Value::as_u64);
    assert!(least >= Some(1_000_000_000) && most >= least, "{report}");
    let times = crate::recorded_times(&report);
    let answered = number(&report, "messages") + number(&report, "after_end");
    assert_eq!(times, answered + counts[2], "{report}");
    // An interval has the times of those that came back in it.
    let mut series = report["series"].as_array().expect("a list").iter();
    let is_right = series.all(|it| it["p99_ns"].is_null() == (number(it, "messages") == 0));
    assert!(is_right, "{report}");
}

#[test]
fn no_message_is_a_failure_with_a_reason() {
    let address = answer_then_hang(0);
    let load = program().args(["load", &address, "-d=0.2"]).output();
    let load = load.expect("it runs");
    let text = String::from_utf8(load.stdout).expect("text");
    let reason = "\nFAILED        1 messages unanswered; no message was complete\n";
    assert_eq!(
        (load.status.code(), text.contains(reason)),
        (Some(1), true),
        "{text}"
    );
    // The message was sent at the start, and the wait of a second has begun at the end.
    let (_, age) = text
        .split_once("\nunanswered    1 messages for at least ")
        .expect("a note");
    let (age, rest) = age.split_once("s: ").expect("an age in seconds");
    assert!(age.parse::<f64>().unwrap() > 1.1, "{text}");
    assert!(rest.starts_with("their age counts as RTT, a lower bound\n"));
}

#[test]
fn one_silent_connection_of_fifty_is_counted_and_named() {
    let modes = [
        "-d=0.3",
        "-d=0.3 --rate=1000",
        "-d=0.3 --connect",
        "-d=0.3 -n=1000000",
    ];
    for mode in modes {
        let silent = Arc::new(Mutex::new(None));
        let address = {
            let silent = Arc::clone(&silent);
            let serve = move |number, stream: TcpStream| {
                if number == 7 {
                    *silent.lock().unwrap() = stream.peer_addr().ok();
                }
                answer_while(&stream, || number != 7);
            };
            start(serve).0
        };
        let arguments: Vec<_> = mode.split(' ').chain(["-c=50"]).collect();
        let (status, report) = report("load", &address, &arguments);
        let unanswered = if mode.contains("rate") { 6 } else { 1 };
        let counts = [number(&report, "unanswered"), number(&report, "failed")];
        assert_eq!((status, counts), (1, [unanswered, 0]), "{mode}: {report}");
        assert!(number(&report, "messages") > 0, "{mode}");
        if !mode.contains("connect") {
            assert_eq!(number(&report, "answered"), 49, "{mode}: {report}");
        }
        let address = silent.lock().unwrap().expect("it was opened").to_string();
        assert_eq!(
            report["never_answered"],
            serde_json::json!([address]),
            "{mode}"
        );
    }
}

#[test]
#[cfg(target_os = "linux")]
fn what_falls_due_while_the_load_is_stopped_counts() {
    use std::time::{Duration, Instant};

    use crate::harness::wait_until;

    let (first, received) = mpsc::channel();
    let (address, _) = start(move |_, stream| {
        answer_while(&stream, || {
            let _ended = first.send(());
            true
        });
    });
    let arguments = ["load", &address, "--rate=100", "-d=1", "--json"];
    let load = Process::launch_with_stdout(program().args(arguments));
    received.recv_timeout(DEADLINE).expect("a message is sent");
    let start = Instant::now();
    load.pause();
    // Beyond its end.
    wait_until("its time is over", || {
        start.elapsed() > Duration::from_millis(1_500)
    });
    load.signal(Signal::CONT);
    let (status, output) = load.wait();
    let report: Value = serde_json::from_str(&output).expect("a report");
    let counts = ["messages", "after_end", "unanswered"].map(|name| number(&report, name));
    assert_eq!(
        (status.code(), counts.iter().sum()),
        (Some(0), 100),
        "{report}"
    );
    let latest = report["lateness_ns"]["max"].as_u64();
    assert!(latest > Some(500_000_000), "{report}");
    let fault = report["own_fault"].as_str().unwrap_or_default();
    assert!(fault.starts_with("the load was late"), "{report}");
}

#[test]
fn bytes_after_the_last_answer_are_an_error() {
    for mode in ["-n=1", "-n=5 --connect", "-d=0.2 -c=3", "-d=0.2 --rate=100"] {
        let (address, _) = start(|_, stream| {
            answer_while(&stream, || true);
            // The client has half-closed.
            (&stream).write_all(b"x").expect("it is read");
        });
        let arguments: Vec<_> = mode.split(' ').collect();
        let (status, report) = report("load", &address, &arguments);
        let errors: BTreeSet<_> = report["errors"].as_object().unwrap().keys().collect();
        let surplus = "wrong byte: more came back than was sent".to_owned();
        assert_eq!(
            (status, errors),
            (1, BTreeSet::from([&surplus])),
            "{mode}: {report}"
        );
        assert!(number(&report, "failed") <= number(&report, "attempts"));
    }
}

/// A message at the border of two intervals would be in the one or the other.
#[test]
fn each_interval_has_the_messages_of_its_rate() {
    let (address, _) = start(|_, stream| answer_while(&stream, || true));
    for (rate, messages) in [("--rate=1", 1), ("--rate=2", 2)] {
        let arguments = ["load", &address, "--json", "--interval=1", "-d=3", rate];
        let output = run(program().args(arguments));
        let mut lines = output.stdout.trim_ascii_end().rsplit(|byte| *byte == b'\n');
        let last = lines.next().expect("a line");
        let report: Value = serde_json::from_slice(last).expect("an object");
        let series = report["series"].as_array().expect("a list").iter();
        let counts: Vec<_> = series.map(|it| number(it, "messages")).collect();
        assert_eq!(counts, [messages; 3], "{report}");
    }
}

#[test]
fn rate_is_never_exceeded() {
    let (address, _) = start(|_, stream| answer_while(&stream, || true));
    for (mode, rate, messages) in [
        ("--rate=5 -d=0.5", 5.0, 2),
        ("--rate=10 -n=3", 10.0, 3),
        ("--rate=7 -n=4 -c=2 --threads=2", 7.0, 4),
        ("--rate=0.1k -d=0.29", 100.0, 29),
    ] {
        let arguments: Vec<_> = mode.split(' ').collect();
        let (status, report) = report("load", &address, &arguments);
        let counts = number(&report, "messages") + number(&report, "after_end");
        assert_eq!((status, counts), (0, messages), "{mode}: {report}");
        let measured = report["messages_per_second"].as_f64().expect("a number");
        assert!(measured <= rate, "{mode}: {measured}");
    }
    let error = error_line(program().args(["load", &address, "--rate=0.1", "-d=5"]), 2);
    assert_eq!(error, "--rate: no message is due in the time of --duration");
}

/// Listens. The kernel accepts a few connections more than `backlog`.
fn listen_at(address: &SockAddr, backlog: i32) -> Socket {
    let listener = Socket::new(address.domain(), Type::STREAM, None).unwrap();
    listener.bind(address).unwrap();
    listener.listen(backlog).unwrap();
    listener
}

/// Connects until the backlog of a listener is full.
fn fill(address: &SockAddr) -> Vec<Socket> {
    let connect = |_| {
        let socket = Socket::new(address.domain(), Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        // Beyond the backlog, it stays without an answer, or is refused for now.
        let _full = socket.connect(address);
        socket
    };
    (0..4).map(connect).collect()
}

fn loopback() -> SockAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()
}

fn name(listener: &Socket) -> String {
    let address = listener.local_addr().unwrap();
    match address.as_socket() {
        Some(ip) => ip.to_string(),
        None => format!("unix:{}", address.as_pathname().unwrap().display()),
    }
}

#[test]
fn listener_that_accepts_nothing_is_unreachable() {
    let folder = tempfile::tempdir().unwrap();
    let unix = SockAddr::unix(folder.path().join("echo")).unwrap();
    for address in [loopback(), unix] {
        let listener = listen_at(&address, 0);
        let _clients = fill(&listener.local_addr().unwrap());
        let name = name(&listener);
        let error = error_line(
            program().args(["load", &name, "-c=100", "-d=1", "--timeout=0.5"]),
            3,
        );
        assert_eq!(error, format!("cannot connect to {name}: timed out"));
    }
}

#[test]
fn connections_that_are_never_accepted_do_not_prolong_the_load() {
    let folder = tempfile::tempdir().unwrap();
    let unix = SockAddr::unix(folder.path().join("echo")).unwrap();
    for address in [loopback(), unix] {
        for mode in ["-d=0.2", "-n=1000"] {
            // The kernel accepts a few, and the rest waits.
            let listener = listen_at(&address, 3);
            let (status, report) =
                report("load", &name(&listener), &["-c=100", mode, "--timeout=0.5"]);
            assert_eq!((status, number(&report, "messages")), (1, 0), "{report}");
            let [failed, attempts] = ["failed", "attempts"].map(|name| number(&report, name));
            assert!(0 < failed && failed <= attempts, "{report}");
            let error = "cannot connect: no answer for 500ms";
            assert!(report["errors"][error].as_u64() > Some(0), "{report}");
            drop(listener);
            let _removed = std::fs::remove_file(folder.path().join("echo"));
        }
    }
}

#[test]
fn signal_ends_the_opening_phase() {
    let listener = listen_at(&loopback(), 3);
    let arguments = ["load", &name(&listener), "-c=100", "--timeout=1000"];
    let mut load = Process::launch_with_stdout(program().args(arguments));
    load.wait_for_log("100 connection(s)");
    load.signal(Signal::INT);
    let (status, output) = load.wait();
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(
        output.contains("FAILED        no message was complete\n"),
        "{output}"
    );
}

#[test]
fn lack_of_descriptors_is_reported_before_anything_is_opened() {
    let (listener, address) = listen();
    listener.set_nonblocking(true).unwrap();
    for (mode, error) in [
        (
            "-c=5000",
            "5,000 connections: needs 5,009 descriptors, limit 300",
        ),
        (
            "--connect -c=200 --threads=2",
            "200 connections: needs 410 descriptors, limit 300",
        ),
    ] {
        let mut command = program_after("ulimit -n 300");
        command.args(["load", &address]).args(mode.split(' '));
        assert_eq!(error_line(&mut command, 2), error);
    }
    assert_eq!(
        listener.accept().unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
}

#[test]
fn each_connection_is_one_of_the_load() {
    for (mode, connections) in [("-n=10", 1), ("-n=10 -c=3", 3), ("-n=5 --connect", 5)] {
        let accepted = Arc::new(AtomicUsize::new(0));
        let (address, _) = {
            let accepted = Arc::clone(&accepted);
            start(move |_, stream| {
                accepted.fetch_add(1, SeqCst);
                answer_while(&stream, || true);
            })
        };
        let arguments: Vec<_> = mode.split(' ').collect();
        let (status, report) = report("load", &address, &arguments);
        let counts = [number(&report, "attempts"), number(&report, "opened")];
        assert_eq!((status, counts), (0, [connections; 2]), "{mode}: {report}");
        assert_eq!(accepted.load(SeqCst) as u64, connections, "{mode}");
    }
}

/// `socat` without `fork`, and `nc -l`, serve one client and end.
#[test]
fn server_for_a_single_client_can_be_measured() {
    if !installed(&["socat"]) {
        return;
    }
    let address = crate::harness::free_address();
    let listen = format!("TCP-LISTEN:{},bind=127.0.0.1", address.port());
    let mut socat = crate::harness::command("socat");
    let mut server = Process::launch(socat.args(["-d", "-d", &listen, "EXEC:cat"]));
    server.wait_for_log("listening on");
    let (status, report) = report("load", &address.to_string(), &["-n=100"]);
    assert_eq!((status, number(&report, "messages")), (0, 100), "{report}");
    let (status, log) = server.wait();
    assert!(status.success(), "{log}");
}

#[test]
fn address_in_use_is_reported() {
    let Ok(listener) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) else {
        println!("skipped: no IPv6");
        return;
    };
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        answer_while(&stream, || true);
    });
    let (status, report) = report("load", &port.to_string(), &["-n=3"]);
    assert_eq!(status, 0, "{report}");
    assert_eq!(report["target"], format!("localhost:{port}"));
    assert_eq!(report["address"], format!("[::1]:{port}"));
}

#[test]
fn connections_end_with_eof() {
    for mode in [
        "-d=0.2 -c=5",
        "-d=0.2 -c=5 --flood",
        "-n=20 -c=5 --connect",
        "-d=0.1 --rate=500 -c=5",
    ] {
        let (address, ends) = start(|_, mut stream| {
            let mut buffer = vec![0; 64 << 10];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return io::Result::Ok(()),
                    count => stream.write_all(&buffer[..count])?,
                }
            }
        });
        let arguments: Vec<_> = mode.split(' ').collect();
        let (status, report) = report("load", &address, &arguments);
        assert_eq!(status, 0, "{mode}: {report}");
        for _ in 0..number(&report, "opened") {
            let end = ends.recv_timeout(DEADLINE).expect("it ends");
            assert_eq!(end.map_err(|error| error.kind()), Ok(()), "{mode}");
        }
    }
}

/// Returns the reading end of a pipe with room for less than a page, and the writing end.
fn nearly_full_pipe() -> (io::PipeReader, PipeWriter) {
    const PAGES: usize = 15;
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(&vec![b' '; PAGES * 4096]).unwrap();
    (reader, writer)
}

#[test]
fn output_that_is_not_read_does_not_prolong_the_load() {
    let (address, ends) = start(|_, stream| answer_while(&stream, || true));
    let (mut reader, writer) = nearly_full_pipe();
    // More lines than the pipe has room for.
    let arguments = ["load", &address, "-d=2", "--interval=10ms"];
    let mut load = program().args(arguments).stdout(writer).spawn().unwrap();
    // The load has ended, and the process still writes.
    ends.recv_timeout(DEADLINE).expect("the connection ends");
    assert_eq!(load.try_wait().unwrap(), None);
    let mut output = Vec::new();
    reader.read_to_end(&mut output).unwrap();
    let output = String::from_utf8(output).unwrap();
    assert!(output.contains("\nduration      2.0"), "{output}");
    assert!(load.wait().unwrap().success());
}

#[test]
fn closed_output_ends_a_load_without_an_end() {
    let (address, ends) = start(|_, stream| answer_while(&stream, || true));
    let (reader, writer) = io::pipe().unwrap();
    let mut load = program();
    let mut load = load
        .args(["load", &address, "-d=0"])
        .stdout(writer)
        .spawn()
        .unwrap();
    let mut line = String::new();
    io::BufRead::read_line(&mut io::BufReader::new(reader), &mut line).unwrap();
    ends.recv_timeout(DEADLINE).expect("the connection ends");
    assert!(load.wait().unwrap().success(), "{line}");
}

#[test]
fn one_connect_time_is_one_figure() {
    let (address, _) = start(|_, stream| answer_while(&stream, || true));
    for (connections, is_single) in [("-c=1", true), ("-c=2", false)] {
        let Output { stdout, .. } = run(program().args(["load", &address, "-n=4", connections]));
        let text = String::from_utf8(stdout).unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with("connect time"))
            .expect("a line");
        assert_eq!(!line.contains("p50"), is_single, "{line}");
    }
}

/// The members of the report that the man page documents.
const MEMBERS: [&str; 33] = [
    "address",
    "after_end",
    "answered",
    "attempts",
    "bytes_verified",
    "connect_ns",
    "connections",
    "cpu_seconds",
    "errors",
    "failed",
    "failure",
    "greetings",
    "host",
    "lateness_ns",
    "least_age_ns",
    "lost",
    "message_size",
    "messages",
    "messages_per_second",
    "never_answered",
    "opened",
    "options",
    "own_fault",
    "rate",
    "rtt_ns",
    "schema",
    "seconds",
    "series",
    "started",
    "target",
    "unanswered",
    "version",
    "warm_up",
];

#[test]
fn json_has_the_documented_members() {
    let (address, _) = start(|_, stream| answer_while(&stream, || true));
    let arguments = [
        "--rate=200",
        "-d=0.25",
        "--warm-up=0.1",
        "-c=2",
        "--interval=0.1",
    ];
    let mut command = program();
    let output = run(command.args(["load", &address, "--json"]).args(arguments));
    let text = String::from_utf8(output.stdout).expect("text");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    let lines: Vec<Value> = lines.collect();
    let (report, intervals) = lines.split_last().expect("a report");
    let members: BTreeSet<_> = report
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(members, BTreeSet::from(MEMBERS));
    let manual = run(program().arg("--generate=man-load")).stdout;
    let manual = String::from_utf8(manual).unwrap().replace('\\', "");
    let names = members.into_iter().chain([
        "end",
        "bytes",
        "p50_ns",
        "p99_ns",
        "max_ns",
        "in_flight",
        "interval",
    ]);
    for name in names {
        assert!(manual.contains(name), "{name} is not documented");
    }
    assert_eq!(
        (&report["schema"], &report["address"]),
        (&1.into(), &address.into())
    );
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    let options = serde_json::json!({
        "connections": 2, "size": 64, "in_flight": null, "rate": 200.0, "flood": false, "connect": false,
        "skip_greeting": false, "threads": 1, "duration": 0.25, "messages": null, "warm_up": 0.1, "timeout": 10.0,
        "interval": 0.1,
    });
    assert_eq!(report["options"], options);
    // The lines of the intervals are the series, which contains every message.
    let series = report["series"].as_array().expect("a list");
    assert_eq!(series, intervals);
    let sum = |name: &str| {
        series
            .iter()
            .map(|interval| number(interval, name))
            .sum::<u64>()
    };
    assert_eq!(sum("messages"), number(report, "messages"), "{report}");
    assert_eq!(sum("bytes"), number(report, "bytes_verified"));
    let last = &series[series.len() - 1];
    assert_eq!(last["end"], report["seconds"]);
    let seconds = series
        .iter()
        .map(|interval| interval["seconds"].as_f64().unwrap());
    let seconds: f64 = seconds.sum();
    assert!(
        (seconds - report["seconds"].as_f64().unwrap()).abs() < 1e-6,
        "{report}"
    );
    let with_messages = series.iter().filter(|it| number(it, "messages") > 0);
    for interval in with_messages {
        let times = ["p50_ns", "p99_ns", "max_ns"].map(|name| number(interval, name));
        assert!(times.is_sorted(), "{interval}");
    }
}

#[test]
fn intervals_are_printed_without_a_terminal() {
    let (address, _) = start(|_, stream| answer_while(&stream, || true));
    for (arguments, is_printed) in [
        (&["-d=0.3", "--rate=100", "--interval=0.1"][..], true),
        (&["-d=0.3", "--rate=100"], false),
    ] {
        let output = run(program().args(["load", &address]).args(arguments));
        let text = String::from_utf8(output.stdout).expect("text");
        let is_interval = |line: &str| line.contains(" s  ") && line.contains(" messages/s  p99 ");
        assert_eq!(text.lines().any(is_interval), is_printed, "{text}");
    }
    // A ping.
    let arguments = ["load", &address, "--rate=1", "-d=0"];
    let mut load = Process::launch_with_stdout(program().args(arguments));
    load.wait_for_log(" messages/s  p99 ");
    load.signal(Signal::INT);
    let (status, output) = load.wait();
    assert_eq!(status.code(), Some(0), "{output}");
}

/// The greeting arrives in two parts, after the message.
#[test]
fn greetings_are_skipped_and_counted() {
    for mode in ["-n=8 -c=4", "-n=4 --connect", "-d=0.1 --rate=100 -c=4"] {
        let (address, _) = start(|number, stream| {
            let line = if number % 4 == 3 { b"B\n" } else { b"A\n" };
            let mut is_greeted = false;
            while let Some(message) = read_message(&stream) {
                if !is_greeted {
                    (&stream).write_all(&line[..1]).unwrap();
                    (&stream).write_all(&line[1..]).unwrap();
                    is_greeted = true;
                }
                (&stream).write_all(&message).unwrap();
            }
        });
        let arguments: Vec<_> = mode.split(' ').chain(["--skip-greeting"]).collect();
        let (status, report) = report("load", &address, &arguments);
        assert_eq!(status, 0, "{mode}: {report}");
        assert_eq!(
            report["greetings"],
            serde_json::json!({"A": 3, "B": 1}),
            "{mode}"
        );
        if mode == "-n=4 --connect" {
            let output = run(program().args(["load", &address]).args(&arguments));
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(
                text.contains("\ngreetings     A 75 % (3), B 25 % (1)\n"),
                "{text}"
            );
        }
    }
    let server = Process::serve(&["--greeting=hello\\n"]);
    let address = server.address().to_string();
    let (status, greeted) = report("load", &address, &["-n=100", "-c=5", "--skip-greeting"]);
    assert_eq!(
        (status, &greeted["greetings"]["hello"]),
        (0, &5.into()),
        "{greeted}"
    );
    let (status, wrong) = report("load", &address, &["-n=100", "-c=1"]);
    let errors = wrong["errors"].to_string();
    assert!(
        status == 1 && errors.contains("use --skip-greeting"),
        "{errors}"
    );
    server.terminate();
}

/// Returns a command that runs the program after `setup` in network and process namespaces of its own, in which no process
/// outlives it; none if that is not possible.
fn program_in_namespace(setup: &str) -> Option<std::process::Command> {
    let mut test = crate::harness::command("unshare");
    let is_possible = installed(&["unshare", "ip"])
        && run(test.args(["-npf", "--kill-child", "true"]))
            .status
            .success();
    if !is_possible {
        println!("skipped: no network namespace");
        return None;
    }
    let mut command = crate::harness::command("unshare");
    command.args([
        "-npf",
        "--kill-child",
        "sh",
        "-c",
        &format!(r#"{setup} && exec "$0" "$@""#),
    ]);
    command.arg(program().get_program());
    Some(command)
}

#[test]
fn connection_to_itself_counts_as_refused() {
    const ONE_PORT: &str =
        "ip link set lo up && echo 40000 40000 >/proc/sys/net/ipv4/ip_local_port_range";
    for arguments in [
        ["load", "127.0.0.1:40000", "-n=1"],
        ["check", "127.0.0.1:40000", "--only=burst"],
    ] {
        let Some(mut command) = program_in_namespace(ONE_PORT) else {
            return;
        };
        let error = error_line(command.args(arguments), 3);
        assert_eq!(
            error,
            "cannot connect to 127.0.0.1:40000: connection refused"
        );
    }
}

#[test]
fn lack_of_an_address_and_lack_of_a_port_are_told_apart() {
    // A port of which the client has no other than the one in use.
    const NO_PORT: &str = "ip link set lo up && echo 40000 40000 >/proc/sys/net/ipv4/ip_local_port_range \
        && echo 0 >/proc/sys/net/ipv4/tcp_tw_reuse && { \"$0\" --listen 127.0.0.1:5555 -q & } && until \"$0\" load 5555 -n 1 >/dev/null 2>&1; do :; done";
    for (setup, target, cause) in [
        (
            "true",
            "[::1]:5555",
            "this machine has no address to connect from",
        ),
        (
            NO_PORT,
            "127.0.0.1:5555",
            "no local port is free: closed connections hold them for a minute",
        ),
    ] {
        let Some(mut command) = program_in_namespace(setup) else {
            return;
        };
        let error = error_line(command.args(["load", target, "-n=1"]), 4);
        assert_eq!(error, format!("cannot connect to {target}: {cause}"));
    }
}
