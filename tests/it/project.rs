//! Rules about the sources: the layers, which rules have a test, what the core imports, and how small the library builds.

mod imports;
mod layers;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::{command, run};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns all sources in a folder and the folders in it.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => sources(&path),
            false => vec![path],
        })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

/// Returns the identifiers and numbers in a text.
fn identifiers(text: &str) -> impl Iterator<Item = &str> {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_';
    text.split(move |letter| !is_part(letter))
        .filter(|word| !word.is_empty())
}

/// A test names the rules of the event loop that it fails without, in a line of its documentation.
#[test]
fn each_rule_of_the_event_loop_is_tested() {
    let docs = read(&root().join("src/lib.rs"));
    let section = docs.split("# The rules of the event loop\n").nth(1);
    let section = section.and_then(|rest| rest.split("\n//! # ").next());
    let lines = section.expect("the section exists").lines();
    let rules = lines.filter_map(|line| {
        line.strip_prefix("//! ")?
            .split_once(". **")?
            .0
            .parse()
            .ok()
    });
    let rules: Vec<u32> = rules.collect();
    assert!(rules.len() > 12, "{rules:?}");

    let files = [sources(&root().join("src")), sources(&root().join("tests"))].concat();
    let tested = files.iter().flat_map(|path| tested_rules(&read(path)));
    let tested: BTreeSet<_> = tested.collect();
    assert_eq!(
        rules,
        Vec::from_iter(tested),
        "rules, and rules that tests name"
    );
}

/// Returns the numbers in lines such as "Rules 1 and 4 of the event loop." in the documentation of tests.
fn tested_rules(source: &str) -> Vec<u32> {
    let mut rules = Vec::new();
    let mut lines = source.lines().map(str::trim);
    while let Some(line) = lines.next() {
        let rest = line.strip_prefix("/// Rule");
        if let Some(text) = rest.and_then(|rest| rest.strip_suffix(" of the event loop.")) {
            let is_test = lines.by_ref().take_while(|line| !line.starts_with("fn "));
            assert!(
                is_test.into_iter().any(|line| line == "#[test]"),
                "not a test: {line}"
            );
            rules.extend(identifiers(text).filter_map(|word| word.parse::<u32>().ok()));
        }
    }
    rules
}

/// The connection and its table can be driven by a simulated kernel, because they depend on no socket, thread or clock.
#[test]
fn connection_core_imports_no_io_thread_or_clock() {
    const FORBIDDEN: [&str; 11] = [
        "net",
        "server",
        "mio",
        "socket2",
        "rustix",
        "libc",
        "Instant",
        "SystemTime",
        "spawn",
        "File",
        "Poll",
    ];
    let folder = root().join("src/connection");
    let files = [sources(&folder), vec![root().join("src/connection.rs")]].concat();
    assert!(files.len() > 2, "{files:?}");
    for file in files {
        let text = read(&file);
        for line in text.lines() {
            let code = line.split("//").next().unwrap_or_default();
            let found = identifiers(code).find(|word| FORBIDDEN.contains(word));
            assert_eq!(found, None, "{}: {line}", file.display());
            // Of threads, only the result of a caught panic.
            let code = code
                .replace("use std::thread;", "")
                .replace("thread::Result", "");
            assert!(
                !identifiers(&code).any(|word| word == "thread"),
                "{}: {line}",
                file.display()
            );
        }
    }
}

#[test]
fn library_needs_at_most_twelve_crates() {
    let mut cargo = command(env!("CARGO"));
    cargo.args(["tree", "--offline", "--locked", "--no-default-features"]);
    cargo.args(["--edges=normal", "--prefix=none", "--no-dedupe"]);
    let output = run(cargo.current_dir(root()));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let tree = String::from_utf8(output.stdout).expect("text");
    let crates: BTreeSet<_> = tree.lines().collect();
    assert!(tree.starts_with("echoserver v"), "{tree}");
    assert!(crates.len() <= 12, "{} crates: {crates:#?}", crates.len());
}

/// A child process must not inherit variables that the program reads, so every one is started by the harness.
#[test]
fn only_the_harness_creates_commands() {
    let harness = root().join("tests/it/harness");
    let pattern = ["Command", "::new("].concat();
    for file in sources(&root().join("tests")) {
        let allowed = file.starts_with(&harness) || !read(&file).contains(&pattern);
        assert!(allowed, "{} creates a command", file.display());
    }
}

#[test]
#[cfg(all(unix, feature = "cli"))]
fn child_processes_do_not_inherit_the_program_s_variables() {
    let this = std::env::current_exe().expect("a test has a path");
    // Fails if the program reads any of these variables.
    let test = "deploy::systemd::absent_service_manager_is_not_logged";
    for (name, value) in [
        ("ECHOSERVER_WORKERS", "invalid"),
        ("RUST_LOG", "echoserver=invalid"),
        ("NOTIFY_SOCKET", "/missing"),
    ] {
        let output = run(command(&this).args(["--exact", test]).env(name, value));
        let report = String::from_utf8_lossy(&output.stdout);
        assert!(report.contains("1 passed"), "{name}: {report}");
    }
}

#[test]
#[cfg(all(target_os = "linux", feature = "cli"))]
fn child_processes_ignore_no_signal_that_ends_them() {
    let output = run(command("cat").arg("/proc/self/status"));
    let status = String::from_utf8(output.stdout).expect("text");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.expect("a line").trim(), 16).expect("a set of bits");
    // SIGHUP, SIGINT and SIGTERM.
    let found = [1, 2, 15].map(|signal| ignored & 1 << (signal - 1));
    assert_eq!(found, [0; 3], "{status}");
}

/// A shell without job control starts background processes with SIGINT ignored, and nohup with SIGHUP.
#[test]
#[cfg(all(target_os = "linux", feature = "cli"))]
fn child_processes_do_not_inherit_ignored_signals() {
    let mut env = command("env");
    env.args(["--ignore-signal=INT", "--ignore-signal=HUP"]);
    env.arg(std::env::current_exe().expect("a test has a path"));
    let test = "project::child_processes_ignore_no_signal_that_ends_them";
    let output = run(env.args(["--exact", test]));
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(report.contains("1 passed"), "{report}");
}
