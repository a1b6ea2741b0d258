//! The limits for each source in `packaging/README.md`, applied by the packet filter of a network namespace.

use std::process::Command;

use serde_json::Value;

use super::packaged;
use crate::harness::{Process, command, installed, program, program_after, run};

/// What the kernel must be able to do.
const PROBE: &str = "
table inet probe {
    chain input {
        type filter hook input priority filter;
        ct state new ct count over 9 limit rate over 9/second drop
    }
}";

/// Returns a command that runs the program in a network namespace with these rules.
fn behind(rules: &str) -> Command {
    let shell = program_after(r#"ip link set lo up && printf %s "$RULES" | nft -f -"#);
    let mut unshare = command("unshare");
    unshare.args(["-r", "-n"]).env("RULES", rules);
    unshare.arg(shell.get_program()).args(shell.get_args());
    unshare
}

#[test]
fn each_source_has_its_limits() {
    if !installed(&["unshare", "nsenter", "ip", "nft"]) {
        return;
    }
    if !run(behind(PROBE).arg("--version")).status.success() {
        println!("skipped: a packet filter in a network namespace is not permitted");
        return;
    }
    let text = packaged("README.md");
    let (_, rules) = text.split_once("```nft\n").expect("rules for nftables");
    let (rules, _) = rules.split_once("```").expect("their end");
    let server = Process::start(behind(rules).arg("--listen=127.0.0.1:5555,[::1]:5555"));
    let load = |address: &str, arguments: &[&str]| {
        let mut nsenter = command("nsenter");
        nsenter.args(["-U", "-n", "--preserve-credentials", "-t"]);
        nsenter.arg(server.pid().to_string());
        nsenter.arg(program().get_program());
        let output = run(nsenter.args(["load", address, "--json"]).args(arguments));
        let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
        ["opened", "failed"].map(|name| report[name].as_u64().unwrap())
    };
    for address in ["127.0.0.1:5555", "[::1]:5555"] {
        // Each connection sends twice, a second apart.
        let many = ["-c110", "-n220", "--rate=110"];
        assert_eq!(load(address, &many), [100, 10], "{address}");
        let [opened, failed] = load(address, &["--connect", "-c1", "-n1000"]);
        assert_eq!(failed, 1, "{address}");
        assert!((50..1000).contains(&opened), "{opened}");
    }
    server.terminate();
}
