//! The faults on request: which bytes come back, and how the connection ends, over TCP and a Unix-domain socket.

use std::io::{ErrorKind, Read};
use std::thread;

use rustix::process::Signal;
use tempfile::{TempDir, tempdir};

use crate::harness::{
    Client, Process, http, possible_connections, random_bytes, total, wait_until,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Eof,
    Reset,
}

/// A server with faults that listens on both kinds of sockets.
struct Server {
    process: Process,
    folder: TempDir,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let folder = tempdir().unwrap();
        let unix = format!("--listen=unix:{}", folder.path().join("echo").display());
        let process =
            Process::serve(&[&[&unix, "-v", "--metrics=127.0.0.1:0"], arguments].concat());
        Self { process, folder }
    }

    /// Returns a client of each kind, which connects when its turn comes.
    fn clients(&self) -> impl Iterator<Item = Client> {
        let tcp = || Client::connect(self.process.address());
        let unix = || Client::connect_unix(self.folder.path().join("echo"));
        [true, false]
            .into_iter()
            .map(move |is_tcp| if is_tcp { tcp() } else { unix() })
    }

    fn metric(&mut self, name: &str) -> u64 {
        let body = http::get(self.process.metrics_address(), "/metrics").body;
        let line = body.lines().find_map(|line| line.strip_prefix(name));
        let value = line.unwrap_or_else(|| panic!("no {name} in {body}"));
        value.trim().parse().expect("a number")
    }
}

/// Reads until the end.
fn read_all(client: &Client) -> (Vec<u8>, End) {
    let mut bytes = Vec::new();
    match (&client.0).read_to_end(&mut bytes) {
        Ok(_) => (bytes, End::Eof),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (bytes, End::Reset),
        Err(error) => panic!("after {} bytes: {error}", bytes.len()),
    }
}

/// Sends `bytes` on another thread, which fails when the connection ends, while `read` reads; returns what it has read and how
/// the connection has ended. A reset is one error of the socket, and either a write or a read gets it.
fn read_while_sending(
    client: &Client,
    bytes: &[u8],
    read: impl FnOnce() -> (Vec<u8>, End),
) -> (Vec<u8>, End) {
    thread::scope(|scope| {
        let sender = scope.spawn(|| client.try_send(bytes));
        let (found, end) = read();
        let sent = sender.join().expect("it does not panic");
        let is_reset = sent.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
        (found, if is_reset { End::Reset } else { end })
    })
}

fn is_unix(client: &Client) -> bool {
    client
        .0
        .domain()
        .is_ok_and(|domain| domain == socket2::Domain::UNIX)
}

/// Checks what is left to read, and how it ends. A Unix-domain socket has no reset.
fn expect_end(client: &Client, bytes: &[u8], end: End) {
    let (found, ended) = read_all(client);
    assert!(found == bytes, "{} bytes, not {}", found.len(), bytes.len());
    assert!(
        ended == end || (is_unix(client) && end == End::Reset),
        "{ended:?}"
    );
}

/// Returns `sent` as the faults that change a byte leave it.
fn changed(kind: &str, sent: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = sent.to_vec();
    match kind {
        "corrupt" => bytes[at] ^= 1 << (at % 8),
        "repeat" => bytes.insert(at, sent[at]),
        _ => drop(bytes.remove(at)),
    }
    bytes
}

#[test]
fn fault_at_a_byte_states_what_comes_back_and_how_it_ends() {
    let sent = random_bytes(1, 200);
    for (kind, count, end) in [
        ("close", 200, End::Eof),
        ("cut", 100, End::Eof),
        ("reset", 100, End::Reset),
        // Silence, until the client ends its half.
        ("stall", 100, End::Reset),
        ("blackhole", 100, End::Reset),
    ] {
        let mut server = Server::start(&[&format!("--fault={kind}@100B")]);
        for client in server.clients() {
            client.send(&sent);
            client.expect(&sent[..count]);
            if matches!(kind, "stall" | "blackhole") {
                client.shutdown_write();
            }
            expect_end(&client, &[], end);
        }
        let count = server.metric(&format!("echoserver_faults_total{{kind=\"{kind}\"}}"));
        assert_eq!(count, 2, "{kind}");
        let log = server.process.terminate();
        let note = match kind {
            "stall" | "blackhole" => format!("{kind}@100B,eof"),
            _ => format!("{kind}@100B"),
        };
        let noted = log
            .lines()
            .filter(|line| line.ends_with(&format!(" note={note}")));
        assert_eq!(noted.count(), 2, "{note}: {log}");
    }
}

#[test]
fn byte_is_changed_once() {
    let sent = random_bytes(2, 300_000);
    for kind in ["corrupt", "repeat", "drop"] {
        for at in [1, 100_000] {
            let server = Server::start(&[&format!("--fault={kind}@{at}B")]);
            for client in server.clients() {
                client.check_echo_of(&sent, &changed(kind, &sent, at));
            }
            let log = server.process.terminate();
            let note = format!(" note={kind}@{at}B");
            assert_eq!(log.matches(&note).count(), 2, "{log}");
        }
    }
}

#[test]
fn note_lists_all_faults_of_a_connection() {
    let faults = "--fault=drop@20B,corrupt@10B,stall@50B";
    let server = Server::start(&[faults]);
    let sent = random_bytes(9, 100);
    let dropped = changed("drop", &sent[..50], 20);
    for client in server.clients() {
        client.send(&sent);
        client.expect(&changed("corrupt", &dropped, 10));
        client.shutdown_write();
        expect_end(&client, &[], End::Reset);
    }
    let log = server.process.terminate();
    let note = " note=corrupt@10B,drop@20B,stall@50B,eof\n";
    assert_eq!(log.matches(note).count(), 2, "{log}");
}

/// The reader starts when the server is stuck.
#[test]
fn slow_reader_gets_what_was_answered_before_the_fault() {
    let sent = random_bytes(3, 8_000_000);
    let at = 5_000_000;
    for (kind, end) in [
        ("cut", End::Eof),
        ("reset", End::Reset),
        ("stall", End::Reset),
        ("blackhole", End::Reset),
    ] {
        let server = Server::start(&[&format!("--fault={kind}@{at}B"), "--fault-hold=1s"]);
        for client in server.clients() {
            let position = client.send_until_stuck(&sent);
            let (bytes, ended) =
                read_while_sending(&client, &sent[position..], || read_all(&client));
            // A reset discards what the kernel has not delivered; a silence begins when all is.
            let is_complete = bytes.len() == at || (kind == "reset" && bytes.len() < at);
            assert!(
                is_complete && sent.starts_with(&bytes),
                "{kind}: {}",
                bytes.len()
            );
            let has_no_reset = is_unix(&client) && end == End::Reset;
            assert!(ended == end || has_no_reset, "{kind}: {ended:?}");
        }
        server.process.terminate();
    }
}

/// It answers what was read before.
#[test]
fn close_gives_a_slow_reader_whole_answers() {
    let sent = random_bytes(4, 8_000_000);
    let server = Server::start(&["--fault=close@5000000B"]);
    for client in server.clients() {
        let position = client.send_until_stuck(&sent);
        let (bytes, end) = read_while_sending(&client, &sent[position..], || read_all(&client));
        assert!(
            bytes.len() >= 5_000_000 && sent.starts_with(&bytes),
            "{}",
            bytes.len()
        );
        assert_eq!(end, End::Eof);
    }
    server.process.terminate();
}

/// None of the options loses or reorders a byte, also together, with buffers that are full while they wait.
#[test]
fn delayed_throttled_and_sliced_bytes_are_complete() {
    let sent = random_bytes(5, 20_000);
    for arguments in [
        &["--delay=20ms"][..],
        &["--delay=1ms..30ms"],
        &["--throttle=100K"],
        &["--slice=1..500@1ms"],
        &["--delay=1ms..5ms", "--throttle=200K", "--slice=1000"],
        &["--delay=2ms", "--buffer-size=500"],
        &["--delay=2s", "--idle-timeout=500ms"],
    ] {
        let server = Server::start(arguments);
        for client in server.clients() {
            client.check_echo_of(&sent, &sent);
        }
        let log = server.process.terminate();
        assert_eq!(total(&log, "closed_peer_closed"), 2, "{arguments:?}");
    }
}

/// The answers that are due before the deadline are given; what stays silent is reset then.
#[test]
fn drain_waits_for_a_delay_and_resets_what_is_silent() {
    for (argument, end, reason) in [
        ("--delay=200ms", End::Eof, "closed_shutdown"),
        ("--throttle=1000", End::Eof, "closed_shutdown"),
        ("--slice=10@1ms", End::Eof, "closed_shutdown"),
        ("--fault=corrupt@1GiB", End::Eof, "closed_shutdown"),
        ("--delay=1h", End::Reset, "closed_drain_timeout"),
        ("--fault=stall@connect", End::Reset, "closed_drain_timeout"),
        (
            "--fault=blackhole@connect",
            End::Reset,
            "closed_drain_timeout",
        ),
    ] {
        let timeout = if end == End::Eof { "20s" } else { "300ms" };
        let mut server = Server::start(&[argument, &format!("--drain-timeout={timeout}")]);
        let clients: Vec<_> = server.clients().collect();
        let sent = random_bytes(6, 200);
        for client in &clients {
            client.send(&sent);
        }
        wait_until("all is received", || {
            server.metric("echoserver_received_bytes_total") == 400
        });
        server.process.signal(Signal::TERM);
        for client in &clients {
            let bytes = if end == End::Eof { &sent[..] } else { &[] };
            expect_end(client, bytes, end);
        }
        drop(clients);
        let log = server.process.wait_for_success();
        assert_eq!(total(&log, reason), 2, "{argument}: {log}");
    }
}

#[test]
fn clients_that_give_up_leave_no_connection() {
    for kind in ["stall", "blackhole"] {
        let mut server = Server::start(&[&format!("--fault={kind}@10B")]);
        let count = possible_connections(1000);
        let address = server.process.address();
        let clients: Vec<_> = (0..count).map(|_| Client::connect(address)).collect();
        for client in &clients {
            client.send(&[7; 100]);
            client.expect(&[7; 10]);
        }
        drop(clients);
        wait_until("all are closed", || {
            server.metric("echoserver_connections_open") == 0
        });
        let log = server.process.terminate();
        assert_eq!(log.matches(&format!(" note={kind}@10B,eof")).count(), count);
    }
}

/// Also one whose EOF the server cannot see, because its buffer is full.
#[test]
fn silence_ends_when_its_time_is_over() {
    for (fault, sent) in [
        ("stall@eof", 100),
        ("blackhole@1B", 100),
        ("stall@1B", 1 << 20),
    ] {
        let server = Server::start(&[&format!("--fault={fault}"), "--fault-hold=200ms"]);
        let client = Client::connect(server.process.address());
        let bytes = random_bytes(7, sent);
        let (found, end) = read_while_sending(&client, &bytes, || {
            if fault == "stall@eof" {
                client.expect(&bytes);
                client.shutdown_write();
                return read_all(&client);
            }
            client.expect(&bytes[..1]);
            read_all(&client)
        });
        assert!(found.is_empty() && end == End::Reset, "{fault}: {end:?}");
        let log = server.process.terminate();
        assert!(log.contains("B,hold\n"), "{fault}: {log}");
    }
}

#[test]
fn fault_at_a_time_needs_no_input() {
    for (fault, end) in [
        ("reset", End::Reset),
        ("cut", End::Eof),
        ("close", End::Eof),
    ] {
        let server = Server::start(&[&format!("--fault={fault}@100ms")]);
        for client in server.clients() {
            expect_end(&client, &[], end);
        }
        let log = server.process.terminate();
        assert_eq!(
            log.matches(&format!(" note={fault}@0B")).count(),
            2,
            "{log}"
        );
    }
}

#[test]
fn greeting_is_sent_first_and_unharmed() {
    for (argument, answer, end) in [
        ("--fault=cut@connect", &b""[..], End::Eof),
        ("--fault=drop@connect", b"cho", End::Eof),
        ("--slice=1", b"echo", End::Eof),
    ] {
        let server = Server::start(&[argument, "--greeting=hello "]);
        for client in server.clients() {
            client.expect(b"hello ");
            // It fails if the connection has ended.
            let _ended = client.try_send(b"echo");
            let _ended = client.0.shutdown(std::net::Shutdown::Write);
            expect_end(&client, answer, end);
        }
        server.process.terminate();
    }
}

/// A reset at once can come before the client's call of connect has returned, so the log tells what was sent.
#[test]
fn greeting_is_sent_before_a_reset() {
    let mut server = Process::serve(&["-v", "--fault=reset@connect", "--greeting=hello "]);
    let _connected_or_reset = std::net::TcpStream::connect(server.address());
    server.wait_for_log(" bytes_in=0 bytes_out=6 reason=handler_reset note=reset@0B");
    server.terminate();
}

#[test]
fn same_connections_misbehave_with_any_number_of_workers() {
    let chosen = |workers: &str| {
        let arguments = [
            "--fault=close@connect",
            "--fault-share=50",
            "--fault-seed=7",
        ];
        let server = Process::serve(&[&arguments[..], &[workers]].concat());
        let answers: Vec<_> = (0..40)
            .map(|_| {
                let client = Client::connect(server.address());
                let _ended = client.try_send(b"!");
                let _ended = client.0.shutdown(std::net::Shutdown::Write);
                read_all(&client).0.len()
            })
            .collect();
        server.terminate();
        answers
    };
    let one = chosen("--workers=1");
    assert_eq!(one, chosen("--workers=4"));
    assert!(one.contains(&0) && one.contains(&1), "{one:?}");
}

#[test]
fn faults_in_effect_are_one_warning() {
    let arguments = [
        "--delay=1ms..2ms",
        "--fault=drop@1B,reset@1h",
        "--fault-share=5",
    ];
    let server = Process::serve(&arguments);
    let warnings = server.lines_with("WARN");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let text = "the server misbehaves as requested: --delay 1ms..2ms, --fault drop@1B, \
                --fault reset@1h, --fault-share 5, --fault-seed ";
    assert!(warnings[0].contains(text), "{warnings:?}");
    server.terminate();
    let healthy = Process::serve(&["--fault-share=5"]);
    assert_eq!(healthy.lines_with("misbehaves").len(), 0);
    healthy.terminate();
}
