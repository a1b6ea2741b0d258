//! The command line: what is wrong is said in one line that names the culprit, and nothing that a
//! shell can do to the program's streams and limits makes it panic.

use std::collections::BTreeSet;
use std::io::{self, PipeWriter, Read};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use assert_cmd::assert::OutputAssertExt;
use rustix::process::Signal;

use crate::daemon::{Daemon, PATIENCE, program, program_with_descriptors};
use crate::support::check_echo;

/// Values that no option may take, and what must be said about each.
const BAD: [(&str, &[&str]); 14] = [
    (
        "listen",
        &[
            "99999",
            "127.0.0.1:99999",
            "localhost",
            "::1",
            "[::1",
            "unix:",
        ],
    ),
    ("backlog", &["0", "-1", "abc", "5000000000", ""]),
    ("workers", &["0", "-1", "abc", "1025", "1000000", "2.5", ""]),
    ("max-connections", &["0", "-1", "abc", "1e3", ""]),
    ("buffer-size", &["0", "-1", "abc", "2GiB", "64KiBs"]),
    ("idle-timeout", &["abc", "-1s", "5", "1 fortnight"]),
    ("drain-timeout", &["abc", "-1s", "5", "1 fortnight"]),
    ("busy-poll", &["abc", "-1us", "5", "1 fortnight"]),
    ("unix-mode", &["abc", "-1", "9", "77777", ""]),
    ("metrics", &["99999", "localhost", "::1", ""]),
    ("log-format", &["xml", "1", ""]),
    ("stats-interval", &["abc", "-1s", "5", "0s"]),
    ("verbose", &["abc", "-1", "300"]),
    ("quiet", &["abc", "-1", "300"]),
];

/// Options that count how often they are given, and so take values from the environment only.
const COUNTED: [&str; 2] = ["verbose", "quiet"];

/// Each option that this build has, with each of its bad values.
fn bad_values() -> impl Iterator<Item = (&'static str, &'static str)> {
    BAD.into_iter()
        .flat_map(|(option, values)| values.iter().map(move |value| (option, *value)))
}

/// Runs the program to its end, which comes by itself.
fn run(command: Command) -> Output {
    assert_cmd::Command::from_std(command)
        .timeout(PATIENCE)
        .output()
        .expect("it ends")
}

fn program_with(words: &[&str]) -> Command {
    let mut command = program();
    command.args(words);
    command
}

/// Checks that it failed with `status`, saying one line; returns that line.
fn check_complaint(command: Command, status: i32) -> String {
    let output = run(command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    output.assert().code(status).stdout("");
    let line = said.strip_suffix('\n').expect("a whole line");
    assert!(!line.contains('\n'), "more than one line: {said}");
    assert!(!line.contains("panicked"), "{said}");
    assert!(!line.contains("Usage"), "more than what is wrong: {said}");
    let complaint = line.strip_prefix("echoserver: ");
    complaint.expect("it says who speaks").to_owned()
}

fn variable(option: &str) -> String {
    format!("ECHOSERVER_{}", option.replace('-', "_").to_uppercase())
}

#[test]
fn bad_values_are_named() {
    for (option, value) in bad_values().filter(|(option, _)| !COUNTED.contains(option)) {
        let said = check_complaint(program_with(&[&format!("--{option}={value}")]), 2);
        let culprit = format!("invalid value '{value}' for '--{option} ");
        let nothing = format!("a value is required for '--{option} ");
        assert!(
            said.starts_with(&culprit) || (value.is_empty() && said.starts_with(&nothing)),
            "--{option}={value}: {said}"
        );
    }
}

#[test]
fn bad_values_in_the_environment_are_named() {
    for (option, value) in bad_values().filter(|(_, value)| !value.is_empty()) {
        let mut command = program();
        command.env(variable(option), value);
        let said = check_complaint(command, 2);
        assert!(said.contains(&format!("'{value}'")), "{option}: {said}");
        assert!(said.contains(&variable(option)), "{option}: {said}");
    }
}

#[test]
fn an_empty_variable_is_named() {
    for option in ["backlog", "workers", "max-connections", "unix-mode"] {
        let mut command = program_with(&["-v"]);
        command.env(variable(option), "");
        let said = check_complaint(command, 2);
        assert!(said.contains(&variable(option)), "{option}: {said}");
    }
}

#[test]
fn every_option_has_its_bad_values() {
    let help = String::from_utf8(run(program_with(&["--help"])).stdout).unwrap();
    let options: BTreeSet<_> = help
        .lines()
        .filter(|line| line.trim_start().starts_with('-'))
        .filter_map(|line| line.split_once("--"))
        .map(|(_, rest)| rest.split([' ', '.']).next().unwrap())
        .collect();
    let tried = bad_values().map(|(option, _)| option);
    assert_eq!(options, tried.chain(["help", "version"]).collect());
}

#[test]
fn words_that_mean_nothing_are_named() {
    for (words, culprit) in [
        (&["--nope"][..], "--nope"),
        (&["-x"], "-x"),
        (&["stray"], "stray"),
        (&["--workers"], "--workers"),
        (&["--workers", "-1"], "-1"),
        (&["-w", "1", "-w", "2"], "--workers"),
        (&["--version=1"], "--version"),
    ] {
        let said = check_complaint(program_with(words), 2);
        assert!(said.contains(culprit), "{words:?}: {said}");
    }
}

#[test]
fn an_address_in_use_is_named() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    let said = check_complaint(program_with(&["--listen", &address]), 1);
    let culprit = format!("cannot listen on {address}: address ");
    assert!(
        said.starts_with(&culprit) && said.ends_with("in use"),
        "{said}"
    );
}

#[test]
fn an_address_that_cannot_be_had_is_named() {
    for (address, reason) in [
        // For documentation: nobody has it.
        ("192.0.2.1:0", "cannot assign requested address"),
        ("[2001:db8::1]:0", "cannot assign requested address"),
        // An empty label, which no resolver needs to ask for.
        ("nobody..invalid:7", ""),
    ] {
        let said = check_complaint(program_with(&["--listen", address]), 1);
        let culprit = format!("cannot listen on {address}: ");
        assert!(said.starts_with(&culprit), "{said}");
        assert!(said.contains(reason), "{said}");
    }
}

#[test]
fn help_and_version_are_no_failures() {
    let version = concat!("echoserver ", env!("CARGO_PKG_VERSION"), "\n");
    for word in ["--version", "-V"] {
        run(program_with(&[word]))
            .assert()
            .code(0)
            .stderr("")
            .stdout(version);
    }
    for word in ["--help", "-h"] {
        let output = run(program_with(&[word]));
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        output.assert().code(0).stderr("");
        assert!(help.ends_with('\n') && !help.ends_with("\n\n"), "{help}");
        for line in help.lines() {
            assert!(line.len() <= 100 && line.trim_end() == line, "{line:?}");
        }
    }
}

/// A pipe that nobody reads any more.
fn broken_pipe() -> PipeWriter {
    let (_reader, writer) = io::pipe().unwrap();
    writer
}

#[test]
fn nobody_needs_to_read_what_it_says() {
    for (word, status) in [("--help", 0), ("--version", 0), ("--nope", 2)] {
        let mut command = program();
        command
            .arg(word)
            .stdout(broken_pipe())
            .stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{word}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("panicked"), "{word}: {said}");

        let mut command = program();
        command
            .arg(word)
            .stdout(Stdio::null())
            .stderr(broken_pipe());
        let ended = command.status().unwrap();
        assert_eq!(ended.code(), Some(status), "{word}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn it_serves_with_its_streams_closed() {
    for closed in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &format!(r#"exec "$0" "$@" {closed}"#)])
            .arg(program().get_program());
        let mut daemon = Daemon::spawn_unheard(&mut shell, Stdio::null());
        check_echo(daemon.address(), b"no streams but this one");
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.wait().code(), Some(0), "{closed}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn quietest_is_silent() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut daemon = Daemon::spawn_unheard(program().arg("-qqq"), writer);
    check_echo(daemon.address(), b"hush");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    assert_eq!(log, "");
}

/// Whatever the limit, it serves, or says in one line why it can't.
#[test]
fn few_descriptors_are_enough_or_named() {
    let (mut served, mut refused) = (0, 0);
    for limit in (4..=40).step_by(2) {
        let mut limited = program_with_descriptors(limit);
        limited.arg("--version");
        if !run(limited).status.success() {
            // The system's own loader needs some too.
            continue;
        }
        match Daemon::spawn_or_end(program_with_descriptors(limit).arg("--workers=2")) {
            Ok(daemon) => {
                check_echo(daemon.address(), b"enough");
                daemon.end();
                served += 1;
            }
            Err((status, log)) => {
                assert_eq!(status.code(), Some(1), "{limit}: {log}");
                assert!(log.starts_with("echoserver: "), "{limit}: {log}");
                assert_eq!(log.lines().count(), 1, "{limit}: {log}");
                assert!(
                    log.contains("descriptor") || log.contains("open files"),
                    "{log}"
                );
                refused += 1;
            }
        }
    }
    assert!(
        served > 0 && refused > 0,
        "{served} served, {refused} refused"
    );
}

#[test]
fn the_metrics_have_their_share_of_the_descriptors() {
    let most = |words: &[&str]| -> u64 {
        let log = Daemon::spawn(program_with_descriptors(200).args(words)).end();
        let (_, rest) = log.split_once("max connections: ").expect("it says so");
        let (most, _) = rest.split_once(',').expect("more is said");
        most.parse().expect("a number")
    };
    let (without, with) = (
        most(&["--workers=2"]),
        most(&["--workers=2", "--metrics=127.0.0.1:0"]),
    );
    assert!(with + 32 < without, "{with}, {without}");
}
