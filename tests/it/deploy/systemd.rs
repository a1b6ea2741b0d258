//! systemd: inherited sockets, notifications, and the packaged units, which confine the program to what it needs.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use socket2::{Domain, SockRef, Socket, Type};
use tempfile::tempdir;

use super::{check_defaults, option_of, packaged, replace_all};
use crate::harness::{
    BlockedServer, Client, DEADLINE, Process, TestServer, command, error_line, free_address, http,
    installed, program, program_after, random_bytes, run, wait_until,
};
use crate::program::command_line::help_options;
#[cfg(target_os = "linux")]
use crate::program::resources::{can_trace, end_tracer};

/// Returns a command that passes `sockets` to the program as service managers do.
fn inheriting(sockets: Vec<OwnedFd>) -> Command {
    // They must be at 3 and above. The descriptors of this process close on `exec`, except for the standard
    // streams, from where a shell moves them.
    let moves = ["3<&0", "3<&0 4<&1"][sockets.len() - 1];
    let mut shell = program_after(&format!(
        "export LISTEN_PID=$$ LISTEN_FDS={} && exec {moves} </dev/null >/dev/null",
        sockets.len(),
    ));
    let mut sockets = sockets.into_iter();
    shell.stdin(sockets.next().expect("at least one"));
    if let Some(second) = sockets.next() {
        shell.stdout(second);
    }
    shell
}

#[test]
fn inherited_sockets_replace_the_default_listener() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let unix = UnixListener::bind(&path).unwrap();
    let address = tcp.local_addr().unwrap();
    let server = Process::start(&mut inheriting(vec![tcp.into(), unix.into()]));
    assert_eq!(server.lines_with("listening on").len(), 2);
    assert_eq!(server.address(), address);
    Client::connect(address).check_echo(&random_bytes(1, 1_000_000));
    Client::connect_unix(&path).check_echo(&random_bytes(2, 1_000_000));
    server.terminate();
    assert!(path.exists(), "the file is not the program's");
}

/// As with `RootDirectory=` of a unit.
#[test]
fn inherited_socket_needs_no_proc() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let mut unshare = command("unshare");
    let inherits = inheriting(vec![tcp.try_clone().unwrap().into()]);
    unshare.args(["-r", "-m", "sh", "-c"]);
    unshare.arg(r#"mount -t tmpfs none /proc && exec "$0" "$@""#);
    unshare
        .arg(inherits.get_program())
        .args(inherits.get_args());
    if !installed(&["unshare"]) || !can_mount() {
        return;
    }
    let server = Process::start(unshare.stdin(OwnedFd::from(tcp)));
    Client::connect(address).check_echo(b"without /proc");
    server.terminate();
}

fn can_mount() -> bool {
    let mut unshare = command("unshare");
    let tried = run(unshare.args(["-r", "-m", "mount", "-t", "tmpfs", "none", "/proc"]));
    if !tried.status.success() {
        println!("skipped: a mount namespace is not permitted");
    }
    tried.status.success()
}

#[test]
fn inherited_sockets_add_to_configured_listeners() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let inherited = tcp.local_addr().unwrap();
    let server = Process::start(inheriting(vec![tcp.into()]).arg("--listen=127.0.0.1:0"));
    assert_eq!(server.lines_with("listening on").len(), 2);
    let configured = server.address();
    assert_ne!(configured, inherited);
    Client::connect(configured).check_echo(b"configured");
    Client::connect(inherited).check_echo(b"inherited");
    server.terminate();
}

#[test]
fn inherited_descriptor_that_cannot_listen_is_reported() {
    let check = |command: &mut Command, problem| {
        let error = error_line(command, 1);
        let context = "cannot listen on inherited descriptor 3";
        assert_eq!(error, format!("{context}: {problem}"));
    };
    let other = "it is closed, or not a TCP or Unix-domain stream socket";
    let bound = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    let (connected, _peer) = UnixStream::pair().unwrap();
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    let file = fs::File::open("/dev/null").unwrap();
    for (descriptor, problem) in [
        (OwnedFd::from(bound), "the TCP socket is not listening"),
        (connected.into(), "the Unix-domain socket is not listening"),
        (datagrams.into(), other),
        (file.into(), other),
    ] {
        check(&mut inheriting(vec![descriptor]), problem);
    }
    // It is not open, and must not be confused with a descriptor that the program opens later.
    let closed = "export LISTEN_PID=$$ LISTEN_FDS=1 && exec 3<&-";
    check(&mut program_after(closed), other);
}

/// A descriptor that was not passed must not be confused with one that the program opens.
#[test]
fn wrong_number_of_inherited_sockets_is_reported() {
    let in_use = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = in_use.local_addr().unwrap().to_string();
    for (count, error) in [
        ("2", not_a_socket(4)),
        ("20", not_a_socket(4)),
        ("-1", invalid_count("-1")),
        ("x", invalid_count("x")),
        ("2000000000", invalid_count("2000000000")),
    ] {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let setup = format!("export LISTEN_PID=$$ LISTEN_FDS={count} && exec 3<&0 4<&- </dev/null");
        let mut command = program_after(&setup);
        // It is checked first.
        command.args(["--listen", &address]);
        assert_eq!(error_line(command.stdin(OwnedFd::from(tcp)), 1), error);
    }
}

fn not_a_socket(descriptor: usize) -> String {
    let problem = "it is closed, or not a TCP or Unix-domain stream socket";
    format!("cannot listen on inherited descriptor {descriptor}: {problem}")
}

fn invalid_count(count: &str) -> String {
    format!("LISTEN_FDS: expected a number of descriptors up to 1024, not '{count}'")
}

#[test]
fn sockets_for_another_process_are_not_taken() {
    for variables in ["LISTEN_PID=1 LISTEN_FDS=5", "LISTEN_PID=1 LISTEN_FDS=x"] {
        let mut command = program_after(&format!("export {variables}"));
        let server = Process::start(command.arg("--listen=127.0.0.1:0"));
        Client::connect(server.address()).check_echo(b"not inherited");
        let log = server.terminate();
        let warning =
            "the sockets of LISTEN_FDS are not taken: they are for process 1 (LISTEN_PID)";
        assert!(log.contains(warning), "{log}");
    }
}

/// The listener outlives the server: clients that connect in between wait in its backlog.
#[test]
fn restart_refuses_no_connection() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let start = || Process::start(&mut inheriting(vec![tcp.try_clone().unwrap().into()]));
    let old = start();
    Client::connect(address).check_echo(b"before");
    old.terminate();
    let waiting: Vec<_> = (0..20).map(|_| Client::connect(address)).collect();
    let new = start();
    for (client, seed) in waiting.into_iter().zip(0..) {
        client.check_echo(&random_bytes(seed, 10_000));
    }
    new.terminate();
}

/// Another server may be using the socket: the options are not restored at the end.
#[test]
fn inherited_socket_keeps_its_options() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let start = || Process::start(&mut inheriting(vec![tcp.try_clone().unwrap().into()]));
    let (old, new) = (start(), start());
    old.terminate();
    let socket = SockRef::from(&tcp);
    assert!(socket.nonblocking().unwrap() && socket.out_of_band_inline().unwrap());
    Client::connect(address).check_echo(&random_bytes(1, 1_000_000));
    new.terminate();
}

#[test]
fn socket_activation_starts_the_program() {
    if !installed(&["systemd-socket-activate"]) {
        return;
    }
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    let address = free_address();
    let mut activator = command("systemd-socket-activate");
    activator.arg(format!("--listen={address}"));
    activator.arg(format!("--listen={}", path.display()));
    activator.arg(program().get_program()).arg("--workers=2");
    let mut server = Process::launch(&mut activator);
    server.wait_for_log(&format!("Listening on {} as", path.display()));
    // The first client starts the program.
    Client::connect_unix(&path).check_echo(b"start");
    server.wait_for_log("] listening on ");
    Client::connect(address).check_echo(&random_bytes(1, 1_000_000));
    Client::connect_unix(&path).check_echo(&random_bytes(2, 1_000_000));
    let log = server.terminate();
    for listener in [address.to_string(), format!("unix:{}", path.display())] {
        let line = format!("] listening on {listener}\n");
        assert!(log.contains(&line), "{log}");
    }
}

fn receive(manager: &UnixDatagram) -> String {
    let mut datagram = [0; 4096];
    let length = manager.recv(&mut datagram).expect("a notification comes");
    String::from_utf8(datagram[..length].to_vec()).unwrap()
}

/// Binds the socket of a service manager; returns its address as the program gets it.
fn service_manager(folder: &Path) -> (String, UnixDatagram) {
    let path = folder.join("notify");
    listen(&path.display().to_string(), UnixDatagram::bind(&path))
}

/// The same with an abstract name.
#[cfg(target_os = "linux")]
fn abstract_service_manager(folder: &Path) -> (String, UnixDatagram) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::SocketAddr;

    // Unique, as the path is.
    let name = folder.display().to_string();
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    listen(&format!("@{name}"), UnixDatagram::bind_addr(&address))
}

fn listen(name: &str, manager: io::Result<UnixDatagram>) -> (String, UnixDatagram) {
    let manager = manager.expect("the name is free");
    manager.set_read_timeout(Some(DEADLINE)).unwrap();
    (name.to_owned(), manager)
}

#[test]
fn service_manager_is_notified() {
    let folder = tempdir().unwrap();
    for (name, manager) in [
        service_manager(folder.path()),
        #[cfg(target_os = "linux")]
        abstract_service_manager(folder.path()),
    ] {
        let mut command = program();
        command.args(["--listen=127.0.0.1:0", "--drain-timeout=20s"]);
        let server = Process::launch(command.env("NOTIFY_SOCKET", &name));

        let ready = receive(&manager);
        assert!(ready.lines().any(|line| line == "READY=1"), "{ready}");
        let status = |line: &str| line.strip_prefix("STATUS=serving on ")?.parse().ok();
        let address: Option<SocketAddr> = ready.lines().find_map(status);
        // From the notification on, connections are accepted.
        let client = Client::connect(address.unwrap_or_else(|| panic!("{ready}")));
        client.ping(b"ready");

        server.signal(Signal::TERM);
        assert_eq!(receive(&manager), "STOPPING=1\nSTATUS=draining\n");
        client.expect_eof();
        drop(client);
        server.wait_for_success();
    }
}

/// Fills the queue of a service manager, as if it were stopped.
#[cfg(target_os = "linux")]
fn fill(name: &str) {
    let other = UnixDatagram::unbound().unwrap();
    other.set_nonblocking(true).unwrap();
    while other.send_to(b"full", name).is_ok() {}
}

/// Empties the queue again. Meanwhile the server is paused: otherwise its pings could fill what this leaves.
#[cfg(target_os = "linux")]
fn empty(manager: &UnixDatagram, server: &Process) {
    server.pause();
    while receive_now(manager) {}
    server.signal(Signal::CONT);
}

/// What is held back comes with the next ping, or without a watchdog soon after there is room.
#[cfg(target_os = "linux")]
#[test]
fn stopped_service_manager_blocks_neither_start_nor_drain() {
    let folder = tempdir().unwrap();
    let (name, manager) = service_manager(folder.path());
    for watchdog in [None, Some("200000")] {
        fill(&name);
        let mut command = program();
        command.args(["--listen=127.0.0.1:0", "--drain-timeout=1h", "-w1"]);
        command.envs(watchdog.map(|time| ("WATCHDOG_USEC", time)));
        let mut server = Process::start(command.env("NOTIFY_SOCKET", &name));
        let client = Client::connect_with_receive_buffer(server.address(), 4096);
        client.send_until_stuck(&random_bytes(1, 40 << 20));
        empty(&manager, &server);
        while !receive(&manager).contains("READY=1\nSTATUS=serving on ") {}

        fill(&name);
        server.signal(Signal::TERM);
        server.wait_for_log("SIGTERM: draining");
        empty(&manager, &server);
        while !receive(&manager).contains("STOPPING=1\nSTATUS=draining\n") {}

        // A second signal is not held up either.
        fill(&name);
        server.signal(Signal::INT);
        let (status, log) = server.wait();
        assert_eq!(status.code(), Some(130), "{log}");
        let warnings = log.matches("the service manager reads no notifications");
        // Once each time: the third time only if there are pings.
        assert!((2..=3).contains(&warnings.count()), "{log}");
        while receive_now(&manager) {}
    }
}

/// Returns whether there was a datagram.
#[cfg(target_os = "linux")]
fn receive_now(manager: &UnixDatagram) -> bool {
    manager.set_nonblocking(true).unwrap();
    let received = manager.recv(&mut [0; 64]).is_ok();
    manager.set_nonblocking(false).unwrap();
    received
}

#[test]
fn service_manager_is_notified_of_a_drain_delay() {
    let folder = tempdir().unwrap();
    let (name, manager) = service_manager(folder.path());
    let mut command = program();
    command.args(["--listen=127.0.0.1:0", "--drain-delay=100ms"]);
    let server = Process::start(command.env("NOTIFY_SOCKET", &name));
    assert!(receive(&manager).starts_with("READY=1\n"));
    server.signal(Signal::TERM);
    for status in ["draining in 100ms", "draining"] {
        let expected = format!("STOPPING=1\nSTATUS={status}\n");
        assert_eq!(receive(&manager), expected);
    }
    server.wait_for_success();
}

#[test]
fn watchdog_is_pinged_while_idle_and_during_a_drain() {
    let folder = tempdir().unwrap();
    let (name, manager) = service_manager(folder.path());
    let mut command = program();
    command.args(["--listen=127.0.0.1:0", "-w4", "--drain-timeout=1h"]);
    command.env("WATCHDOG_USEC", "200000");
    let server = Process::start(command.env("NOTIFY_SOCKET", &name));
    assert!(receive(&manager).starts_with("READY=1\n"));
    for _ in 0..5 {
        assert_eq!(receive(&manager), "WATCHDOG=1\n");
    }
    // Three workers end at once.
    let client = Client::connect_with_receive_buffer(server.address(), 64 << 10);
    let bytes = random_bytes(1, 40 << 20);
    let sent = client.send_until_stuck(&bytes);
    server.signal(Signal::TERM);
    let draining = "STOPPING=1\nSTATUS=draining\n";
    // A ping may bring it.
    while !receive(&manager).starts_with(draining) {}
    for _ in 0..5 {
        assert_eq!(receive(&manager), "WATCHDOG=1\n");
    }
    client.shutdown_write();
    client.expect(&bytes[..sent]);
    client.expect_eof();
    let log = server.wait_for_success();
    assert!(!log.contains("stuck"), "{log}");
}

/// A worker is stuck when strace delays it.
#[test]
#[cfg(target_os = "linux")]
fn stuck_worker_is_not_reported_as_alive() {
    if !can_trace() {
        return;
    }
    let folder = tempdir().unwrap();
    let (name, manager) = service_manager(folder.path());
    let mut strace = command("strace");
    strace.args(["-D", "-qq", "-f", "-o", "/dev/null", "-e", "trace=recvfrom"]);
    strace.args(["-e", "inject=recvfrom:delay_enter=60000000"]);
    strace
        .arg(program().get_program())
        .args(["--listen=127.0.0.1:0", "-w1"]);
    strace.env("WATCHDOG_USEC", "400000");
    let mut server = Process::start(strace.env("NOTIFY_SOCKET", &name));
    assert!(receive(&manager).starts_with("READY=1\n"));
    assert_eq!(receive(&manager), "WATCHDOG=1\n");
    let client = Client::connect(server.address());
    client.send(b"the worker hangs in recvfrom");
    server.wait_for_log("worker 0 is stuck: no tick within 100ms");
    // All pings of before.
    manager.set_nonblocking(true).unwrap();
    while manager.recv(&mut [0; 64]).is_ok() {}
    let lines = server.lines_with("is stuck").len();
    wait_until("it is checked again", || {
        server.lines_with("is stuck").len() > lines + 2
    });
    let pinged = manager.recv(&mut [0; 64]).is_ok();
    end_tracer(&server);
    assert!(!pinged);
}

#[test]
#[cfg(target_os = "linux")]
fn watchdog_of_another_process_is_ignored() {
    let mut command = program();
    command.args(["--listen=127.0.0.1:0"]);
    command
        .env("WATCHDOG_USEC", "1000")
        .env("WATCHDOG_PID", "1");
    let server = Process::start(&mut command);
    Client::connect(server.address()).check_echo(b"unwatched");
    let is_watchdog = |task: procfs::process::Task| task.stat().unwrap().comm == "watchdog";
    let tasks = server.procfs().tasks().unwrap();
    assert!(!tasks.flatten().any(is_watchdog));
    server.terminate();
}

#[test]
fn unreachable_service_manager_is_only_logged() {
    for socket in ["/missing/notify", "@echoserver-test-no-manager", ""] {
        let mut command = program();
        command.arg("--listen=127.0.0.1:0");
        let mut server = Process::start(command.env("NOTIFY_SOCKET", socket));
        server.wait_for_log("cannot notify the service manager: ");
        Client::connect(server.address()).check_echo(b"all the same");
        server.terminate();
    }
}

#[test]
fn absent_service_manager_is_not_logged() {
    let server = Process::serve(&[]);
    Client::connect(server.address()).check_echo(b"alone");
    let log = server.terminate();
    assert!(!log.contains("WARN") && !log.contains("notify"), "{log}");
}

#[test]
fn woken_worker_ticks_unless_it_is_stuck() {
    let ticks = |server: &TestServer| server.stats().workers[0].ticks;
    let idle = TestServer::echo();
    for _ in 0..3 {
        let before = ticks(&idle);
        idle.handle.wake_workers();
        wait_until("the worker runs a tick", || ticks(&idle) > before);
    }
    let (blocked, _) = BlockedServer::new(0);
    let before = ticks(&blocked.server);
    blocked.server.handle.wake_workers();
    assert_eq!(ticks(&blocked.server), before);
    let server = blocked.release();
    wait_until("the worker runs a tick", || ticks(&server) > before);
}

/// Copies the packaged units to `folder`, with the path of this build's program.
fn copy_units(folder: &Path) {
    let program = program().get_program().to_string_lossy().into_owned();
    let service = packaged("echoserver.service");
    let service = replace_all(&service, &[("/usr/bin/echoserver", &program)]);
    fs::write(folder.join("echoserver.service"), service).unwrap();
    let socket = packaged("echoserver.socket");
    fs::write(folder.join("echoserver.socket"), socket).unwrap();
}

/// Runs systemd-analyze, which must succeed, and returns its output.
fn analyze(folder: &Path, arguments: &[&str]) -> String {
    let output = run(command("systemd-analyze")
        .args(arguments)
        .current_dir(folder));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}");
    text
}

#[test]
fn units_pass_verification() {
    if !installed(&["systemd-analyze"]) {
        return;
    }
    let folder = tempdir().unwrap();
    copy_units(folder.path());
    let units = ["./echoserver.service", "./echoserver.socket"];
    let text = analyze(folder.path(), &["verify", "--man=no", units[0], units[1]]);
    assert_eq!(text, "");
}

/// The unit sets no option as an argument, which would win over /etc/default/echoserver.
#[test]
fn defaults_of_the_unit_can_be_replaced() {
    let service = packaged("echoserver.service");
    let has = |line: &str| service.lines().any(|found| found == line);
    assert!(has("ExecStart=/usr/bin/echoserver"), "{service}");
    assert!(has("EnvironmentFile=-/etc/default/echoserver"), "{service}");
    let lines = service
        .lines()
        .filter_map(|line| line.strip_prefix("Environment="));
    let defaults: Vec<_> = lines.filter_map(|line| line.split_once('=')).collect();
    assert!(!defaults.is_empty(), "{service}");
    check_defaults(&defaults);
    // The comments of the file that the package installs name options too.
    for line in packaged("echoserver.default").lines() {
        if let Some((variable, _)) = line.trim_start_matches('#').split_once('=') {
            assert!(
                help_options(&["--help"]).contains(&option_of(variable)),
                "{line}"
            );
        }
    }
}

#[test]
fn service_has_a_low_exposure_level() {
    if !installed(&["systemd-analyze"]) {
        return;
    }
    let folder = tempdir().unwrap();
    copy_units(folder.path());
    let arguments = ["security", "--offline=true", "--threshold=12"];
    let text = analyze(
        folder.path(),
        &[&arguments[..], &["./echoserver.service"]].concat(),
    );
    assert!(text.contains("Overall exposure level"), "{text}");
}

/// Returns the names in a set of system calls, and in the sets that it includes.
fn calls_in(set: &str) -> BTreeSet<String> {
    let text = analyze(Path::new("/"), &["syscall-filter", set]);
    let mut names = BTreeSet::new();
    for line in text.lines().skip(1).map(str::trim) {
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

/// Returns the calls that the unit's filter allows.
fn allowed_calls() -> BTreeSet<String> {
    // Always allowed, by systemd.exec(5).
    let mut allowed = calls_in("@default");
    let service = packaged("echoserver.service");
    let filters = service
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="));
    for filter in filters {
        let denies = filter.starts_with('~');
        for set in filter.trim_start_matches('~').split_whitespace() {
            let calls = calls_in(set);
            match denies {
                true => allowed.retain(|call| !calls.contains(call)),
                false => allowed.extend(calls),
            }
        }
    }
    allowed
}

#[test]
fn system_call_filter_allows_all_that_the_program_calls() {
    if !installed(&["systemd-analyze", "strace"]) {
        return;
    }
    let folder = tempdir().unwrap();
    let (counts, path) = (folder.path().join("counts"), folder.path().join("echo"));
    let mut strace = command("strace");
    // The program stays this process' child, and all of its threads are traced.
    strace.args(["-D", "-qq", "-f", "-c", "-U", "name", "-o"]);
    strace.arg(&counts).arg(program().get_program());
    strace.args(["--listen=127.0.0.1:0", "--unix-mode=0660", "--workers=2"]);
    strace.arg(format!("--listen=unix:{}", path.display()));
    strace.args(["--idle-timeout=1s", "--stats-interval=50ms", "-v"]);
    strace.arg("--metrics=127.0.0.1:0");
    let mut server = Process::start(&mut strace);
    let metrics = server.metrics_address();
    assert_eq!(http::get(metrics, "/metrics").status, 200);
    Client::connect(server.address()).check_echo(&random_bytes(1, 100_000));
    Client::connect_unix(&path).check_echo(&random_bytes(2, 100_000));
    Client::connect(server.address()).expect_eof();
    server.signal(Signal::USR1);
    server.wait_for_log("stats: ");
    server.terminate();

    let mut text = String::new();
    wait_until("strace has written its counts", || {
        text = fs::read_to_string(&counts).unwrap_or_default();
        text.ends_with("total\n")
    });
    // Neither rulers nor what strace reports about a thread that it leaves.
    let is_name = |line: &&str| {
        line.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    let called: BTreeSet<_> = text
        .lines()
        .map(str::trim)
        .filter(|line| !["syscall", "total"].contains(line))
        .filter(is_name)
        .map(str::to_owned)
        .collect();
    assert!(
        called.contains("accept4") && called.contains("prlimit64"),
        "{text}"
    );
    let allowed = allowed_calls();
    let denied: Vec<_> = called.difference(&allowed).collect();
    assert!(denied.is_empty(), "the filter denies {denied:?}");
}

/// MemoryDenyWriteExecute denies memory that is both, and memory that becomes executable later.
#[test]
fn no_memory_is_writable_and_executable() {
    if !installed(&["strace"]) {
        return;
    }
    let folder = tempdir().unwrap();
    let calls = folder.path().join("calls");
    let mut strace = command("strace");
    let filter = "trace=mmap,mprotect,pkey_mprotect,shmat";
    strace.args(["-D", "-qq", "-f", "-e", filter, "-o"]);
    strace.arg(&calls).arg(program().get_program());
    let server = Process::start(strace.arg("--listen=127.0.0.1:0"));
    Client::connect(server.address()).check_echo(&random_bytes(1, 1_000_000));
    server.terminate();
    let calls = fs::read_to_string(&calls).unwrap();
    let protections = calls.lines().filter(|line| line.contains("PROT_"));
    assert!(protections.clone().count() > 10, "{calls}");
    for line in protections.filter(|line| line.contains("PROT_EXEC")) {
        assert!(!line.contains("PROT_WRITE"), "{line}");
        assert!(line.contains("mmap("), "{line}");
    }
}
