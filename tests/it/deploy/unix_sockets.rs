//! `--listen unix:PATH` and `unix:@NAME`: echo, and the socket's file.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::thread;

use echoserver::{Address, Server};
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::tempdir;

use crate::harness::{
    Client, Process, READY, TestServer, config, error_line, program, program_after, random_bytes,
    wait_until,
};

fn program_at(path: &Path) -> Command {
    let mut command = program();
    command.arg(format!("--listen=unix:{}", path.display()));
    command
}

/// Checks that the program cannot listen at `path`; returns the reason that it reports.
fn check_error(path: &Path) -> String {
    let error = error_line(&mut program_at(path), 1);
    let start = format!("cannot listen on unix:{}: ", path.display());
    let reason = error.strip_prefix(&start);
    reason.unwrap_or_else(|| panic!("{error}")).to_owned()
}

#[test]
fn unix_socket_echoes_every_byte() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    let server = Process::start(program_at(&path).arg("--workers=2"));
    for bytes in [&b""[..], b"hello", &random_bytes(1, 5_000_000)] {
        Client::connect_unix(&path).check_echo(bytes);
    }
    let clients: Vec<_> = (0..50).map(|_| Client::connect_unix(&path)).collect();
    for (client, seed) in clients.iter().zip(0..) {
        client.ping(&random_bytes(seed, 1000));
    }
    drop(clients);
    server.terminate();
}

#[test]
#[cfg(target_os = "linux")]
fn abstract_socket_needs_no_file() {
    let name = format!("echoserver-test-{}", std::process::id());
    // The first byte of an abstract address is zero.
    let path = format!("\0{name}");
    let listen = format!("--listen=unix:@{name}");
    let server = Process::start(program().arg(&listen));
    Client::connect_unix(&path).check_echo(&random_bytes(1, 1_000_000));
    let error = error_line(program().arg(&listen), 1);
    let start = format!("cannot listen on unix:@{name}: address");
    assert!(error.starts_with(&start), "{error}");
    Client::connect_unix(&path).check_echo(b"still here");
    server.terminate();
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    assert!(socket.connect(&SockAddr::unix(&path).unwrap()).is_err());
}

#[test]
fn stale_socket_is_replaced() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "the file is left");
    let server = Process::start(&mut program_at(&path));
    Client::connect_unix(&path).check_echo(b"replaced");
    server.terminate();
}

#[test]
fn socket_of_a_killed_server_is_replaced() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    drop(Process::start(&mut program_at(&path)));
    assert!(path.exists(), "the file is left");
    let server = Process::start(&mut program_at(&path));
    Client::connect_unix(&path).check_echo(b"replaced");
    server.terminate();
}

#[test]
fn live_socket_is_left_alone() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    let server = Process::start(&mut program_at(&path));
    assert_eq!(check_error(&path), "address in use");
    Client::connect_unix(&path).check_echo(b"unaffected");
    server.terminate();
}

/// A connect would wait for a place in the backlog.
#[test]
fn live_socket_with_a_full_backlog_is_left_alone() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    let busy = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    busy.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    busy.listen(0).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();
    assert_eq!(check_error(&path), "address in use");
    assert!(path.exists());
}

#[test]
fn other_files_are_left_alone() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    let reason = "file exists and is not a socket";
    fs::write(&path, "precious").unwrap();
    assert_eq!(check_error(&path), reason);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    // A link to a stale socket.
    let (stale, link) = (folder.path().join("stale"), folder.path().join("link"));
    drop(UnixListener::bind(&stale).unwrap());
    symlink(&stale, &link).unwrap();
    assert_eq!(check_error(&link), reason);
    assert_eq!(check_error(folder.path()), reason);
    // A socket of another type.
    let datagrams = folder.path().join("datagrams");
    let _owner = UnixDatagram::bind(&datagrams).unwrap();
    check_error(&datagrams);
    assert!(datagrams.exists() && link.is_symlink());
}

#[test]
fn unusable_path_is_reported() {
    let folder = tempdir().unwrap();
    check_error(&folder.path().join("missing/echo"));
}

/// Returns the path for a round of a race, in every second round that of a stale socket.
fn path_of_round(folder: &Path, round: usize) -> PathBuf {
    let path = folder.join(format!("echo{round}"));
    if round.is_multiple_of(2) {
        drop(UnixListener::bind(&path).unwrap());
    }
    path
}

#[test]
fn one_of_many_servers_gets_a_path() {
    const THREADS: usize = 16;
    let folder = tempdir().unwrap();
    for round in 0..60 {
        let path = path_of_round(folder.path(), round);
        let start = Barrier::new(THREADS);
        let bind = || {
            let mut config = config();
            config.listen.push(Address::UnixPath(path.clone()));
            start.wait();
            Server::bind(config)
        };
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(bind)).collect();
            let threads = threads.into_iter();
            threads.map(|thread| thread.join().unwrap()).collect()
        });
        let (servers, errors): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        for error in errors.into_iter().map(Result::unwrap_err) {
            assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
        }
        assert_eq!(servers.len(), 1, "round {round}");
        for server in servers {
            let server = TestServer::run_echo(server.unwrap());
            Client::connect_unix(&path).check_echo(b"served");
            server.stop();
        }
        assert!(!path.exists());
    }
}

#[test]
fn one_of_many_processes_gets_a_path() {
    let folder = tempdir().unwrap();
    for round in 0..10 {
        let path = path_of_round(folder.path(), round);
        let launch = |_| Process::launch(program_at(&path).arg("--workers=1"));
        let mut running: Vec<_> = (0..10).map(launch).collect();
        let mut ended = Vec::new();
        wait_until("all but one end", || {
            ended.extend(running.extract_if(.., Process::has_exited));
            running.len() <= 1
        });
        let path_name = path.display();
        for process in ended {
            let (status, log) = process.wait();
            assert_eq!(status.code(), Some(1), "{log}");
            let error = format!("cannot listen on unix:{path_name}: address in use");
            assert_eq!(log, format!("echoserver: {error}\n"));
        }
        let mut server = running.pop().unwrap_or_else(|| panic!("round {round}"));
        server.wait_for_log(READY);
        Client::connect_unix(&path).check_echo(b"served");
        server.terminate();
    }
}

#[test]
fn socket_file_is_removed_on_exit() {
    let folder = tempdir().unwrap();
    let (path, other) = (folder.path().join("echo"), folder.path().join("other"));
    let mut both = program_at(&path);
    both.arg(format!("--listen=unix:{}", other.display()));
    let server = Process::start(&mut both);
    assert!(path.exists() && other.exists());
    server.terminate();
    assert!(!path.exists() && !other.exists());

    // And when another listener fails.
    fs::write(&other, "not a socket").unwrap();
    error_line(&mut both, 1);
    assert!(!path.exists());
}

#[test]
fn socket_file_of_a_successor_is_kept() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    let old = Process::start(&mut program_at(&path));
    fs::rename(&path, folder.path().join("old")).unwrap();
    let new = Process::start(&mut program_at(&path));
    old.terminate();
    Client::connect_unix(&path).check_echo(b"the successor");
    new.terminate();
    assert!(!path.exists());
}

#[test]
fn socket_file_has_the_requested_mode() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("echo");
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    for requested in [0o660, 0o600, 0o777] {
        let server = Process::start(program_at(&path).arg(format!("--unix-mode={requested:o}")));
        assert_eq!(mode(), requested);
        server.terminate();
    }
    let mut command = program_after("umask 027");
    let server = Process::start(command.arg(format!("--listen=unix:{}", path.display())));
    assert_eq!(mode(), 0o750);
    assert_eq!(fs::metadata(&path).unwrap().nlink(), 1);
    server.terminate();
}
