//! `--metrics`: what was counted, for Prometheus at `/metrics`; and whether it serves, for a load
//! balancer at `/healthz`. It is served by this crate's own library: a handler on a second server.

use std::fmt;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use echoserver::{
    Action, Address, Buffer, CloseReason, Config, Handle, Handler, Server, WorkerStats,
};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// A request's line and headers must fit in here, in bytes.
const MAX_REQUEST: usize = 8 << 10;
const MAX_HEADERS: usize = 64;

/// Scrapers and health checks are few.
pub(crate) const MAX_CONNECTIONS: usize = 32;

/// The endpoint's server; it ends when this is dropped.
pub(crate) struct Metrics {
    server: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Metrics {
    /// Serves the numbers of `watched` at `address`, until dropped: through its drain as well.
    pub(crate) fn start(address: Address, watched: Handle) -> io::Result<Self> {
        let server = Server::bind(Config {
            listen: vec![address],
            workers: NonZeroUsize::MIN,
            max_connections: MAX_CONNECTIONS,
            buffer_size: MAX_REQUEST,
            backlog: 128,
            idle_timeout: Some(Duration::from_secs(90)),
            drain_timeout: Duration::from_millis(250),
            ..Config::default()
        })?;
        for address in server.addresses() {
            log::info!("metrics: listening on {address}");
        }
        let handle = server.handle();
        let serve = move || {
            let mut registry = Registry::with_prefix("echoserver");
            registry.register_collector(Box::new(StatsCollector(watched.clone())));
            let site = Endpoint { registry, watched };
            if let Err(error) = server.run(|_peer| Client {
                site: &site,
                answer: Vec::new(),
                sent: 0,
                last: false,
            }) {
                log::error!("metrics: {error}");
            }
        };
        let thread = thread::Builder::new()
            .name("metrics".to_owned())
            .spawn(serve)?;
        Ok(Self {
            server: handle,
            thread: Some(thread),
        })
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        self.server.shut_down();
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, the panic hook has told of it.
            let _panic = thread.join();
        }
    }
}

/// What is served.
struct Endpoint {
    registry: Registry,
    watched: Handle,
}

/// One client: HTTP/1.1 as far as scrapers and health checks speak it.
struct Client<'a> {
    site: &'a Endpoint,
    /// What is still to be sent of an answer, which may be larger than the buffer.
    answer: Vec<u8>,
    /// So many bytes of it are sent.
    sent: usize,
    /// The connection ends behind this answer.
    last: bool,
}

impl Handler for Client<'_> {
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
        loop {
            // A buffer takes what fits, and never fails.
            self.sent += output.write(&self.answer[self.sent..]).unwrap_or(0);
            if self.sent < self.answer.len() {
                return Action::Continue;
            }
            if self.last {
                return Action::Close;
            }
            let Some((request, length)) = read_request(input.data(), input.room() == 0) else {
                return Action::Continue;
            };
            input.consume(length);
            (self.answer, self.last) = self.site.answer(request);
            self.sent = 0;
        }
    }
}

/// What a client wants, as far as it matters here.
enum Request {
    Get {
        path: String,
        head: bool,
        last: bool,
    },
    OtherMethod,
    TooLarge,
    Bad,
}

/// The request at the start of `bytes` and its length, if it has come whole.
fn read_request(bytes: &[u8], is_full: bool) -> Option<(Request, usize)> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if is_full => return Some((Request::TooLarge, bytes.len())),
        Ok(httparse::Status::Partial) => return None,
        Err(httparse::Error::TooManyHeaders) => return Some((Request::TooLarge, bytes.len())),
        Err(_) => return Some((Request::Bad, bytes.len())),
    };
    let (Some(method), Some(path), Some(version)) = (request.method, request.path, request.version)
    else {
        return Some((Request::Bad, length));
    };
    let says = |name: &str, what: &str| {
        let named = |header: &&httparse::Header<'_>| header.name.eq_ignore_ascii_case(name);
        request
            .headers
            .iter()
            .filter(named)
            .flat_map(|header| header.value.split(|&byte| byte == b','))
            .any(|token| token.trim_ascii().eq_ignore_ascii_case(what.as_bytes()))
    };
    // A body is nothing that these paths take: it goes unread, and the connection with it.
    let has_body = request.headers.iter().any(|header| {
        header.name.eq_ignore_ascii_case("transfer-encoding")
            || (header.name.eq_ignore_ascii_case("content-length") && header.value != b"0")
    });
    let last = has_body
        || says("connection", "close")
        || (version == 0 && !says("connection", "keep-alive"));
    let request = match method {
        "GET" | "HEAD" => {
            let path = path.split(['?', '#']).next().unwrap_or(path).to_owned();
            Request::Get {
                path,
                head: method == "HEAD",
                last,
            }
        }
        _ => Request::OtherMethod,
    };
    Some((request, length))
}

impl Endpoint {
    /// An answer's bytes, and whether the connection ends behind it.
    fn answer(&self, request: Request) -> (Vec<u8>, bool) {
        let text = "text/plain; charset=utf-8";
        match request {
            Request::Get { path, head, last } => {
                let (status, kind, body) = match path.as_str() {
                    "/metrics" => self.metrics(),
                    "/healthz" if self.watched.is_shut_down() => {
                        ("503 Service Unavailable", text, "draining\n".to_owned())
                    }
                    "/healthz" => ("200 OK", text, "serving\n".to_owned()),
                    _ => (
                        "404 Not Found",
                        text,
                        "try /metrics or /healthz\n".to_owned(),
                    ),
                };
                (response(status, kind, &body, head, last), last)
            }
            Request::OtherMethod => (
                response(
                    "405 Method Not Allowed\r\nAllow: GET, HEAD",
                    text,
                    "",
                    false,
                    true,
                ),
                true,
            ),
            Request::TooLarge => (
                response("431 Request Header Fields Too Large", text, "", false, true),
                true,
            ),
            Request::Bad => (response("400 Bad Request", text, "", false, true), true),
        }
    }

    fn metrics(&self) -> (&'static str, &'static str, String) {
        let mut body = String::new();
        match encode(&mut body, &self.registry) {
            Ok(()) => (
                "200 OK",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                body,
            ),
            Err(error) => (
                "500 Internal Server Error",
                "text/plain; charset=utf-8",
                format!("{error}\n"),
            ),
        }
    }
}

fn response(status: &str, kind: &str, body: &str, head: bool, last: bool) -> Vec<u8> {
    let (length, body) = (body.len(), if head { "" } else { body });
    let connection = if last { "close" } else { "keep-alive" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Connection: {connection}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// What a server has counted, read anew with each scrape.
#[derive(Debug)]
struct StatsCollector(Handle);

impl Collector for StatsCollector {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stats = self.0.stats();
        counter(&mut to, "accepted", "Connections accepted", stats.accepted)?;
        counter(
            &mut to,
            "accept_errors",
            "Failed accepts, passing ones included",
            stats.accept_errors,
        )?;
        counter(
            &mut to,
            "accept_pauses",
            "How often accepting paused",
            stats.accept_pauses,
        )?;
        let seconds = ConstCounter::new(stats.accept_paused.as_secs_f64());
        let name = "accept_paused_seconds";
        let metric = to.encode_descriptor(
            name,
            "How long accepting paused",
            None,
            seconds.metric_type(),
        )?;
        seconds.encode(metric)?;

        let workers = WorkerMetrics(&stats.workers);
        workers.counters(
            &mut to,
            "assigned",
            "Connections assigned to a worker",
            |worker| worker.assigned,
        )?;
        workers.gauges(&mut to, "open", "Connections open", |worker| {
            worker.assigned.saturating_sub(worker.total_closed())
        })?;
        workers.by_reason(&mut to, "closed", "Connections closed", |worker| {
            worker.closed
        })?;
        workers.counters(&mut to, "bytes_in", "Bytes received", |worker| {
            worker.bytes_in
        })?;
        workers.counters(&mut to, "bytes_out", "Bytes sent", |worker| {
            worker.bytes_out
        })?;
        workers.gauges(&mut to, "buffered_bytes", "Bytes in buffers", |worker| {
            worker.buffered
        })?;
        workers.by_reason(&mut to, "discarded_bytes", "Bytes discarded", |worker| {
            worker.discarded
        })?;
        workers.counters(&mut to, "wakes", "Returns of the poll", |worker| {
            worker.wakes
        })?;
        workers.counters(&mut to, "yields", "Budgets spent", |worker| worker.yields)
    }
}

fn counter(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: u64,
) -> Result<(), fmt::Error> {
    let counter = ConstCounter::new(value);
    let metric = to.encode_descriptor(name, help, None, counter.metric_type())?;
    counter.encode(metric)
}

/// The workers' numbers, each under its worker's label.
struct WorkerMetrics<'a>(&'a [WorkerStats]);

impl WorkerMetrics<'_> {
    fn counters(
        &self,
        to: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        value: impl Fn(&WorkerStats) -> u64,
    ) -> Result<(), fmt::Error> {
        let counters = self.0.iter().enumerate();
        let counters =
            counters.map(|(index, worker)| (index_label(index), ConstCounter::new(value(worker))));
        family(to, name, help, counters)
    }

    fn gauges(
        &self,
        to: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        value: impl Fn(&WorkerStats) -> u64,
    ) -> Result<(), fmt::Error> {
        let gauge = |worker| ConstGauge::new(i64::try_from(value(worker)).unwrap_or(i64::MAX));
        family(
            to,
            name,
            help,
            self.0
                .iter()
                .enumerate()
                .map(|(index, worker)| (index_label(index), gauge(worker))),
        )
    }

    fn by_reason(
        &self,
        to: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        values: impl Fn(&WorkerStats) -> [u64; CloseReason::ALL.len()],
    ) -> Result<(), fmt::Error> {
        let counters = self.0.iter().enumerate().flat_map(|(index, worker)| {
            CloseReason::ALL
                .iter()
                .zip(values(worker))
                .map(move |(reason, value)| {
                    let [worker] = index_label(index);
                    (
                        [worker, ("reason", reason.to_string())],
                        ConstCounter::new(value),
                    )
                })
        });
        family(to, name, help, counters)
    }
}

fn index_label(index: usize) -> [(&'static str, String); 1] {
    [("worker", index.to_string())]
}

/// Encodes one metric with its many labels.
fn family<L: EncodeLabelSet, M: EncodeMetric>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    metrics: impl Iterator<Item = (L, M)>,
) -> Result<(), fmt::Error> {
    let mut metrics = metrics.peekable();
    let Some((_, first)) = metrics.peek() else {
        return Ok(());
    };
    let mut metric = to.encode_descriptor(name, help, None, first.metric_type())?;
    for (labels, value) in metrics {
        value.encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}
