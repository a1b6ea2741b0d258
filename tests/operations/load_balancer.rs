//! Scaled out: the packaged configuration of HAProxy before two servers, one of which is ended under
//! load.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use rustix::process::Signal;

use crate::companion::Companion;
use crate::daemon::{Daemon, number, totals};
use crate::http::get;
use crate::support::{
    Client, Scratch, check_echo, connect, free_address, installed, packaged, pattern, ping,
    replaced, wait_until,
};

/// HAProxy before two servers.
struct Cluster {
    a: Daemon,
    b: Daemon,
    address: SocketAddr,
    _balancer: Companion,
    scratch: Scratch,
}

impl Cluster {
    /// None if there is no HAProxy.
    fn start() -> Option<Self> {
        if !installed(&["haproxy"]) {
            return None;
        }
        let scratch = Scratch::new();
        let server = || {
            Daemon::start(&[
                "--metrics=127.0.0.1:0",
                "--workers=1",
                "--drain-timeout=10s",
            ])
        };
        let (mut a, mut b) = (server(), server());
        let place =
            |daemon: &mut Daemon| format!("{} port {}", daemon.address(), daemon.metrics().port());
        let address = free_address();
        let text = replaced(
            &packaged("haproxy.cfg"),
            &[
                ("192.0.2.1:5555 port 9555", &place(&mut a)),
                ("192.0.2.2:5555 port 9555", &place(&mut b)),
                ("bind :5555", &format!("bind {address}")),
                ("/run/haproxy/", &format!("{}/", scratch.path().display())),
            ],
        );
        let config = scratch.join("haproxy.cfg");
        fs::write(&config, text).unwrap();
        let balancer = Companion::start(
            Command::new("haproxy")
                .args(["-db", "-q", "-f"])
                .arg(&config),
        );
        let cluster = Self {
            a,
            b,
            address,
            _balancer: balancer,
            scratch,
        };
        wait_until("both servers are up", || cluster.states() == ["2", "2"]);
        Some(cluster)
    }

    /// Tells HAProxy something; returns its answer.
    fn command(&self, words: &str) -> io::Result<String> {
        let mut admin = UnixStream::connect(self.scratch.join("admin.sock"))?;
        writeln!(admin, "{words}")?;
        io::read_to_string(admin)
    }

    /// The operational states of both servers: 2 is up, 0 is down. None before HAProxy is up itself.
    fn states(&self) -> Vec<String> {
        let table = self.command("show servers state echo").unwrap_or_default();
        // be_id be_name srv_id srv_name srv_addr srv_op_state ...
        let rows = table.lines().filter(|line| line.contains(" echo "));
        rows.filter_map(|line| line.split_whitespace().nth(5).map(str::to_owned))
            .collect()
    }

    /// Ends both; returns the lines with their totals.
    fn end(self) -> [String; 2] {
        let Self { a, b, .. } = self;
        [a.end(), b.end()].map(|log| totals(&log).to_owned())
    }
}

#[test]
fn the_configuration_is_in_order() {
    if !installed(&["haproxy"]) {
        return;
    }
    let scratch = Scratch::new();
    let config = scratch.join("haproxy.cfg");
    fs::write(&config, packaged("haproxy.cfg")).unwrap();
    let output = Command::new("haproxy")
        .args(["-c", "-f"])
        .arg(&config)
        .output();
    let output = output.unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(
        output.status.success() && !said.contains("WARNING"),
        "{said}"
    );
}

#[test]
fn load_is_spread_over_both() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let mut open: Vec<_> = (0..20).map(|_| connect(cluster.address)).collect();
    for (client, seed) in open.iter_mut().zip(0..) {
        ping(client, &pattern(seed, 1000));
    }
    check_echo(connect(cluster.address), &pattern(1, 5_000_000));
    for client in open {
        check_echo(client, b"bye");
    }
    let totals = cluster.end();
    let accepted = totals.each_ref().map(|line| number(line, "accepted"));
    assert!(accepted[0] + accepted[1] == 21, "{totals:?}");
    assert!(accepted.iter().all(|&count| count >= 10), "{totals:?}");
}

/// What clients have seen.
#[derive(Debug, Default)]
struct Tally {
    received: AtomicU64,
    /// Visits that began when one server was gone already, and were served.
    served_late: AtomicU64,
    failed: Mutex<Vec<String>>,
}

/// Connects, sends and reads back again and again, until told to stop; counts what came back. A
/// visit that begins when a server is `gone` must succeed. One that was on its way to it then may be
/// cut short: its connection was open, and nothing had arrived.
fn visit(address: SocketAddr, seed: usize, gone: &AtomicBool, enough: &AtomicBool, tally: &Tally) {
    let bytes = pattern(seed, 5_000);
    while !enough.load(SeqCst) {
        let late = gone.load(SeqCst);
        let mut client = connect(address);
        let mut back = Vec::new();
        let visited = client.write_all(&bytes).and_then(|()| {
            client.end();
            client.read_to_end(&mut back)
        });
        tally.received.fetch_add(back.len() as u64, SeqCst);
        let whole = visited.is_ok() && back == bytes;
        if late && whole {
            tally.served_late.fetch_add(1, SeqCst);
        }
        if (late && !whole) || !bytes.starts_with(&back) {
            let story = format!("{visited:?}, {} bytes, late: {late}", back.len());
            tally.failed.lock().unwrap().push(story);
        }
    }
}

/// Sends and reads back again and again on one connection, until that ends. Whoever's message was
/// taken has its answer; then comes the end.
fn talk(address: SocketAddr, seed: usize, enough: &AtomicBool, tally: &Tally) {
    let bytes = pattern(seed, 1_000);
    let mut client = connect(address);
    while !enough.load(SeqCst) {
        if client.write_all(&bytes).is_err() {
            return;
        }
        let mut back = vec![0; bytes.len()];
        let mut done = 0;
        while done < back.len() {
            match client.read(&mut back[done..]) {
                Ok(count) if count > 0 => done += count,
                ended => {
                    if done > 0 || ended.is_err() {
                        let story = format!("a talk: {ended:?} behind {done} bytes");
                        tally.failed.lock().unwrap().push(story);
                    }
                    tally.received.fetch_add(done as u64, SeqCst);
                    return;
                }
            }
        }
        assert!(back == bytes, "other bytes came back");
        tally.received.fetch_add(done as u64, SeqCst);
    }
}

#[test]
fn one_of_two_servers_may_end_under_load() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let (gone, enough) = (AtomicBool::new(false), AtomicBool::new(false));
    let tally = Tally::default();
    let Cluster { a, address, .. } = &cluster;
    thread::scope(|scope| {
        for seed in 0..8 {
            let (gone, enough, tally) = (&gone, &enough, &tally);
            scope.spawn(move || visit(*address, seed, gone, enough, tally));
            scope.spawn(move || talk(*address, 100 + seed, enough, tally));
        }
        wait_until("there is load", || tally.received.load(SeqCst) > 500_000);
        a.signal(Signal::TERM);
        wait_until("the server has stopped listening", || {
            TcpStream::connect(a.address()).is_err()
        });
        // From here on HAProxy has to find out.
        gone.store(true, SeqCst);
        wait_until("HAProxy has found out", || cluster.states()[0] == "0");
        let before = tally.served_late.load(SeqCst);
        wait_until("the other one serves everybody", || {
            tally.served_late.load(SeqCst) > before + 50
        });
        enough.store(true, SeqCst);
    });
    assert_eq!(*tally.failed.lock().unwrap(), [] as [String; 0]);
    let Cluster { a, b, .. } = cluster;
    let totals = [a.wait_in_order(), b.end()].map(|log| totals(&log).to_owned());
    let sum = |name: &str| -> u64 { totals.iter().map(|line| number(line, name)).sum() };
    // What left the servers has reached the clients, and all that was taken has left.
    assert_eq!(sum("bytes_out"), tally.received.load(SeqCst), "{totals:?}");
    let late = sum("discarded_shutdown");
    assert_eq!(sum("bytes_in"), sum("bytes_out") + late, "{totals:?}");
    assert_eq!(
        sum("closed_drain_timeout") + sum("closed_error"),
        0,
        "{totals:?}"
    );
}

#[test]
fn a_server_that_is_drained_first_is_not_missed() {
    let Some(mut cluster) = Cluster::start() else {
        return;
    };
    let (always, enough) = (AtomicBool::new(true), AtomicBool::new(false));
    let tally = Tally::default();
    let (address, metrics) = (cluster.address, cluster.a.metrics());
    thread::scope(|scope| {
        for seed in 0..8 {
            let (always, enough, tally) = (&always, &enough, &tally);
            scope.spawn(move || visit(address, seed, always, enough, tally));
        }
        wait_until("there is load", || tally.received.load(SeqCst) > 500_000);
        let answer = cluster.command("set server echo/a state drain");
        assert_eq!(answer.unwrap().trim(), "");
        wait_until("nobody is left on it", || {
            let numbers = get(metrics, "/metrics").body;
            let open = "echoserver_open{worker=\"0\"} 0";
            numbers.lines().any(|line| line == open)
        });
        cluster.a.signal(Signal::TERM);
        wait_until("the server has stopped listening", || {
            TcpStream::connect(cluster.a.address()).is_err()
        });
        let before = tally.served_late.load(SeqCst);
        wait_until("the other one serves everybody", || {
            tally.served_late.load(SeqCst) > before + 50
        });
        enough.store(true, SeqCst);
    });
    assert_eq!(*tally.failed.lock().unwrap(), [] as [String; 0]);
    let Cluster { a, b, .. } = cluster;
    a.wait_in_order();
    b.end();
}
