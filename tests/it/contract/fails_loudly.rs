//! An error is one line on stderr that names the option, variable or address, and a non-zero exit status. A worker
//! that panics ends the server.

use std::panic;

use echoserver::{Config, Echo, Handler};

use crate::harness::{FnHandler, TestServer, bind, config, wait_until};

/// The payload of the panic panics on drop, where the worker cannot catch it and continue.
#[test]
fn worker_panic_stops_the_server_and_drains_other_workers() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("intended");
        }
    }
    let server = bind(Config {
        workers: 2.try_into().unwrap(),
        ..config()
    });
    let server = TestServer::run(server, |_peer| {
        FnHandler::new(|input, output| {
            if input.data() == b"bomb" {
                panic::panic_any(Bomb);
            }
            Echo.process(input, output)
        })
    });
    let (victim, other) = (server.connect(), server.connect());
    victim.ping(b"one");
    other.ping(b"two");
    victim.send(b"bomb");
    victim.expect_closed();
    other.expect_eof();
    drop(other);
    wait_until("the server ends", || server.handle.is_shut_down());
    let error = server.outcome().expect_err("a worker has panicked");
    assert_eq!(error.to_string(), "worker 0 panicked: intended");
}

#[cfg(all(unix, feature = "cli"))]
mod program {
    use std::collections::BTreeSet;
    use std::net::TcpListener;
    use std::process::Command;

    use assert_cmd::assert::OutputAssertExt;

    use crate::harness::{
        Client, Process, READY, program, program_with_descriptors, run, wait_until,
    };
    use crate::program::command_line::help_options;

    /// Values that each option must reject.
    const INVALID: [(&str, &[&str]); 14] = [
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
        (
            "unix-mode",
            &["abc", "-1", "9", "0999", "77777", "1777", "rw", ""],
        ),
        ("metrics", &["99999", "localhost", "::1", ""]),
        ("log-format", &["xml", "1", ""]),
        ("stats-interval", &["abc", "-1s", "5", "0s"]),
        ("verbose", &["abc", "-1", "300"]),
        ("quiet", &["abc", "-1", "300"]),
    ];

    /// Options that count how often they are given, and so take values from the environment only.
    const COUNTED: [&str; 2] = ["verbose", "quiet"];

    fn invalid_values() -> impl Iterator<Item = (&'static str, &'static str)> {
        let of_option = |(option, values): (_, &'static [&str])| {
            values.iter().map(move |value| (option, *value))
        };
        INVALID.into_iter().flat_map(of_option)
    }

    /// Checks that `command` fails with `status` and one line on stderr; returns that line.
    fn error_line(command: &mut Command, status: i32) -> String {
        let output = run(command);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        output.assert().code(status).stdout("");
        let line = stderr.strip_suffix('\n').expect("a complete line");
        for unwanted in ["\n", "panicked", "Usage"] {
            assert!(!line.contains(unwanted), "{unwanted:?} in {stderr}");
        }
        let error = line.strip_prefix("echoserver: ");
        error.expect("the program's name").to_owned()
    }

    fn variable(option: &str) -> String {
        format!("ECHOSERVER_{}", option.replace('-', "_").to_uppercase())
    }

    #[test]
    fn invalid_values_are_reported() {
        for (option, value) in invalid_values().filter(|(option, _)| !COUNTED.contains(option)) {
            let error = error_line(program().arg(format!("--{option}={value}")), 2);
            let invalid = format!("invalid value '{value}' for '--{option} ");
            let missing = format!("a value is required for '--{option} ");
            assert!(
                error.starts_with(&invalid) || (value.is_empty() && error.starts_with(&missing)),
                "--{option}={value}: {error}"
            );
        }
    }

    #[test]
    fn invalid_environment_values_are_reported() {
        for (option, value) in invalid_values().filter(|(_, value)| !value.is_empty()) {
            let error = error_line(program().env(variable(option), value), 2);
            assert!(error.contains(&format!("'{value}'")), "{option}: {error}");
            assert!(error.contains(&variable(option)), "{option}: {error}");
        }
    }

    #[test]
    fn empty_environment_values_are_reported() {
        for option in ["backlog", "workers", "max-connections", "unix-mode"] {
            let error = error_line(program().arg("-v").env(variable(option), ""), 2);
            assert!(error.contains(&variable(option)), "{option}: {error}");
        }
    }

    #[test]
    fn invalid_values_of_every_option_are_tested() {
        let tested = invalid_values().map(|(option, _)| option.to_owned());
        let others = ["help", "version"].map(str::to_owned);
        assert_eq!(
            help_options(),
            tested.chain(others).collect::<BTreeSet<_>>()
        );
    }

    #[test]
    fn invalid_arguments_are_reported() {
        for (arguments, culprit) in [
            (&["--nope"][..], "--nope"),
            (&["-x"], "-x"),
            (&["stray"], "stray"),
            (&["--workers"], "--workers"),
            (&["--workers", "-1"], "-1"),
            (&["-w", "1", "-w", "2"], "--workers"),
            (&["--version=1"], "--version"),
        ] {
            let error = error_line(program().args(arguments), 2);
            assert!(error.contains(culprit), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn address_in_use_is_reported() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap().to_string();
        let error = error_line(program().args(["--listen", &address]), 1);
        let start = format!("cannot listen on {address}: address ");
        assert!(
            error.starts_with(&start) && error.ends_with("in use"),
            "{error}"
        );
    }

    #[test]
    fn unavailable_address_is_reported() {
        for (address, reason) in [
            // Restarted for documentation.
            ("192.0.2.1:0", "cannot assign requested address"),
            ("[2001:db8::1]:0", "cannot assign requested address"),
            // An empty label, which is refused without a query.
            ("empty..invalid:7", ""),
        ] {
            let error = error_line(program().args(["--listen", address]), 1);
            let start = format!("cannot listen on {address}: ");
            assert!(error.starts_with(&start), "{error}");
            assert!(error.contains(reason), "{error}");
        }
    }

    /// At every descriptor limit, the program serves or reports in one line why it cannot.
    #[test]
    fn too_few_descriptors_are_reported() {
        let (mut started, mut refused) = (0, 0);
        for limit in (4..=40).step_by(2) {
            let limited = || program_with_descriptors(limit);
            let version = run(limited().arg("--version"));
            if !version.status.success() {
                // The dynamic loader needs some too.
                continue;
            }
            let arguments = ["--listen=127.0.0.1:0", "--workers=2"];
            let mut server = Process::launch(limited().args(arguments));
            wait_until("it serves or exits", || {
                server.log().contains(READY) || server.has_exited()
            });
            if server.has_exited() {
                let (status, log) = server.wait();
                assert_eq!(status.code(), Some(1), "{limit}: {log}");
                assert!(log.starts_with("echoserver: "), "{limit}: {log}");
                assert_eq!(log.lines().count(), 1, "{limit}: {log}");
                let names_it = ["descriptor", "open files"]
                    .iter()
                    .any(|part| log.contains(part));
                assert!(names_it, "{limit}: {log}");
                refused += 1;
            } else {
                Client::connect(server.address()).check_echo(b"enough");
                server.terminate();
                started += 1;
            }
        }
        assert!(
            started > 0 && refused > 0,
            "{started} started, {refused} refused"
        );
    }
}
