//! Servers of the library in this process.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use echoserver::{
    Action, Address, Config, Context, Echo, Event, Handle, Handler, NewConnection, Server, Stats,
    WorkerStats,
};

use super::{Client, ping_all, wait_until};

/// Returns a configuration of one worker at a free loopback port.
pub(crate) fn config() -> Config {
    Config {
        workers: 1,
        ..Config::new(Address::Ip(([127, 0, 0, 1], 0).into()))
    }
}

/// Binds a server that does not run yet: clients can connect, and wait in the backlog.
pub(crate) fn bind(config: Config) -> Server {
    Server::bind(config).expect("a loopback port is free")
}

pub(crate) fn address_of(server: &Server) -> SocketAddr {
    match server.addresses() {
        [Address::Ip(address), ..] => *address,
        other => panic!("not an IP address first: {other:?}"),
    }
}

/// A running server. Its drop shuts it down, joins it and checks its counters.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) handle: Handle,
    serving: Option<JoinHandle<io::Result<Stats>>>,
    is_echo: bool,
}

impl TestServer {
    /// Starts an echo server with one worker.
    pub(crate) fn echo() -> Self {
        Self::echo_with(config())
    }

    pub(crate) fn echo_with(config: Config) -> Self {
        Self::run_echo(bind(config))
    }

    pub(crate) fn run_echo(server: Server) -> Self {
        let mut server = Self::run(server, |_peer| Echo);
        server.is_echo = true;
        server
    }

    /// Starts a server of another protocol; `handler` creates the handlers.
    pub(crate) fn run<H: Handler + 'static>(
        server: Server,
        handler: impl Fn(&NewConnection<'_>) -> H + Send + Sync + 'static,
    ) -> Self {
        Self {
            address: address_of(&server),
            handle: server.handle(),
            serving: Some(thread::spawn(move || server.run(handler))),
            is_echo: false,
        }
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    pub(crate) fn connect_many(&self, count: usize) -> Vec<Client> {
        (0..count).map(|_| self.connect()).collect()
    }

    pub(crate) fn stats(&self) -> Stats {
        self.handle.stats()
    }

    /// Waits until the server holds output that it cannot send, and transfers nothing.
    pub(crate) fn wait_until_stuck(&self) {
        self.wait_until_unchanged(|total| total.buffered > 0);
    }

    /// Waits until the server has transferred bytes, and transfers no more.
    pub(crate) fn wait_until_quiet(&self) {
        self.wait_until_unchanged(|total| total.bytes_in > 0);
    }

    fn wait_until_unchanged(&self, condition: impl Fn(&WorkerStats) -> bool) {
        let (mut before, mut unchanged) = (self.stats(), 0);
        wait_until("the server's counters stop changing", || {
            let now = self.stats();
            unchanged = if now == before { unchanged + 1 } else { 0 };
            before = now;
            unchanged >= 50 && condition(&before.total())
        });
    }

    pub(crate) fn shut_down(&self) {
        self.handle.shut_down();
    }

    /// Shuts the server down, checks its counters and returns them.
    pub(crate) fn stop(mut self) -> Stats {
        self.join_and_check()
    }

    /// Checks the contract's balances.
    fn join_and_check(&mut self) -> Stats {
        self.handle.shut_down();
        let serving = self.serving.take().expect("joined once");
        wait_until("the server ends", || serving.is_finished());
        let stats = serving.join().expect("the server does not panic");
        let stats = stats.expect("the server does not fail");
        assert_eq!(stats.check_final_balance(), None, "{stats:?}");
        if self.is_echo {
            assert_eq!(stats.total().bytes_generated, 0, "{stats:?}");
        }
        stats
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.handle.shut_down();
        // A failing test may still hold clients, for which the server would wait.
        if self.serving.is_some() && !thread::panicking() {
            self.join_and_check();
        }
    }
}

/// Connects clients that never read, sends until no more bytes move, and returns how many each has sent.
pub(crate) fn stuck_clients(
    server: &TestServer,
    count: usize,
    bytes: &[u8],
) -> Vec<(Client, usize)> {
    let connect = || Client::connect_with_receive_buffer(server.address, 64 << 10);
    let mut clients: Vec<_> = (0..count).map(|_| (connect(), 0)).collect();
    let mut is_moving = true;
    while is_moving {
        is_moving = false;
        for (client, sent) in &mut clients {
            let before = *sent;
            *sent = client.fill(bytes, before);
            is_moving |= *sent > before;
        }
        server.wait_until_quiet();
    }
    assert!(clients.iter().all(|(_, sent)| *sent < bytes.len()));
    clients
}

/// A handler made of one function.
pub(crate) struct FnHandler(Box<Process>);

type Process = dyn FnMut(Event, &mut Context<'_>) -> Action;

impl FnHandler {
    pub(crate) fn new(process: impl FnMut(Event, &mut Context<'_>) -> Action + 'static) -> Self {
        Self(Box::new(process))
    }

    pub(crate) fn echo() -> Self {
        Self::new(|event, context| Echo.process(event, context))
    }
}

impl Handler for FnHandler {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        (self.0)(event, context)
    }
}

/// An echo server whose only worker is blocked in a handler, so that events accumulate.
pub(crate) struct BlockedServer {
    // Dropped before the server, whose drop would otherwise wait for the blocked worker.
    release: Sender<()>,
    blocking: Client,
    pub(crate) server: TestServer,
}

impl BlockedServer {
    /// Blocks a server that already has `count` clients.
    pub(crate) fn new(count: usize) -> (Self, Vec<Client>) {
        let (release, released) = mpsc::channel();
        let (is_blocked, released) = (Arc::new(AtomicBool::new(false)), Mutex::new(released));
        let shared = Arc::new((Arc::clone(&is_blocked), released));
        let server = TestServer::run(bind(config()), move |_peer| {
            let shared = Arc::clone(&shared);
            FnHandler::new(move |event, context| {
                if context.input.data() == b"block" {
                    shared.0.store(true, SeqCst);
                    // An error means that a failing test has dropped the sender.
                    let _released = shared.1.lock().unwrap().recv();
                }
                Echo.process(event, context)
            })
        });
        let clients = server.connect_many(count);
        ping_all(&clients, b"connected");
        let blocking = server.connect();
        blocking.send(b"block");
        wait_until("the worker is blocked", || is_blocked.load(SeqCst));
        let server = Self {
            release,
            blocking,
            server,
        };
        (server, clients)
    }

    /// Unblocks the worker and closes the connection that blocked it.
    pub(crate) fn release(self) -> TestServer {
        self.release.send(()).expect("the handler waits for it");
        self.blocking.expect(b"block");
        self.blocking.close();
        self.server
    }
}
