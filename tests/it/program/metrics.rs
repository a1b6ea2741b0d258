//! `--metrics`: HTTP on the wire, curl and Prometheus; the metrics match the traffic.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::http::{exchange, get, read_head, read_response};
use crate::harness::{
    Client, Process, command, free_address, installed, program_after, random_bytes, run, wait_for,
    wait_until,
};

/// Starts a server with metrics; returns their address too.
fn serve_metrics() -> (Process, SocketAddr) {
    let mut server = Process::serve(&["--metrics=127.0.0.1:0", "--workers=2"]);
    let address = server.metrics_address();
    (server, address)
}

/// Returns the sum of a metric over all series whose labels contain `label`.
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
fn metrics_match_the_traffic() {
    let (server, address) = serve_metrics();
    let open = Client::connect(server.address());
    open.ping(&random_bytes(0, 500));
    for seed in 1..=3 {
        Client::connect(server.address()).check_echo(&random_bytes(seed, 1000));
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
    // Each metric is described once.
    let mut types: Vec<_> = metrics
        .lines()
        .filter(|line| line.starts_with("# TYPE"))
        .collect();
    let count = types.len();
    types.sort_unstable();
    types.dedup();
    assert_eq!(types.len(), count, "{metrics}");
    server.terminate();
}

#[test]
fn every_path_and_method_gets_its_status() {
    let (server, address) = serve_metrics();
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
        let answer = exchange(address, request.as_bytes());
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
        let answer = exchange(address, bad);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{bad:?}: {answer}");
        assert!(answer.contains("\r\nConnection: close\r\n"), "{answer}");
    }
    server.terminate();
}

#[test]
fn oversized_heads_are_rejected() {
    let (server, address) = serve_metrics();
    let start = "GET /metrics HTTP/1.1\r\n";
    let many = format!("{start}{}\r\n", "a: b\r\n".repeat(100));
    let long = format!("{start}long: {}\r\n\r\n", "x".repeat(9_000));
    for request in [many, long, "GET /".to_owned() + &"x".repeat(9_000)] {
        let answer = exchange(address, request.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    // A client that never stops sending gets its response too, and is then closed.
    let client = Client::connect(address);
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut sent = client.try_send(start.as_bytes());
            while sent.is_ok() {
                sent = client.try_send(b"endless: header\r\n");
            }
            sent.expect_err("the loop has ended").kind()
        });
        assert_eq!(read_head(&client).status, 431);
        // The server discards the rest for a while, and closing with unread input resets the connection.
        if let Err(error) = (&client.0).read_to_end(&mut Vec::new()) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        let error = sending.join().expect("it does not panic");
        let closed = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
        assert!(closed.contains(&error), "{error}");
    });
    assert_eq!(get(address, "/healthz").status, 200);
    server.terminate();
}

#[test]
fn connection_is_kept_until_a_close_is_requested() {
    let (server, address) = serve_metrics();
    let client = Client::connect(address);
    for path in ["/healthz", "/metrics", "/nowhere", "/healthz"] {
        client.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
        let response = read_response(&client);
        assert_eq!(response.header("Connection"), Some("keep-alive"), "{path}");
    }
    // The response to HEAD has no body: the next response follows at once.
    client.send(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let head = read_head(&client);
    assert_eq!(head.status, 200);
    let length: usize = head.header("Content-Length").unwrap().parse().unwrap();
    assert!(length > 1000, "the length of the body of GET: {length}");
    client.send(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n");
    let last = String::from_utf8(client.read_to_end()).unwrap();
    assert!(last.starts_with("HTTP/1.1 200 "), "{last}");
    assert!(last.ends_with("\r\n\r\nserving\n"), "{last}");

    // One option of several.
    let request = b"GET /healthz HTTP/1.1\r\nConnection: Close, TE\r\n\r\n";
    let last = exchange(address, request);
    assert!(last.contains("\r\nConnection: close\r\n"), "{last}");

    let old = exchange(address, b"GET /healthz HTTP/1.0\r\n\r\n");
    assert!(old.contains("\r\nConnection: close\r\n"), "{old}");
    assert!(old.ends_with("\r\n\r\nserving\n"), "{old}");
    let client = Client::connect(address);
    for _ in 0..2 {
        client.send(b"GET /healthz HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n");
        let response = read_response(&client);
        assert_eq!(response.header("Connection"), Some("keep-alive"));
    }
    // A body is not read, so the server cannot find the next request after it.
    let request =
        b"GET /healthz HTTP/1.1\r\nContent-Length: 30\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n      ";
    let answer = exchange(address, request);
    assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    server.terminate();
}

#[test]
fn pipelined_and_fragmented_requests_are_answered() {
    let (server, address) = serve_metrics();
    // More responses than the buffers hold.
    let count = 500;
    let client = Client::connect(address);
    thread::scope(|scope| {
        scope.spawn(|| {
            client.send(&b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(count));
            client.shutdown_write();
        });
        for _ in 0..count {
            let response = read_response(&client);
            assert!(response.body.ends_with("# EOF\n"));
        }
    });
    client.expect_eof();

    let client = Client::connect(address);
    for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" {
        client.send(&[*byte]);
    }
    assert_eq!(read_response(&client).status, 200);
    server.terminate();
}

#[test]
fn health_check_fails_during_a_drain() {
    let mut server = Process::serve(&["--metrics=127.0.0.1:0", "--drain-timeout=20s"]);
    let address = server.metrics_address();
    // The drain lasts until this client reads.
    let bytes = random_bytes(1, 40 << 20);
    let client = Client::connect_with_receive_buffer(server.address(), 64 << 10);
    let sent = client.send_until_stuck(&bytes);
    let metrics = get(address, "/metrics").body;
    assert!(sum(&metrics, "echoserver_buffered_bytes", "") > 0);
    assert_eq!(get(address, "/healthz").status, 200);
    server.signal(Signal::TERM);
    let response = wait_for("the health check fails", || {
        Some(get(address, "/healthz")).filter(|response| response.status == 503)
    });
    assert_eq!(response.body, "draining\n");
    assert_eq!(get(address, "/metrics").status, 200);
    client.shutdown_write();
    client.expect(&bytes[..sent]);
    client.expect_eof();
    server.wait_for_success();
}

#[test]
fn metrics_reserve_descriptors() {
    let max_connections = |arguments: &[&str]| -> u64 {
        let mut command = program_after("ulimit -n 200");
        command.args(["--listen=127.0.0.1:0", "--workers=2"]);
        let log = Process::start(command.args(arguments)).terminate();
        let (_, rest) = log.split_once("max connections: ").expect("it is logged");
        let (number, _) = rest.split_once(',').expect("more follows");
        number.parse().expect("a number")
    };
    let without = max_connections(&[]);
    let with = max_connections(&["--metrics=127.0.0.1:0"]);
    assert!(with + 32 < without, "{with}, {without}");
}

#[test]
fn curl_reads_metrics_and_health() {
    if !installed(&["curl"]) {
        return;
    }
    let (server, address) = serve_metrics();
    let curl = |arguments: &[&str], path: &str| {
        let mut curl = command("curl");
        curl.args(["--silent", "--fail", "--noproxy", "*"]);
        let output = run(curl.args(arguments).arg(format!("http://{address}{path}")));
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), text)
    };
    let (status, metrics) = curl(&[], "/metrics");
    assert_eq!(status, Some(0));
    assert_eq!(sum(&metrics, "echoserver_accepted_total", ""), 0);
    assert_eq!(curl(&[], "/healthz"), (Some(0), "serving\n".to_owned()));
    assert_eq!(curl(&["--head"], "/healthz").0, Some(0));
    assert_eq!(curl(&["--http1.0"], "/healthz").0, Some(0));
    // 22: a status of 400 or above.
    assert_eq!(curl(&[], "/nowhere").0, Some(22));
    assert_eq!(curl(&["--data", "x=1"], "/metrics").0, Some(22));
    server.terminate();
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
fn prometheus_scrapes_metrics() {
    if !installed(&["prometheus"]) {
        return;
    }
    let (server, address) = serve_metrics();
    for seed in 1..=3 {
        Client::connect(server.address()).check_echo(&random_bytes(seed, 1000));
    }
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("prometheus.yml");
    let text = PROMETHEUS.replace("ADDRESS", &address.to_string());
    fs::write(&config, text).unwrap();
    let data = folder.path().join("data");
    let own_address = free_address();
    let mut prometheus = command("prometheus");
    prometheus.arg(format!("--config.file={}", config.display()));
    prometheus.arg(format!("--storage.tsdb.path={}", data.display()));
    prometheus.arg(format!("--web.listen-address={own_address}"));
    let _prometheus = Process::launch(prometheus.arg("--log.level=error"));
    let query = |expression: &str| -> Option<String> {
        let mut stream = TcpStream::connect(own_address).ok()?;
        let request = format!("GET /api/v1/query?query={expression} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (_head, body) = answer.split_once("\r\n\r\n")?;
        let body: Value = serde_json::from_str(body).ok()?;
        let value = body["data"]["result"][0]["value"][1].as_str()?;
        Some(value.to_owned())
    };
    for (expression, value) in [
        ("up", "1"),
        ("echoserver_accepted_total", "3"),
        ("sum(echoserver_bytes_in_total)", "3000"),
        ("sum(echoserver_bytes_out_total)", "3000"),
        ("sum(echoserver_closed_total{reason=\"peer_closed\"})", "3"),
        ("sum(echoserver_open)", "0"),
    ] {
        let expression = expression.replace('"', "%22");
        wait_until(&format!("{expression} is {value}"), || {
            query(&expression).as_deref() == Some(value)
        });
    }
    server.terminate();
}
