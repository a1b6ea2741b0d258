//! The server: what it is told, and who owns and joins every thread.

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

/// Connections that may wait in one worker's mailbox.
const MAX_QUEUED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// How long a client may take to end its stream once the server has ended its own.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes that a connection may receive per turn, in whole buffers, of which it gets at least two.
const TURN_BYTES: usize = 1 << 20;

/// What a server is told: a plain struct, to be filled from its [`Default`].
///
/// ```
/// use echoserver::Config;
///
/// let config = Config { buffer_size: 4096, max_connections: 1000, ..Config::default() };
/// assert!(config.max_memory() > 1000 * 2 * 4096);
/// ```
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen; may be empty if the server is to [adopt](Server::adopt_tcp) listeners.
    /// Default: every interface, port 5555.
    pub listen: Vec<Address>,
    /// Worker threads, at most [`Config::MAX_WORKERS`]. Default: the CPUs available.
    pub workers: NonZeroUsize,
    /// Connections open at once; at the limit accepting pauses, and clients wait in the kernel's
    /// backlog. Default: 10,000.
    pub max_connections: usize,
    /// The most bytes held for one connection in each direction, from 1 to
    /// [`Buffer::MAX_CAPACITY`]. Default: 64 KiB.
    pub buffer_size: usize,
    /// Connections that the kernel may hold until they are accepted; the system may have a lower
    /// limit of its own. Default: 4096.
    pub backlog: u32,
    /// The permissions of a Unix-domain socket's file, as `0o660`. Default: as the umask leaves them.
    pub unix_mode: Option<u32>,
    /// Close a connection that has moved no byte for this long, or at most an eighth longer; not zero.
    /// Default: never.
    pub idle_timeout: Option<Duration>,
    /// How long a shutdown may take; who is not done by then is cut off. Default: 5 s.
    pub drain_timeout: Duration,
    /// How long a worker without work polls on before it sleeps. It lowers latency and costs up to
    /// one CPU per worker. Default: 0.
    pub busy_poll: Duration,
}

impl Config {
    /// The largest number of workers.
    pub const MAX_WORKERS: usize = 1024;

    /// The most bytes that connections can make the server hold in their buffers: two buffers each,
    /// and what the workers keep spare.
    #[must_use]
    pub fn max_memory(&self) -> u64 {
        let connections = (self.max_connections as u64).saturating_mul(2 * self.buffer_size as u64);
        connections.saturating_add(self.max_spare_memory())
    }

    /// The part of [`max_memory`](Self::max_memory) that workers keep for connections to come.
    #[must_use]
    pub fn max_spare_memory(&self) -> u64 {
        self.workers.get() as u64 * Pool::max_bytes(self.buffer_size) as u64
    }

    fn check(&self) -> io::Result<()> {
        let fault = if self.workers.get() > Self::MAX_WORKERS {
            format!(
                "{} workers are more than {}",
                self.workers,
                Self::MAX_WORKERS
            )
        } else if self.buffer_size == 0 || self.buffer_size > Buffer::MAX_CAPACITY {
            format!(
                "a buffer of {} bytes is not between 1 byte and 1 GiB",
                self.buffer_size
            )
        } else if self.idle_timeout == Some(Duration::ZERO) {
            "an idle timeout of zero, which closes everyone at once".to_owned()
        } else if self.max_connections == 0 {
            "a server of no connections".to_owned()
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, fault))
    }

    fn limits(&self) -> Limits {
        Limits {
            buffer_size: self.buffer_size,
            budget: (TURN_BYTES / self.buffer_size).clamp(2, 1024) as u32,
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

/// A server that listens, and serves once it is [run](Server::run).
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
    /// Listens everywhere that `config` says. Clients can connect from here on; they are served
    /// once the server [runs](Server::run).
    ///
    /// # Errors
    ///
    /// One line that names the culprit: an address that cannot be listened on, a value out of its
    /// bounds ([`io::ErrorKind::InvalidInput`]), or a lack of descriptors for the workers.
    pub fn bind(config: Config) -> io::Result<Self> {
        config.check()?;
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

    /// Listens at a socket that was made elsewhere too, by a service manager for example.
    ///
    /// # Errors
    ///
    /// If the socket is none that can listen.
    pub fn adopt_tcp(&mut self, listener: std::net::TcpListener) -> io::Result<()> {
        self.adopt(Listener::from_tcp(listener)?)
    }

    /// Listens at a Unix-domain socket that was made elsewhere too. Its file, if it has one, stays
    /// when the server ends.
    ///
    /// # Errors
    ///
    /// If the socket is none that can listen.
    #[cfg(unix)]
    pub fn adopt_unix(&mut self, listener: std::os::unix::net::UnixListener) -> io::Result<()> {
        self.adopt(Listener::from_unix(listener)?)
    }

    fn adopt(&mut self, listener: Listener) -> io::Result<()> {
        self.addresses.push(listener.address()?);
        self.listeners.push(listener);
        Ok(())
    }

    /// Where it listens in fact: with the ports that were picked, one entry per socket.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// A handle to reach the server from other threads while it runs.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves until [`Handle::shut_down`], then drains, and returns what was counted.
    ///
    /// This thread accepts; every worker is a thread of its own, joined before this returns. Each
    /// connection gets a handler of its own from `handler`, on its worker's thread; a panic in it
    /// ends that connection.
    ///
    /// # Errors
    ///
    /// If a thread can't be started, or a worker dies; connections are drained first in both cases.
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
                "nowhere to listen",
            ));
        }
        let (queue, receivers) = WorkQueue::bounded(MAX_QUEUED, workers.iter().map(Worker::waker));
        let (control_ref, limits, handler) = (&*control, config.limits(), &handler);
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (index, (worker, receiver)) in workers.into_iter().zip(receivers).enumerate() {
                let own = Arc::clone(&counters.workers[index]);
                let serve = move || {
                    let _ending = ShutdownOnDrop(control_ref);
                    worker.run(
                        receiver,
                        limits,
                        config.busy_poll,
                        &own,
                        control_ref,
                        handler,
                    )
                };
                let thread = thread::Builder::new().name(format!("worker-{index}"));
                let thread = thread.spawn_scoped(scope, serve);
                // Those who run already see the queue's end, and end too.
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

/// Ends the server when a worker ends, however it does: nobody may go on feeding a dead worker.
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
            "worker {index} died: {}",
            message(&*panic)
        ))),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("it panicked")
}

/// Reaches a running [`Server`] from any thread. Clones reach the same one.
#[derive(Clone, Debug)]
pub struct Handle {
    control: Arc<AcceptorControl>,
    counters: Arc<Counters>,
}

impl Handle {
    /// Asks the server to shut down: to stop listening, answer what has arrived, and close every
    /// connection in order. Returns at once; further calls change nothing.
    pub fn shut_down(&self) {
        self.control.shut_down();
    }

    /// Whether a shutdown was asked for, or a worker's death has caused one.
    #[must_use]
    pub fn is_shut_down(&self) -> bool {
        self.control.is_shut_down()
    }

    /// What the server has counted so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.counters.snapshot()
    }
}
