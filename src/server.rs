//! The server: its configuration, and the start, shutdown and join of its threads.

mod acceptor;
mod worker;

use std::any::Any;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use mio::Poll;

use self::acceptor::{Acceptor, AcceptorControl};
use self::worker::Worker;
use crate::connection::buffer::{Buffer, Pool};
use crate::connection::table::{Limits, millis};
use crate::error::with_context;
use crate::handler::Handler;
use crate::net::address::Address;
use crate::net::listener::Listener;
use crate::peer::Peer;
use crate::stats::{Counters, Stats};
use crate::work_queue::WorkQueue;

/// Capacity of a worker's mailbox, in connections.
const MAX_QUEUED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Time limit for a client to close its side after the server has closed its own.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Budget of a connection per tick, in bytes. It is converted to whole buffers, at least two.
const TICK_BYTES: usize = 1 << 20;

/// Server configuration; construct it with struct update syntax.
///
/// ```
/// use echoserver::Config;
///
/// let config = Config { buffer_size: 4096, max_connections: 1000, ..Config::default() };
/// assert!(config.max_memory() > 1000 * 2 * 4096);
/// ```
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses to listen on. May be empty if the server [adopts](Server::adopt_tcp) listeners.
    /// Default: port 5555 on every interface.
    pub listen: Vec<Address>,
    /// Number of worker threads, at most [`Config::MAX_WORKERS`]. Default: the number of CPUs.
    pub workers: NonZeroUsize,
    /// Maximum concurrent connections; at the limit, new clients wait in the kernel's backlog.
    /// Default: 10,000.
    pub max_connections: usize,
    /// Buffer limit per connection and direction in bytes, from 1 to [`Buffer::MAX_CAPACITY`].
    /// Default: 64 KiB.
    pub buffer_size: usize,
    /// Maximum connections that wait in the kernel to be accepted; the system can impose a lower
    /// limit. Default: 4096.
    pub backlog: u32,
    /// Permissions of a Unix-domain socket's file, such as `0o660`. Default: determined by the umask.
    pub unix_mode: Option<u32>,
    /// Idle timeout: closes a connection on which no byte is received or sent for this long, or up to
    /// an eighth longer. Must not be zero. Default: none.
    pub idle_timeout: Option<Duration>,
    /// Time limit for a graceful shutdown; remaining connections are then closed. Default: 5 s.
    pub drain_timeout: Duration,
    /// How long a worker without work keeps polling before it sleeps. Polling lowers latency and costs
    /// up to one CPU per worker. Default: 0.
    pub busy_poll: Duration,
}

impl Config {
    /// The maximum number of workers.
    pub const MAX_WORKERS: usize = 1024;

    /// Returns the maximum number of bytes in buffers: two buffers for each connection, and the spare
    /// buffers of the workers.
    #[must_use]
    pub fn max_memory(&self) -> u64 {
        let connections = (self.max_connections as u64).saturating_mul(2 * self.buffer_size as u64);
        connections.saturating_add(self.max_spare_memory())
    }

    /// Returns the part of [`max_memory`](Self::max_memory) that the workers keep as spare buffers.
    #[must_use]
    pub fn max_spare_memory(&self) -> u64 {
        self.workers.get() as u64 * Pool::max_bytes(self.buffer_size) as u64
    }

    fn validate(&self) -> io::Result<()> {
        let problem = if self.workers.get() > Self::MAX_WORKERS {
            format!(
                "{} workers exceed the limit of {}",
                self.workers,
                Self::MAX_WORKERS
            )
        } else if self.buffer_size == 0 || self.buffer_size > Buffer::MAX_CAPACITY {
            format!(
                "buffer size of {} bytes is not between 1 byte and 1 GiB",
                self.buffer_size
            )
        } else if self.idle_timeout == Some(Duration::ZERO) {
            "idle timeout must not be zero".to_owned()
        } else if self.max_connections == 0 {
            "connection limit must not be zero".to_owned()
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, problem))
    }

    fn limits(&self) -> Limits {
        Limits {
            buffer_size: self.buffer_size,
            budget: (TICK_BYTES / self.buffer_size).clamp(2, 1024) as u32,
            idle_timeout: self.idle_timeout.map(millis),
            linger_timeout: millis(LINGER_TIMEOUT),
            drain_timeout: millis(self.drain_timeout),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![Address::AnyInterface(5555)],
            workers: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            max_connections: 10_000,
            buffer_size: 64 << 10,
            backlog: 4096,
            unix_mode: None,
            idle_timeout: None,
            drain_timeout: Duration::from_secs(5),
            busy_poll: Duration::ZERO,
        }
    }
}

/// A server that listens, and serves its clients when it is [run](Server::run).
///
/// ```
/// use std::thread;
///
/// use echoserver::{Config, Echo, Server};
///
/// let listen = vec!["127.0.0.1:0".parse()?];
/// let server = Server::bind(Config { listen, ..Config::default() })?;
/// println!("listening on {}", server.addresses()[0]);
/// let handle = server.handle();
/// let serving = thread::spawn(move || server.run(|_peer| Echo));
/// handle.shut_down();
/// let stats = serving.join().unwrap()?;
/// assert_eq!(stats.accepted, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Server {
    config: Config,
    listeners: Vec<Listener>,
    addresses: Vec<Address>,
    workers: Vec<Worker>,
    poll: Poll,
    handle: Handle,
}

impl Server {
    /// Listens on all addresses of `config`. Clients can connect from now on, and are served when the
    /// server [runs](Server::run).
    ///
    /// # Errors
    ///
    /// Fails if a value of `config` is out of range ([`io::ErrorKind::InvalidInput`]), an address
    /// cannot be listened on, or the file descriptors do not suffice for the workers. The message is
    /// one line that names the value, address or worker.
    pub fn bind(config: Config) -> io::Result<Self> {
        config.validate()?;
        let mut listeners = Vec::new();
        for address in &config.listen {
            listeners.extend(Listener::bind(address, config.backlog, config.unix_mode)?);
        }
        let addresses = listeners
            .iter()
            .map(Listener::address)
            .collect::<io::Result<_>>()?;
        let count = config.workers.get();
        let workers = (0..count)
            .map(|index| {
                Worker::new(index)
                    .map_err(|error| with_context(&error, &format!("cannot set up worker {index}")))
            })
            .collect::<io::Result<_>>()?;
        let poll = Poll::new()?;
        let handle = Handle {
            control: Arc::new(AcceptorControl::new(&poll)?),
            counters: Arc::new(Counters::new(count)),
        };
        Ok(Self {
            config,
            listeners,
            addresses,
            workers,
            poll,
            handle,
        })
    }

    /// Adds a TCP listener that was created elsewhere, for example by a service manager.
    ///
    /// # Errors
    ///
    /// Fails if the socket cannot be configured or has no local address.
    pub fn adopt_tcp(&mut self, listener: std::net::TcpListener) -> io::Result<()> {
        self.adopt(Listener::from_tcp(listener)?)
    }

    /// Adds a Unix-domain listener that was created elsewhere. Its file is kept when the server ends.
    ///
    /// # Errors
    ///
    /// Fails if the socket cannot be configured or has no local address.
    #[cfg(unix)]
    pub fn adopt_unix(&mut self, listener: std::os::unix::net::UnixListener) -> io::Result<()> {
        self.adopt(Listener::from_unix(listener)?)
    }

    fn adopt(&mut self, listener: Listener) -> io::Result<()> {
        self.addresses.push(listener.address()?);
        self.listeners.push(listener);
        Ok(())
    }

    /// Returns the address of each listening socket, with the ports that the system chose.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Returns a handle to control the server from other threads while it runs.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves until [`Handle::shut_down`], then drains all connections and returns the statistics.
    ///
    /// The calling thread accepts connections. Each worker is a thread of its own, and is joined
    /// before this returns. `handler` creates the handler of each connection on its worker's thread; a
    /// panic in it closes that connection only.
    ///
    /// # Errors
    ///
    /// Fails if no listener is configured, a thread cannot be started, or a worker fails. In the last
    /// two cases the connections of the other workers are drained first.
    pub fn run<H, F>(self, handler: F) -> io::Result<Stats>
    where
        H: Handler,
        F: Fn(&Peer) -> H + Sync,
    {
        let Self {
            config,
            listeners,
            workers,
            poll,
            handle: Handle { control, counters },
            ..
        } = self;
        if listeners.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no listening address configured",
            ));
        }
        let (queue, receivers) = WorkQueue::bounded(MAX_QUEUED, workers.iter().map(Worker::waker));
        let (control_ref, limits, handler) = (&*control, config.limits(), &handler);
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (index, (worker, receiver)) in workers.into_iter().zip(receivers).enumerate() {
                let worker_counters = Arc::clone(&counters.workers[index]);
                let serve = move || {
                    let _guard = ShutdownOnDrop(control_ref);
                    worker.run(
                        receiver,
                        limits,
                        config.busy_poll,
                        &worker_counters,
                        control_ref,
                        handler,
                    )
                };
                let thread = thread::Builder::new().name(format!("worker-{index}"));
                let thread = thread.spawn_scoped(scope, serve);
                // On failure the queue is dropped, which makes the running workers drain and end.
                threads.push(thread.map_err(|error| {
                    with_context(&error, &format!("cannot start worker {index}"))
                })?);
            }
            let acceptor = Acceptor::new(
                listeners,
                queue,
                config.max_connections,
                Arc::clone(&counters),
                Arc::clone(&control),
            );
            let accepted = acceptor.run(poll);
            let mut served = Ok(());
            for (index, thread) in threads.into_iter().enumerate() {
                served = served.and(join(index, thread));
            }
            accepted.and(served)
        })?;
        Ok(counters.snapshot())
    }
}

/// Shuts the server down when a worker ends for any reason, a panic included. Otherwise the acceptor
/// would continue to accept connections for it.
struct ShutdownOnDrop<'a>(&'a AcceptorControl);

impl Drop for ShutdownOnDrop<'_> {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

fn join(index: usize, thread: ScopedJoinHandle<'_, io::Result<()>>) -> io::Result<()> {
    match thread.join() {
        Ok(served) => {
            served.map_err(|error| with_context(&error, &format!("worker {index} failed")))
        }
        Err(panic) => Err(io::Error::other(format!(
            "worker {index} panicked: {}",
            panic_message(&*panic)
        ))),
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Controls a [`Server`] from any thread. Clones control the same server.
#[derive(Clone, Debug)]
pub struct Handle {
    control: Arc<AcceptorControl>,
    counters: Arc<Counters>,
}

impl Handle {
    /// Starts a graceful shutdown: the server stops listening, answers all input that has arrived, and
    /// closes every connection. Returns at once. Further calls have no effect.
    pub fn shut_down(&self) {
        self.control.shut_down();
    }

    /// Returns whether a shutdown was requested, or caused by the end of a worker.
    #[must_use]
    pub fn is_shut_down(&self) -> bool {
        self.control.is_shut_down()
    }

    /// Returns a snapshot of the server's counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.counters.snapshot()
    }
}
