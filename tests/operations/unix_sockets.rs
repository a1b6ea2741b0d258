//! `--listen unix:PATH` and `unix:@NAME`: echo through them, and whose file it is.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::daemon::{Daemon, clean, program};
use crate::support::{Scratch, check_echo, connect_unix, pattern, ping};

fn listening_at(path: &Path) -> Command {
    let mut command = program();
    command.arg(format!("--listen=unix:{}", path.display()));
    command
}

/// Checks that it can't listen at `path`; returns what it says of it.
fn check_refusal(path: &Path) -> String {
    let (status, said) = Daemon::launch(&mut listening_at(path)).wait();
    assert_eq!(status.code(), Some(1), "{said}");
    let culprit = format!("echoserver: cannot listen on unix:{}: ", path.display());
    let reason = said
        .strip_prefix(&culprit)
        .unwrap_or_else(|| panic!("{said}"));
    assert_eq!(reason.trim_end().lines().count(), 1, "{said}");
    reason.trim_end().to_owned()
}

#[test]
fn every_byte_comes_back_and_then_the_end() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    let daemon = Daemon::spawn(listening_at(&path).arg("--workers=2"));
    check_echo(connect_unix(&path), b"");
    check_echo(connect_unix(&path), b"hello");
    check_echo(connect_unix(&path), &pattern(1, 5_000_000));
    let mut clients: Vec<_> = (0..50).map(|_| connect_unix(&path)).collect();
    for (client, seed) in clients.iter_mut().zip(0..) {
        ping(client, &pattern(seed, 1000));
    }
    daemon.end();
}

#[test]
#[cfg(target_os = "linux")]
fn a_name_needs_no_file() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::SocketAddr;

    let name = format!("echoserver-test-{}", std::process::id());
    let daemon = Daemon::spawn(program().arg(format!("--listen=unix:@{name}")));
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let connect = || crate::support::bounded(UnixStream::connect_addr(&address).unwrap());
    check_echo(connect(), &pattern(1, 1_000_000));
    let mut second = program();
    second.arg(format!("--listen=unix:@{name}"));
    let (status, said) = Daemon::launch(&mut second).wait();
    assert_eq!(status.code(), Some(1), "{said}");
    let culprit = format!("echoserver: cannot listen on unix:@{name}: address");
    assert!(said.starts_with(&culprit), "{said}");
    check_echo(connect(), b"still here");
    daemon.end();
    assert!(UnixStream::connect_addr(&address).is_err());
}

#[test]
fn a_socket_that_nobody_listens_at_is_replaced() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "its file is left");
    let daemon = Daemon::spawn(&mut listening_at(&path));
    check_echo(connect_unix(&path), b"replaced");
    daemon.end();
}

#[test]
fn the_socket_of_a_server_that_was_killed_is_replaced() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    drop(Daemon::spawn(&mut listening_at(&path)));
    assert!(path.exists(), "it had no time to remove it");
    let daemon = Daemon::spawn(&mut listening_at(&path));
    check_echo(connect_unix(&path), b"replaced");
    daemon.end();
}

#[test]
fn a_socket_that_somebody_listens_at_is_left_alone() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    let daemon = Daemon::spawn(&mut listening_at(&path));
    assert_eq!(check_refusal(&path), "address in use");
    check_echo(connect_unix(&path), b"undisturbed");
    daemon.end();
}

/// The same where that one is so busy that a connect would wait.
#[test]
fn a_socket_whose_backlog_is_full_is_left_alone() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    let busy = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    busy.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    busy.listen(0).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();
    assert_eq!(check_refusal(&path), "address in use");
    assert!(path.exists());
}

#[test]
fn a_file_that_is_no_listener_is_left_alone() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    let said = "file exists and is not a socket";
    fs::write(&path, "precious").unwrap();
    assert_eq!(check_refusal(&path), said);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    // Neither is what a link leads to.
    let link = scratch.join("link");
    drop(UnixListener::bind(scratch.join("stale")).unwrap());
    symlink(scratch.join("stale"), &link).unwrap();
    assert_eq!(check_refusal(&link), said);
    assert_eq!(check_refusal(scratch.path()), said);
    // Another kind of socket has another kind of owner.
    let datagrams = scratch.join("datagrams");
    let _owner = UnixDatagram::bind(&datagrams).unwrap();
    check_refusal(&datagrams);
    assert!(datagrams.exists() && link.is_symlink());
}

#[test]
fn a_place_that_cannot_be_had_is_named() {
    let scratch = Scratch::new();
    check_refusal(&scratch.join("nowhere/echo"));
    check_refusal(&scratch.join(&"x".repeat(200)));
}

#[test]
fn the_file_is_gone_at_the_end() {
    let scratch = Scratch::new();
    let (path, other) = (scratch.join("echo"), scratch.join("other"));
    let daemon =
        Daemon::spawn(listening_at(&path).arg(format!("--listen=unix:{}", other.display())));
    assert!(path.exists() && other.exists());
    daemon.end();
    assert!(!path.exists() && !other.exists());

    // One that could not be had takes the others with it.
    fs::write(&other, "no socket").unwrap();
    let mut both = listening_at(&path);
    both.arg(format!("--listen=unix:{}", other.display()));
    let (status, said) = Daemon::launch(&mut both).wait();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(!path.exists());
}

#[test]
fn the_file_of_a_successor_stays() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    let old = Daemon::spawn(&mut listening_at(&path));
    fs::rename(&path, scratch.join("old")).unwrap();
    let new = Daemon::spawn(&mut listening_at(&path));
    old.end();
    check_echo(connect_unix(&path), b"the new one");
    new.end();
    assert!(!path.exists());
}

#[test]
fn permissions_are_as_asked_for() {
    let scratch = Scratch::new();
    let path = scratch.join("echo");
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    for wanted in [0o660, 0o600, 0o777] {
        let daemon = Daemon::spawn(listening_at(&path).arg(format!("--unix-mode={wanted:o}")));
        assert_eq!(mode(), wanted);
        daemon.end();
    }
    let mut shell = clean(Command::new("sh"));
    shell.args(["-c", r#"umask 027; exec "$0" "$@""#]);
    shell.arg(program().get_program());
    let daemon = Daemon::spawn(shell.arg(format!("--listen=unix:{}", path.display())));
    assert_eq!(mode(), 0o750);
    assert_eq!(fs::metadata(&path).unwrap().nlink(), 1);
    daemon.end();
    for wrong in ["0999", "rw", "1777", ""] {
        let mut command = listening_at(&path);
        command.arg(format!("--unix-mode={wrong}"));
        let (status, said) = Daemon::launch(&mut command).wait();
        assert_eq!(status.code(), Some(2), "{wrong}: {said}");
    }
}
