//! `--help` and `--version`.

use std::collections::BTreeSet;

use assert_cmd::assert::OutputAssertExt;

use crate::harness::{program, run};

/// The command line of the help of the server, and of each command.
pub(crate) const HELP: [&[&str]; 3] = [&["--help"], &["check", "--help"], &["load", "--help"]];

/// Returns the long names of the options that a help lists.
pub(crate) fn help_options(arguments: &[&str]) -> BTreeSet<String> {
    let help = run(program().args(arguments)).stdout;
    let help = String::from_utf8(help).expect("text");
    let names = help
        .lines()
        .filter(|line| line.trim_start().starts_with('-'))
        .filter_map(|line| line.split_once("--"))
        .map(|(_, rest)| rest.split([' ', '.']).next().unwrap().to_owned());
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
        assert!(help.lines().count() <= 60, "{help}");
    }
}
