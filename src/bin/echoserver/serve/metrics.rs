//! `--metrics`: an HTTP endpoint with `/metrics` for Prometheus, and health checks for load balancers
//! (`/healthz`) and Kubernetes (`/livez`, `/readyz`).
//!
//! The endpoint is a second [`Server`] of this crate's library, with an HTTP handler.

mod exposition;
mod process;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use crossbeam_channel::bounded;
use echoserver::{Action, Address, Config, Context, Event, Handle, Handler, NewConnection, Server};
use httparse::Status;

use self::exposition::Exposition;
use crate::error::with_context;
use crate::serve::background::BackgroundThread;
use crate::serve::faults::Faults;
use crate::serve::logging;
use crate::serve::logging::Log;

/// Limit for the request line and headers of a request, in bytes.
const MAX_REQUEST: usize = 8 << 10;
const MAX_HEADERS: usize = 64;

/// More than scrapers and health checks need, so that connections which are left open do not keep them out.
pub(crate) const MAX_CONNECTIONS: usize = 256;

/// A client without a whole request is closed after this time, so that connections which are left open or send
/// single bytes do not use up the limit.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

const TEXT: &str = "text/plain; charset=utf-8";

/// Binds the endpoint's own server to `address`, with what `config` says about the sockets of the other one.
pub(crate) fn bind(address: Address, config: &Config) -> io::Result<Server> {
    let config = Config {
        unix_mode: config.unix_mode,
        reuse_port: config.reuse_port,
        workers: 1,
        max_connections: MAX_CONNECTIONS,
        buffer_size: MAX_REQUEST,
        backlog: 128,
        idle_timeout: Some(Duration::from_secs(90)),
        drain_timeout: Duration::from_millis(250),
        ..Config::new(address)
    };
    Server::bind(config).map_err(|error| with_context(&error, "--metrics"))
}

/// Starts a thread that runs `http_server`, which serves what `endpoint` describes, also during a drain. Waits until it
/// serves.
pub(crate) fn start(http_server: Server, endpoint: Endpoint) -> io::Result<BackgroundThread> {
    let handle = http_server.handle();
    let (sender, started) = bounded(1);
    let serve = move || {
        // The log records of this thread, which accepts, and of the worker.
        logging::set_server("metrics");
        let on_start = || {
            let _sent = sender.send(Ok(()));
            Ok(())
        };
        let new_handler = |_: &NewConnection<'_>| {
            logging::set_server("metrics");
            HttpHandler {
                endpoint: &endpoint,
                unsent: Vec::new(),
            }
        };
        if let Err(error) = http_server.run_with_start(on_start, new_handler)
            && let Err(unsent) = sender.try_send(Err(error))
            && let Err(error) = unsent.into_inner()
        {
            // It had started.
            log::error!("{error}");
        }
    };
    let thread = BackgroundThread::spawn("metrics", serve, move || handle.shut_down())?;
    let result = started.recv().unwrap_or(Ok(()));
    result.map_err(|error: io::Error| with_context(&error, "--metrics"))?;
    Ok(thread)
}

/// Answers one request of HTTP/1.1, and closes the connection.
struct HttpHandler<'a> {
    endpoint: &'a Endpoint,
    /// The part of the response that has not been written to the output.
    unsent: Vec<u8>,
}

impl Handler for HttpHandler<'_> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        match event {
            Event::Open => context.set_timer(Some(REQUEST_TIMEOUT)),
            Event::Timer => return Action::Close,
            _ => {}
        }
        if self.unsent.is_empty() {
            let input = &mut context.input;
            let is_full = input.len() == input.capacity();
            let Some(response) = self.endpoint.respond(input.data(), is_full) else {
                return Action::Continue;
            };
            input.consume(input.len());
            self.unsent = response;
        }
        // A write takes what fits and returns no error.
        let written = context.output.write(&self.unsent).unwrap_or(0);
        self.unsent.drain(..written);
        let done = self.unsent.is_empty();
        if done { Action::Close } else { Action::Flush }
    }
}

/// The server that is described, and the state shared by all connections of the endpoint.
pub(crate) struct Endpoint {
    pub(crate) server: Handle,
    pub(crate) max_connections: usize,
    pub(crate) max_buffer_memory: u64,
    /// A signal has requested a shutdown; the drain may not have begun.
    pub(crate) is_stopping: Arc<AtomicBool>,
    pub(crate) log: Log,
    /// When the process started.
    pub(crate) start: SystemTime,
    pub(crate) faults: Option<Arc<Faults>>,
}

impl Endpoint {
    /// Returns the response to the request at the start of `bytes` once its head is complete. That to HEAD has the length
    /// of the body, but no body.
    fn respond(&self, bytes: &[u8], buffer_full: bool) -> Option<Vec<u8>> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let error = |status| (status, TEXT, String::new());
        let (status, content_type, body) = match request.parse(bytes) {
            Ok(Status::Partial) if !buffer_full => return None,
            Ok(Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
                error("431 Request Header Fields Too Large")
            }
            Err(_) => error("400 Bad Request"),
            Ok(Status::Complete(_)) => match request.method {
                Some("GET" | "HEAD") => self.get(request.path.unwrap_or_default()),
                _ => error("405 Method Not Allowed\r\nAllow: GET, HEAD"),
            },
        };
        let is_head = request.method == Some("HEAD");
        let (length, body) = (body.len(), if is_head { "" } else { &body });
        let response = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
             Connection: close\r\n\r\n{body}"
        );
        Some(response.into_bytes())
    }

    /// Returns the status, content type and body for `path`.
    fn get(&self, path: &str) -> (&'static str, &'static str, String) {
        let text = |status, body: &str| (status, TEXT, body.to_owned());
        // Whether a load balancer must send no more clients.
        let is_draining = self.is_stopping.load(Relaxed) || self.server.is_shutting_down();
        match path.split(['?', '#']).next().unwrap_or_default() {
            "/metrics" => ("200 OK", exposition::CONTENT_TYPE, self.metrics()),
            "/livez" => text("200 OK", "alive\n"),
            "/readyz" | "/healthz" if is_draining => text("503 Service Unavailable", "draining\n"),
            "/readyz" | "/healthz" => text("200 OK", "serving\n"),
            _ => text(
                "404 Not Found",
                "try /metrics, /livez, /readyz or /healthz\n",
            ),
        }
    }

    fn metrics(&self) -> String {
        let mut metrics = Exposition::default();
        metrics.counters(&self.server.stats());
        let name = "echoserver_log_lines_lost_total";
        let help =
            "Lines missing in the log: stderr was not read in time, or could not be written.";
        metrics.value(name, help, self.log.lost_lines());
        if let Some(faults) = &self.faults {
            let name = "echoserver_faults_total";
            let help = "Faults that happened on request, by kind; for delay, throttle and slice, \
                        connections.";
            metrics.begin(name, help);
            for (kind, count) in faults.counts() {
                metrics.sample(name, &format!("{{kind=\"{kind}\"}}"), count);
            }
        }
        let help = "Maximum concurrent connections.";
        metrics.value("echoserver_max_connections", help, self.max_connections);
        let help = "Maximum memory of all buffers, in bytes.";
        let name = "echoserver_max_buffer_memory_bytes";
        metrics.value(name, help, self.max_buffer_memory);
        let name = "echoserver_build_info";
        metrics.begin(name, "The version of the program.");
        let version = concat!("{version=\"", env!("CARGO_PKG_VERSION"), "\"}");
        metrics.sample(name, version, 1);
        process::add(&mut metrics, self.start);
        metrics.0
    }
}
