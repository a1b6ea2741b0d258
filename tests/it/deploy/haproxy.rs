//! The packaged configuration of HAProxy, with two servers, one of which ends under load.

use std::fs;
use std::io::{self, Read, Write};
use std::mem;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use rustix::process::Signal;
use tempfile::{TempDir, tempdir};

use super::{packaged, replace_all};
use crate::harness::{
    Client, Process, SetOnDrop, command, free_address, http, installed, program, random_bytes,
    report, run, total, wait_until,
};

/// HAProxy in front of two servers.
struct Cluster {
    a: Process,
    b: Process,
    address: SocketAddr,
    _balancer: Process,
    folder: TempDir,
    /// Of both servers, without their addresses.
    options: Vec<String>,
}

impl Cluster {
    /// Returns `None` if HAProxy is not installed.
    fn start() -> Option<Self> {
        Self::start_with(&[])
    }

    /// Starts both servers with more options.
    fn start_with(options: &[&str]) -> Option<Self> {
        if !installed(&["haproxy"]) {
            return None;
        }
        let folder = tempdir().unwrap();
        let metrics = "--metrics=127.0.0.1:0";
        let options = [&["--workers=1", "--drain-timeout=10s"], options].concat();
        let serve = || Process::serve(&[&options[..], &[metrics]].concat());
        let (mut a, mut b) = (serve(), serve());
        let addresses = |server: &mut Process| {
            let health = server.metrics_address().port();
            format!("{} port {health}", server.address())
        };
        let address = free_address();
        let text = replace_all(
            &packaged("haproxy.cfg"),
            &[
                ("192.0.2.1:5555 port 9555", &addresses(&mut a)),
                ("192.0.2.2:5555 port 9555", &addresses(&mut b)),
                ("bind :5555", &format!("bind {address}")),
                ("/run/haproxy/", &format!("{}/", folder.path().display())),
            ],
        );
        let config = folder.path().join("haproxy.cfg");
        fs::write(&config, text).unwrap();
        let mut haproxy = command("haproxy");
        let balancer = Process::launch(haproxy.args(["-db", "-q", "-f"]).arg(&config));
        let cluster = Self {
            a,
            b,
            address,
            _balancer: balancer,
            folder,
            options: options.into_iter().map(str::to_owned).collect(),
        };
        wait_until("both servers are up", || cluster.states() == ["2", "2"]);
        Some(cluster)
    }

    /// Replaces a server by a new one at the same addresses, as a service manager does; returns its log.
    fn restart(&mut self, index: usize) -> String {
        let old = self.server(index);
        let (address, metrics) = (old.address(), old.metrics_address());
        old.signal(Signal::TERM);
        wait_until("the server exits", || old.has_exited());
        let mut command = program();
        command.args(&self.options);
        command.arg(format!("--listen={address}"));
        let new = Process::start(command.arg(format!("--metrics={metrics}")));
        let old = mem::replace(self.server(index), new);
        wait_until("the server is up", || self.states() == ["2", "2"]);
        old.wait_for_success()
    }

    fn server(&mut self, index: usize) -> &mut Process {
        [&mut self.a, &mut self.b].into_iter().nth(index).unwrap()
    }

    /// Sends a command to HAProxy's administration socket; returns its answer.
    fn command(&self, line: &str) -> io::Result<String> {
        let mut socket = UnixStream::connect(self.folder.path().join("admin.sock"))?;
        writeln!(socket, "{line}")?;
        io::read_to_string(socket)
    }

    /// Returns the operational states of both servers: 2 is up, 0 is down. None until HAProxy itself is up.
    fn states(&self) -> Vec<String> {
        let table = self.command("show servers state echo").unwrap_or_default();
        // be_id be_name srv_id srv_name srv_addr srv_op_state ...
        let rows = table.lines().filter(|line| line.contains(" echo "));
        rows.filter_map(|line| line.split_whitespace().nth(5).map(str::to_owned))
            .collect()
    }
}

#[test]
fn configuration_is_valid() {
    if !installed(&["haproxy"]) {
        return;
    }
    let folder = tempdir().unwrap();
    let config = folder.path().join("haproxy.cfg");
    fs::write(&config, packaged("haproxy.cfg")).unwrap();
    let output = run(command("haproxy").args(["-c", "-f"]).arg(&config));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{text}");
    assert!(!text.contains("WARNING"), "{text}");
}

#[test]
fn connections_are_spread_over_both_servers() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let open: Vec<_> = (0..20).map(|_| Client::connect(cluster.address)).collect();
    for (client, seed) in open.iter().zip(0..) {
        client.ping(&random_bytes(seed, 1000));
    }
    Client::connect(cluster.address).check_echo(&random_bytes(1, 5_000_000));
    for client in open {
        client.check_echo(b"bye");
    }
    let Cluster { a, b, .. } = cluster;
    let accepted = [a, b].map(|server| total(&server.terminate(), "accepted"));
    assert_eq!(accepted[0] + accepted[1], 21, "{accepted:?}");
    assert!(accepted.iter().all(|&count| count >= 10), "{accepted:?}");
}

/// What the clients have seen.
#[derive(Debug, Default)]
struct Tally {
    received: AtomicU64,
    /// Visits that began after one server had ended, and succeeded.
    late_visits: AtomicU64,
    errors: Mutex<Vec<String>>,
}

/// Connects, sends and reads everything back, over and over until `stop`.
///
/// A visit that begins after a server has `ended` must succeed. An earlier one may be cut short: its connection was
/// open when the server ended, and nothing had arrived.
fn visit(address: SocketAddr, seed: u64, ended: &AtomicBool, stop: &AtomicBool, tally: &Tally) {
    let bytes = random_bytes(seed, 5_000);
    while !stop.load(SeqCst) {
        let is_late = ended.load(SeqCst);
        let client = Client::connect(address);
        let mut received = Vec::new();
        let visit = client.try_send(&bytes).and_then(|()| {
            client.shutdown_write();
            (&client.0).read_to_end(&mut received)
        });
        tally.received.fetch_add(received.len() as u64, SeqCst);
        let succeeded = visit.is_ok() && received == bytes;
        if is_late && succeeded {
            tally.late_visits.fetch_add(1, SeqCst);
        }
        if (is_late && !succeeded) || !bytes.starts_with(&received) {
            let error = format!("{visit:?}, {} bytes, late: {is_late}", received.len());
            tally.errors.lock().unwrap().push(error);
        }
    }
}

/// Sends and reads back on one connection, over and over until it ends. A message that was accepted is answered
/// before EOF.
fn talk(address: SocketAddr, seed: u64, stop: &AtomicBool, tally: &Tally) {
    let bytes = random_bytes(seed, 1_000);
    let client = Client::connect(address);
    while !stop.load(SeqCst) {
        if client.try_send(&bytes).is_err() {
            return;
        }
        let mut received = vec![0; bytes.len()];
        let mut done = 0;
        while done < received.len() {
            match (&client.0).read(&mut received[done..]) {
                Ok(count) if count > 0 => done += count,
                end => {
                    if done > 0 || end.is_err() {
                        let error = format!("a connection ended with {end:?} after {done} bytes");
                        tally.errors.lock().unwrap().push(error);
                    }
                    tally.received.fetch_add(done as u64, SeqCst);
                    return;
                }
            }
        }
        assert!(received == bytes, "other bytes came back");
        tally.received.fetch_add(done as u64, SeqCst);
    }
}

fn wait_for_load(tally: &Tally) {
    wait_until("there is load", || tally.received.load(SeqCst) > 500_000);
}

fn wait_until_refused(server: &Process) {
    let address = server.address();
    wait_until("the server has stopped listening", || {
        TcpStream::connect(address).is_err()
    });
}

fn wait_for_late_visits(tally: &Tally) {
    let before = tally.late_visits.load(SeqCst);
    wait_until("the other server serves all clients", || {
        tally.late_visits.load(SeqCst) > before + 50
    });
}

#[test]
fn one_server_can_end_under_load() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let (ended, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let tally = Tally::default();
    let Cluster { a, address, .. } = &cluster;
    thread::scope(|scope| {
        let _end = SetOnDrop(&stop);
        for seed in 0..8 {
            let (ended, stop, tally) = (&ended, &stop, &tally);
            scope.spawn(move || visit(*address, seed, ended, stop, tally));
            scope.spawn(move || talk(*address, 100 + seed, stop, tally));
        }
        wait_for_load(&tally);
        a.signal(Signal::TERM);
        wait_until_refused(a);
        // HAProxy redispatches connections until its health check fails.
        ended.store(true, SeqCst);
        wait_until("the health check fails", || cluster.states()[0] == "0");
        wait_for_late_visits(&tally);
    });
    assert_eq!(*tally.errors.lock().unwrap(), [] as [String; 0]);
    let Cluster { a, b, .. } = cluster;
    let logs = [a.wait_for_success(), b.terminate()];
    let sum = |name: &str| -> u64 { logs.iter().map(|log| total(log, name)).sum() };
    // The clients have received all that the servers sent, and the servers have sent all that they accepted.
    assert_eq!(sum("bytes_out"), tally.received.load(SeqCst), "{logs:?}");
    let late = sum("discarded_shutdown");
    assert_eq!(sum("bytes_in"), sum("bytes_out") + late, "{logs:?}");
    let failed = sum("closed_drain_timeout") + sum("closed_error");
    assert_eq!(failed, 0, "{logs:?}");
}

/// Three times, each of the two servers is replaced by a new one at the same address, under a load of one connection
/// per message. No connection fails, and no byte is missing.
#[test]
fn rolling_restarts_lose_no_connection() {
    // Longer than the interval of the health checks.
    let Some(mut cluster) = Cluster::start_with(&["--drain-delay=3s"]) else {
        return;
    };
    let (late, stop) = (AtomicBool::new(true), AtomicBool::new(false));
    let tally = Tally::default();
    let address = cluster.address;
    let mut logs = Vec::new();
    thread::scope(|scope| {
        let _end = SetOnDrop(&stop);
        for seed in 0..8 {
            let (late, stop, tally) = (&late, &stop, &tally);
            scope.spawn(move || visit(address, seed, late, stop, tally));
        }
        for server in [0, 1, 0, 1, 0, 1] {
            wait_for_late_visits(&tally);
            logs.push(cluster.restart(server));
        }
        wait_for_late_visits(&tally);
    });
    assert_eq!(*tally.errors.lock().unwrap(), [] as [String; 0]);
    let Cluster { a, b, .. } = cluster;
    for server in [&a, &b] {
        server.signal(Signal::TERM);
    }
    logs.extend([a, b].map(Process::wait_for_success));
    let sum = |name: &str| -> u64 { logs.iter().map(|log| total(log, name)).sum() };
    let received = tally.received.load(SeqCst);
    assert_eq!(
        [sum("bytes_in"), sum("bytes_out")],
        [received; 2],
        "{logs:?}"
    );
    assert_eq!(sum("closed_peer_closed"), sum("accepted"), "{logs:?}");
}

/// The greeting of each server shows how the balancer distributes connections.
#[test]
fn load_measures_the_distribution() {
    let Some(cluster) = Cluster::start_with(&[r"--greeting={pid}\n"]) else {
        return;
    };
    let address = cluster.address.to_string();
    let arguments = ["--connect", "-n=100", "-c=4", "--skip-greeting"];
    let (status, report) = report("load", &address, &arguments);
    assert_eq!((status, &report["attempts"]), (0, &100.into()), "{report}");
    // In turn. The load opens no other connection, so that the counts are equal.
    for server in [&cluster.a, &cluster.b] {
        let pid = server.pid().as_raw_nonzero().to_string();
        assert_eq!(report["greetings"][pid], 50, "{report}");
    }
}

#[test]
fn drained_server_can_end_unnoticed() {
    let Some(mut cluster) = Cluster::start() else {
        return;
    };
    let (late, stop) = (AtomicBool::new(true), AtomicBool::new(false));
    let tally = Tally::default();
    let (address, metrics) = (cluster.address, cluster.a.metrics_address());
    thread::scope(|scope| {
        let _end = SetOnDrop(&stop);
        for seed in 0..8 {
            let (late, stop, tally) = (&late, &stop, &tally);
            scope.spawn(move || visit(address, seed, late, stop, tally));
        }
        wait_for_load(&tally);
        let answer = cluster.command("set server echo/a state drain");
        assert_eq!(answer.unwrap().trim(), "");
        wait_until("it has no connections", || {
            let metrics = http::get(metrics, "/metrics").body;
            let open = "echoserver_connections_open 0";
            metrics.lines().any(|line| line == open)
        });
        cluster.a.signal(Signal::TERM);
        wait_until_refused(&cluster.a);
        wait_for_late_visits(&tally);
    });
    assert_eq!(*tally.errors.lock().unwrap(), [] as [String; 0]);
    let Cluster { a, b, .. } = cluster;
    a.wait_for_success();
    b.terminate();
}
