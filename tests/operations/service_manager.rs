//! At home under a service manager: sockets handed over, readiness told, and units that confine the
//! program to what it needs.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use crate::daemon::{Daemon, clean, program};
use crate::support::{
    PATIENCE, Scratch, check_echo, connect, connect_unix, free_address, installed, packaged,
    pattern, ping, replaced, wait_until,
};

// Sockets handed over.

/// The program with `sockets` handed over to it, as service managers do it.
fn inheriting(sockets: Vec<OwnedFd>) -> Command {
    // A shell moves them to where they are looked for: 3 and up. Those of Rust's close with `exec`,
    // but for the three standard ones.
    const PLACES: [&str; 2] = ["0", "1"];
    let moves: Vec<_> = (0..sockets.len())
        .map(|index| format!("{}<&{}", 3 + index, PLACES[index]))
        .collect();
    let mut shell = clean(Command::new("sh"));
    shell.arg("-c");
    shell.arg(format!(
        r#"LISTEN_PID=$$ LISTEN_FDS={} exec "$0" "$@" {} </dev/null >/dev/null"#,
        sockets.len(),
        moves.join(" ")
    ));
    shell.arg(program().get_program());
    let mut sockets = sockets.into_iter();
    if let Some(first) = sockets.next() {
        shell.stdin(first);
    }
    if let Some(second) = sockets.next() {
        shell.stdout(second);
    }
    assert!(sockets.next().is_none(), "there are two places");
    shell
}

#[test]
fn sockets_handed_over_take_the_place_of_the_default() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let unix = UnixListener::bind(&path).unwrap();
    let address = tcp.local_addr().unwrap();
    let daemon = Daemon::spawn(&mut inheriting(vec![tcp.into(), unix.into()]));
    assert_eq!(daemon.lines_with("listening on").len(), 2);
    assert_eq!(daemon.address(), address);
    check_echo(connect(address), &pattern(1, 1_000_000));
    check_echo(connect_unix(&path), &pattern(2, 1_000_000));
    daemon.end();
    assert!(path.exists(), "the file is somebody else's");
}

#[test]
fn sockets_handed_over_come_beside_those_asked_for() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let daemon = Daemon::spawn(inheriting(vec![tcp.into()]).arg("--listen=127.0.0.1:0"));
    assert_eq!(daemon.lines_with("listening on").len(), 2);
    let own = daemon.address();
    assert_ne!(own, address);
    check_echo(connect(own), b"asked for");
    check_echo(connect(address), b"handed over");
    daemon.end();
}

#[test]
fn a_socket_that_cannot_listen_is_named() {
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (status, said) = Daemon::launch(&mut inheriting(vec![datagrams.into()])).wait();
    assert_eq!(status.code(), Some(1), "{said}");
    let culprit = "echoserver: cannot listen on inherited socket 0: ";
    assert!(said.starts_with(culprit), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// The listener outlives the server, so nobody is refused: who comes in between waits.
#[test]
fn a_restart_refuses_nobody() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let start = || Daemon::spawn(&mut inheriting(vec![tcp.try_clone().unwrap().into()]));
    let old = start();
    check_echo(connect(address), b"the old one");
    old.end();
    let waiting: Vec<TcpStream> = (0..20).map(|_| connect(address)).collect();
    let new = start();
    for (client, seed) in waiting.into_iter().zip(0..) {
        check_echo(client, &pattern(seed, 10_000));
    }
    new.end();
}

#[test]
fn systemd_activates_it() {
    if !installed(&["systemd-socket-activate"]) {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    let address = free_address();
    let mut activator = clean(Command::new("systemd-socket-activate"));
    activator.arg(format!("--listen={address}"));
    activator.arg(format!("--listen={}", path.display()));
    activator.arg(program().get_program()).arg("--workers=2");
    let mut daemon = Daemon::launch(&mut activator);
    wait_until("the activator listens", || path.exists());
    // The first client has it started.
    check_echo(connect_unix(&path), b"wake up");
    daemon.wait_for_log("] listening on ");
    check_echo(connect(address), &pattern(1, 1_000_000));
    check_echo(connect_unix(&path), &pattern(2, 1_000_000));
    let log = daemon.end();
    for place in [address.to_string(), format!("unix:{}", path.display())] {
        assert!(log.contains(&format!("] listening on {place}\n")), "{log}");
    }
}

// Readiness told.

fn receive(manager: &UnixDatagram) -> String {
    let mut datagram = [0; 4096];
    let length = manager.recv(&mut datagram).expect("it is told in time");
    String::from_utf8(datagram[..length].to_vec()).unwrap()
}

#[test]
fn a_service_manager_is_told_what_it_does() {
    let scratch = Scratch::new();
    let socket = scratch.join("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = program();
    command.args(["--listen=127.0.0.1:0", "--drain-timeout=20s"]);
    let daemon = Daemon::launch(command.env("NOTIFY_SOCKET", &socket));

    let told = receive(&manager);
    assert!(told.lines().any(|line| line == "READY=1"), "{told}");
    // It is true: the first connect succeeds.
    let address: SocketAddr = told
        .lines()
        .find_map(|line| line.strip_prefix("STATUS=serving on "))
        .unwrap_or_else(|| panic!("{told}"))
        .parse()
        .unwrap();
    let mut client = connect(address);
    ping(&mut client, b"ready");

    daemon.signal(Signal::TERM);
    let told = receive(&manager);
    assert_eq!(told, "STOPPING=1\nSTATUS=draining\n");
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    drop(client);
    daemon.wait_in_order();
}

/// A manager that can't be reached is a line in the log.
#[test]
fn a_service_manager_that_is_gone_does_no_harm() {
    for socket in ["/nowhere/notify", "@nobody-is-here", ""] {
        let mut command = program();
        command.args(["--listen=127.0.0.1:0"]);
        let mut daemon = Daemon::spawn(command.env("NOTIFY_SOCKET", socket));
        daemon.wait_for_log("cannot notify the service manager: ");
        check_echo(connect(daemon.address()), b"all the same");
        daemon.end();
    }
}

#[test]
fn without_a_service_manager_nobody_is_told() {
    let daemon = Daemon::start(&[]);
    check_echo(connect(daemon.address()), b"alone");
    let log = daemon.end();
    assert!(!log.contains("WARN") && !log.contains("notify"), "{log}");
}

// The units.

/// The packaged units in `directory`, but for the place of the program.
fn units(directory: &Path) {
    let program = program().get_program().to_string_lossy().into_owned();
    let service = packaged("echoserver.service");
    let service = replaced(&service, &[("/usr/bin/echoserver", &program)]);
    fs::write(directory.join("echoserver.service"), service).unwrap();
    fs::write(
        directory.join("echoserver.socket"),
        packaged("echoserver.socket"),
    )
    .unwrap();
}

/// What systemd-analyze says, which must be in order.
fn analyze(directory: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new("systemd-analyze");
    command.args(arguments).current_dir(directory);
    let output = command.output().expect("it starts");
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
    said
}

#[test]
fn the_units_are_in_order() {
    if !installed(&["systemd-analyze"]) {
        return;
    }
    let scratch = Scratch::new();
    units(scratch.path());
    let verify = [
        "verify",
        "--man=no",
        "./echoserver.service",
        "./echoserver.socket",
    ];
    let said = analyze(scratch.path(), &verify);
    assert_eq!(said, "", "not a word");
}

/// The units' options are those that the program has.
#[test]
fn the_unit_starts_the_program_as_it_is() {
    let service = packaged("echoserver.service");
    let start = service
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart=/usr/bin/echoserver"))
        .expect("it starts the program");
    let mut command = program();
    command
        .arg("--listen=127.0.0.1:0")
        .args(start.split_whitespace());
    // But not at this port, which may be in use here.
    let status = command.arg("--help").status().unwrap();
    assert!(status.success(), "{start}");
}

#[test]
fn the_service_is_exposed_to_little() {
    if !installed(&["systemd-analyze"]) {
        return;
    }
    let scratch = Scratch::new();
    units(scratch.path());
    let said = analyze(
        scratch.path(),
        &[
            "security",
            "--offline=true",
            "--threshold=12",
            "./echoserver.service",
        ],
    );
    assert!(said.contains("Overall exposure level"), "{said}");
}

/// The names in a set of system calls, those of the sets in it included.
fn calls_in(set: &str) -> BTreeSet<String> {
    let said = analyze(Path::new("/"), &["syscall-filter", set]);
    let mut names = BTreeSet::new();
    for line in said.lines().skip(1).map(str::trim) {
        match line.chars().next() {
            Some('@') => names.extend(calls_in(line)),
            Some('#') | None => {}
            Some(_) => {
                names.insert(line.to_owned());
            }
        }
    }
    names
}

/// What the unit's filter lets through, by its own lines.
fn calls_allowed() -> BTreeSet<String> {
    // Always allowed, says systemd.exec(5).
    let mut allowed = calls_in("@default");
    let service = packaged("echoserver.service");
    let filters = service
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="));
    for filter in filters {
        let denied = filter.starts_with('~');
        for set in filter.trim_start_matches('~').split_whitespace() {
            let calls = calls_in(set);
            match denied {
                true => allowed.retain(|call| !calls.contains(call)),
                false => allowed.extend(calls),
            }
        }
    }
    allowed
}

/// Whatever the program does under the unit, the filter lets it.
#[test]
fn the_filter_allows_what_the_program_does() {
    if !installed(&["systemd-analyze", "strace"]) {
        return;
    }
    let scratch = Scratch::new();
    let (calls, path) = (scratch.join("calls"), scratch.join("echo"));
    let mut strace = clean(Command::new("strace"));
    // The program stays this process' child, and all of its threads are followed.
    strace.args(["-D", "-qq", "-f", "-c", "-U", "name", "-o"]);
    strace.arg(&calls).arg(program().get_program());
    strace.args(["--listen=127.0.0.1:0", "--unix-mode=0660", "--workers=2"]);
    strace.arg(format!("--listen=unix:{}", path.display()));
    strace.args(["--idle-timeout=1s", "--stats-interval=50ms", "-v"]);
    strace.arg("--metrics=127.0.0.1:0");
    let mut daemon = Daemon::spawn(&mut strace);
    {
        let metrics = daemon.metrics();
        assert_eq!(crate::http::get(metrics, "/metrics").status, 200);
    }
    check_echo(connect(daemon.address()), &pattern(1, 100_000));
    check_echo(connect_unix(&path), &pattern(2, 100_000));
    let mut idle = connect(daemon.address());
    assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    drop(idle);
    daemon.signal(Signal::USR1);
    daemon.wait_for_log("stats: ");
    daemon.end();

    let mut counted = String::new();
    wait_until("strace has counted", || {
        counted = fs::read_to_string(&calls).unwrap_or_default();
        counted.ends_with("total\n")
    });
    let made: BTreeSet<_> = counted
        .lines()
        .map(str::trim)
        .filter(|line| !["syscall", "total"].contains(line))
        // Neither rulers nor what strace says of a thread that it leaves.
        .filter(|line| {
            let of_a_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
            line.bytes().all(of_a_name)
        })
        .map(str::to_owned)
        .collect();
    assert!(
        made.contains("accept4") && made.contains("prlimit64"),
        "{counted}"
    );
    let allowed = calls_allowed();
    let refused: Vec<_> = made.difference(&allowed).collect();
    assert!(refused.is_empty(), "the filter refuses {refused:?}");
}

/// Memory that is written is never run: nothing asks for both.
#[test]
fn no_memory_is_both_written_and_run() {
    if !installed(&["strace"]) {
        return;
    }
    let scratch = Scratch::new();
    let calls = scratch.join("calls");
    let mut strace = clean(Command::new("strace"));
    strace.args([
        "-D",
        "-qq",
        "-f",
        "-e",
        "trace=mmap,mprotect,pkey_mprotect,shmat",
        "-o",
    ]);
    strace.arg(&calls).arg(program().get_program());
    let daemon = Daemon::spawn(strace.arg("--listen=127.0.0.1:0"));
    check_echo(connect(daemon.address()), &pattern(1, 1_000_000));
    daemon.end();
    let made = fs::read_to_string(&calls).unwrap();
    let protections = made.lines().filter(|line| line.contains("PROT_"));
    assert!(protections.clone().count() > 10, "{made}");
    // MemoryDenyWriteExecute refuses what is both, and what becomes executable later.
    for line in protections.filter(|line| line.contains("PROT_EXEC")) {
        assert!(!line.contains("PROT_WRITE"), "{line}");
        assert!(line.contains("mmap("), "{line}");
    }
}
