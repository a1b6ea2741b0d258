//! `--metrics`: HTTP on the wire, curl and Prometheus; the metrics match the traffic and follow the conventions.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::str::FromStr;
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
    let mut server = Process::serve(&["--metrics=127.0.0.1:0", "-w2", "-c1000"]);
    let address = server.metrics_address();
    (server, address)
}

/// Returns the values of a metric whose labels contain `label`.
fn values<T: FromStr<Err: Debug>>(metrics: &str, name: &str, label: &str) -> Vec<T> {
    let values: Vec<T> = metrics
        .lines()
        .filter(|line| line.split(['{', ' ']).next() == Some(name) && line.contains(label))
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(!values.is_empty(), "no {name} with {label} in {metrics}");
    values
}

/// Returns the sum of a metric over all series whose labels contain `label`.
fn sum(metrics: &str, name: &str, label: &str) -> u64 {
    values::<u64>(metrics, name, label).iter().sum()
}

/// Returns the names of all metrics.
fn names(metrics: &str) -> BTreeSet<&str> {
    let described = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "));
    described
        .map(|line| line.split(' ').next().unwrap())
        .collect()
}

/// After its idle timeout a client gets EOF. Its place is free at once when it ends its half; otherwise after a second.
#[test]
fn connections_that_wait_for_the_end_of_a_client_are_counted() {
    let arguments = ["--metrics=127.0.0.1:0", "-c1", "--idle-timeout=100ms"];
    let mut server = Process::serve(&arguments);
    let metrics = server.metrics_address();
    let lingering = || {
        sum(
            &get(metrics, "/metrics").body,
            "echoserver_connections_lingering",
            "",
        )
    };
    let mut client = None;
    wait_until("a client lingers that has not ended its half", || {
        let idle = client.insert(Client::connect(server.address()));
        idle.expect_eof();
        lingering() == 1
    });
    drop(client);
    wait_until("its place is free", || lingering() == 0);
    Client::connect(server.address()).check_echo(b"in its place");
    server.terminate();
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
        sum(&metrics, "echoserver_sent_bytes_total", "") == 3500
            && sum(&metrics, "echoserver_connections_closed_total", "") == 3
    });
    for (name, label, value) in [
        ("echoserver_connections_accepted_total", "", 4),
        ("echoserver_connections_open", "", 1),
        (
            "echoserver_connections_closed_total",
            "reason=\"peer_closed\"",
            3,
        ),
        ("echoserver_received_bytes_total", "", 3500),
        ("echoserver_generated_bytes", "", 0),
        ("echoserver_buffered_bytes", "", 0),
        ("echoserver_discarded_bytes_total", "reason", 0),
        ("echoserver_accept_errors_total", "", 0),
        ("echoserver_accept_paused", "", 0),
        ("echoserver_accept_pauses_total", "", 0),
        ("echoserver_accept_paused_seconds_total", "", 0),
        (
            "echoserver_worker_connections_assigned_total",
            "worker=\"0\"",
            2,
        ),
        (
            "echoserver_worker_connections_assigned_total",
            "worker=\"1\"",
            2,
        ),
        ("echoserver_worker_connections_open", "worker", 1),
        ("echoserver_max_connections", "", 1000),
        (
            "echoserver_build_info",
            concat!("version=\"", env!("CARGO_PKG_VERSION"), "\""),
            1,
        ),
    ] {
        assert_eq!(sum(&metrics, name, label), value, "{name}: {metrics}");
    }
    assert!(sum(&metrics, "echoserver_worker_ticks_total", "worker") > 0);
    let longest: Vec<f64> = values(&metrics, "echoserver_worker_longest_tick_seconds", "worker");
    assert_eq!(longest.len(), 2);
    // Each metric is described once.
    let described = metrics.matches("# TYPE ").count();
    assert_eq!(described, names(&metrics).len(), "{metrics}");
    server.terminate();
}

#[test]
fn bytes_balance_while_some_are_buffered_and_after_some_are_discarded() {
    let (server, address) = serve_metrics();
    let balance = |is_at_rest: fn(&str) -> bool| {
        let mut metrics = String::new();
        let bytes = |metrics: &str, name: &str| sum(metrics, &format!("echoserver_{name}"), "");
        wait_until("received + generated = sent + buffered + discarded", || {
            metrics = get(address, "/metrics").body;
            let produced =
                bytes(&metrics, "received_bytes_total") + bytes(&metrics, "generated_bytes");
            let accounted = bytes(&metrics, "sent_bytes_total")
                + bytes(&metrics, "buffered_bytes")
                + bytes(&metrics, "discarded_bytes_total");
            is_at_rest(&metrics) && produced == accounted
        });
    };
    let client = Client::connect_with_receive_buffer(server.address(), 64 << 10);
    client.send_until_stuck(&random_bytes(1, 40 << 20));
    balance(|metrics| sum(metrics, "echoserver_buffered_bytes", "") > 0);
    client.reset();
    balance(|metrics| {
        sum(
            metrics,
            "echoserver_discarded_bytes_total",
            "reason=\"reset\"",
        ) > 0
    });
    server.terminate();
}

/// A counter must not fall below 0.
#[test]
fn generated_bytes_are_a_gauge_that_swallowed_bytes_lower() {
    let mut server = Process::serve(&["--metrics=127.0.0.1:0", "--fault=blackhole@connect"]);
    let address = server.metrics_address();
    let client = Client::connect(server.address());
    client.send(&[7; 100]);
    let mut metrics = String::new();
    wait_until("the bytes are swallowed", || {
        metrics = get(address, "/metrics").body;
        values::<i64>(&metrics, "echoserver_generated_bytes", "") == [-100]
    });
    let kind = "# TYPE echoserver_generated_bytes gauge\n";
    assert!(metrics.contains(kind), "{metrics}");
    server.terminate();
}

#[test]
fn accept_pause_is_visible_while_it_lasts_and_counted_when_it_ends() {
    let mut server = Process::serve(&["--metrics=127.0.0.1:0", "--max-connections=1"]);
    let address = server.metrics_address();
    let paused = || {
        let metrics = get(address, "/metrics").body;
        let seconds = values::<f64>(&metrics, "echoserver_accept_paused_seconds_total", "")[0];
        (sum(&metrics, "echoserver_accept_paused", "") == 1, seconds)
    };
    let first = Client::connect(server.address());
    first.ping(b"first");
    assert_eq!(paused(), (false, 0.0));
    let second = Client::connect(server.address());
    wait_until("accepting is paused", || paused().0);
    assert_eq!(paused(), (true, 0.0));
    first.close();
    second.ping(b"second");
    let (is_paused, total) = paused();
    assert!(!is_paused && total > 0.0, "{total}");
    assert_eq!(paused(), (false, total));
    server.terminate();
}

#[test]
#[cfg(target_os = "linux")]
fn process_metrics_match_proc() {
    use std::time::{SystemTime, UNIX_EPOCH};

    let (server, address) = serve_metrics();
    // Once a client is served, all threads have been started.
    let client = Client::connect(server.address());
    client.ping(b"served");
    let metrics = get(address, "/metrics").body;
    let value = |name: &str| values::<f64>(&metrics, name, "")[0];
    let count = |name: &str| sum(&metrics, name, "");
    let process = server.procfs();
    let threads = process.stat().unwrap().num_threads;
    assert_eq!(count("process_threads"), threads.cast_unsigned());
    let (_, hard) = rlimit::getrlimit(rlimit::Resource::NOFILE).unwrap();
    assert_eq!(count("process_max_fds"), hard);
    // The scrape's connection may be closed by now.
    let descriptors = process.fd_count().unwrap() as u64;
    assert!(count("process_open_fds").abs_diff(descriptors) <= 1);
    let resident = value("process_resident_memory_bytes");
    assert!(resident > 1e6 && resident < value("process_virtual_memory_bytes"));
    assert!(value("process_cpu_seconds_total") < 100.0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let age = now.as_secs_f64() - value("process_start_time_seconds");
    assert!((0.0..100.0).contains(&age), "{age}");
    client.close();
    server.terminate();
}

#[test]
#[cfg(target_os = "linux")]
fn lost_log_lines_are_counted() {
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let address = free_address();
    let mut command = crate::harness::program();
    command.arg(format!("--metrics={address}"));
    let (server, _) = Process::start_without_log(&mut command, full);
    wait_until("it serves metrics", || TcpStream::connect(address).is_ok());
    wait_until("its first lines are lost", || {
        let metrics = get(address, "/metrics").body;
        sum(&metrics, "echoserver_log_lines_lost_total", "") >= 3
    });
    server.signal(Signal::TERM);
    assert_eq!(server.wait().0.code(), Some(0));
}

#[test]
fn metrics_pass_promtool() {
    if !installed(&["promtool"]) {
        return;
    }
    let (server, address) = serve_metrics();
    let response = get(address, "/metrics");
    let kind = response.header("Content-Type");
    assert_eq!(kind, Some("text/plain; version=0.0.4; charset=utf-8"));
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(response.body.as_bytes()).unwrap();
    // A command that the harness runs has no stdin.
    let mut shell = command("sh");
    shell.args(["-c", r#"promtool check metrics <"$0""#]);
    let output = run(shell.arg(file.path()));
    let report = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && report.is_empty(), "{report}");
    server.terminate();
}

#[test]
fn alert_rules_pass_promtool() {
    if !installed(&["promtool"]) {
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/prometheus");
    for (what, file) in [
        ("check", "echoserver.rules.yml"),
        ("test", "echoserver.test.yml"),
    ] {
        let mut promtool = command("promtool");
        promtool.args([what, "rules", file]).current_dir(&folder);
        let output = run(&mut promtool);
        let report = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(output.status.success(), "{report}");
    }
}

#[test]
fn documentation_and_alert_rules_name_the_metrics_that_exist() {
    let mut server = Process::serve(&["--metrics=127.0.0.1:0", "--delay=1ms"]);
    let metrics = get(server.metrics_address(), "/metrics").body;
    let exported = names(&metrics);
    for file in ["README.md", "prometheus/echoserver.rules.yml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("packaging")
            .join(file);
        let text = fs::read_to_string(path).unwrap();
        let words = text.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
        let is_metric =
            |word: &&str| word.starts_with("echoserver_") || word.starts_with("process_");
        let named: BTreeSet<_> = words.filter(is_metric).collect();
        assert!(named.len() > 5, "{named:?}");
        let unknown: Vec<_> = named.difference(&exported).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?}");
        if file == "README.md" {
            let own = exported
                .iter()
                .filter(|name| name.starts_with("echoserver_"));
            let missing: Vec<_> = own.filter(|name| !named.contains(*name)).collect();
            assert!(missing.is_empty(), "{file} does not explain {missing:?}");
        }
    }
    server.terminate();
}

#[test]
fn every_path_and_method_gets_its_status() {
    let (server, address) = serve_metrics();
    for (path, status) in [
        ("/metrics", 200),
        ("/metrics?name[]=x", 200),
        ("/healthz", 200),
        ("/livez", 200),
        ("/readyz?verbose", 200),
        ("http://any.host:80/metrics", 404),
        ("/", 404),
        ("/metrics/", 404),
        ("/%6detrics", 404),
    ] {
        assert_eq!(get(address, path).status, status, "{path}");
    }
    assert_eq!(get(address, "/healthz").body, "serving\n");
    assert_eq!(get(address, "/readyz").body, "serving\n");
    assert_eq!(get(address, "/livez").body, "alive\n");

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
fn connection_is_closed_after_the_response() {
    let (server, address) = serve_metrics();
    for (request, body) in [
        ("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", "alive\n"),
        ("GET /livez HTTP/1.0\r\n\r\n", "alive\n"),
        (
            "GET /livez HTTP/1.1\r\nConnection: keep-alive\r\n\r\n",
            "alive\n",
        ),
        // Only the first is answered.
        (
            "GET /livez HTTP/1.1\r\n\r\nGET /readyz HTTP/1.1\r\n\r\n",
            "alive\n",
        ),
        (
            "GET /livez HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody",
            "alive\n",
        ),
        ("HEAD /livez HTTP/1.1\r\n\r\n", ""),
    ] {
        let answer = exchange(address, request.as_bytes());
        let (head, rest) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(
            head.starts_with("HTTP/1.1 200 OK\r\n"),
            "{request}: {answer}"
        );
        assert!(
            head.contains("\r\nContent-Length: 6"),
            "{request}: {answer}"
        );
        assert!(
            head.ends_with("\r\nConnection: close"),
            "{request}: {answer}"
        );
        assert_eq!(rest, body, "{request}");
    }
    server.terminate();
}

#[test]
fn fragmented_request_gets_a_response_larger_than_the_buffer() {
    let mut server = Process::serve(&["--metrics=127.0.0.1:0", "--workers=100"]);
    let address = server.metrics_address();
    let client = Client::connect_with_receive_buffer(address, 4096);
    for byte in b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" {
        client.send(&[*byte]);
    }
    let response = read_response(&client);
    assert!(response.body.len() > 16 << 10);
    assert!(response.body.contains("\nechoserver_build_info{"));
    client.expect_eof();
    server.terminate();
}

#[test]
fn idle_connections_do_not_keep_health_checks_out() {
    let (server, address) = serve_metrics();
    let idle: Vec<_> = (0..200).map(|_| Client::connect(address)).collect();
    assert_eq!(get(address, "/healthz").status, 200);
    drop(idle);
    server.terminate();
}

/// Long before the idle timeout, after which the read would fail here.
#[test]
fn client_without_a_whole_request_is_closed() {
    let (server, address) = serve_metrics();
    let silent = Client::connect(address);
    let dribbling = Client::connect(address);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut sent = dribbling.try_send(b"GET /");
            wait_until("the connection is closed", || {
                sent = dribbling.try_send(b"x");
                sent.is_err()
            });
        });
        for client in [&silent, &dribbling] {
            client.expect_closed();
        }
    });
    server.terminate();
}

#[test]
fn log_tells_the_endpoint_from_the_echo_server() {
    let mut server = Process::serve(&["-v", "--metrics=127.0.0.1:0"]);
    let address = server.metrics_address();
    exchange(address, b"GET /livez HTTP/1.0\r\n\r\n");
    server.wait_for_log("echoserver::access] metrics: closed peer=");
    Client::connect(server.address()).check_echo(b"echo");
    server.wait_for_log("echoserver::access] closed peer=");
    // At its own limit.
    let idle: Vec<_> = (0..260).map(|_| Client::connect(address)).collect();
    server.wait_for_log("] metrics: accept paused: connection limit reached (256)");
    drop(idle);
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
    for path in ["/healthz", "/readyz"] {
        let response = wait_for("the health check fails", || {
            Some(get(address, path)).filter(|response| response.status == 503)
        });
        assert_eq!(response.body, "draining\n", "{path}");
    }
    assert_eq!(get(address, "/livez").status, 200);
    assert_eq!(get(address, "/metrics").status, 200);
    client.shutdown_write();
    client.expect(&bytes[..sent]);
    client.expect_eof();
    server.wait_for_success();
}

#[test]
fn metrics_reserve_descriptors() {
    let max_connections = |arguments: &[&str]| -> u64 {
        let mut command = program_after("ulimit -n 500");
        command.args(["--listen=127.0.0.1:0", "--workers=2"]);
        let log = Process::start(command.args(arguments)).terminate();
        let (_, rest) = log.split_once("max_connections=").expect("it is logged");
        let (number, _) = rest.split_once(' ').expect("more follows");
        number.parse().expect("a number")
    };
    let without = max_connections(&[]);
    let with = max_connections(&["--metrics=127.0.0.1:0"]);
    assert!(with + 256 < without, "{with}, {without}");
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
    assert_eq!(
        sum(&metrics, "echoserver_connections_accepted_total", ""),
        0
    );
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
        ("echoserver_connections_accepted_total", "3"),
        ("echoserver_received_bytes_total", "3000"),
        ("echoserver_sent_bytes_total", "3000"),
        (
            "echoserver_connections_closed_total{reason=\"peer_closed\"}",
            "3",
        ),
        ("echoserver_connections_open", "0"),
    ] {
        let expression = expression.replace('"', "%22");
        wait_until(&format!("{expression} is {value}"), || {
            query(&expression).as_deref() == Some(value)
        });
    }
    server.terminate();
}
