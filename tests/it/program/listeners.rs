//! Addresses that are unusual: IPv4-mapped, with a zone, names on systems without IPv6, and socket files.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;

use echoserver::{Address, Config, Peer};
use rustix::process::Signal;
use tempfile::tempdir;

use crate::harness::{
    Client, DEADLINE, FnHandler, Process, READY, SetOnDrop, TestServer, bind, command, config,
    error_line, free_address, installed, program, program_after, run, wait_until,
};

/// Returns a command that runs the program with a network and an `/etc/hosts` of its own, after `setup`, unless the
/// system does not permit that.
fn isolated(hosts: &str, setup: &str) -> Option<Command> {
    let unshare = |setup: &str| {
        let shell = program_after(&format!(
            r#"mount -t tmpfs none /mnt && echo "$HOSTS" >/mnt/hosts &&
            mount --bind /mnt/hosts /etc/hosts && ip link set lo up && {setup}"#
        ));
        let mut unshare = command("unshare");
        unshare.args(["-r", "-n", "-m"]).env("HOSTS", hosts);
        unshare.arg(shell.get_program()).args(shell.get_args());
        unshare
    };
    if !installed(&["unshare", "ip"]) {
        return None;
    }
    if !run(unshare("true").arg("--version")).status.success() {
        println!("skipped: a network namespace is not permitted");
        return None;
    }
    Some(unshare(setup))
}

#[test]
fn localhost_without_ipv6_binds_ipv4() {
    let listen = "--listen=localhost:0";
    let without_ipv6 = "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6";
    let Some(mut command) = isolated("127.0.0.1 localhost\n::1 localhost", without_ipv6) else {
        return;
    };
    let server = Process::start(command.arg(listen));
    let listening = server.lines_with("] listening on");
    let log = server.terminate();
    assert_eq!(listening.len(), 1, "{log}");
    assert!(listening[0].contains("listening on 127.0.0.1:"), "{log}");
    let skipped = "not listening on [::1]:0: cannot assign requested address";
    assert!(log.contains(skipped), "{log}");

    let mut command = isolated("::1 localhost", without_ipv6).expect("it was permitted");
    let expected = "cannot listen on localhost:0: cannot assign requested address";
    assert_eq!(error_line(command.arg(listen), 1), expected);
}

#[test]
fn zone_of_an_ipv6_address_can_be_a_name() {
    let error = error_line(program().arg("--listen=[fe80::1%nowhere]:7"), 1);
    let expected = "cannot listen on [fe80::1%nowhere]:7: failed to lookup address information: ";
    assert!(error.starts_with(expected), "{error}");

    let Some(mut command) = isolated("", "ip addr add fe80::1/64 dev lo nodad") else {
        return;
    };
    let log = Process::start(command.arg("--listen=[fe80::1%lo]:0")).terminate();
    assert!(log.contains("listening on [fe80::1%1]:"), "{log}");
}

#[test]
fn ipv4_mapped_address_is_its_ipv4_address() {
    let server = Process::start(program().arg("--listen=[::ffff:127.0.0.1]:0"));
    let address = server.address();
    assert!(address.is_ipv4(), "{address}");
    Client::connect(address).check_echo(b"mapped");
    server.terminate();
}

/// What an address adds to the others is bound, and nothing twice.
#[test]
fn overlapping_addresses_are_bound_once() {
    let port = free_address().port().to_string();
    for (listen, expected) in [
        ("127.0.0.1:P,127.0.0.1:P", "127.0.0.1:P"),
        ("0.0.0.0:P,127.0.0.1:P", "0.0.0.0:P"),
        ("0.0.0.0:P,[::]:P", "0.0.0.0:P [::]:P"),
        (":P,127.0.0.1:P", "[::]:P"),
        ("127.0.0.1:P,:P", "[::]:P"),
        ("[::1]:P,:P,0.0.0.0:P", "[::]:P 0.0.0.0:P"),
    ] {
        let needs_ipv6 = expected.contains("[::]");
        if needs_ipv6 && TcpListener::bind("[::1]:0").is_err() {
            continue;
        }
        let server = Process::start(program().args(["--listen", &listen.replace('P', &port)]));
        for ip in ["127.0.0.1", "[::1]"]
            .iter()
            .take(1 + usize::from(needs_ipv6))
        {
            let address = format!("{ip}:{port}").parse().unwrap();
            Client::connect(address).check_echo(b"served");
        }
        let lines = server.lines_with("] listening on ");
        let bound = lines.iter().map(|line| line.rsplit(' ').next().unwrap());
        let bound = bound.collect::<Vec<_>>().join(" ").replace(&port, "P");
        assert_eq!(bound, expected, "{listen}");
        server.terminate();
    }
    // Port 0 is another one each time.
    let two = Process::serve(&["--listen=127.0.0.1:0"]);
    assert_eq!(two.lines_with("] listening on ").len(), 2);
    two.terminate();
}

/// A port that is free at the first address of a name is in use at another one, so the system chooses again.
#[test]
fn a_name_has_one_port() {
    let hosts = "127.0.0.1 three\n127.0.0.2 three\n127.0.0.3 three";
    let range = "echo 40000 40063 >/proc/sys/net/ipv4/ip_local_port_range";
    let Some(mut command) = isolated(hosts, range) else {
        return;
    };
    // The system tries the odd ports of the lower half first.
    for port in (40001..40029).step_by(2) {
        let ip = if port < 40015 {
            "127.0.0.2"
        } else {
            "127.0.0.3"
        };
        command.arg(format!("--listen={ip}:{port}"));
    }
    let server = Process::start(command.arg("--listen=three:0"));
    let log = server.terminate();
    let port_of = |ip: &str| {
        let line = log.lines().rfind(|line| line.contains(ip)).unwrap();
        line.rsplit(':').next().unwrap().to_owned()
    };
    let [one, two, three] = ["127.0.0.1:", "127.0.0.2:", "127.0.0.3:"].map(port_of);
    assert!(one == two && two == three, "{log}");
}

#[test]
fn backlog_beyond_that_of_the_system_is_reduced() {
    let Some(mut command) = isolated("", "echo 77 >/proc/sys/net/core/somaxconn") else {
        return;
    };
    let server = Process::start(command.args(["--listen=127.0.0.1:0", "--backlog=78"]));
    let log = server.terminate();
    assert!(
        log.contains("backlog reduced from 78 to 77: net.core.somaxconn"),
        "{log}"
    );
    assert!(log.contains(" backlog=77 "), "{log}");
}

/// As `kill; start` does, without waiting for the end of the old server.
#[test]
fn new_server_waits_for_the_port_of_the_old_one() {
    let old = Process::serve(&["--metrics=127.0.0.1:0"]);
    let (address, mut old) = (old.address().to_string(), old);
    let metrics = old.metrics_address().to_string();
    // Its listeners stay open until it continues.
    old.pause();
    old.signal(Signal::TERM);
    let new = Process::launch(program().args(["--listen", &address, "--metrics", &metrics]));
    old.signal(Signal::CONT);
    old.wait_for_success();
    let mut new = new;
    new.wait_for_log(READY);
    Client::connect(new.address()).check_echo(b"new");
    new.terminate();
}

/// Two servers side by side, 20 times, under a load of one connection per message. A SYN that the system gives to the old
/// listener at its end is repeated after a second.
#[test]
fn reused_port_makes_restarts_without_a_failure() {
    let mut server = Process::serve(&["--reuse-port", "--metrics=127.0.0.1:0"]);
    let (address, metrics) = (server.address(), server.metrics_address());
    let (stop, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    let server = thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    Client::connect(address).ping(b"a message of its own connection");
                    count.fetch_add(1, Relaxed);
                }
            });
        }
        for _ in 0..20 {
            let mut next = program();
            next.args(["--reuse-port", "--listen", &address.to_string()]);
            let next = Process::start(next.args(["--metrics", &metrics.to_string()]));
            let before = count.load(Relaxed);
            server.terminate();
            server = next;
            wait_until("the new server answers", || count.load(Relaxed) > before);
        }
        server
    });
    server.terminate();
}

#[test]
fn handler_factory_gets_both_addresses_of_a_connection() {
    let folder = tempdir().unwrap();
    let unix = Address::UnixPath(folder.path().join("echo"));
    let listen = vec![Address::AnyInterface(0), unix.clone()];
    let (sender, addresses) = mpsc::channel();
    let server = TestServer::run(bind(Config { listen, ..config() }), move |connection| {
        let local = connection.local_address().unwrap();
        sender.send((connection.peer(), local)).unwrap();
        FnHandler::echo()
    });
    // A dual-stack listener has an IPv6 address.
    let ipv4 = SocketAddr::from(([127, 0, 0, 1], server.address.port()));
    let client = Client::connect(ipv4);
    let expected = (Peer::Ip(client.local_address()), Address::Ip(ipv4));
    assert_eq!(addresses.recv_timeout(DEADLINE), Ok(expected));
    let _client = Client::connect_unix(folder.path().join("echo"));
    assert_eq!(addresses.recv_timeout(DEADLINE), Ok((Peer::Unix, unix)));
}

/// The permissions hold for every socket file, that of the metrics endpoint included.
#[test]
fn unix_mode_holds_for_the_metrics_endpoint() {
    let folder = tempdir().unwrap();
    let (echo, metrics) = (folder.path().join("echo"), folder.path().join("metrics"));
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let mut command = program();
    command.args(["--listen=127.0.0.1:0", "--unix-mode=0601"]);
    let mut server = Process::start(command.arg(format!("--metrics=unix:{}", metrics.display())));
    server.wait_for_log("metrics: listening on unix:");
    assert_eq!(mode(&metrics), 0o601);
    server.terminate();

    let mut command = program();
    command.arg(format!("--listen=unix:{}", echo.display()));
    command.arg(format!("--metrics=unix:{}", metrics.display()));
    let mut server = Process::start(command.arg("--unix-mode=0610"));
    server.wait_for_log("metrics: listening on unix:");
    assert_eq!((mode(&echo), mode(&metrics)), (0o610, 0o610));
    server.terminate();
}

#[test]
fn path_can_contain_a_comma() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a,b\\");
    let listen = format!("unix:{}", path.display()).replace(',', "\\,");
    let server = Process::start(program().arg(format!("--listen=127.0.0.1:0,{listen}")));
    Client::connect(server.address()).check_echo(b"before the comma");
    Client::connect_unix(&path).check_echo(b"after it");
    server.terminate();
}

/// A path cannot forge a line of the log.
#[test]
fn control_characters_of_a_path_are_logged_escaped() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a\nb");
    let server = Process::start(program().arg(format!("--listen=unix:{}", path.display())));
    Client::connect_unix(&path).check_echo(b"found");
    assert_eq!(server.lines_with("/a\\nb").len(), 1);
    server.terminate();
}
