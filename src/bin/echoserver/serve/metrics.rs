//! `--metrics`: an HTTP endpoint with `/metrics` for Prometheus and `/healthz` for load balancers.
//!
//! The endpoint is a second [`Server`] of this crate's library, with an HTTP handler.

use std::fmt;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::time::Duration;

use echoserver::{
    Action, Address, Buffer, CloseReason, Config, Handle, Handler, Server, WorkerStats,
};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeLabelSet, EncodeMetric,
};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::serve::{BackgroundThread, logging};

/// Limit for the request line and headers of a request, in bytes.
const MAX_REQUEST: usize = 8 << 10;
const MAX_HEADERS: usize = 64;

/// Enough for scrapers and health checks.
pub(crate) const MAX_CONNECTIONS: usize = 32;

const TEXT: &str = "text/plain; charset=utf-8";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Starts a thread that serves the counters and the health of `server` at `address`, also during
/// its drain.
pub(crate) fn start(address: Address, server: Handle) -> io::Result<BackgroundThread> {
    let http_server = Server::bind(Config {
        listen: vec![address],
        workers: NonZeroUsize::MIN,
        max_connections: MAX_CONNECTIONS,
        buffer_size: MAX_REQUEST,
        backlog: 128,
        idle_timeout: Some(Duration::from_secs(90)),
        drain_timeout: Duration::from_millis(250),
        ..Config::default()
    })?;
    for address in http_server.addresses() {
        log::info!("metrics: listening on {address}");
    }
    let handle = http_server.handle();
    let serve = move || {
        let mut registry = Registry::with_prefix("echoserver");
        registry.register_collector(Box::new(StatsCollector(server.clone())));
        let endpoint = Endpoint { registry, server };
        // The log records of this thread, which accepts, and of the worker.
        logging::set_server("metrics");
        let new_handler = |_peer: &_| {
            logging::set_server("metrics");
            HttpHandler {
                endpoint: &endpoint,
                response: Vec::new(),
                sent: 0,
                close: false,
            }
        };
        if let Err(error) = http_server.run(new_handler) {
            log::error!("{error}");
        }
    };
    BackgroundThread::spawn("metrics", serve, move || handle.shut_down())
}

/// Serves HTTP/1.1 on one connection, as far as scrapers and health checks need it.
struct HttpHandler<'a> {
    endpoint: &'a Endpoint,
    /// The current response, which may be larger than the output buffer.
    response: Vec<u8>,
    /// The length of the part of `response` that has been written to the output.
    sent: usize,
    /// Close the connection after `response`.
    close: bool,
}

impl Handler for HttpHandler<'_> {
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
        loop {
            // A write to a buffer takes what fits and returns no error.
            self.sent += output.write(&self.response[self.sent..]).unwrap_or(0);
            if self.sent < self.response.len() {
                return Action::Continue;
            }
            if self.close {
                return Action::Close;
            }
            let Some((request, length)) = parse_request(input.data(), input.room() == 0) else {
                return Action::Continue;
            };
            input.consume(length);
            (self.response, self.close) = self.endpoint.respond(request);
            self.sent = 0;
        }
    }
}

/// A parsed request.
enum Request {
    Get {
        path: String,
        /// The method is HEAD.
        head: bool,
        /// Close the connection after the response.
        close: bool,
    },
    UnsupportedMethod,
    TooLarge,
    Malformed,
}

/// Parses the request at the start of `bytes`; returns it and its length once it is complete.
fn parse_request(bytes: &[u8], buffer_full: bool) -> Option<(Request, usize)> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if !buffer_full => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Some((Request::TooLarge, bytes.len()));
        }
        Err(_) => return Some((Request::Malformed, bytes.len())),
    };
    let (Some(method), Some(path), Some(version)) = (request.method, request.path, request.version)
    else {
        return Some((Request::Malformed, length));
    };
    let connection_has = |option: &str| {
        request
            .headers
            .iter()
            .filter(|header| header.name.eq_ignore_ascii_case("connection"))
            .flat_map(|header| header.value.split(|&byte| byte == b','))
            .any(|token| token.trim_ascii().eq_ignore_ascii_case(option.as_bytes()))
    };
    // A request body is not read, so the end of the request is unknown: close the connection.
    let has_body = request.headers.iter().any(|header| {
        header.name.eq_ignore_ascii_case("transfer-encoding")
            || (header.name.eq_ignore_ascii_case("content-length") && header.value != b"0")
    });
    let close =
        has_body || connection_has("close") || (version == 0 && !connection_has("keep-alive"));
    let request = match method {
        "GET" | "HEAD" => Request::Get {
            path: path.split(['?', '#']).next().unwrap_or(path).to_owned(),
            head: method == "HEAD",
            close,
        },
        _ => Request::UnsupportedMethod,
    };
    Some((request, length))
}

/// The state shared by all connections of the endpoint.
struct Endpoint {
    registry: Registry,
    server: Handle,
}

impl Endpoint {
    /// Returns the response to `request`, and whether to close the connection after it.
    fn respond(&self, request: Request) -> (Vec<u8>, bool) {
        let error = |status| (response(status, TEXT, "", false, true), true);
        match request {
            Request::Get { path, head, close } => {
                let (status, content_type, body) = self.get(&path);
                let response = response(status, content_type, &body, head, close);
                (response, close)
            }
            Request::UnsupportedMethod => error("405 Method Not Allowed\r\nAllow: GET, HEAD"),
            Request::TooLarge => error("431 Request Header Fields Too Large"),
            Request::Malformed => error("400 Bad Request"),
        }
    }

    /// Returns the status, content type and body for `path`.
    fn get(&self, path: &str) -> (&'static str, &'static str, String) {
        match path {
            "/metrics" => {
                let mut metrics = String::new();
                match encode(&mut metrics, &self.registry) {
                    Ok(()) => ("200 OK", OPENMETRICS, metrics),
                    Err(error) => ("500 Internal Server Error", TEXT, format!("{error}\n")),
                }
            }
            "/healthz" if self.server.is_shut_down() => {
                ("503 Service Unavailable", TEXT, "draining\n".to_owned())
            }
            "/healthz" => ("200 OK", TEXT, "serving\n".to_owned()),
            _ => (
                "404 Not Found",
                TEXT,
                "try /metrics or /healthz\n".to_owned(),
            ),
        }
    }
}

/// Formats a response. For a HEAD request, `head` omits the body but keeps its length.
fn response(status: &str, content_type: &str, body: &str, head: bool, close: bool) -> Vec<u8> {
    let (length, body) = (body.len(), if head { "" } else { body });
    let connection = if close { "close" } else { "keep-alive" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Connection: {connection}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Encodes the server's counters at each scrape.
#[derive(Debug)]
struct StatsCollector(Handle);

impl Collector for StatsCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stats = self.0.stats();
        let workers = &stats.workers;
        let mut metrics = MetricsEncoder { encoder, workers };
        metrics.counter("accepted", "Connections accepted", stats.accepted)?;
        let help = "Failed accept calls, including transient errors";
        metrics.counter("accept_errors", help, stats.accept_errors)?;
        metrics.counter("accept_pauses", "Accept pauses", stats.accept_pauses)?;
        let seconds = stats.accept_paused.as_secs_f64();
        metrics.counter("accept_paused_seconds", "Time in accept pauses", seconds)?;
        let help = "Connections assigned to the worker";
        metrics.worker_counter("assigned", help, |worker| worker.assigned)?;
        metrics.worker_gauge("open", "Open connections", |worker| {
            worker.assigned.saturating_sub(worker.total_closed())
        })?;
        metrics.reason_counter("closed", "Closed connections", |worker| worker.closed)?;
        metrics.worker_counter("bytes_in", "Bytes received", |worker| worker.bytes_in)?;
        metrics.worker_counter("bytes_out", "Bytes sent", |worker| worker.bytes_out)?;
        let help = "Bytes in the buffers of open connections";
        metrics.worker_gauge("buffered_bytes", help, |worker| worker.buffered)?;
        let help = "Bytes discarded when a connection closed";
        metrics.reason_counter("discarded_bytes", help, |worker| worker.discarded)?;
        metrics.worker_counter("wakes", "Returns from poll", |worker| worker.wakes)?;
        let help = "Times a connection used its budget and yielded";
        metrics.worker_counter("yields", help, |worker| worker.yields)
    }
}

/// Encodes metrics of the whole server, per worker, or per worker and close reason.
struct MetricsEncoder<'a, 'b> {
    encoder: DescriptorEncoder<'a>,
    workers: &'b [WorkerStats],
}

impl MetricsEncoder<'_, '_> {
    fn counter(&mut self, name: &str, help: &str, value: impl EncodeCounterValue) -> fmt::Result {
        let counter = ConstCounter::new(value);
        let kind = counter.metric_type();
        counter.encode(self.encoder.encode_descriptor(name, help, None, kind)?)
    }

    fn worker_counter(
        &mut self,
        name: &str,
        help: &str,
        value: impl Fn(&WorkerStats) -> u64,
    ) -> fmt::Result {
        self.per_worker(name, help, |worker| ConstCounter::new(value(worker)))
    }

    fn worker_gauge(
        &mut self,
        name: &str,
        help: &str,
        value: impl Fn(&WorkerStats) -> u64,
    ) -> fmt::Result {
        self.per_worker(name, help, |worker| ConstGauge::new(value(worker)))
    }

    fn per_worker<M: EncodeMetric + TypedMetric>(
        &mut self,
        name: &str,
        help: &str,
        metric: impl Fn(&WorkerStats) -> M,
    ) -> fmt::Result {
        let metrics = self.workers.iter().enumerate().map(|(index, worker)| {
            let labels = [("worker", index.to_string())];
            (labels, metric(worker))
        });
        self.family(name, help, metrics)
    }

    fn reason_counter(
        &mut self,
        name: &str,
        help: &str,
        values: impl Fn(&WorkerStats) -> [u64; CloseReason::ALL.len()],
    ) -> fmt::Result {
        let metrics = self.workers.iter().enumerate().flat_map(|(index, worker)| {
            let reasons = CloseReason::ALL.iter().zip(values(worker));
            reasons.map(move |(reason, value)| {
                let worker = ("worker", index.to_string());
                let labels = [worker, ("reason", reason.to_string())];
                (labels, ConstCounter::new(value))
            })
        });
        self.family(name, help, metrics)
    }

    /// Encodes one metric with several sets of labels.
    fn family<L: EncodeLabelSet, M: EncodeMetric + TypedMetric>(
        &mut self,
        name: &str,
        help: &str,
        metrics: impl Iterator<Item = (L, M)>,
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, M::TYPE)?;
        for (labels, metric) in metrics {
            metric.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
