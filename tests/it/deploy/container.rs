//! The static binary in an empty root directory, as in an image built from scratch: no libraries, no /dev, no /proc,
//! no /etc.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Signal, geteuid};
use tempfile::{TempDir, tempdir};

use super::{check_defaults, packaged, root};
use crate::harness::{Client, Process, command, installed, random_bytes, run, total};

/// Returns the static binary that `.ci/image` builds as the container file does, if it has been built.
fn static_binary() -> Option<PathBuf> {
    let image = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()?
        .join("image");
    let folders = fs::read_dir(image).ok()?.flatten();
    let mut binaries = folders.map(|folder| folder.path().join("release/echoserver"));
    binaries.find(|binary| binary.is_file())
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
        println!("skipped: the static binary is missing; .ci/image builds it");
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

/// A host name needs the files of a resolver, which container engines add; addresses do not.
#[test]
fn container_looks_host_names_up_in_the_files_of_a_resolver() {
    let root = tempdir().unwrap();
    let Some(mut command) = contained(&root) else {
        return;
    };
    let command = command.arg("--listen=pod:0");
    let (status, log) = Process::launch(command).wait();
    assert_eq!(status.code(), Some(1), "{log}");
    let start = "echoserver: cannot listen on pod:0: ";
    assert!(log.starts_with(start), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");

    fs::create_dir(root.path().join("etc")).unwrap();
    fs::write(root.path().join("etc/hosts"), "127.0.0.1 pod\n").unwrap();
    let server = Process::start(command);
    Client::connect(server.address()).check_echo(b"by name");
    server.terminate();
}

#[test]
fn defaults_of_the_image_can_be_replaced() {
    let file = packaged("Containerfile");
    for line in ["FROM scratch", r#"ENTRYPOINT ["/echoserver"]"#] {
        assert!(file.lines().any(|found| found == line), "no {line}");
    }
    // An argument would win over the environment.
    assert!(!file.contains("\nCMD "), "{file}");
    let (_, image) = file.split_once("FROM scratch").unwrap();
    let lines = image.lines().filter_map(|line| line.strip_prefix("ENV "));
    let defaults: Vec<_> = lines.filter_map(|line| line.split_once('=')).collect();
    check_defaults(&defaults);
}

/// The base image has a tag, of a version of Rust that the crate supports, and the build uses the lock file.
#[test]
fn image_is_built_with_fixed_versions() {
    let file = packaged("Containerfile");
    let version = |text: &str| -> Vec<u32> {
        let numbers = text.split('.').map_while(|number| number.parse().ok());
        numbers.collect()
    };
    let base = file
        .split_once("docker.io/library/rust:")
        .expect("it starts from Rust")
        .1;
    let base = version(base.split('-').next().unwrap());
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let oldest = manifest.split_once("rust-version = \"").unwrap().1;
    assert!(
        base.len() > 1 && base >= version(oldest.split('"').next().unwrap()),
        "{base:?}"
    );
    for command in file.lines().filter(|line| line.contains("cargo build")) {
        assert!(command.contains("--locked"), "{command}");
    }
}
