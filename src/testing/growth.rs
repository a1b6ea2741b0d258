//! A worker with many connections, to measure how its costs grow with their number: see `benches/growth.rs`.
//!
//! Worker, table, timers and connections are the code that serves sockets. Poll and streams answer at once and keep nothing
//! for each connection, so what is counted is the server.

use std::io::{self, Read, Write};
use std::mem::{self, MaybeUninit};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

use crate::connection::Resources;
use crate::connection::buffer::Pool;
use crate::connection::handler::Echo;
use crate::connection::shared::{Shared, Timeouts};
use crate::connection::waker::WakeQueue;
use crate::net::stream::Socket;
use crate::peer::Peer;
use crate::server::acceptor::Accepted;
use crate::server::control::Control;
use crate::server::dispatcher::Dispatcher;
use crate::server::table::ConnectionTable;
use crate::server::worker::Worker;
use crate::stats::WorkerCounters;
use crate::system::{Millis, PollEvent, Poller, Readiness, Stream, Wake};

/// The time between two rounds.
const ROUND: Millis = 10;

/// A connection sends a message in one of this many rounds: 1 % are active in each.
const ROUNDS_PER_MESSAGE: u64 = 100;

/// Twice the time between two messages of a connection, so none expires, and its timer is set again after every second
/// message.
const IDLE_TIMEOUT: Millis = 2 * ROUND * ROUNDS_PER_MESSAGE;

const MESSAGE_BYTES: usize = 64;

/// As many as the poll of the operating system reports.
const MAX_EVENTS: usize = 1024;

/// New connections per tick, no more than a worker takes.
const MAX_DISPATCHED: usize = 100;

/// A prime that divides no number of connections, so that each sends one message in turn, in an order without pattern.
const STRIDE: u64 = 2_654_435_761;

/// A worker with connections that send small messages now and then.
#[derive(Debug)]
pub struct ManyConnections {
    worker: Worker<Client, Echo, NoWaker>,
    /// Without it the worker would shut down.
    dispatcher: Dispatcher<Accepted<Client>, NoWaker>,
    poll: Poll,
    counters: Arc<CachePadded<WorkerCounters>>,
}

impl ManyConnections {
    /// Opens `count` connections, a multiple of 100, each hundredth of them 10 ms after the one before.
    ///
    /// # Panics
    ///
    /// If memory is lacking.
    #[must_use]
    pub fn open(count: u64) -> Self {
        let timeouts = Timeouts {
            idle: Some(IDLE_TIMEOUT),
            answer: None,
            close: IDLE_TIMEOUT,
            linger: IDLE_TIMEOUT,
            stuck: IDLE_TIMEOUT,
            drain: IDLE_TIMEOUT,
        };
        let counters = Arc::<CachePadded<WorkerCounters>>::default();
        let pool = Pool::new(64 << 10).expect("memory for a pair of buffers");
        let (wakes, wake_ups) = WakeQueue::new(|| {});
        let shared = Shared::new(timeouts, wakes, Arc::clone(&counters));
        let table = ConnectionTable::new(Resources { pool, shared }, wake_ups, 0);
        let control = Arc::new(Control::new(count as usize, NoWaker, []));
        let (dispatcher, receivers) = Dispatcher::new(MAX_DISPATCHED, [NoWaker]);
        let receiver = receivers.into_iter().next().expect("one for the waker");
        let mut this = Self {
            worker: Worker::new(table, receiver, control, Arc::clone(&counters)),
            dispatcher,
            poll: Poll::new(count),
            counters,
        };
        for _ in 0..ROUNDS_PER_MESSAGE {
            this.poll.now += ROUND;
            let mut remaining = count / ROUNDS_PER_MESSAGE;
            while remaining > 0 {
                let batch = remaining.min(MAX_DISPATCHED as u64);
                for _ in 0..batch {
                    let accepted = Accepted {
                        stream: Client(MaybeUninit::uninit()),
                        peer: Peer::Unix,
                        number: 0,
                    };
                    let outcome = this.dispatcher.try_dispatch(accepted);
                    assert!(outcome.is_ok(), "the tick before has emptied the queue");
                }
                remaining -= batch;
                this.poll.has_new = true;
                this.tick();
            }
        }
        this
    }

    /// Runs rounds, in each of which 1 % of the connections send a message. Returns how long the longest tick took.
    ///
    /// # Panics
    ///
    /// If a message is not echoed, or a connection is closed.
    // Not inlined, because `benches/growth.rs` counts the instructions of this symbol.
    #[inline(never)]
    pub fn exchange_messages(&mut self, rounds: u64) -> Duration {
        let mut longest = Duration::ZERO;
        for _ in 0..rounds {
            self.poll.now += ROUND;
            self.poll.arrived += self.poll.connections / ROUNDS_PER_MESSAGE;
            while self.poll.batch.end < self.poll.arrived {
                let start = Instant::now();
                self.tick();
                longest = longest.max(start.elapsed());
            }
        }
        let echoed = self.counters.bytes_out.get();
        assert_eq!(echoed, self.poll.arrived * MESSAGE_BYTES as u64);
        assert_eq!(self.counters.closed(), 0, "no connection is closed");
        longest
    }

    /// How many messages were echoed.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.poll.arrived
    }

    fn tick(&mut self) {
        let new_handler = |_: &Client, _, _| Echo;
        let outcome = self.worker.tick(&mut self.poll, &new_handler);
        outcome.expect("this poll does not fail");
    }
}

/// A stream on which a message is read whenever one was announced, and everything can be written. It is as large as a socket.
#[derive(Debug)]
struct Client(#[allow(dead_code, reason = "for its size")] MaybeUninit<Socket>);

impl Read for Client {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(bytes.len().min(MESSAGE_BYTES))
    }
}

impl Write for Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Client {
    fn shutdown_write(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn poll_delivery(&mut self) -> bool {
        true
    }

    fn unread(&self) -> u64 {
        0
    }

    fn reset_on_close(&mut self) {}
}

#[derive(Debug)]
struct NoWaker;

impl Wake for NoWaker {
    fn wake(&self) {}
}

/// A poll that reports messages by their number, from which it computes the connection.
#[derive(Debug)]
struct Poll {
    connections: u64,
    now: Millis,
    /// Connections are in the worker's queue.
    has_new: bool,
    /// The last poll has reported that.
    has_woken: bool,
    /// How many messages have arrived.
    arrived: u64,
    /// The numbers of those that the last poll has reported.
    batch: Range<u64>,
}

impl Poll {
    fn new(connections: u64) -> Self {
        Self {
            connections,
            now: 0,
            has_new: false,
            has_woken: false,
            arrived: 0,
            batch: 0..0,
        }
    }
}

impl Poller<Client> for Poll {
    fn poll(&mut self, _: Option<Millis>) -> io::Result<bool> {
        let start = self.batch.end;
        self.batch = start..self.arrived.min(start + MAX_EVENTS as u64);
        self.has_woken = mem::take(&mut self.has_new);
        Ok(self.batch.end < self.arrived)
    }

    fn max_events(&self) -> usize {
        MAX_EVENTS
    }

    fn events(&self) -> impl Iterator<Item = PollEvent> {
        let readable = Readiness {
            readable: true,
            ..Readiness::default()
        };
        let token = |number| (number * STRIDE % self.connections) as usize;
        let messages = self.batch.clone();
        let messages = messages.map(move |number| PollEvent::Ready(token(number), readable));
        let wake = self.has_woken.then_some(PollEvent::Wake);
        messages.chain(wake)
    }

    fn now(&self) -> Millis {
        self.now
    }

    fn register(&mut self, _: &mut Client, _: usize) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
