//! `--help` and `--version`.

use std::collections::BTreeSet;

use assert_cmd::assert::OutputAssertExt;

use crate::harness::{Process, error_line, number, program, program_after, run};

/// The command line of the help of the server, and of each command.
pub(crate) const HELP: [&[&str]; 4] = [
    &["--help"],
    &["check", "--help"],
    &["load", "--help"],
    &["plot", "--help"],
];

/// Returns the long names of the options that a help lists.
pub(crate) fn help_options(arguments: &[&str]) -> BTreeSet<String> {
    let help = run(program().args(arguments)).stdout;
    let help = String::from_utf8(help).expect("text");
    let names = help
        .lines()
        .filter(|line| line.trim_start().starts_with('-'))
        .filter_map(|line| line.split_once("--"))
        .map(|(_, rest)| rest.split([' ', '.', ']']).next().unwrap().to_owned());
    names.collect()
}

#[test]
fn version_is_printed() {
    let version = concat!("echoserver ", env!("CARGO_PKG_VERSION"), "\n");
    for argument in ["--version", "-V"] {
        let output = run(program().arg(argument));
        output.assert().code(0).stderr("").stdout(version);
    }
}

#[test]
fn help_fits_a_terminal() {
    for arguments in HELP.into_iter().chain([&["-h"][..]]) {
        let output = run(program().args(arguments));
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        output.assert().code(0).stderr("");
        assert!(help.ends_with('\n') && !help.ends_with("\n\n"), "{help}");
        for line in help.lines() {
            assert!(line.len() <= 100 && line.trim_end() == line, "{line:?}");
        }
        assert!(help.lines().count() <= 85, "{help}");
    }
}

#[test]
fn width_of_zero_columns_is_unknown() {
    for arguments in HELP {
        let [unset, zero] = [None, Some("0")].map(|columns| {
            let mut command = program();
            command.args(arguments).env_remove("COLUMNS");
            if let Some(columns) = columns {
                command.env("COLUMNS", columns);
            }
            String::from_utf8(run(&mut command).stdout).expect("text")
        });
        assert_eq!(zero, unset);
    }
}

#[test]
fn command_help_prints_the_help() {
    for arguments in HELP {
        let help = run(program().args(arguments)).stdout;
        let command = &arguments[..arguments.len() - 1];
        let mut program = program();
        // It is not the server, which reads its variables.
        program
            .arg("help")
            .args(command)
            .env("ECHOSERVER_WORKERS", "abc");
        run(&mut program).assert().code(0).stderr("").stdout(help);
    }
}

/// A value can have 128 KiB on Linux. What the error says about it is complete.
#[test]
fn long_value_is_not_repeated_in_an_error() {
    let long = "x".repeat(100_000);
    let host = format!("{long}:5555");
    let refused = "expected a number from 1 to 1024 (from ECHOSERVER_WORKERS)";
    for (command, status, start, end) in [
        (
            program().env("ECHOSERVER_WORKERS", &long),
            2,
            "invalid value 'xxx",
            refused,
        ),
        (
            program().arg(format!("--listen={long}/:1")),
            2,
            "invalid value 'xxx",
            "...'",
        ),
        (
            program().arg(format!("--{long}")),
            2,
            "unexpected argument '--xxx",
            "' found",
        ),
        (program().arg(&long), 2, "unrecognized subcommand 'xxx", "'"),
        (
            program().arg(format!("--listen={host}")),
            2,
            "invalid value 'xxx",
            "...'",
        ),
        (
            program().args(["check", &host]),
            2,
            "invalid value 'xxx",
            "...'",
        ),
    ] {
        let error = error_line(command, status);
        assert!(error.len() < 1_100, "{} bytes", error.len());
        assert!(error.starts_with(start) && error.ends_with(end), "{error}");
    }
}

/// At most what the descriptor limit allows is accepted, and nothing else is logged.
#[test]
fn max_connections_is_clamped_to_the_descriptor_limit() {
    let mut command = program_after("ulimit -n 200");
    command.args([
        "--listen=127.0.0.1:0",
        "--workers=1",
        "--max-connections=5000",
    ]);
    let server = Process::start(&mut command);
    let warnings = server.lines_with("WARN");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let (_, warning) = warnings[0]
        .split_once("max connections reduced from 5000 to ")
        .unwrap();
    let (limit, reason) = warning.split_once(": ").unwrap();
    assert_eq!(reason, "the descriptor limit is 200");
    assert_eq!(
        server
            .lines_with(&format!(" max_connections={limit} "))
            .len(),
        1
    );
    server.terminate();
}

#[test]
fn configuration_in_effect_is_logged() {
    let logged = |arguments: &[&str], name: &str| {
        let mut command = program();
        let server = Process::start(command.arg("--listen=127.0.0.1:0").args(arguments));
        let config = server.lines_with("] configuration: ").remove(0);
        server.terminate();
        number(&config, name)
    };
    for (argument, name, value) in [
        ("--idle-timeout=90", "idle_timeout_ms", 90_000),
        ("--idle-timeout=0", "idle_timeout_ms", 0),
        ("--tcp-keepalive=1h 1s", "tcp_keepalive_ms", 3_601_000),
        ("--drain-timeout=1500ms", "drain_timeout_ms", 1_500),
        ("--busy-poll=50us", "busy_poll_us", 50),
        ("--buffer-size=8K", "buffer_size", 8_192),
        ("--buffer-memory=32M", "max_buffer_bytes", 32 << 20),
        ("--workers=3", "workers", 3),
        ("--backlog=77", "backlog", 77),
    ] {
        assert_eq!(logged(&[argument], name), value, "{argument}");
    }
}
