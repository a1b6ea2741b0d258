//! The server: its configuration, and the start, shutdown and join of its threads.

pub(crate) mod acceptor;
pub(crate) mod control;
pub(crate) mod dispatcher;
pub(crate) mod new_connection;
pub(crate) mod table;
pub(crate) mod timers;
pub(crate) mod worker;

use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use self::acceptor::Acceptor;
use self::control::Control;
use self::dispatcher::Dispatcher;
use self::new_connection::NewConnection;
use self::worker::Worker;
use crate::connection::Resources;
use crate::connection::buffer::{Buffers, Pool};
use crate::connection::handler::Handler;
use crate::connection::shared::{Shared, Timeouts};
use crate::connection::waker::WakeQueue;
use crate::error::{panic_message, with_context};
use crate::net::address::Address;
use crate::net::listener::{ListenOptions, Listener};
use crate::net::poller::{Clock, MioPoller};
use crate::net::stream::Socket;
use crate::server::table::ConnectionTable;
use crate::stats::{Counters, Stats};
use crate::system::{NEVER, Wake, millis};

/// Capacity of a worker's queue of new connections.
const QUEUE_CAPACITY: usize = 1024;

/// Time limit for a client to close its side after the server has closed its own.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Time limit for the last output of a connection that closes, without any progress.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection that holds buffers makes no progress until it is reset at the limit of the buffers, instead of the
/// connection that needs them. While more clients than there are buffers get stuck in this time, healthy ones are reset:
/// with 1 s, that is every peak of 1,000 clients per second beside 256 pairs of buffers. Without it, clients that read slowly
/// could take the buffers from each other for ever.
const STUCK_TIME: Duration = Duration::from_millis(100);

/// Server configuration; construct it with [`new`](Self::new) and struct update syntax.
///
/// ```
/// use echoserver::Config;
///
/// let address = "127.0.0.1:5555".parse()?;
/// let config = Config { buffer_size: 4096, max_connections: 1000, ..Config::new(address) };
/// assert!(config.max_memory() > 1000 * 2 * 4096);
/// # Ok::<(), echoserver::AddressError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses to listen on. May be empty if the server [adopts](Server::adopt_tcp) listeners. Default: none.
    pub listen: Vec<Address>,
    /// Number of worker threads, from 1 to [`Config::MAX_WORKERS`]. Default: the number of CPUs.
    pub workers: usize,
    /// Maximum concurrent connections; at the limit, new clients wait in the kernel's backlog.
    /// Default: 10,000.
    pub max_connections: usize,
    /// Buffer limit per connection and direction in bytes, from 1 to [`Config::MAX_BUFFER_SIZE`].
    /// Default: 64 KiB.
    pub buffer_size: usize,
    /// Maximum memory of all buffers in bytes, of which each worker has an equal share: at least two pairs of buffers. At the
    /// limit, a connection that must keep bytes gets the buffers of the one on its worker that has been stuck longest, which is
    /// reset: its bytes have not moved for at least 100 ms. If there is none, the connection that must keep bytes is reset.
    /// Connections without pending bytes need no buffers. What handlers own is not included. Default: none, so only
    /// [`max_connections`](Self::max_connections) bounds it.
    pub buffer_memory: Option<u64>,
    /// Maximum connections that wait in the kernel to be accepted; the system can impose a lower
    /// limit. Default: 4096.
    pub backlog: u32,
    /// Lets other processes of the same user listen on the same TCP addresses, if they set this as well (Linux only). The
    /// system spreads new clients over them. Default: off.
    pub reuse_port: bool,
    /// Permissions of a Unix-domain socket's file, such as `0o660`. Default: determined by the umask.
    pub unix_mode: Option<u32>,
    /// Closes a connection if for this time the client has sent nothing while the server was reading, and
    /// accepted none of the pending output. The close can be late by an eighth of it. Must not be zero.
    /// Default: none.
    pub idle_timeout: Option<Duration>,
    /// Resets a connection whose handler has announced an answer with [`Action::Pending`](crate::Action::Pending) and not
    /// given it for this time, or an eighth longer, also after the client's EOF. A part of an answer that is sent starts
    /// the time again; input does not. Must not be zero. Default: none, so an answer that never comes holds its connection
    /// until the server shuts down or the client resets it.
    pub answer_timeout: Option<Duration>,
    /// Time limit for a graceful shutdown. Connections that are still open are closed then, and reset if the server
    /// holds bytes of them or an answer is still to come. Data that arrives in its last quarter is not
    /// answered, and a client that ends its stream with it is reset. Data after the server has ended its half of a
    /// connection is discarded.
    /// Default: 5 s.
    pub drain_timeout: Duration,
    /// Checks whether a client still exists after this time without a packet from it (TCP keepalive): six
    /// probes, 10 s apart, before the connection is closed. Default: 5 minutes; `None` turns it off.
    pub tcp_keepalive: Option<Duration>,
    /// How long a worker without work keeps polling before it sleeps. Polling lowers latency and costs
    /// up to one CPU per worker. Default: 0.
    pub busy_poll: Duration,
}

impl Config {
    /// The maximum number of workers.
    pub const MAX_WORKERS: usize = 1024;

    /// The largest buffer size in bytes: 1 GiB.
    pub const MAX_BUFFER_SIZE: usize = 1 << 30;

    /// Returns the default configuration of a server that listens on `address`.
    #[must_use]
    pub fn new(address: Address) -> Self {
        Self {
            listen: vec![address],
            ..Self::default()
        }
    }

    /// Returns the maximum number of bytes in buffers: two buffers for each connection, in whole pages, and
    /// the spare buffers of the workers, but at most [`buffer_memory`](Self::buffer_memory). The kernel's socket buffers are
    /// not included.
    #[must_use]
    pub fn max_memory(&self) -> u64 {
        let connection = Buffers::max_bytes(self.buffer_size);
        let connections = (self.max_connections as u64).saturating_mul(connection);
        let all = connections.saturating_add(self.max_spare_memory());
        self.buffer_memory.map_or(all, |limit| limit.min(all))
    }

    /// Returns the least [`buffer_memory`](Self::buffer_memory): a pair of buffers that each worker uses, and one that a
    /// connection can keep.
    #[must_use]
    pub fn min_buffer_memory(&self) -> u64 {
        2 * self.workers as u64 * Buffers::max_bytes(self.buffer_size)
    }

    /// Returns how many pairs of buffers a worker can have.
    fn max_pairs(&self) -> usize {
        let share = self
            .buffer_memory
            .map_or(u64::MAX, |limit| limit / self.workers as u64);
        usize::try_from(share / Buffers::max_bytes(self.buffer_size)).unwrap_or(usize::MAX)
    }

    /// Returns how much memory the workers keep as spare buffers, within [`max_memory`](Self::max_memory).
    #[must_use]
    pub fn max_spare_memory(&self) -> u64 {
        (self.workers as u64).saturating_mul(Pool::max_bytes(self.buffer_size))
    }

    fn validate(&self) -> io::Result<()> {
        let (workers, size) = (self.workers, self.buffer_size);
        let problem = if workers == 0 || workers > Self::MAX_WORKERS {
            let max = Self::MAX_WORKERS;
            format!("worker count of {workers} is not between 1 and {max}")
        } else if size == 0 || size > Self::MAX_BUFFER_SIZE {
            format!("buffer size of {size} bytes is not between 1 byte and 1 GiB")
        } else if self.idle_timeout == Some(Duration::ZERO) {
            "idle timeout must not be zero".to_owned()
        } else if self.answer_timeout == Some(Duration::ZERO) {
            "answer timeout must not be zero".to_owned()
        } else if self.max_connections == 0 {
            "connection limit must not be zero".to_owned()
        } else if let Some(memory) = self.buffer_memory
            && memory < self.min_buffer_memory()
        {
            let (min, size) = (self.min_buffer_memory(), self.buffer_size);
            format!(
                "buffer memory of {memory} bytes is less than {min}: two pairs of {size} bytes for each worker"
            )
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, problem))
    }

    fn listen_options(&self) -> ListenOptions {
        ListenOptions {
            backlog: self.backlog,
            unix_mode: self.unix_mode,
            keepalive: self.tcp_keepalive,
            reuse_port: self.reuse_port,
        }
    }

    fn timeouts(&self) -> Timeouts {
        Timeouts {
            idle: self.idle_timeout.map(millis),
            answer: self.answer_timeout.map(millis),
            close: millis(CLOSE_TIMEOUT),
            stuck: millis(STUCK_TIME),
            linger: millis(LINGER_TIMEOUT),
            drain: millis(self.drain_timeout),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            workers: thread::available_parallelism().map_or(1, NonZero::get),
            max_connections: 10_000,
            buffer_size: 64 << 10,
            buffer_memory: None,
            backlog: 4096,
            reuse_port: false,
            unix_mode: None,
            idle_timeout: None,
            answer_timeout: None,
            drain_timeout: Duration::from_secs(5),
            tcp_keepalive: Some(Duration::from_secs(300)),
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
/// let server = Server::bind(Config::new("127.0.0.1:0".parse()?))?;
/// println!("listening on {}", server.addresses()[0]);
/// let handle = server.handle();
/// let serving = thread::spawn(move || server.run(|_connection| Echo));
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
    /// The poll and the buffers of each worker, whose thread begins when the server is run. They are allocated earlier, so
    /// that a lack of descriptors or memory is an error at start.
    workers: Vec<(MioPoller, Pool)>,
    poller: MioPoller,
    handle: Handle,
}

impl Server {
    /// Listens on all addresses of `config`. Clients can connect from now on, and are served when the
    /// server [runs](Server::run). An address that another one includes has no listener of its own: the same one twice, or
    /// `127.0.0.1:5555` beside `0.0.0.0:5555`. All addresses of a name have one port.
    ///
    /// # Errors
    ///
    /// Fails if a value of `config` is out of range ([`io::ErrorKind::InvalidInput`]), an address
    /// cannot be listened on, or the file descriptors do not suffice for the workers. The message is
    /// one line that names the value, address or worker.
    pub fn bind(config: Config) -> io::Result<Self> {
        config.validate()?;
        let listeners = Listener::bind(&config.listen, config.listen_options())?;
        let addresses = listeners.iter().map(Listener::address);
        let addresses = addresses.collect::<io::Result<_>>()?;
        let clock = Clock::start();
        let new_worker = |index| {
            allocate_worker(&config, clock)
                .map_err(|error| with_context(&error, &format!("cannot set up worker {index}")))
        };
        let allocated = (0..config.workers).map(new_worker);
        let workers = allocated.collect::<io::Result<Vec<_>>>()?;
        let poller = MioPoller::new(clock, Duration::ZERO)
            .map_err(|error| with_context(&error, "cannot set up the acceptor"))?;
        let (max, waker) = (config.max_connections, Arc::clone(&poller.waker));
        let handle = Handle {
            control: Arc::new(Control::new(max, waker, wakers(&workers))),
            counters: Arc::new(Counters::new(workers.len())),
            clock,
            drain_timeout: config.drain_timeout,
            reuse_port: config.reuse_port,
        };
        Ok(Self {
            config,
            listeners,
            addresses,
            workers,
            poller,
            handle,
        })
    }

    /// Adds a TCP listener that was created elsewhere, for example by a service manager.
    ///
    /// # Errors
    ///
    /// Fails if the socket is not a listening TCP socket or cannot be configured.
    pub fn adopt_tcp(&mut self, listener: std::net::TcpListener) -> io::Result<()> {
        let options = self.config.listen_options();
        self.adopt(Listener::from_tcp(listener, options)?)
    }

    /// Adds a Unix-domain listener that was created elsewhere. Its file is kept when the server ends.
    ///
    /// # Errors
    ///
    /// Fails if the socket is not a listening Unix-domain stream socket or cannot be configured.
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
    /// before this returns. `new_handler` creates the handler of each connection on its worker's thread; a
    /// panic in it closes that connection only.
    ///
    /// # Errors
    ///
    /// Fails if no listener is configured, a thread cannot be started, or the acceptor or a worker fails. In the last
    /// two cases the connections of the other workers are drained first.
    pub fn run<H, F>(self, new_handler: F) -> io::Result<Stats>
    where
        H: Handler,
        F: Fn(&NewConnection<'_>) -> H + Sync,
    {
        self.run_with_start(|| Ok(()), new_handler)
    }

    /// The same as [`run`](Self::run), and calls `on_start` once every worker runs, before the first connection is accepted:
    /// the moment to report that the server serves.
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run), and the error of `on_start`, after which the server does not serve.
    pub fn run_with_start<H, F>(
        mut self,
        on_start: impl FnOnce() -> io::Result<()>,
        new_handler: F,
    ) -> io::Result<Stats>
    where
        H: Handler,
        F: Fn(&NewConnection<'_>) -> H + Sync,
    {
        if self.listeners.is_empty() {
            let problem = "no listening address configured";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let handle = &self.handle;
        let (dispatcher, receivers) = Dispatcher::new(QUEUE_CAPACITY, wakers(&self.workers));
        let acceptor = Acceptor::new(
            self.listeners,
            self.config.backlog,
            dispatcher,
            Arc::clone(&handle.counters),
            Arc::clone(&handle.control),
        );
        let timeouts = self.config.timeouts();
        let new_handler =
            &|socket: &Socket, peer, number| new_handler(&NewConnection::new(socket, peer, number));
        thread::scope(|scope| {
            let mut threads = Vec::new();
            let workers = self.workers.into_iter().zip(receivers);
            for (index, ((mut poller, pool), receiver)) in workers.enumerate() {
                let counters = &handle.counters.workers[index];
                let serve = move || {
                    let _guard = ShutdownOnDrop(handle);
                    let waker = Arc::clone(&poller.waker);
                    let (wake_queue, wake_ups) = WakeQueue::new(move || Wake::wake(&waker));
                    let shared = Shared::new(timeouts, wake_queue, Arc::clone(counters));
                    let table = ConnectionTable::new(Resources { pool, shared }, wake_ups, index);
                    let control = Arc::clone(&handle.control);
                    let mut worker = Worker::new(table, receiver, control, Arc::clone(counters));
                    worker.run(&mut poller, new_handler)
                };
                let thread = thread::Builder::new().name(format!("worker-{index}"));
                let thread = thread.spawn_scoped(scope, serve);
                // On failure this closure ends, and drops the acceptor with its dispatcher, which makes the running workers
                // drain and end. Only then the scope joins them.
                threads.push(thread.map_err(|error| {
                    with_context(&error, &format!("cannot start worker {index}"))
                })?);
            }
            // As above, if it fails.
            on_start()?;
            // Consumes the acceptor with its dispatcher, whose end closes the queues: without that no worker ends.
            let accepted = acceptor.run(&mut self.poller);
            // Joins all, and returns the first error.
            let served = threads.into_iter().enumerate().map(join);
            served.fold(accepted, Result::and)
        })?;
        Ok(handle.counters.snapshot())
    }
}

fn allocate_worker(config: &Config, clock: Clock) -> io::Result<(MioPoller, Pool)> {
    let (poller, size) = (MioPoller::new(clock, config.busy_poll)?, config.buffer_size);
    let mut pool = Pool::new(size).map_err(|error| {
        with_context(&error, &format!("cannot allocate buffers of {size} bytes"))
    })?;
    pool.max_pairs = config.max_pairs();
    Ok((poller, pool))
}

fn wakers(workers: &[(MioPoller, Pool)]) -> impl Iterator<Item = Arc<mio::Waker>> {
    workers.iter().map(|(poller, _)| Arc::clone(&poller.waker))
}

/// Shuts the server down when a worker ends for any reason, a panic included. Otherwise the acceptor
/// would continue to accept connections for it.
struct ShutdownOnDrop<'a>(&'a Handle);

impl Drop for ShutdownOnDrop<'_> {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

fn join((index, thread): (usize, ScopedJoinHandle<'_, io::Result<()>>)) -> io::Result<()> {
    let served = thread.join().map_err(|panic| {
        let message = panic_message(&*panic);
        io::Error::other(format!("worker {index} panicked: {message}"))
    })?;
    served.map_err(|error| with_context(&error, &format!("worker {index} failed")))
}

/// Controls a [`Server`] from any thread. Clones control the same server.
#[derive(Clone, Debug)]
pub struct Handle {
    control: Arc<Control<Arc<mio::Waker>>>,
    counters: Arc<Counters>,
    clock: Clock,
    drain_timeout: Duration,
    reuse_port: bool,
}

impl Handle {
    /// Starts a graceful shutdown: the server stops listening (on Linux after 100 ms, in which handshakes in
    /// progress complete and no others begin), answers input until a connection has nothing left to
    /// read and its output is delivered, and closes it then. Connections that are not done
    /// [`drain_timeout`](Config::drain_timeout) after this call are closed then, and reset if the server still
    /// holds bytes of them or an answer is still to come. A client that has received everything and stays connected is
    /// waited for 1 s, and longer while it sends. Returns at once. Further calls have no effect.
    ///
    /// With [`reuse_port`](Config::reuse_port) another server takes the new clients: connections are served as before until
    /// the listeners are closed, so that one that has just been opened can still send and gets an answer.
    pub fn shut_down(&self) {
        let deadline = self.clock.now().saturating_add(millis(self.drain_timeout));
        let deadline = deadline.min(NEVER - 1);
        if self.reuse_port {
            self.control.shut_down_acceptor(deadline);
        } else {
            self.control.shut_down(deadline);
        }
    }

    /// Shuts the server down at once: every connection that is open is closed, and reset if its output is
    /// not sent completely. Returns before that is done.
    pub fn abort(&self) {
        self.control.shut_down(self.clock.now());
    }

    /// Returns whether a shutdown was requested, or caused by the end of a worker.
    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        self.control.acceptor_deadline().is_some()
    }

    /// Wakes every worker. One whose [`ticks`](crate::WorkerStats::ticks) do not increase afterwards is stuck in a
    /// handler, or has ended.
    pub fn wake_workers(&self) {
        self.control.wake_workers();
    }

    /// Returns a snapshot of the server's counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.counters.snapshot()
    }
}

#[cfg(test)]
mod tests;
