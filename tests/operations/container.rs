//! The static binary in an empty root directory, as in an image made from scratch: no libraries, no
//! /dev, no /proc, no /etc.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Signal, geteuid};

use crate::daemon::{Daemon, clean, number, totals};
use crate::support::{Scratch, check_echo, connect, installed, packaged, pattern, ping};

const BUILD: &str = "RUSTFLAGS='-C target-feature=+crt-static' \
    cargo build --target x86_64-unknown-linux-gnu";

/// The static binary, if it was built.
fn binary() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?;
    let target = target.join("x86_64-unknown-linux-gnu");
    let built = ["debug", "release"].map(|profile| target.join(profile).join("echoserver"));
    built.into_iter().find(|binary| binary.is_file())
}

/// The program in a directory that holds nothing else, to be given arguments.
fn contained(root: &Scratch) -> Option<Command> {
    if !installed(&["chroot"]) {
        return None;
    }
    if !geteuid().is_root() {
        println!("skipped: only root may chroot");
        return None;
    }
    let Some(binary) = binary() else {
        println!("skipped: there is no static binary; to build it: {BUILD}");
        return None;
    };
    // By another process: a descriptor that writes to it here could be inherited by what other tests
    // start meanwhile, and what is written to can't be run.
    let copied = Command::new("cp")
        .arg(binary)
        .arg(root.join("echoserver"))
        .status();
    assert!(copied.expect("there is a cp").success());
    let mut chroot = clean(Command::new("chroot"));
    chroot.arg(root.path()).arg("/echoserver");
    Some(chroot)
}

#[test]
fn it_serves_in_an_empty_directory() {
    let root = Scratch::new();
    let Some(mut command) = contained(&root) else {
        return;
    };
    command.args(["--listen=127.0.0.1:0", "--listen=unix:/echo", "--workers=2"]);
    command.arg("--metrics=127.0.0.1:0");
    let daemon = Daemon::spawn(&mut command);
    check_echo(connect(daemon.address()), &pattern(1, 3_000_000));
    check_echo(
        crate::support::connect_unix(&root.join("echo")),
        b"a file of its own",
    );
    let mut open = connect(daemon.address());
    ping(&mut open, b"still open");
    daemon.signal(Signal::TERM);
    let end = std::io::Read::read(&mut open, &mut [0]);
    assert_eq!(end.expect("no reset"), 0);
    drop(open);
    let log = daemon.wait_in_order();
    assert_eq!(number(totals(&log), "accepted"), 3);
    let left: Vec<_> = fs::read_dir(root.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

/// A name needs a resolver, and its files; addresses don't.
#[test]
fn a_host_name_is_refused_there_in_one_line() {
    let root = Scratch::new();
    let Some(mut command) = contained(&root) else {
        return;
    };
    let (status, said) = Daemon::launch(command.arg("--listen=localhost:0")).wait();
    assert_eq!(status.code(), Some(1), "{said}");
    let culprit = "echoserver: cannot listen on localhost:0: ";
    assert!(said.starts_with(culprit), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// The image's command is one that the program takes.
#[test]
fn the_image_starts_the_program_as_it_is() {
    let file = packaged("Containerfile");
    for line in ["FROM scratch", r#"ENTRYPOINT ["/echoserver"]"#] {
        assert!(file.lines().any(|found| found == line), "no {line}");
    }
    let command = file.lines().find_map(|line| line.strip_prefix("CMD "));
    let words: Vec<String> = serde_json::from_str(command.expect("a command")).unwrap();
    let started = crate::daemon::program()
        .args(&words)
        .arg("--version")
        .status();
    assert!(started.unwrap().success(), "{words:?}");
}
