//! Two network namespaces, and a link between them that delays, reorders and loses packets.
//!
//! A TUN device in each namespace hands the packets of its kernel to a thread, which passes them on. A namespace has
//! no name: it lives as long as a file or a process refers to it, so nothing is left however a test ends.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use procfs::net::{TcpNetEntries, TcpNetEntry};
use procfs::{FromReadSI, current_system_info};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use tappers::{AddAddressV4, Tun};

use crate::harness::{Client, Process, wait_until};

/// The two ends of the link.
pub(super) const SERVER: usize = 0;
pub(super) const CLIENTS: usize = 1;

const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 9, 0, 1), Ipv4Addr::new(10, 9, 0, 2)];
/// Every packet takes this long, and [`LATE_PERCENT`] of them up to twice as long.
const DELAY: Duration = Duration::from_millis(20);
const LATE_PERCENT: u32 = 10;
const LOST_PER_MILLE: u32 = 15;
/// Longest wait for a packet, after which the thread checks whether it is to end.
const MAX_WAIT: Duration = Duration::from_millis(10);

/// A namespace for a server, one for its clients, and the link between them.
pub(super) struct Network {
    namespaces: [Namespace; 2],
    state: Arc<State>,
    link: Option<JoinHandle<()>>,
}

/// What the link's thread shares with the test.
#[derive(Default)]
struct State {
    stopped: AtomicBool,
    /// Whether each end receives nothing.
    is_cut_off: [AtomicBool; 2],
    lost: AtomicU64,
    overtaken: AtomicU64,
}

impl Network {
    /// Returns `None`, and prints the reason, if this process may not create namespaces or devices.
    pub(super) fn new() -> Option<Self> {
        Self::create().map_or_else(
            |error| {
                let denied = [ErrorKind::PermissionDenied, ErrorKind::NotFound];
                assert!(denied.contains(&error.kind()), "{error}");
                println!("skipped: no network namespace with a TUN device: {error}");
                None
            },
            Some,
        )
    }

    fn create() -> io::Result<Self> {
        let [server, client] = ADDRESSES;
        let (server_namespace, server_end) = Namespace::create(server, client)?;
        let (client_namespace, client_end) = Namespace::create(client, server)?;
        let state = Arc::new(State::default());
        let link = Link {
            ends: [server_end, client_end],
            in_flight: BinaryHeap::new(),
            random: fastrand::Rng::with_seed(1),
            count: 0,
            newest: [0; 2],
            state: Arc::clone(&state),
        };
        Ok(Self {
            namespaces: [server_namespace, client_namespace],
            state,
            link: Some(thread::spawn(|| link.run())),
        })
    }

    /// Starts the program in the server's namespace, at a free port, and waits until it serves.
    pub(super) fn serve(&self, program: &mut Command) -> Process {
        let program = program.arg(format!("--listen={}:0", ADDRESSES[SERVER]));
        self.namespaces[SERVER].run(|| Process::start(program))
    }

    /// Connects `count` clients, whose sockets stay in the clients' namespace.
    pub(super) fn connect_many(&self, server: &Process, count: usize) -> Vec<Client> {
        let address = server.address();
        self.namespaces[CLIENTS].run(|| (0..count).map(|_| Client::connect(address)).collect())
    }

    /// Waits until the server's kernel has everything that `clients` have sent, FINs included.
    pub(super) fn wait_until_received(&self, clients: &[Client]) {
        let pending = |entry: &TcpNetEntry| {
            let is_its = |client: &Client| client.local_address() == entry.local_address;
            entry.tx_queue > 0 && clients.iter().any(is_its)
        };
        self.namespaces[CLIENTS].run(|| {
            wait_until("everything sent is acknowledged", || {
                let path = "/proc/thread-self/net/tcp";
                let table = TcpNetEntries::from_file(path, current_system_info());
                !table.expect("/proc is there").0.iter().any(pending)
            });
        });
    }

    /// From now on, the link loses all packets to these ends, those in flight included.
    pub(super) fn lose_packets_to(&self, ends: &[usize]) {
        for (end, is_cut_off) in self.state.is_cut_off.iter().enumerate() {
            is_cut_off.store(ends.contains(&end), Relaxed);
        }
    }

    /// Checks that the link has lost and reordered packets.
    pub(super) fn check_faults(&self) {
        let [lost, overtaken] = [&self.state.lost, &self.state.overtaken].map(|n| n.load(Relaxed));
        assert!(
            lost > 0 && overtaken > 0,
            "{lost} lost, {overtaken} overtaken"
        );
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.state.stopped.store(true, Relaxed);
        let result = self.link.take().map_or(Ok(()), JoinHandle::join);
        assert!(result.is_ok() || thread::panicking(), "the link failed");
    }
}

/// A network namespace.
struct Namespace(File);

impl Namespace {
    /// Creates a namespace with a point-to-point device.
    fn create(own: Ipv4Addr, peer: Ipv4Addr) -> io::Result<(Self, Tun)> {
        in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let namespace = Self(File::open("/proc/thread-self/ns/net")?);
            let mut end = Tun::new()?;
            let mut address = AddAddressV4::new(own);
            address.set_destination(peer);
            end.add_addr(address)?;
            end.set_up()?;
            end.set_nonblocking(true)?;
            Ok((namespace, end))
        })
    }

    fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        in_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET).expect("it was allowed before");
            body()
        })
    }
}

/// Runs `body` on a thread of its own, because a thread is in one namespace at a time.
fn in_thread<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let result = thread::scope(|scope| scope.spawn(body).join());
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The thread between the two devices.
struct Link {
    ends: [Tun; 2],
    in_flight: BinaryHeap<Reverse<Packet>>,
    random: fastrand::Rng,
    /// Packets sent so far.
    count: u64,
    /// The latest packet that each end has received.
    newest: [u64; 2],
    state: Arc<State>,
}

/// A packet in flight. The earliest is the least.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    due: Instant,
    number: u64,
    to: usize,
    bytes: Vec<u8>,
}

impl Link {
    fn run(mut self) {
        let mut buffer = vec![0; 1 << 16];
        while !self.state.stopped.load(Relaxed) {
            self.wait();
            for from in 0..self.ends.len() {
                // One that would block has no more packets.
                while let Ok(length) = self.ends[from].recv(&mut buffer) {
                    self.send(1 - from, &buffer[..length]);
                }
            }
            self.deliver();
        }
    }

    /// Waits for a packet that is sent or due.
    fn wait(&self) {
        let next = self.in_flight.peek().map(|packet| packet.0.due);
        let timeout = next.map_or(MAX_WAIT, |due| {
            due.saturating_duration_since(Instant::now())
        });
        let timeout = timeout.min(MAX_WAIT).try_into().expect("it is short");
        let [one, other] = &self.ends;
        let mut ends = [one, other].map(|end| PollFd::new(end, PollFlags::IN));
        let result = retry_on_intr(|| poll(&mut ends, Some(&timeout)));
        result.expect("two devices can be polled");
    }

    fn send(&mut self, to: usize, bytes: &[u8]) {
        if self.random.u32(..1000) < LOST_PER_MILLE {
            self.state.lost.fetch_add(1, Relaxed);
            return;
        }
        let extra = match self.random.u32(..100) < LATE_PERCENT {
            true => DELAY.mul_f64(self.random.f64()),
            false => Duration::ZERO,
        };
        self.count += 1;
        self.in_flight.push(Reverse(Packet {
            due: Instant::now() + DELAY + extra,
            number: self.count,
            to,
            bytes: bytes.to_vec(),
        }));
    }

    /// Delivers what is due.
    fn deliver(&mut self) {
        while let Some(first) = self.in_flight.peek_mut() {
            if first.0.due > Instant::now() {
                break;
            }
            let packet = PeekMut::pop(first).0;
            let Packet { number, to, .. } = packet;
            if self.state.is_cut_off[to].load(Relaxed) {
                continue;
            }
            if number < self.newest[to] {
                self.state.overtaken.fetch_add(1, Relaxed);
            }
            self.newest[to] = self.newest[to].max(number);
            // A device without room loses the packet, as any link does.
            let _sent = self.ends[to].send(&packet.bytes);
        }
    }
}
