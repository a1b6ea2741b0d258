//! What every test needs: a server that cleans up after itself, clients that cannot hang, and data
//! in which no two places look alike.

mod program;
mod protocol;

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::iter;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::num::NonZeroUsize;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use echoserver::{Address, Config, Echo, Handle, Handler, Peer, Server, Stats, WorkerStats};
use socket2::{Domain, SockRef, Socket, Type};

pub(crate) use program::Program;
pub(crate) use protocol::{HeldServer, Protocol};

/// How long anything may take. Far more than it does: it only keeps a broken server from hanging
/// the tests.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds.
///
/// # Panics
///
/// If it doesn't by the [`DEADLINE`]; `what` says what was waited for.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Data in which no two stretches of 8 bytes are alike, so that a byte lost, doubled or out of
/// order shows.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    // SplitMix64: consecutive states, scrambled.
    let scrambled = |index: u64| {
        let mut word = (seed << 40 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    };
    let mut bytes = vec![0; len];
    for (index, chunk) in bytes.chunks_mut(8).enumerate() {
        chunk.copy_from_slice(&scrambled(index as u64).to_le_bytes()[..chunk.len()]);
    }
    bytes
}

/// How many of `wanted` connections this process can be a client of: not all, where the limit of
/// descriptors is low. Says so then.
pub(crate) fn connections_possible(wanted: usize) -> usize {
    /// For what other tests have open meanwhile.
    const OTHERS: u64 = 3_000;
    let limit = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(0);
    let room = usize::try_from(limit.saturating_sub(OTHERS)).unwrap_or(usize::MAX);
    let possible = wanted.min(room.max(50));
    if possible < wanted {
        println!("{possible} connections instead of {wanted}: the descriptor limit is {limit}");
    }
    possible
}

/// A server's configuration for tests: one worker, on a loopback port of its own.
pub(crate) fn config() -> Config {
    Config {
        listen: vec![Address::Ip(([127, 0, 0, 1], 0).into())],
        workers: NonZeroUsize::MIN,
        ..Config::default()
    }
}

/// A server in this process. Its drop shuts it down, joins it, and checks its books.
pub(crate) struct TestServer {
    address: SocketAddr,
    handle: Handle,
    serving: Option<JoinHandle<io::Result<Stats>>>,
    /// What it sends is what it got.
    is_echo: bool,
}

impl TestServer {
    /// An echo server with one worker.
    pub(crate) fn echo() -> Self {
        Self::echo_with(config())
    }

    pub(crate) fn echo_with(config: Config) -> Self {
        BoundServer::new(config).run_echo()
    }

    /// A server of any protocol; `handler` makes the handlers.
    pub(crate) fn serve<H: Handler + 'static>(
        config: Config,
        handler: impl Fn(&Peer) -> H + Send + Sync + 'static,
    ) -> Self {
        BoundServer::new(config).run(handler)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
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

    /// Waits until the server holds bytes that nobody takes, and has stopped moving any.
    pub(crate) fn until_stuck(&self) {
        self.until_still_with("is stuck", |total| total.buffered > 0);
    }

    /// Waits until the server has begun to move bytes, and has stopped.
    pub(crate) fn until_still(&self) {
        self.until_still_with("stands still", |total| total.bytes_in > 0);
    }

    fn until_still_with(&self, state: &str, has_it: impl Fn(&WorkerStats) -> bool) {
        let (mut before, mut alike) = (self.stats(), 0);
        until(&format!("the server {state}"), || {
            let now = self.stats();
            alike = if now == before { alike + 1 } else { 0 };
            before = now;
            alike >= 50 && has_it(&before.total())
        });
    }

    pub(crate) fn shut_down(&self) {
        self.handle.shut_down();
    }

    pub(crate) fn is_shut_down(&self) -> bool {
        self.handle.is_shut_down()
    }

    /// Shuts it down and returns what it counted, or why it failed.
    pub(crate) fn outcome(mut self) -> io::Result<Stats> {
        self.handle.shut_down();
        let serving = self.serving.take();
        ended(serving.expect("only this and the drop take it"))
    }

    /// Shuts it down, checks its books, and returns them.
    pub(crate) fn stop(self) -> Stats {
        let is_echo = self.is_echo;
        let stats = self.outcome().expect("the server has not failed");
        check_counters(&stats, is_echo);
        stats
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let Some(serving) = self.serving.take() else {
            return;
        };
        self.handle.shut_down();
        // A test that fails already has said what is wrong, and its clients may still be there.
        if !thread::panicking() {
            let stats = ended(serving).expect("the server has not failed");
            check_counters(&stats, self.is_echo);
        }
    }
}

/// Waits for a server that is to end, and joins its thread.
fn ended(serving: JoinHandle<io::Result<Stats>>) -> io::Result<Stats> {
    until("the server ends", || serving.is_finished());
    serving
        .join()
        .expect("the server's thread has not panicked")
}

/// Contract: nothing is lost, neither a connection nor a byte.
fn check_counters(stats: &Stats, is_echo: bool) {
    assert_eq!(stats.check_balance(), None, "{stats}");
    assert_eq!(stats.open(), 0, "{stats}");
    assert_eq!(stats.total().buffered, 0, "{stats}");
    if is_echo {
        assert_eq!(stats.total().bytes_generated, 0, "{stats}");
    }
}

/// A server that listens and isn't running yet: clients can connect, and wait in the backlog.
pub(crate) struct BoundServer(Server);

impl BoundServer {
    pub(crate) fn new(config: Config) -> Self {
        Self(Server::bind(config).expect("a loopback port is free"))
    }

    pub(crate) fn address(&self) -> SocketAddr {
        match self.0.addresses() {
            [Address::Ip(address)] => *address,
            other => panic!("not one IP address: {other:?}"),
        }
    }

    pub(crate) fn handle(&self) -> Handle {
        self.0.handle()
    }

    pub(crate) fn run_echo(self) -> TestServer {
        let mut server = self.run(|_peer| Echo);
        server.is_echo = true;
        server
    }

    pub(crate) fn run<H: Handler + 'static>(
        self,
        handler: impl Fn(&Peer) -> H + Send + Sync + 'static,
    ) -> TestServer {
        let (address, handle) = (self.address(), self.0.handle());
        let serving = thread::spawn(move || self.0.run(handler));
        TestServer {
            address,
            handle,
            serving: Some(serving),
            is_echo: false,
        }
    }
}

/// A client, all of whose reads and writes have a deadline.
pub(crate) struct Client(pub(crate) TcpStream);

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        Self::connect_by(socket, address)
    }

    /// Connects with little room in the kernel for what comes back, so that the server soon notices
    /// when it isn't read.
    pub(crate) fn connect_narrow(address: SocketAddr) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // Before it connects: the window is agreed upon then.
        socket.set_recv_buffer_size(64 << 10).unwrap();
        Self::connect_by(socket, address)
    }

    fn connect_by(socket: Socket, address: SocketAddr) -> Self {
        let connected = socket.connect_timeout(&address.into(), DEADLINE);
        connected.expect("it listens");
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(stream)
    }

    /// Another handle to the same connection, to send on it from another thread.
    pub(crate) fn twin(&self) -> Self {
        Self(self.0.try_clone().expect("a descriptor is free"))
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("the server takes the bytes");
    }

    /// Sends `bytes` from `position` on until the kernel takes no more; returns how far that is.
    pub(crate) fn stuff(&mut self, bytes: &[u8], mut position: usize) -> usize {
        self.0.set_nonblocking(true).unwrap();
        while position < bytes.len() {
            match self.0.write(&bytes[position..]) {
                Ok(count) => position += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("the server is gone: {error}"),
            }
        }
        self.0.set_nonblocking(false).unwrap();
        position
    }

    /// Sends `bytes`, unless the connection ends first.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Reads as many bytes as `bytes` has, which they must equal.
    pub(crate) fn expect(&mut self, bytes: &[u8]) {
        let count = self.expect_prefix(bytes);
        assert_eq!(count, bytes.len(), "the stream ended early");
    }

    /// Reads as many bytes as `bytes` has, or up to the stream's end. They must be equal so far;
    /// returns how far that is.
    pub(crate) fn expect_prefix(&mut self, bytes: &[u8]) -> usize {
        let mut chunk = vec![0; bytes.len().min(256 << 10)];
        let mut done = 0;
        while done < bytes.len() {
            let wanted = chunk.len().min(bytes.len() - done);
            let count = self.0.read(&mut chunk[..wanted]).unwrap_or_else(|error| {
                panic!("{done} of {} bytes came, and then: {error}", bytes.len())
            });
            if count == 0 {
                break;
            }
            if chunk[..count] != bytes[done..done + count] {
                let same = iter::zip(&chunk, &bytes[done..]).take_while(|(a, b)| a == b);
                panic!("byte {} is not what was sent", done + same.count());
            }
            done += count;
        }
        done
    }

    /// Reads the stream's end: no byte more, and no reset.
    pub(crate) fn expect_end(&mut self) {
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(count) => assert_eq!(count, 0, "a byte too many: {byte:?}"),
            Err(error) => panic!("not the stream's end: {error}"),
        }
    }

    /// Reads something, and returns how much; 0 is the stream's end.
    pub(crate) fn read_some(&mut self) -> usize {
        self.0
            .read(&mut [0; 16 << 10])
            .expect("the stream is whole")
    }

    /// Reads until the connection is gone: ended or reset, but nothing else comes.
    pub(crate) fn expect_gone(&mut self) {
        match self.0.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => panic!("a byte came"),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
        }
    }

    /// Sends `bytes` and reads them back. They should be few enough to fit into the kernel.
    pub(crate) fn ping(&mut self, bytes: &[u8]) {
        self.send(bytes);
        self.expect(bytes);
    }

    /// Ends the client's half of the stream.
    pub(crate) fn end(&self) {
        self.0.shutdown(Shutdown::Write).expect("it is connected");
    }

    /// Ends both halves in order: nothing is missing, nothing too much.
    pub(crate) fn close(mut self) {
        self.end();
        self.expect_end();
    }

    /// Resets the connection.
    pub(crate) fn reset(self) {
        let lingering = SockRef::from(&self.0).set_linger(Some(Duration::ZERO));
        lingering.expect("it is connected");
    }
}

/// Elsewhere nothing tells, and a loopback delivers at once.
#[cfg(not(target_os = "linux"))]
pub(crate) fn until_arrived(_clients: &[Client]) {}

/// Sends `bytes` on each connection.
pub(crate) fn send_all(clients: &mut [Client], bytes: &[u8]) {
    for client in clients {
        client.send(bytes);
    }
}

/// Reads `bytes` on each connection.
pub(crate) fn expect_all(clients: &mut [Client], bytes: &[u8]) {
    for client in clients {
        client.expect(bytes);
    }
}

/// Sends `bytes` on each connection, and then reads them back.
pub(crate) fn ping_all(clients: &mut [Client], bytes: &[u8]) {
    send_all(clients, bytes);
    expect_all(clients, bytes);
}

/// Clients that have written until nothing moved any more, and how far each of them got.
pub(crate) fn stuffed(server: &TestServer, count: usize, bytes: &[u8]) -> Vec<(Client, usize)> {
    let mut clients: Vec<_> = (0..count)
        .map(|_| (Client::connect_narrow(server.address()), 0))
        .collect();
    loop {
        let before: usize = clients.iter().map(|(_, position)| position).sum();
        for (client, position) in &mut clients {
            *position = client.stuff(bytes, *position);
        }
        if before == clients.iter().map(|(_, position)| position).sum::<usize>() {
            break;
        }
        server.until_still();
    }
    assert!(
        clients.iter().all(|(_, position)| *position < bytes.len()),
        "everybody is stuck"
    );
    clients
}

/// Waits until everything that `clients` have sent, ends included, is in the server's kernel.
#[cfg(target_os = "linux")]
pub(crate) fn until_arrived(clients: &[Client]) {
    let port = |address: &str| u16::from_str_radix(address.rsplit(':').next()?, 16).ok();
    let mut on_their_way: HashSet<_> = clients
        .iter()
        .map(|client| Some(client.0.local_addr().unwrap().port()))
        .collect();
    let server = clients
        .first()
        .map(|client| client.0.peer_addr().unwrap().port());
    until("everything has arrived", || {
        // `sl local remote state sending:receiving ...`: nothing is left to send, or unacknowledged.
        for line in std::fs::read_to_string("/proc/net/tcp").unwrap().lines() {
            let words: Vec<_> = line.split_whitespace().take(5).collect();
            if port(words[2]) == server && words[4].starts_with("00000000:") {
                on_their_way.remove(&port(words[1]));
            }
        }
        on_their_way.is_empty()
    });
}

/// Sends `bytes` on a connection of their own, reading meanwhile: all of them come back, and then
/// the end.
pub(crate) fn check_echo(address: SocketAddr, bytes: &[u8]) {
    let mut client = Client::connect(address);
    let mut sender = client.twin();
    thread::scope(|scope| {
        scope.spawn(|| {
            sender.send(bytes);
            sender.end();
        });
        client.expect(bytes);
        client.expect_end();
    });
}
