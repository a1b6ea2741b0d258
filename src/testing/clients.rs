//! What happens outside the server: clients connect, send, read and leave, and the network transmits.

use super::connection::{ClosePolicy, ReadPolicy, SimConnection};
use super::kernel::{Kernel, Source};

/// A pause of 28 hours, in milliseconds.
const LONG_PAUSE: usize = 100_000_000;

impl Kernel<'_> {
    /// Connects a client that will send `input`, repeated as often as the schedule says, to a random listener.
    pub(super) fn connect(&mut self, input: &[u8]) {
        let listener = self.rng.below(self.listeners.len());
        let backlog = &self.listeners[listener];
        if !backlog.open || backlog.waiting.len() >= self.parameters.backlog as usize {
            return;
        }
        self.act();
        let scale = self.parameters.scale;
        let input = input.repeat(scale);
        let mut connection = SimConnection::new(&mut self.rng, input, scale, self.sequence);
        connection.expected = (self.model)(connection.seen_at_end());
        let id = self.connections.len();
        self.record(|| {
            format!(
                "client {id} connects: sends {} bytes, then {:?}; reads {:?}, acknowledges {:?}; buffers of {}, {} and {} bytes, at most {} unsent",
                connection.input.len(),
                connection.close_policy,
                connection.read_policy,
                connection.acknowledge_policy,
                connection.receive_buffer_size,
                connection.send_buffer_size,
                connection.client_buffer_size,
                connection.max_unsent,
            )
        });
        self.connections.push(connection);
        self.listeners[listener].waiting.push_back(id);
        self.raise(Source::Listener(listener));
    }

    /// Counts an action of a client.
    fn act(&mut self) {
        self.progress += 1;
        self.sequence += 1;
    }

    /// Lets one client, or the network on its behalf, do one thing, both chosen at random.
    pub(super) fn run_random_client(&mut self) {
        if self.connections.is_empty() {
            return;
        }
        let id = self.rng.below(self.connections.len());
        match self.rng.below(11) {
            0..4 => self.send(id),
            4..6 => {
                let max = self.rng.up_to(self.connections[id].client_buffer_size);
                self.transmit(id, max);
            }
            6 => self.acknowledge(id),
            7..9 => {
                if self.connections[id].read_policy == ReadPolicy::Immediately {
                    let max = self.rng.up_to(self.connections[id].client_buffer_size);
                    self.receive(id, max);
                }
            }
            9 if self.rng.one_in(8) => self.wake_handlers(),
            9 => self.wake_handler(id),
            _ => match self.connections[id].close_policy {
                ClosePolicy::Reset if self.rng.one_in(4) => self.reset(id),
                ClosePolicy::HalfClose => self.half_close(id),
                _ => {}
            },
        }
    }

    /// Lets each client do all it can. Late readers and resets are included with `include_late`.
    pub(super) fn run_all_clients(&mut self, include_late: bool) {
        let is_due = |policy| match policy {
            ReadPolicy::Immediately => true,
            ReadPolicy::Late => include_late,
            ReadPolicy::Never => false,
        };
        for id in 0..self.connections.len() {
            self.send(id);
            loop {
                let before = self.progress;
                self.transmit(id, usize::MAX);
                if is_due(self.connections[id].read_policy) {
                    self.receive(id, usize::MAX);
                }
                if self.progress == before {
                    break;
                }
            }
            if include_late || is_due(self.connections[id].acknowledge_policy) {
                self.acknowledge(id);
            }
            match self.connections[id].close_policy {
                ClosePolicy::HalfClose => self.half_close(id),
                ClosePolicy::Reset if include_late => self.reset(id),
                ClosePolicy::Reset | ClosePolicy::KeepOpen => {}
            }
        }
    }

    /// Uses the waker of a connection, if its handler has asked for one.
    fn wake_handler(&mut self, id: usize) {
        let connection = &mut self.connections[id];
        let Some(waker) = connection.waker.clone() else {
            return;
        };
        connection.is_woken = true;
        self.record(|| format!("the handler of client {id} is woken"));
        waker.wake();
    }

    /// Wakes all handlers, several times.
    fn wake_handlers(&mut self) {
        for _ in 0..self.rng.up_to(3) {
            (0..self.connections.len()).for_each(|id| self.wake_handler(id));
        }
    }

    /// Wakes every handler that has announced an answer, and advances the clock to the next timer of one. Returns
    /// whether there was one.
    pub(super) fn wake_pending_handlers(&mut self) -> bool {
        let pending = |connection: &SimConnection| connection.is_pending();
        for id in 0..self.connections.len() {
            if pending(&self.connections[id]) {
                self.wake_handler(id);
            }
        }
        let timed = |connection: &&SimConnection| pending(connection) && connection.timer.is_some();
        let workers = self.connections.iter().filter(timed);
        let workers = workers.filter_map(|connection| connection.registered);
        let wake_up = |(worker, _): (usize, usize)| self.pollers[worker].wake_at;
        let next = workers.filter_map(wake_up).min();
        self.now = self.now.max(next.unwrap_or(0));
        next.is_some()
    }

    fn send(&mut self, id: usize) {
        let connection = &mut self.connections[id];
        let max = (connection.receive_buffer_size - connection.unread())
            .min(connection.input.len() - connection.arrived);
        if max == 0 || connection.half_closed || connection.is_reset() {
            return;
        }
        if !connection.is_open() {
            connection.reset_by_server = true;
            return self
                .record(|| format!("client {id} sends to a closed connection, which resets it"));
        }
        let count = self.rng.up_to(max);
        let urgent = self.rng.one_in(8);
        self.act();
        let connection = &mut self.connections[id];
        if connection.unread() == 0 {
            connection.unread_since = self.sequence;
        }
        connection.arrived += count;
        if urgent {
            connection.urgent = Some(connection.arrived - 1);
        }
        self.raise(Source::Connection(id));
        self.record(|| {
            format!(
                "client {id} sends {count} bytes{}",
                if urgent { ", urgent" } else { "" }
            )
        });
        if self.connections[id].close_policy == ClosePolicy::HalfClose && self.rng.one_in(2) {
            self.half_close(id);
        }
    }

    /// Closes the client's side, if it has sent everything.
    fn half_close(&mut self, id: usize) {
        let connection = &mut self.connections[id];
        if connection.half_closed
            || connection.is_reset()
            || connection.arrived < connection.input.len()
        {
            return;
        }
        connection.half_closed = true;
        self.act();
        let connection = &mut self.connections[id];
        if connection.unread() == 0 {
            connection.unread_since = self.sequence;
        }
        self.raise(Source::Connection(id));
        self.record(|| format!("client {id} closes its side"));
    }

    fn reset(&mut self, id: usize) {
        let discards_unread = self.rng.one_in(2);
        let connection = &mut self.connections[id];
        if connection.half_closed || connection.is_reset() || !connection.is_open() {
            return;
        }
        connection.reset_by_client = true;
        // A reset can reach the server before it has read all data, which is then discarded.
        if discards_unread {
            connection.arrived = connection.read;
        }
        self.act();
        self.raise(Source::Connection(id));
        let how = match self.connections[id].vanishes {
            true => "has vanished, which the kernel detects",
            false => "resets the connection",
        };
        self.record(|| format!("client {id} {how}"));
    }

    /// Moves unsent bytes to the client's kernel.
    fn transmit(&mut self, id: usize, max: usize) {
        let connection = &mut self.connections[id];
        let count = max.min(connection.unsent()).min(connection.window());
        if count == 0 || connection.is_reset() {
            return;
        }
        self.act();
        self.connections[id].sent += count;
        self.record(|| format!("client {id} is sent {count} bytes"));
        self.announce_room(id);
    }

    fn acknowledge(&mut self, id: usize) {
        let connection = &mut self.connections[id];
        if connection.acknowledged == connection.sent || connection.is_reset() {
            return;
        }
        self.act();
        let connection = &mut self.connections[id];
        connection.acknowledged = connection.sent;
        self.record(|| format!("client {id} acknowledges"));
        self.announce_room(id);
    }

    fn receive(&mut self, id: usize, max: usize) {
        let connection = &mut self.connections[id];
        let count = max.min(connection.sent - connection.received);
        if count == 0 || connection.is_reset() {
            return;
        }
        self.act();
        self.connections[id].received += count;
        self.record(|| format!("client {id} reads {count} bytes"));
    }

    fn announce_room(&mut self, id: usize) {
        let sequence = self.sequence;
        let connection = &mut self.connections[id];
        if connection.room() > 0 && connection.room_since == u64::MAX {
            connection.room_since = sequence;
        }
        if connection.awaits_writable && connection.is_writable() {
            (connection.awaits_writable, connection.blocked) = (false, false);
            self.raise(Source::Connection(id));
        }
    }

    /// Changes what other processes do: they take and free descriptors, and deny accepts.
    pub(super) fn run_other_processes(&mut self) {
        match self.rng.below(4) {
            0 => self.accepts_denied = !self.accepts_denied && self.parameters.has_errors,
            _ => {
                self.foreign_descriptors = self.rng.below(self.parameters.max_descriptors + 1);
            }
        }
        self.record_environment();
    }

    /// Ends all disturbances by other processes.
    pub(super) fn calm_other_processes(&mut self) {
        self.accepts_denied = false;
        self.foreign_descriptors = 0;
        self.record_environment();
    }

    fn record_environment(&mut self) {
        let (foreign, denied) = (self.foreign_descriptors, self.accepts_denied);
        self.record(|| {
            format!("other processes hold {foreign} descriptors; accepts are denied: {denied}")
        });
    }

    /// Stops the process for a time, in which clients act.
    pub(super) fn pause(&mut self) {
        let parameters = self.parameters;
        let idle = parameters.timeouts.idle.unwrap_or(100) as usize;
        let ms = match self.rng.below(16) {
            0 => LONG_PAUSE,
            _ => self.rng.up_to(3 * idle),
        };
        self.record(|| format!("the process is stopped for {ms} ms"));
        self.run_clients_for_a_while();
        self.now += ms as u64;
        self.run_clients_for_a_while();
    }

    fn run_clients_for_a_while(&mut self) {
        for _ in 0..self.rng.below(12) {
            self.run_random_client();
        }
    }
}
