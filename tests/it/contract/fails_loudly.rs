//! An error is one line on stderr that names the option, variable or address, and a non-zero exit status. The end of a
//! server after a panic of a worker has a crate of its own, `worker_panic`.

#[test]
#[cfg(target_os = "linux")]
fn only_listening_sockets_can_be_adopted() {
    use std::io::{Error, ErrorKind};
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    use socket2::{Domain, SockAddr, Socket, Type};

    use crate::harness::{bind, config};

    let folder = tempfile::tempdir().unwrap();
    let mut server = bind(echoserver::Config {
        listen: vec![],
        ..config()
    });
    let check = |error: Error, problem| {
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(error.to_string(), problem);
    };
    let unused = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let bound = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    bound.bind(&SockAddr::from(address)).unwrap();
    let datagrams = UdpSocket::bind(address).unwrap();
    let unix = UnixListener::bind(folder.path().join("unix")).unwrap();
    for (socket, problem) in [
        (OwnedFd::from(unused), "the TCP socket is not listening"),
        (bound.into(), "the TCP socket is not listening"),
        (datagrams.into(), "not a TCP stream socket"),
        (unix.into(), "not a TCP stream socket"),
    ] {
        check(server.adopt_tcp(socket.into()).unwrap_err(), problem);
    }
    let (connected, _peer) = UnixStream::pair().unwrap();
    let tcp = TcpListener::bind(address).unwrap();
    for (socket, problem) in [
        (
            OwnedFd::from(connected),
            "the Unix-domain socket is not listening",
        ),
        (tcp.into(), "not a Unix-domain stream socket"),
    ] {
        check(server.adopt_unix(socket.into()).unwrap_err(), problem);
    }
    assert_eq!(server.addresses(), []);
}

#[cfg(all(unix, feature = "cli"))]
mod program {
    use std::collections::BTreeSet;
    use std::net::TcpListener;
    #[cfg(target_os = "linux")]
    use std::os::unix::net::UnixDatagram;

    use crate::harness::{
        Client, Process, READY, error_line, program, program_after, run, wait_until,
    };
    use crate::program::command_line::help_options;
    #[cfg(target_os = "linux")]
    use crate::program::resources::{can_trace, with_few_threads};

    /// Values that each option must reject.
    const INVALID: [(&str, &[&str]); 26] = [
        (
            "listen",
            &[
                "99999",
                "127.0.0.1:99999",
                "localhost",
                "::1",
                "[::1",
                "unix:",
                "tcp://127.0.0.1:0",
                "*:5555",
                "127.0.0.1:0, 127.0.0.1:0",
                "256.1.1.1:0",
                "127.1:0",
                "a\nb",
                "-v",
                LONG_PATH,
            ],
        ),
        ("backlog", &["0", "-1", "abc", "5000000000", ""]),
        ("workers", &["0", "-1", "abc", "1025", "1000000", "2.5", ""]),
        ("max-connections", &["0", "-1", "abc", "1e3", ""]),
        ("buffer-size", &["0", "-1", "abc", "2GiB", "64KiBs"]),
        ("idle-timeout", &["abc", "-1s", "5x", "1 fortnight"]),
        (
            "tcp-keepalive",
            &[
                "abc", "x", "-1s", "0.5s", "500ms", "32768", "32768s", "99999s", "",
            ],
        ),
        ("drain-delay", &["abc", "-1s", "5x"]),
        ("drain-timeout", &["abc", "-1s", "5x", "1 fortnight"]),
        ("busy-poll", &["abc", "-1us", "5x", "1 fortnight"]),
        (
            "unix-mode",
            &["abc", "-1", "9", "0999", "77777", "1777", "rw", ""],
        ),
        ("greeting", &["{host}", "{peer", r"\x", "\\"]),
        ("metrics", &["99999", "localhost", "::1", "*:9555", ""]),
        ("log-format", &["xml", "1", ""]),
        ("stats-interval", &["abc", "-1s", "5x", "0", "0s"]),
        ("reuse-port", &["abc", "-1", "2"]),
        ("buffer-memory", &["0", "-1", "abc", "2PiB", ""]),
        ("delay", &["abc", "-1s", "5x", "2s..1s", "1s..", ""]),
        ("throttle", &["0", "-1", "abc", "2GiB", ""]),
        ("slice", &["0", "abc", "5..1", "1@0s", "1@", ""]),
        (
            "fault",
            &[
                "stall",
                "hang@5s",
                "stall@5",
                "drop@eof",
                "@5s",
                "reset@2GiB",
                "",
            ],
        ),
        ("fault-share", &["abc", "-1", "101", "nan", ""]),
        ("fault-seed", &["abc", "-1", "1.5", ""]),
        ("fault-hold", &["abc", "-1s", "5x", "0s", ""]),
        ("verbose", &["abc", "-1", "300"]),
        ("quiet", &["abc", "-1", "300"]),
    ];

    /// The longest path of a Unix-domain socket has 107 bytes.
    const LONG_PATH: &str = "unix:/1234567890/1234567890/1234567890/1234567890/1234567890/\
        1234567890/1234567890/1234567890/1234567890/123456789";

    /// Options that are given or not, or count how often, and so take values from the environment only.
    const FLAGS: [&str; 3] = ["verbose", "quiet", "reuse-port"];

    fn invalid_values() -> impl Iterator<Item = (&'static str, &'static str)> {
        let of_option = |(option, values): (_, &'static [&str])| {
            values.iter().map(move |value| (option, *value))
        };
        INVALID.into_iter().flat_map(of_option)
    }

    fn variable(option: &str) -> String {
        format!("ECHOSERVER_{}", option.replace('-', "_").to_uppercase())
    }

    #[test]
    fn invalid_values_are_reported() {
        for (option, value) in invalid_values().filter(|(option, _)| !FLAGS.contains(option)) {
            let name = format!("--{option}");
            let with_equals_sign = format!("{name}={value}");
            for arguments in [&[with_equals_sign.as_str()][..], &[&name, value]] {
                let error = error_line(program().args(arguments), 2);
                let value = value.replace('\n', r"\n");
                let invalid = format!("invalid value '{value}' for '--{option} ");
                let missing = format!("a value is required for '--{option} ");
                let is_empty = value.is_empty();
                assert!(
                    error.starts_with(&invalid) || (is_empty && error.starts_with(&missing)),
                    "--{option}={value}: {error}"
                );
            }
        }
    }

    #[test]
    fn invalid_environment_values_are_reported() {
        for (option, value) in invalid_values().filter(|(_, value)| !value.is_empty()) {
            let error = error_line(program().env(variable(option), value), 2);
            // A comma separates values.
            let culprit = value.rsplit(',').next().unwrap().replace('\n', r"\n");
            assert!(error.contains(&format!("'{culprit}'")), "{option}: {error}");
            let source = format!(" (from {})", variable(option));
            assert!(error.ends_with(&source), "{option}: {error}");
        }
    }

    /// The same value on the command line, of this option or another one, makes no difference.
    #[test]
    fn source_of_an_invalid_value_is_not_guessed() {
        let error =
            |argument| error_line(program().env("ECHOSERVER_WORKERS", "x").arg(argument), 2);
        let expected = "invalid value 'x' for '--workers <N>': expected a number from 1 to 1024";
        let with_source = format!("{expected} (from ECHOSERVER_WORKERS)");
        assert_eq!(error("--metrics=unix:/x"), with_source);
        assert_eq!(error("-wx"), expected);
    }

    #[test]
    fn invalid_utf_8_is_reported() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;

        let error = error_line(program().arg(OsStr::from_bytes(b"--listen=\n\xff")), 2);
        assert_eq!(error, "invalid UTF-8 in '--listen=\\n\u{fffd}'");
        let mut command = program();
        let variable = command.env("ECHOSERVER_LISTEN", OsStr::from_bytes(b"\xff"));
        assert_eq!(
            error_line(variable, 2),
            "invalid UTF-8 in 'ECHOSERVER_LISTEN'"
        );
    }

    #[test]
    fn invalid_values_of_every_option_are_tested() {
        let tested = invalid_values().map(|(option, _)| option.to_owned());
        let others = ["help", "version"].map(str::to_owned);
        assert_eq!(
            help_options(&["--help"]),
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
            (&["--tcp-keepalive", "-1s"], "'-1"),
            (&["-w", "1", "-w", "2"], "--workers"),
            (&["--version=1"], "--version"),
            // Control characters would end the line.
            (&["a\nb"], r"'a\nb'"),
            (&["--a\n\nb"], r"'--a\n\nb'"),
            // Clap's suggestions.
            (
                &["--drain-time=1s"],
                "(a similar argument exists: '--drain-timeout')",
            ),
            (&["--log-format=jsn"], "(a similar value exists: 'json')"),
            (&["--listen=:0,"], "expected IP:PORT, HOST:PORT"),
            (&["-l", ":0,", ":0"], "':0'"),
            (&["--unix-mode=0600"], "--unix-mode needs a socket file"),
            (
                &["--unix-mode=0600", "--listen=unix:@name"],
                "--unix-mode needs",
            ),
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

    /// Nothing is logged as listening before everything is bound.
    #[test]
    fn metrics_address_in_use_is_reported() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap().to_string();
        let mut command = program();
        command.args(["--listen=127.0.0.1:0", "--metrics", &address]);
        let expected = format!("--metrics: cannot listen on {address}: address already in use");
        assert_eq!(error_line(&mut command, 1), expected);
    }

    /// As at a limit of processes or threads. Nothing is logged or notified as serving before.
    #[test]
    #[cfg(target_os = "linux")]
    fn threads_that_cannot_start_are_reported() {
        if !can_trace() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("notify");
        let manager = UnixDatagram::bind(&name).unwrap();
        manager.set_nonblocking(true).unwrap();
        // The log, signals, two workers, metrics, reports and the watchdog.
        for count in 0..7 {
            let mut server = with_few_threads(count);
            server.args(["--listen=127.0.0.1:0", "--metrics=127.0.0.1:0", "-w2"]);
            server
                .arg("--stats-interval=1h")
                .env("NOTIFY_SOCKET", &name);
            let error = error_line(server.env("WATCHDOG_USEC", "1000000000"), 1);
            let context = ["cannot start ", "--metrics: cannot start "];
            assert!(context.iter().any(|start| error.contains(start)), "{error}");
            assert!(manager.recv(&mut [0; 64]).is_err(), "{count}");
        }

        let server = Process::serve(&[]);
        let address = server.address().to_string();
        for count in 0..3 {
            let mut load = with_few_threads(count);
            load.args(["load", "--json", "--connections=3", "--threads=3", &address]);
            let error = error_line(&mut load, 1);
            assert!(error.starts_with("cannot start the threads of the load: "));
        }
        server.terminate();
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
        for limit in (3..12).chain((12..=40).step_by(2)) {
            let limited = || program_after(&format!("ulimit -n {limit}"));
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
                let error = error_line(limited().args(arguments), 1);
                let starts = ["cannot ", "the descriptor limit of "];
                let parts = ["descriptor", "open files"];
                assert!(
                    starts.iter().any(|start| error.starts_with(start))
                        && parts.iter().any(|part| error.contains(part)),
                    "{limit}: {error}"
                );
                refused += 1;
            } else {
                Client::connect(server.address()).check_echo(b"enough");
                server.terminate();
                started += 1;
            }
        }
        assert!(
            started > 0 && refused > 3,
            "{started} started, {refused} refused"
        );
    }
}
