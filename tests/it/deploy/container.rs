//! The static binary in an empty root directory, as in an image built from scratch: no libraries, no /dev, no /proc,
//! no /etc.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Signal, geteuid};
use tempfile::{TempDir, tempdir};

use super::packaged;
use crate::harness::{Client, Process, command, installed, program, random_bytes, run, total};

const BUILD: &str = "RUSTFLAGS='-C target-feature=+crt-static' \
    cargo build --target x86_64-unknown-linux-gnu";

/// Returns the static binary, if it has been built.
fn static_binary() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?;
    let target = target.join("x86_64-unknown-linux-gnu");
    let built = ["debug", "release"].map(|profile| target.join(profile).join("echoserver"));
    built.into_iter().find(|binary| binary.is_file())
}

/// Returns a command that runs the program in a directory that holds nothing else.
fn contained(root: &TempDir) -> Option<Command> {
    if !installed(&["chroot"]) {
        return None;
    }
    if !geteuid().is_root() {
        println!("skipped: chroot needs root");
        return None;
    }
    let Some(binary) = static_binary() else {
        println!("skipped: the static binary is missing; to build it: {BUILD}");
        return None;
    };
    // By another process: a child that another test starts meanwhile could inherit a descriptor that writes to
    // the copy, and a file that is open for writing cannot be run.
    let copied = run(command("cp")
        .arg(binary)
        .arg(root.path().join("echoserver")));
    assert!(copied.status.success(), "{copied:?}");
    let mut chroot = command("chroot");
    chroot.arg(root.path()).arg("/echoserver");
    Some(chroot)
}

#[test]
fn container_serves_in_an_empty_root() {
    let root = tempdir().unwrap();
    let Some(mut command) = contained(&root) else {
        return;
    };
    command.args(["--listen=127.0.0.1:0", "--listen=unix:/echo", "--workers=2"]);
    let server = Process::start(command.arg("--metrics=127.0.0.1:0"));
    Client::connect(server.address()).check_echo(&random_bytes(1, 3_000_000));
    Client::connect_unix(root.path().join("echo")).check_echo(b"over a file");
    let open = Client::connect(server.address());
    open.ping(b"still open");
    server.signal(Signal::TERM);
    open.expect_eof();
    drop(open);
    let log = server.wait_for_success();
    assert_eq!(total(&log, "accepted"), 3);
    let left: Vec<_> = fs::read_dir(root.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

/// A host name needs the files of a resolver; addresses do not.
#[test]
fn container_reports_a_host_name_in_one_line() {
    let root = tempdir().unwrap();
    let Some(mut command) = contained(&root) else {
        return;
    };
    let (status, log) = Process::launch(command.arg("--listen=localhost:0")).wait();
    assert_eq!(status.code(), Some(1), "{log}");
    let start = "echoserver: cannot listen on localhost:0: ";
    assert!(log.starts_with(start), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
}

#[test]
fn image_uses_existing_options() {
    let file = packaged("Containerfile");
    for line in ["FROM scratch", r#"ENTRYPOINT ["/echoserver"]"#] {
        assert!(file.lines().any(|found| found == line), "no {line}");
    }
    let arguments = file.lines().find_map(|line| line.strip_prefix("CMD "));
    let arguments: Vec<String> = serde_json::from_str(arguments.expect("a CMD")).unwrap();
    let output = run(program().args(&arguments).arg("--version"));
    assert!(output.status.success(), "{output:?}");
}
