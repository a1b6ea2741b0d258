//! The system calls: the streams, listeners, pollers and wakers that the server works with.
//!
//! Before a call takes effect, something else may happen: another thread runs a tick, a client acts, or time
//! passes.

use std::cell::{OnceCell, RefCell, RefMut};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::{Rc, Weak};

use super::connection::{Close, WriteShutdown};
use super::kernel::{ACCEPTOR, Kernel, SimEvent, Source, TickPhase};
use crate::connection::buffer::OUT_OF_MEMORY;
use crate::peer::Peer;
use crate::system::{Listen, Millis, PollEvent, Poller, Stream, Wake};

/// The threads of the server.
pub(super) trait Threads {
    /// Runs a tick of a thread, unless it is in a tick already.
    fn tick(&self, thread: usize);
}

/// The kernel and the threads that call it.
pub(super) struct Machine<'a> {
    pub(super) kernel: RefCell<Kernel<'a>>,
    pub(super) threads: OnceCell<Weak<dyn Threads + 'a>>,
}

impl<'a> Machine<'a> {
    /// Enters a system call.
    fn enter(&self) -> RefMut<'_, Kernel<'a>> {
        let mut kernel = self.kernel.borrow_mut();
        let interval = kernel.parameters.interrupt_interval;
        if !kernel.rng.one_in(interval) {
            return kernel;
        }
        match kernel.rng.below(4) {
            0 => kernel.now += kernel.rng.below(3) as u64,
            1 => {
                let threads = kernel.pollers.len();
                let thread = kernel.rng.below(threads);
                drop(kernel);
                self.run_if_ready(thread);
                return self.kernel.borrow_mut();
            }
            _ => kernel.run_random_client(),
        }
        kernel
    }

    /// Runs a tick of another thread.
    fn run_if_ready(&self, thread: usize) {
        if self.kernel.borrow().is_ready(thread)
            && let Some(threads) = self.threads.get().and_then(Weak::upgrade)
        {
            threads.tick(thread);
        }
    }
}

/// The server's side of a connection.
pub(super) struct SimStream<'a> {
    id: usize,
    machine: Rc<Machine<'a>>,
}

impl Read for SimStream<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let looks_for_eof = self.machine.kernel.borrow().connections[self.id].found_empty;
        let mut kernel = self.machine.enter();
        let (kernel, id) = (&mut *kernel, self.id);
        kernel.account(id, 0, 0);
        kernel.check(!bytes.is_empty(), || {
            format!("connection {id} reads into a full buffer")
        });
        if kernel.is_interrupted() {
            kernel.connections[id].found_empty = looks_for_eof;
            return Err(ErrorKind::Interrupted.into());
        }
        let connection = &mut kernel.connections[id];
        if connection.unread() > 0 {
            let count = kernel.read(id, bytes, looks_for_eof);
            kernel.record(|| format!("connection {id}: read returns {count} of {}", bytes.len()));
            return Ok(count);
        }
        if connection.reset_by_client && !connection.reset_reported {
            connection.reset_reported = true;
            let error = match connection.vanishes {
                true => ErrorKind::TimedOut,
                false => ErrorKind::ConnectionReset,
            };
            kernel.record(|| format!("connection {id}: read returns {error}"));
            return Err(error.into());
        }
        if connection.half_closed || connection.reset_by_client {
            let is_serving = connection.write_shutdown.is_none()
                && connection.close_requested.is_none()
                && connection.refusal.is_none();
            connection.ended |= is_serving;
            let is_second = is_serving && connection.eof_reported;
            connection.eof_reported = true;
            kernel.record(|| format!("connection {id}: read returns EOF"));
            kernel.check(!is_second, || format!("connection {id} reads after EOF"));
            return Ok(0);
        }
        kernel.record(|| format!("connection {id}: read would block"));
        Err(ErrorKind::WouldBlock.into())
    }
}

impl Kernel<'_> {
    /// Decides whether the current call is interrupted.
    fn is_interrupted(&mut self) -> bool {
        let interval = self.parameters.interrupt_interval;
        self.rng.one_in(2 * interval)
    }

    /// Moves unread bytes to the server; returns their number.
    fn read(&mut self, id: usize, bytes: &mut [u8], looks_for_eof: bool) -> usize {
        let truncate = self.parameters.short_reads_unreliable && self.rng.one_in(2);
        let connection = &mut self.connections[id];
        let mut count = connection.unread().min(bytes.len());
        if let Some(urgent) = connection.urgent.filter(|urgent| *urgent > connection.read) {
            count = count.min(urgent - connection.read);
        }
        if truncate {
            count = self.rng.up_to(count);
        }
        connection.found_unread = false;
        let unread = &connection.input[connection.read..];
        bytes[..count].copy_from_slice(&unread[..count]);
        connection.read += count;
        self.bytes_read += count as u64;
        self.account(id, count, 0);
        self.check_reading(id, count, looks_for_eof);
        count
    }
}

impl Write for SimStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kernel = self.machine.enter();
        let (kernel, id) = (&mut *kernel, self.id);
        kernel.account(id, 0, 0);
        if kernel.is_interrupted() {
            return Err(ErrorKind::Interrupted.into());
        }
        OUT_OF_MEMORY.set(kernel.parameters.lacks_memory && kernel.rng.one_in(4));
        let truncate = kernel.rng.one_in(8);
        let connection = &mut kernel.connections[id];
        if connection.reset_by_client {
            connection.reset_reported = true;
            let error = match connection.vanishes {
                true => ErrorKind::TimedOut,
                false => ErrorKind::BrokenPipe,
            };
            kernel.record(|| format!("connection {id}: write returns {error}"));
            return Err(error.into());
        }
        let room = connection.room();
        if room == 0 {
            (connection.awaits_writable, connection.blocked) = (true, true);
            kernel.record(|| format!("connection {id}: write would block"));
            return Err(ErrorKind::WouldBlock.into());
        }
        let mut count = room.min(bytes.len());
        connection.awaits_writable |= count < bytes.len();
        if kernel.parameters.tiny_writes {
            count = 1;
        } else if truncate {
            count = kernel.rng.up_to(count);
        }
        let connection = &mut kernel.connections[id];
        let start = connection.written;
        let expected = connection.expected.get(start..).unwrap_or_default();
        let difference = match expected.starts_with(&bytes[..count]) {
            true => None,
            false => Some(compare(start, expected, &bytes[..count])),
        };
        let is_shut_down = connection.write_shutdown.is_some();
        connection.written += count;
        if connection.room() == 0 {
            connection.room_since = u64::MAX;
        }
        kernel.bytes_written += count as u64;
        kernel.account(id, 0, count);
        kernel.record(|| format!("connection {id}: write takes {count} of {}", bytes.len()));
        if let Some(difference) = difference {
            kernel.fail(format!("connection {id} wrote wrong bytes: {difference}"));
        }
        kernel.check(!is_shut_down, || {
            format!("connection {id} wrote after it had shut down its side")
        });
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Describes the difference between the expected output from `start` on and what was written.
fn compare(start: usize, expected: &[u8], written: &[u8]) -> String {
    /// Bytes that are shown before the first that differs, and from it on.
    const BEFORE: usize = 8;
    const AFTER: usize = 24;
    let same = expected.iter().zip(written).take_while(|(a, b)| a == b);
    let at = same.count();
    let show = |bytes: &[u8]| {
        let end = bytes.len().min(at + AFTER);
        bytes[at.saturating_sub(BEFORE).min(end)..end]
            .escape_ascii()
            .to_string()
    };
    format!(
        "the first that differs is at position {} of its output; expected \"{}\", written \"{}\"",
        start + at,
        show(expected),
        show(written)
    )
}

impl Stream for SimStream<'_> {
    fn shutdown_write(&mut self) -> io::Result<()> {
        let mut kernel = self.machine.enter();
        let (kernel, id) = (&mut *kernel, self.id);
        kernel.account(id, 0, 0);
        kernel.record(|| format!("connection {id}: the server shuts down its side"));
        if kernel.connections[id].reset_by_client {
            kernel.connections[id].reset_reported = true;
            return Err(ErrorKind::NotConnected.into());
        }
        kernel.check_refusal(id);
        let deadline = kernel.deadline_in_tick(id);
        let poller = &kernel.pollers[kernel.current];
        let (now, sequence) = (poller.now, poller.sequence);
        let connection = &mut kernel.connections[id];
        let shutdown = WriteShutdown {
            at: now,
            read: connection.read,
            had_input: connection.had_input(sequence),
            deadline,
            ignored_event: connection.reported > connection.read,
            ignored_input: connection.unread() > 0
                && connection.unread_since <= connection.asked_unread,
        };
        let twice = connection.write_shutdown.replace(shutdown).is_some();
        connection.quiet_since = now;
        kernel.check(!twice, || {
            format!("connection {id} shut down its side twice")
        });
        kernel.check_delivered(id);
        kernel.check_eof(id);
        Ok(())
    }

    fn poll_delivery(&mut self) -> bool {
        let mut kernel = self.machine.enter();
        let (kernel, id) = (&mut *kernel, self.id);
        kernel.account(id, 0, 0);
        let connection = &mut kernel.connections[id];
        connection.reports_delivery = true;
        let is_delivered =
            connection.acknowledged == connection.written || connection.reset_by_client;
        if !is_delivered {
            (connection.awaits_writable, connection.blocked) = (true, true);
            connection.room_since = u64::MAX;
        }
        connection.found_delivered = is_delivered;
        kernel.record(|| format!("connection {id}: delivered: {is_delivered}"));
        is_delivered
    }

    fn unread(&self) -> u64 {
        // `finish` asks for delivery first; of the others, `limit_reading` is the first.
        let is_done = self.machine.kernel.borrow().connections[self.id].found_delivered;
        let mut kernel = self.machine.enter();
        kernel.account(self.id, 0, 0);
        let sequence = kernel.sequence;
        let connection = &mut kernel.connections[self.id];
        connection.asked_unread = sequence;
        connection.found_unread = connection.unread() > 0;
        connection.found_empty = !connection.found_unread;
        if !is_done && connection.read_limit.is_none() {
            connection.read_limit = Some(connection.arrived);
            connection.ended_in_time = connection.half_closed;
        }
        let unread = connection.unread() as u64;
        let is_late = |limit| limit <= connection.read;
        if is_done && unread > 0 && connection.read_limit.is_some_and(is_late) {
            kernel.note_refusal(self.id);
        }
        unread
    }

    fn reset_on_close(&mut self) {
        let mut kernel = self.machine.enter();
        kernel.connections[self.id].abort_requested = true;
    }

    fn short_read_means_drained(&self) -> bool {
        let kernel = self.machine.kernel.borrow();
        !kernel.parameters.short_reads_unreliable
    }
}

impl Drop for SimStream<'_> {
    fn drop(&mut self) {
        // The kernel is borrowed only while a panic unwinds.
        if let Ok(mut kernel) = self.machine.kernel.try_borrow_mut() {
            kernel.close(self.id);
        }
    }
}

impl Kernel<'_> {
    /// Closes a connection. A close with unread bytes sends a reset, which destroys output in flight.
    fn close(&mut self, id: usize) {
        let thread = self.current;
        self.check_last_close(thread);
        let deadline = self.deadline_in_tick(id);
        let (holders, victim) = (self.holders(thread).count(), self.check_victim(thread, id));
        let poller = &self.pollers[thread];
        let (now, sequence) = (poller.now, poller.sequence);
        let connection = &mut self.connections[id];
        let close = Close {
            at: now,
            read: connection.read,
            reset: connection.abort_requested || connection.unread() > 0,
            had_room: connection.room() > 0 && connection.room_since < sequence,
            had_input: connection.had_input(sequence),
            deadline,
            holders,
            victim,
        };
        connection.close = Some(close);
        connection.reset_by_server |= close.reset;
        self.descriptors -= 1;
        if let Some((poller, _)) = connection.registered {
            self.deregister(poller, Source::Connection(id));
        }
        self.pollers[thread].uncounted_drop = Some(id);
        self.record(|| {
            format!(
                "connection {id}: the server drops it; reset: {}",
                close.reset
            )
        });
    }
}

/// A listener of the server.
pub(super) struct SimListener<'a> {
    index: usize,
    machine: Rc<Machine<'a>>,
}

impl<'a> SimListener<'a> {
    pub(super) fn new(index: usize, machine: &Rc<Machine<'a>>) -> Self {
        Self {
            index,
            machine: Rc::clone(machine),
        }
    }
}

impl<'a> Listen for SimListener<'a> {
    type Stream = SimStream<'a>;

    fn accept(&self) -> io::Result<(SimStream<'a>, Peer)> {
        let mut kernel = self.machine.enter();
        kernel.pollers[ACCEPTOR].new_connections += 1;
        // Linux takes a descriptor before it looks for a client.
        if !kernel.has_descriptor() {
            kernel.record(|| "accept: no descriptors".to_owned());
            return Err(io::Error::other("too many open files"));
        }
        let denied = kernel.accepts_denied;
        let aborted = kernel.parameters.has_errors && kernel.rng.one_in(8);
        let waiting = &mut kernel.listeners[self.index].waiting;
        if denied && !waiting.is_empty() {
            kernel.record(|| "accept: denied".to_owned());
            return Err(ErrorKind::PermissionDenied.into());
        }
        let Some(id) = waiting.pop_front() else {
            kernel.record(|| "accept would block".to_owned());
            return Err(ErrorKind::WouldBlock.into());
        };
        kernel.progress += 1;
        if aborted {
            kernel.connections[id].reset_by_client = true;
            kernel.record(|| format!("accept: client {id} has aborted"));
            return Err(ErrorKind::ConnectionAborted.into());
        }
        kernel.descriptors += 1;
        kernel.connections[id].accepted = true;
        kernel.connections[id].number = kernel.counters.acceptor.accepted.get() + 1;
        kernel.record(|| format!("client {id} is accepted"));
        let stream = SimStream {
            id,
            machine: Rc::clone(&self.machine),
        };
        Ok((stream, Peer::Ip(address_of(id))))
    }

    fn has_waiting_client(&self) -> bool {
        let kernel = self.machine.enter();
        !kernel.listeners[self.index].waiting.is_empty()
    }
}

impl Drop for SimListener<'_> {
    fn drop(&mut self) {
        if let Ok(mut kernel) = self.machine.kernel.try_borrow_mut() {
            kernel.close_listener(self.index);
        }
    }
}

/// The address of a client, whose port is its number.
fn address_of(id: usize) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, id as u16))
}

/// The number of the client with this address.
pub(super) fn client_of(peer: Peer) -> usize {
    match peer {
        Peer::Ip(address) => usize::from(address.port()),
        Peer::Unix => 0,
    }
}

/// A source that a [`SimPoller`] can watch.
pub(super) trait Register {
    /// Registers the source. As with epoll, an event reports the current state first.
    fn register(&mut self, thread: usize, token: usize) -> io::Result<()>;
}

impl Register for SimListener<'_> {
    fn register(&mut self, _: usize, token: usize) -> io::Result<()> {
        assert_eq!(token, self.index, "the simulation registers listeners");
        let mut kernel = self.machine.kernel.borrow_mut();
        if !kernel.listeners[token].waiting.is_empty() {
            kernel.raise(Source::Listener(token));
        }
        Ok(())
    }
}

impl Register for SimStream<'_> {
    fn register(&mut self, thread: usize, token: usize) -> io::Result<()> {
        let mut kernel = self.machine.enter();
        let id = self.id;
        kernel.record(|| format!("thread {thread}: registers connection {id}, token {token}"));
        let in_use = kernel.connections.iter().any(|connection| {
            connection.is_open() && connection.registered == Some((thread, token))
        });
        kernel.check(!in_use, || format!("token {token} is already in use"));
        kernel.check_limit();
        if kernel.parameters.has_errors && kernel.rng.one_in(16) {
            kernel.connections[id].registration_failed = true;
            return Err(ErrorKind::StorageFull.into());
        }
        let poller = &mut kernel.pollers[thread];
        poller.new_connections += 1;
        let now = poller.now;
        let connection = &mut kernel.connections[id];
        connection.registered = Some((thread, token));
        connection.registered_at = now;
        connection.quiet_since = now;
        kernel.raise(Source::Connection(id));
        Ok(())
    }
}

/// The poller of a thread.
pub(super) struct SimPoller<'a> {
    thread: usize,
    machine: Rc<Machine<'a>>,
    batch: Vec<SimEvent>,
}

impl<'a> SimPoller<'a> {
    pub(super) fn new(thread: usize, machine: &Rc<Machine<'a>>) -> Self {
        Self {
            thread,
            machine: Rc::clone(machine),
            batch: Vec::new(),
        }
    }
}

impl<S: Register> Poller<S> for SimPoller<'_> {
    fn poll(&mut self, timeout: Option<Millis>) -> io::Result<bool> {
        let mut kernel = self.machine.enter();
        Ok(kernel.poll(self.thread, timeout, &mut self.batch))
    }

    fn max_events(&self) -> usize {
        self.machine.kernel.borrow().parameters.max_events
    }

    fn events(&self) -> impl Iterator<Item = PollEvent> {
        let mut rest = self.batch.iter();
        std::iter::from_fn(move || {
            let event = rest.next().copied();
            let mut kernel = self.machine.kernel.borrow_mut();
            kernel.start_turn(self.thread, event);
            event.map(|event| event.event)
        })
    }

    /// Called once per tick, after its first poll.
    fn now(&self) -> Millis {
        let mut kernel = self.machine.enter();
        let (now, sequence) = (kernel.now, kernel.sequence);
        let poller = &mut kernel.pollers[self.thread];
        (poller.now, poller.sequence) = (now, sequence);
        (poller.tick_phase, poller.turn) = (TickPhase::Events, None);
        poller.wakes = 0;
        if self.thread != ACCEPTOR {
            let bulk_turns = kernel.counters.workers[self.thread - 1].bulk_turns.get();
            let poller = &mut kernel.pollers[self.thread];
            (poller.bulk_turns, poller.bulk_turns_before) = (bulk_turns, bulk_turns);
        }
        now
    }

    fn register(&mut self, source: &mut S, token: usize) -> io::Result<()> {
        source.register(self.thread, token)
    }
}

/// Wakes a thread. The last clone that is dropped discards a wake-up that was not delivered.
pub(super) struct SimWaker<'a> {
    thread: usize,
    machine: Rc<Machine<'a>>,
    alive: Rc<()>,
}

impl<'a> SimWaker<'a> {
    pub(super) fn new(thread: usize, machine: &Rc<Machine<'a>>) -> Self {
        Self {
            thread,
            machine: Rc::clone(machine),
            alive: Rc::default(),
        }
    }
}

impl Clone for SimWaker<'_> {
    fn clone(&self) -> Self {
        Self {
            thread: self.thread,
            machine: Rc::clone(&self.machine),
            alive: Rc::clone(&self.alive),
        }
    }
}

impl Wake for SimWaker<'_> {
    /// Sometimes the thread runs before the call returns.
    fn wake(&self) {
        let mut kernel = self.machine.enter();
        kernel.record(|| format!("thread {} is woken", self.thread));
        kernel.wake(self.thread);
        let preempts = kernel.rng.one_in(3);
        drop(kernel);
        if preempts {
            self.machine.run_if_ready(self.thread);
        }
    }
}

impl Drop for SimWaker<'_> {
    fn drop(&mut self) {
        if Rc::strong_count(&self.alive) == 1
            && let Ok(mut kernel) = self.machine.kernel.try_borrow_mut()
        {
            kernel.deregister(self.thread, Source::Waker);
        }
    }
}
