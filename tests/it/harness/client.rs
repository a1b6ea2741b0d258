//! A client whose reads and writes have a timeout.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::{Duration, Instant};
use std::{iter, thread};

use socket2::{SockAddr, Socket, Type};

use super::{DEADLINE, wait_until};

/// Once the server has taken no byte for this long, it is taken to be unable to.
const STUCK: Duration = Duration::from_millis(300);

/// A connection to a server, over TCP or a Unix-domain socket.
#[derive(Debug)]
pub(crate) struct Client(pub(crate) Socket);

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::connect_to(&address.into(), None)
    }

    /// Connects with a small receive buffer, so that unread output soon backs up into the server.
    pub(crate) fn connect_with_receive_buffer(address: SocketAddr, bytes: usize) -> Self {
        Self::connect_to(&address.into(), Some(bytes))
    }

    #[cfg(unix)]
    pub(crate) fn connect_unix(path: impl AsRef<std::path::Path>) -> Self {
        Self::connect_to(&SockAddr::unix(path).expect("the path is short"), None)
    }

    fn connect_to(address: &SockAddr, receive_buffer: Option<usize>) -> Self {
        let socket =
            Socket::new(address.domain(), Type::STREAM, None).expect("a descriptor is free");
        if let Some(bytes) = receive_buffer {
            // Before the connection is made: TCP then advertises a window of this size.
            socket.set_recv_buffer_size(bytes).unwrap();
        }
        let connected = socket.connect_timeout(address, DEADLINE);
        connected.expect("the server listens");
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        if !address.is_unix() {
            socket.set_tcp_nodelay(true).unwrap();
        }
        Self(socket)
    }

    pub(crate) fn local_address(&self) -> SocketAddr {
        let address = self.0.local_addr().unwrap();
        address.as_socket().expect("a TCP connection")
    }

    pub(crate) fn send(&self, bytes: &[u8]) {
        self.try_send(bytes).expect("the server takes the bytes");
    }

    /// Sends `bytes`, unless the connection ends first.
    pub(crate) fn try_send(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.0).write_all(bytes)
    }

    /// Sends `bytes`, starting at `position`, until a write would block; returns the new position.
    pub(crate) fn fill(&self, bytes: &[u8], position: usize) -> usize {
        self.try_fill(bytes, position).expect("the server is there")
    }

    /// The same, unless the connection ends first.
    pub(crate) fn try_fill(&self, bytes: &[u8], mut position: usize) -> io::Result<usize> {
        self.0.set_nonblocking(true)?;
        while position < bytes.len() {
            match (&self.0).write(&bytes[position..]) {
                Ok(count) => position += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.0.set_nonblocking(false)?;
        Ok(position)
    }

    /// Sends `bytes` until the server takes no more; returns how many it took.
    pub(crate) fn send_until_stuck(&self, bytes: &[u8]) -> usize {
        let (mut position, mut progress) = (0, Instant::now());
        wait_until("the server takes no more bytes", || {
            let before = position;
            position = self.fill(bytes, position);
            if position > before {
                progress = Instant::now();
            }
            position == bytes.len() || progress.elapsed() > STUCK
        });
        position
    }

    /// Reads as many bytes as `bytes` has, which must be equal.
    pub(crate) fn expect(&self, bytes: &[u8]) {
        let count = self.expect_prefix(bytes);
        assert_eq!(count, bytes.len(), "EOF came early");
    }

    /// Reads as many bytes as `bytes` has, or until EOF. They must be equal so far; returns how many came.
    pub(crate) fn expect_prefix(&self, bytes: &[u8]) -> usize {
        // Not on the heap, for the test that counts allocations.
        let mut chunk = [0; 16 << 10];
        let mut done = 0;
        while done < bytes.len() {
            let room = chunk.len().min(bytes.len() - done);
            let count = self.read(&mut chunk[..room]).unwrap_or_else(|error| {
                panic!("{done} of {} bytes came, then: {error}", bytes.len())
            });
            if count == 0 {
                break;
            }
            let (found, expected) = (&chunk[..count], &bytes[done..done + count]);
            if found != expected {
                let equal = iter::zip(found, expected).take_while(|(a, b)| a == b);
                let start = equal.count();
                let end = count.min(start + 80);
                panic!(
                    "at byte {}: \"{}\" instead of \"{}\"",
                    done + start,
                    found[start..end].escape_ascii(),
                    expected[start..end].escape_ascii()
                );
            }
            done += count;
        }
        done
    }

    /// Reads as many bytes as `bytes` has, at most `bytes_per_second` of them; they must be equal.
    pub(crate) fn expect_slowly(&self, bytes: &[u8], bytes_per_second: usize) {
        let start = Instant::now();
        let mut read = 0;
        for chunk in bytes.chunks(4096) {
            let due = Duration::from_secs(read as u64) / bytes_per_second as u32;
            thread::sleep(due.saturating_sub(start.elapsed()));
            self.expect(chunk);
            read += chunk.len();
        }
    }

    /// Reads once. The end of a child process can interrupt a read.
    fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.0).read(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Reads what is left, which a reset must end.
    pub(crate) fn expect_reset(&self) {
        let read = io::copy(&mut &self.0, &mut io::sink());
        let error = read.expect_err("EOF instead of a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }

    /// Reads EOF: no byte more, and no reset.
    pub(crate) fn expect_eof(&self) {
        let mut byte = [0];
        let count = self.read(&mut byte).expect("no reset");
        assert_eq!(count, 0, "a byte instead of EOF: {byte:?}");
    }

    /// Reads that the connection has ended, by EOF or reset.
    pub(crate) fn expect_closed(&self) {
        match self.read(&mut [0]) {
            Ok(count) => assert_eq!(count, 0, "a byte came"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
        }
    }

    /// Reads until EOF, which must come.
    pub(crate) fn read_to_end(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let read = (&self.0).take(64 << 20).read_to_end(&mut bytes);
        read.expect("no reset");
        bytes
    }

    /// Sends `bytes` and then reads them back. They must fit into the kernel's buffers.
    pub(crate) fn ping(&self, bytes: &[u8]) {
        self.send(bytes);
        self.expect(bytes);
    }

    /// Sends `bytes` and half-closes on another thread, while reading them back, and then EOF.
    pub(crate) fn check_echo(self, bytes: &[u8]) {
        self.check_echo_of(bytes, bytes);
    }

    /// The same, for a server that answers `answer`.
    pub(crate) fn check_echo_of(self, bytes: &[u8], answer: &[u8]) {
        thread::scope(|scope| {
            scope.spawn(|| {
                self.send(bytes);
                self.shutdown_write();
            });
            self.expect(answer);
            self.expect_eof();
        });
    }

    /// Closes the sending half.
    pub(crate) fn shutdown_write(&self) {
        self.0.shutdown(Shutdown::Write).expect("it is connected");
    }

    /// Closes the sending half and then reads EOF.
    pub(crate) fn close(self) {
        self.shutdown_write();
        self.expect_eof();
    }

    /// Closes the connection with a reset.
    pub(crate) fn reset(self) {
        let linger = self.0.set_linger(Some(Duration::ZERO));
        linger.expect("it is connected");
    }
}

pub(crate) fn send_all(clients: &[Client], bytes: &[u8]) {
    for client in clients {
        client.send(bytes);
    }
}

pub(crate) fn expect_all(clients: &[Client], bytes: &[u8]) {
    for client in clients {
        client.expect(bytes);
    }
}

/// Sends `bytes` on every connection before it reads any of them back.
pub(crate) fn ping_all(clients: &[Client], bytes: &[u8]) {
    send_all(clients, bytes);
    expect_all(clients, bytes);
}

/// Waits until the server's kernel has everything that `clients` have sent, FINs included.
#[cfg(target_os = "linux")]
pub(crate) fn wait_until_received(clients: &[Client]) {
    let remote = |client: &Client| client.0.peer_addr().unwrap().as_socket().unwrap();
    let addresses = |client| (Client::local_address(client), remote(client));
    let mut pending: std::collections::HashSet<_> = clients.iter().map(addresses).collect();
    wait_until("everything sent is acknowledged", || {
        for entry in procfs::net::tcp().expect("/proc is there") {
            if entry.tx_queue == 0 {
                pending.remove(&(entry.local_address, entry.remote_address));
            }
        }
        pending.is_empty()
    });
}

/// Does nothing: other systems do not report it, and loopback delivers at once.
#[cfg(not(target_os = "linux"))]
pub(crate) fn wait_until_received(_clients: &[Client]) {}

/// Connects clients that send `length` bytes, more than fits into the server's buffers and the kernel's, and never read. It
/// should not be much more: the kernel has one limit for the memory of all TCP connections, those of other tests included.
#[cfg(all(target_os = "linux", feature = "cli"))]
pub(crate) fn never_readers(server: SocketAddr, count: usize, length: usize) -> Vec<Client> {
    let bytes = super::random_bytes(3, length);
    let connect = |_| Client::connect_with_receive_buffer(server, 4096);
    let clients: Vec<_> = (0..count).map(connect).collect();
    for _ in 0..2 {
        for client in &clients {
            // A server without memory resets it.
            let _reset = client.try_fill(&bytes, 0);
        }
    }
    clients
}
