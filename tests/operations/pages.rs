//! `--generate`: a man page that renders and completions that complete, from the options themselves.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::process::{Command, Output, Stdio};

use crate::daemon::program;
use crate::support::{Scratch, installed};

const PAGES: [&str; 4] = ["man", "bash", "zsh", "fish"];

fn generate(page: &str) -> String {
    let output = program()
        .args(["--generate", page])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The long names of the options that the help tells of.
fn options() -> BTreeSet<String> {
    let help = program().arg("--help").stdout(Stdio::piped()).output();
    let help = String::from_utf8(help.unwrap().stdout).unwrap();
    let names = help
        .lines()
        .filter(|line| line.trim_start().starts_with('-'))
        .filter_map(|line| line.split_once("--"))
        .map(|(_, rest)| rest.split([' ', '.']).next().unwrap().to_owned());
    names.collect()
}

/// Runs a tool that must find nothing to complain of.
fn check_quiet(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
    output
}

#[test]
fn every_option_is_on_every_page() {
    let options = options();
    assert!(options.contains("drain-timeout"), "{options:?}");
    for page in PAGES {
        // In a man page a hyphen that is none of typography's is escaped.
        let text = generate(page).replace("\\-", "-");
        for option in &options {
            let long = match page {
                "fish" => format!("-l {option}"),
                _ => format!("--{option}"),
            };
            assert!(text.contains(&long), "{page} has no {option}");
        }
    }
}

#[test]
fn the_man_page_renders() {
    let page = generate("man");
    for line in [
        ".TH echoserver 1",
        ".SH NAME",
        ".SH SYNOPSIS",
        ".SH OPTIONS",
    ] {
        assert!(page.contains(line), "{page}");
    }
    if !installed(&["groff"]) {
        return;
    }
    let scratch = Scratch::new();
    let file = scratch.join("echoserver.1");
    fs::write(&file, &page).unwrap();
    // -ww: every warning there is.
    let output = check_quiet(
        Command::new("groff")
            .args(["-man", "-Tascii", "-P-cbou", "-ww"])
            .arg(&file),
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains("echoserver(1)"), "{text}");
    assert!(
        text.contains("--drain-timeout <TIME> [default: 5s]"),
        "{text}"
    );
    if installed(&["mandoc"]) {
        check_quiet(Command::new("mandoc").args(["-T", "ascii"]).arg(&file));
    }
}

#[test]
fn bash_completes() {
    if !installed(&["bash"]) {
        return;
    }
    let scratch = Scratch::new();
    let file = scratch.join("completion");
    fs::write(&file, generate("bash")).unwrap();
    check_quiet(Command::new("bash").arg("-n").arg(&file));
    let complete = |word: &str, before: &str| {
        let script = r#". "$0"
            COMP_WORDS=(echoserver "$2" "$1") COMP_CWORD=2
            _echoserver echoserver "$1" "$2"
            echo "${COMPREPLY[@]}""#;
        let mut bash = Command::new("bash");
        bash.args(["--norc", "-c", script]).arg(&file);
        let output = check_quiet(bash.args([word, before]));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(complete("--work", "-v"), "--workers");
    assert_eq!(complete("", "--log-format"), "text json");
}

#[test]
fn other_shells_can_read_theirs() {
    let scratch = Scratch::new();
    for (shell, page) in [("zsh", "zsh"), ("fish", "fish")] {
        if installed(&[shell]) {
            let file = scratch.join(page);
            fs::write(&file, generate(page)).unwrap();
            check_quiet(Command::new(shell).arg("-n").arg(&file));
        }
    }
}

#[test]
fn nobody_needs_to_read_to_the_end() {
    for page in PAGES {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = program()
            .args(["--generate", page])
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{page}: {output:?}");
        assert!(output.stderr.is_empty(), "{page}: {output:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_a_failure() {
    for page in PAGES {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = program()
            .args(["--generate", page])
            .stdout(full)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{page}: {output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            said.starts_with("echoserver: cannot write to stdout: "),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}
