//! Addresses that are unusual: IPv4-mapped, with a zone, and names on systems without IPv6.

use std::process::Command;

use crate::harness::{
    Client, Process, command, error_line, installed, program, program_after, run,
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
