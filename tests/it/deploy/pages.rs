//! `--generate`: a man page that renders and completions that complete, made from the options themselves.

use std::fs;
use std::io;
use std::process::{Command, Output, Stdio};

use tempfile::tempdir;

use crate::harness::{command, installed, program, run};
use crate::program::command_line::{HELP, help_options};

const PAGES: [&str; 7] = [
    "man",
    "man-check",
    "man-load",
    "man-plot",
    "bash",
    "zsh",
    "fish",
];

fn generate(page: &str) -> String {
    let output = check_quiet(program().args(["--generate", page]));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that must succeed and report nothing.
fn check_quiet(command: &mut Command) -> Output {
    let output = run(command);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    output
}

#[test]
fn every_page_has_every_option() {
    let options = HELP.map(help_options);
    assert!(options[0].contains("drain-timeout"), "{options:?}");
    for page in PAGES {
        // A man page escapes hyphens.
        let text = generate(page).replace("\\-", "-");
        let options = match PAGES.iter().position(|known| *known == page) {
            Some(index @ 0..4) => options[index].clone(),
            _ => options.iter().flatten().cloned().collect(),
        };
        for option in options {
            let long = match page {
                "fish" => format!("-l {option}"),
                _ => format!("--{option}"),
            };
            assert!(text.contains(&long), "{page} has no {option}");
        }
    }
}

#[test]
fn man_pages_render_without_warnings() {
    let folder = tempdir().unwrap();
    for (page, title, part, synopsis) in [
        (
            "man",
            "echoserver",
            "--drain-timeout <TIME> [default: 5s]",
            "[-l|--listen <ADDR>]",
        ),
        (
            "man-check",
            "echoserver-check",
            "--patience <TIME> [default: 5s]",
            "[--only <GLOB>]",
        ),
        (
            "man-load",
            "echoserver-load",
            "--timeout <TIME> [default: 10]",
            "[--rate <N>]",
        ),
        (
            "man-plot",
            "echoserver-plot",
            "-o, --output <FILE.svg>",
            "plot\\fR -o|--output <FILE.svg> [-h|--help]",
        ),
    ] {
        let roff = generate(page);
        assert!(roff.contains(&format!(".TH {title} 1")), "{roff}");
        for section in [
            "NAME",
            "SYNOPSIS",
            "OPTIONS",
            "\"EXIT STATUS\"",
            "ENVIRONMENT",
            "EXAMPLES",
        ] {
            assert!(
                roff.contains(&format!("\n.SH {section}\n")),
                "{section}: {roff}"
            );
        }
        assert!(!roff.contains("EXTRA"), "{roff}");
        let start = roff.split_once(".SH DESCRIPTION").expect("a section").0;
        assert!(start.replace("\\-", "-").contains(synopsis), "{start}");
        if !installed(&["groff"]) {
            continue;
        }
        let file = folder.path().join(page);
        fs::write(&file, &roff).unwrap();
        // -ww enables every warning.
        let arguments = ["-man", "-Tascii", "-P-cbou", "-ww"];
        let output = check_quiet(command("groff").args(arguments).arg(&file));
        let text = String::from_utf8(output.stdout).unwrap();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let footer = concat!("echoserver ", env!("CARGO_PKG_VERSION"));
        for part in [
            &format!("{title}(1) User Commands {title}(1)"),
            footer,
            part,
        ] {
            assert!(text.contains(part), "no {part} in {text}");
        }
        if installed(&["mandoc"]) {
            check_quiet(command("mandoc").args(["-T", "ascii"]).arg(&file));
        }
    }
}

/// The help mentions it in a line, and does not list it.
#[test]
fn man_page_explains_generate() {
    let page = generate("man");
    for file in PAGES.map(|page| page.replace('-', "\\-")) {
        assert!(page.contains(&file), "{file}: {page}");
    }
    assert!(page.contains(r"\fB\-\-generate\fR \fI<WHAT>\fR"), "{page}");
}

#[test]
fn bash_completions_complete() {
    if !installed(&["bash"]) {
        return;
    }
    let folder = tempdir().unwrap();
    let file = folder.path().join("completion");
    fs::write(&file, generate("bash")).unwrap();
    check_quiet(command("bash").arg("-n").arg(&file));
    let complete = |words: &[&str]| {
        let script = r#". "$0"
            COMP_WORDS=(echoserver "$@") COMP_CWORD=$#
            _echoserver echoserver "${@: -1}" "${@: -2:1}"
            echo "${COMPREPLY[@]}""#;
        let mut bash = command("bash");
        bash.args(["--norc", "-c", script]).arg(&file);
        let output = check_quiet(bash.args(words));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(complete(&["-v", "--work"]), "--workers");
    assert_eq!(complete(&["--log-format", ""]), "text json");
    assert_eq!(complete(&["lo"]), "load");
    assert_eq!(complete(&["check", "--pat"]), "--patience");
    assert_eq!(complete(&["load", "-v", "--in-f"]), "--in-flight");
}

#[test]
fn zsh_and_fish_completions_parse() {
    let folder = tempdir().unwrap();
    for shell in ["zsh", "fish"] {
        if installed(&[shell]) {
            let file = folder.path().join(shell);
            fs::write(&file, generate(shell)).unwrap();
            check_quiet(command(shell).arg("-n").arg(&file));
        }
    }
}

/// Generates a page to another stdout.
fn generate_to(page: &str, stdout: impl Into<Stdio>) -> Output {
    let mut command = program();
    command
        .args(["--generate", page])
        .stdout(stdout)
        .stderr(Stdio::piped());
    command.spawn().unwrap().wait_with_output().unwrap()
}

#[test]
fn closed_pipe_is_not_an_error() {
    for page in PAGES {
        let (_, writer) = io::pipe().unwrap();
        let output = generate_to(page, writer);
        assert_eq!(output.status.code(), Some(0), "{page}: {output:?}");
        assert!(output.stderr.is_empty(), "{page}: {output:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn full_disk_is_an_error() {
    for page in PAGES {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = generate_to(page, full);
        assert_eq!(output.status.code(), Some(1), "{page}: {output:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        let start = "echoserver: cannot write to stdout: ";
        assert!(stderr.starts_with(start), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}
