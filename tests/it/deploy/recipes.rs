//! The recipes of `docs/recipes.md` with HAProxy, whose configurations are taken from there.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;

use tempfile::{TempDir, tempdir};

use super::{replace_all, root};
use crate::harness::{Client, Process, command, free_address, installed, program, run, wait_until};

/// HAProxy with a configuration of the recipes.
struct Balancer {
    address: SocketAddr,
    process: Process,
    _folder: TempDir,
}

impl Balancer {
    /// Starts it with the configuration `name` in front of `servers`, whose first port there is 5555.
    fn start(name: &str, servers: &[&Process]) -> Self {
        let recipes = fs::read_to_string(root().join("docs/recipes.md")).unwrap();
        let start = format!("<!-- haproxy: {name} -->\n```haproxy\n");
        let (_, rest) = recipes
            .split_once(&start)
            .expect("the configuration is marked");
        let (config, _) = rest.split_once("```").expect("it ends");
        let address = free_address();
        let bound = address.to_string();
        let found: Vec<_> = servers
            .iter()
            .map(|server| server.address().to_string())
            .collect();
        let documented = ["127.0.0.1:5555", "127.0.0.1:5556"];
        let servers = documented.into_iter().zip(found.iter().map(String::as_str));
        let replacements: Vec<_> = servers.chain([("127.0.0.1:5000", &*bound)]).collect();
        let folder = tempdir().unwrap();
        let path = folder.path().join("haproxy.cfg");
        fs::write(&path, replace_all(config, &replacements)).unwrap();
        let mut haproxy = command("haproxy");
        let process = Process::launch(haproxy.args(["-db", "-f"]).arg(&path));
        let balancer = Self {
            address,
            process,
            _folder: folder,
        };
        wait_until("HAProxy listens", || {
            std::net::TcpStream::connect(address).is_ok()
        });
        balancer
    }

    /// Runs `load` through it; returns its status and text.
    fn load(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let address = self.address.to_string();
        let output = run(program().args(["load", &address]).args(arguments));
        (
            output.status.code(),
            String::from_utf8(output.stdout).expect("text"),
        )
    }
}

#[test]
fn balancer_gives_up_on_a_server_that_stalls() {
    if !installed(&["haproxy"]) {
        return;
    }
    let server = Process::serve(&["--fault=stall@connect"]);
    let balancer = Balancer::start("timeout", &[&server]);
    for (timeout, sentence) in [
        ("--timeout=10", "the server closed the connection"),
        ("--timeout=0.5", "nothing came back for 500ms"),
    ] {
        let (status, text) = balancer.load(&["-n=1", timeout]);
        assert!(status == Some(1) && text.contains(sentence), "{text}");
    }
}

#[test]
fn health_check_with_a_message_takes_a_server_that_resets_for_down() {
    if !installed(&["haproxy"]) {
        return;
    }
    let sick = Process::serve(&["--fault=reset@connect"]);
    let healthy = Process::serve(&[]);
    let mut balancer = Balancer::start("checks", &[&sick, &healthy]);
    balancer.process.wait_for_log("Server echo/a is DOWN");
    let (status, text) = balancer.load(&["--connect", "-n=20", "-c=1"]);
    assert!(
        status == Some(0) && text.contains("20 messages\n"),
        "{text}"
    );
    Client::connect(balancer.address).check_echo(b"healthy");
}

#[test]
fn health_check_flaps_with_half_of_the_connections() {
    if !installed(&["haproxy"]) {
        return;
    }
    let sick = Process::serve(&["--fault=close@connect", "--fault-share=50"]);
    let healthy = Process::serve(&[]);
    let balancer = Balancer::start("checks", &[&sick, &healthy]);
    wait_until("a has gone down and come up", || {
        let log = balancer.process.log();
        let states = ["DOWN", "UP"].map(|state| format!("Server echo/a is {state}"));
        let seen: BTreeSet<_> = states.iter().filter(|state| log.contains(*state)).collect();
        seen.len() == 2
    });
}
