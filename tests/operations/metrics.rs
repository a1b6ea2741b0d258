//! `--metrics`: HTTP on the wire, curl, and a Prometheus that scrapes; the numbers are those of what
//! was done.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::process::Command;
use std::thread;

use rustix::process::Signal;
use serde_json::Value;

use crate::companion::Companion;
use crate::daemon::{Daemon, program};
use crate::http::{Answer, ask, get, read_answer, read_head, read_to_end};
use crate::support::{
    Client, Scratch, check_echo, connect, free_address, installed, pattern, ping, replaced,
    wait_until,
};

fn watched() -> (Daemon, SocketAddr) {
    let mut daemon = Daemon::start(&["--metrics=127.0.0.1:0", "--workers=2"]);
    let address = daemon.metrics();
    (daemon, address)
}

/// The sum of a metric over its labels, as far as they contain `label`.
fn sum(metrics: &str, name: &str, label: &str) -> u64 {
    let values: Vec<u64> = metrics
        .lines()
        .filter(|line| line.split(['{', ' ']).next() == Some(name) && line.contains(label))
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(!values.is_empty(), "no {name} with {label} in {metrics}");
    values.iter().sum()
}

#[test]
fn the_numbers_are_those_of_what_was_done() {
    let (daemon, address) = watched();
    let mut open = connect(daemon.address());
    ping(&mut open, &pattern(0, 500));
    for seed in 1..=3 {
        check_echo(connect(daemon.address()), &pattern(seed, 1000));
    }
    let mut metrics = String::new();
    wait_until("everything is counted", || {
        metrics = get(address, "/metrics").body;
        sum(&metrics, "echoserver_bytes_out_total", "worker") == 3500
            && sum(&metrics, "echoserver_closed_total", "worker") == 3
    });
    for (name, label, value) in [
        ("echoserver_accepted_total", "", 4),
        ("echoserver_accept_pauses_total", "", 0),
        ("echoserver_assigned_total", "worker=\"0\"", 2),
        ("echoserver_assigned_total", "worker=\"1\"", 2),
        ("echoserver_open", "worker", 1),
        ("echoserver_closed_total", "reason=\"peer_closed\"", 3),
        ("echoserver_bytes_in_total", "worker", 3500),
        ("echoserver_buffered_bytes", "worker", 0),
        ("echoserver_discarded_bytes_total", "worker", 0),
    ] {
        assert_eq!(sum(&metrics, name, label), value, "{name}: {metrics}");
    }
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    // What Prometheus is told of each metric, it is told once.
    let mut types: Vec<_> = metrics
        .lines()
        .filter(|line| line.starts_with("# TYPE"))
        .collect();
    let count = types.len();
    types.sort_unstable();
    types.dedup();
    assert_eq!(types.len(), count, "{metrics}");
    daemon.end();
}

#[test]
fn each_path_and_method_has_its_answer() {
    let (daemon, address) = watched();
    for (path, status) in [
        ("/metrics", 200),
        ("/metrics?name[]=x", 200),
        ("/healthz", 200),
        ("/", 404),
        ("/metrics/", 404),
        ("/%6detrics", 404),
    ] {
        assert_eq!(get(address, path).status, status, "{path}");
    }
    assert_eq!(get(address, "/healthz").body, "serving\n");
    let openmetrics = get(address, "/metrics");
    let kind = openmetrics.header("Content-Type").unwrap();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");

    for method in ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "BREW"] {
        let request = format!("{method} /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        let answer = ask(address, request.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 405 "), "{method}: {answer}");
        assert!(answer.contains("\r\nAllow: GET, HEAD\r\n"), "{answer}");
    }
    for bad in [
        &b"hello\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/3.0\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0\0\0\0\r\n\r\n",
    ] {
        let answer = ask(address, bad);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{bad:?}: {answer}");
        assert!(answer.contains("\r\nConnection: close\r\n"), "{answer}");
    }
    daemon.end();
}

#[test]
fn a_head_without_an_end_is_too_large() {
    let (daemon, address) = watched();
    let start = "GET /metrics HTTP/1.1\r\n";
    let many = format!("{start}{}\r\n", "a: b\r\n".repeat(100));
    let long = format!("{start}long: {}\r\n\r\n", "x".repeat(9_000));
    for request in [many, long, "GET /".to_owned() + &"x".repeat(9_000)] {
        let answer = ask(address, request.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    // Who never stops is answered all the same, and then cut off.
    let mut stream = connect(address);
    let mut sender = stream.twin();
    thread::scope(|scope| {
        let sending = scope.spawn(move || {
            let mut sent = sender.write_all(start.as_bytes());
            while sent.is_ok() {
                sent = sender.write_all(b"endless: header\r\n");
            }
            sent.expect_err("it was sent in vain").kind()
        });
        assert_eq!(read_head(&mut stream).status, 431);
        // What is discarded until the connection is cut ends in a reset.
        if let Err(error) = stream.read_to_end(&mut Vec::new()) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        let ended = sending.join().expect("it does not panic");
        let gone = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
        assert!(gone.contains(&ended), "{ended}");
    });
    assert_eq!(get(address, "/healthz").status, 200);
    daemon.end();
}

#[test]
fn a_connection_is_kept_until_someone_wants_it_closed() {
    let (daemon, address) = watched();
    let mut stream = connect(address);
    for path in ["/healthz", "/metrics", "/nowhere", "/healthz"] {
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let answer = read_answer(&mut stream);
        assert_eq!(answer.header("Connection"), Some("keep-alive"), "{path}");
    }
    // The head and nothing else: the next answer follows at once.
    write!(stream, "HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let head = read_head(&mut stream);
    assert_eq!(head.status, 200);
    let length: usize = head.header("Content-Length").unwrap().parse().unwrap();
    assert!(length > 1000, "as long as the body would be: {length}");
    write!(stream, "GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let last = read_to_end(stream);
    assert!(last.starts_with("HTTP/1.1 200 "), "{last}");
    assert!(last.ends_with("\r\n\r\nserving\n"), "{last}");

    // One wish of several.
    let wishes = b"GET /healthz HTTP/1.1\r\nConnection: Close, TE\r\n\r\n";
    let last = ask(address, wishes);
    assert!(last.contains("\r\nConnection: close\r\n"), "{last}");

    let old = ask(address, b"GET /healthz HTTP/1.0\r\n\r\n");
    assert!(old.contains("\r\nConnection: close\r\n"), "{old}");
    assert!(old.ends_with("\r\n\r\nserving\n"), "{old}");
    let mut stream = connect(address);
    for _ in 0..2 {
        stream
            .write_all(b"GET /healthz HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
            .unwrap();
        let answer = read_answer(&mut stream);
        assert_eq!(answer.header("Connection"), Some("keep-alive"));
    }
    // A body is not read, so what follows it can't be told from it.
    let body =
        b"GET /healthz HTTP/1.1\r\nContent-Length: 30\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n      ";
    let answer = ask(address, body);
    assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    daemon.end();
}

#[test]
fn requests_may_come_in_crowds_and_in_crumbs() {
    let (daemon, address) = watched();
    // More answers than any buffer holds, to a client that reads none of them until all are asked for.
    let count = 500;
    let mut stream = connect(address);
    let mut sender = stream.twin();
    thread::scope(|scope| {
        scope.spawn(move || {
            let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
            sender.write_all(&request.repeat(count)).unwrap();
            sender.end();
        });
        for _ in 0..count {
            let answer = read_answer(&mut stream);
            assert!(answer.body.ends_with("# EOF\n"));
        }
    });
    assert_eq!(read_to_end(stream), "");

    let mut stream = connect(address);
    for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" {
        stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(read_answer(&mut stream).status, 200);
    daemon.end();
}

#[test]
fn it_is_not_healthy_while_it_drains() {
    let mut daemon = Daemon::start(&["--metrics=127.0.0.1:0", "--drain-timeout=20s"]);
    let address = daemon.metrics();
    // A client that writes and doesn't read, up to where everything is full: the drain takes until
    // it does read.
    let bytes = pattern(1, 40 << 20);
    let mut client = connect(daemon.address());
    client.set_nonblocking(true).unwrap();
    let mut sent = 0;
    wait_until("the client is stuck", || {
        while let Ok(count) = client.write(&bytes[sent..]) {
            sent += count;
        }
        sum(
            &get(address, "/metrics").body,
            "echoserver_buffered_bytes",
            "",
        ) > 0
    });
    client.set_nonblocking(false).unwrap();
    assert_eq!(get(address, "/healthz").status, 200);
    daemon.signal(Signal::TERM);
    let mut answer: Option<Answer> = None;
    wait_until("it is not healthy", || {
        let answer = answer.insert(get(address, "/healthz"));
        answer.status == 503
    });
    assert_eq!(answer.unwrap().body, "draining\n");
    assert_eq!(get(address, "/metrics").status, 200);
    client.end();
    let mut back = Vec::new();
    client.read_to_end(&mut back).expect("no reset");
    assert!(!back.is_empty() && bytes.starts_with(&back));
    daemon.wait_in_order();
}

#[test]
fn an_endpoint_in_use_is_named() {
    let (daemon, address) = watched();
    let mut other = program();
    other.args(["--listen=127.0.0.1:0", &format!("--metrics={address}")]);
    let (status, said) = Daemon::launch(&mut other).wait();
    assert_eq!(status.code(), Some(1), "{said}");
    let culprit = format!("echoserver: cannot listen on {address}: address");
    assert!(said.contains(&culprit), "{said}");
    daemon.end();
}

#[test]
fn curl_gets_it() {
    if !installed(&["curl"]) {
        return;
    }
    let (daemon, address) = watched();
    let curl = |arguments: &[&str], path: &str| {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail", "--noproxy", "*", "--max-time", "20"]);
        curl.args(arguments).arg(format!("http://{address}{path}"));
        let output = curl.output().expect("it starts");
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), text)
    };
    let (status, metrics) = curl(&[], "/metrics");
    assert_eq!(status, Some(0));
    assert_eq!(sum(&metrics, "echoserver_accepted_total", ""), 0);
    assert_eq!(curl(&[], "/healthz"), (Some(0), "serving\n".to_owned()));
    assert_eq!(curl(&["--head"], "/healthz").0, Some(0));
    assert_eq!(curl(&["--http1.0"], "/healthz").0, Some(0));
    // 22: an answer of 400 or above.
    assert_eq!(curl(&[], "/nowhere").0, Some(22));
    assert_eq!(curl(&["--data", "x=1"], "/metrics").0, Some(22));
    daemon.end();
}

const PROMETHEUS: &str = "
global:
  scrape_interval: 200ms
scrape_configs:
  - job_name: echo
    static_configs:
      - targets: ['ADDRESS']
";

#[test]
fn prometheus_scrapes_it() {
    if !installed(&["prometheus"]) {
        return;
    }
    let (daemon, address) = watched();
    for seed in 1..=3 {
        check_echo(connect(daemon.address()), &pattern(seed, 1000));
    }
    let scratch = Scratch::new();
    let config = scratch.join("prometheus.yml");
    let text = replaced(PROMETHEUS, &[("ADDRESS", &address.to_string())]);
    fs::write(&config, text).unwrap();
    let own = free_address();
    let _prometheus = Companion::start(
        Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                scratch.join("data").display()
            ))
            .arg(format!("--web.listen-address={own}"))
            .args(["--log.level=error"]),
    );
    let query = |what: &str| -> Option<String> {
        let mut stream = std::net::TcpStream::connect(own).ok()?;
        let request = format!("GET /api/v1/query?query={what} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (_head, body) = answer.split_once("\r\n\r\n")?;
        let body: Value = serde_json::from_str(body).ok()?;
        let value = body["data"]["result"][0]["value"][1].as_str()?;
        Some(value.to_owned())
    };
    for (what, value) in [
        ("up", "1"),
        ("echoserver_accepted_total", "3"),
        ("sum(echoserver_bytes_in_total)", "3000"),
        ("sum(echoserver_bytes_out_total)", "3000"),
        ("sum(echoserver_closed_total{reason=\"peer_closed\"})", "3"),
        ("sum(echoserver_open)", "0"),
    ] {
        let what = what.replace('"', "%22");
        wait_until(&format!("{what} is {value}"), || {
            query(&what).as_deref() == Some(value)
        });
    }
    daemon.end();
}
