//! The messages of one connection: how many may be sent, and how long each took.
//!
//! It has no clock and does no I/O: times and byte counts are arguments.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// When the messages of one connection are due: at a fixed rate, shared by several connections in turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) start: Instant,
    /// Messages per second of all connections.
    pub(crate) rate: f64,
    /// The connection has every `step`-th of these messages, from `first` on.
    pub(crate) first: usize,
    pub(crate) step: usize,
}

impl Schedule {
    fn due(&self, index: u64) -> Instant {
        let place = self.first as f64 + index as f64 * self.step as f64;
        self.start + Duration::from_secs_f64(place / self.rate)
    }
}

/// A stream of messages of equal size, and the streams that follow it on the same connection.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    size: u64,
    max_in_flight: u64,
    /// Messages of one stream.
    max_per_stream: u64,
    /// When the messages are due. Their times begin then, even if they cannot be sent: a stall counts for every message
    /// that it delays. Without a schedule, they begin when the first byte is sent.
    pub(crate) schedule: Option<Schedule>,
    /// Messages that may be sent, those of earlier streams included.
    granted: u64,
    /// Messages of earlier streams.
    earlier: u64,
    /// Messages of this stream that came back.
    completed: u64,
    /// Bytes of this stream.
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// When the messages in flight were sent.
    send_times: VecDeque<Instant>,
}

impl Flow {
    pub(crate) fn new(size: u64, max_in_flight: u64, max_per_stream: u64) -> Self {
        Self {
            size,
            max_in_flight,
            max_per_stream,
            ..Self::default()
        }
    }

    /// Allows `count` more messages to be sent.
    pub(crate) fn grant(&mut self, count: u64) {
        self.granted += count;
    }

    /// Returns when the next message is due, if there is a schedule.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        Some(self.schedule?.due(self.granted))
    }

    /// Returns how many bytes may be sent now.
    pub(crate) fn sendable(&self) -> u64 {
        let granted = (self.granted - self.earlier).min(self.max_per_stream);
        let messages = granted.min(self.completed.saturating_add(self.max_in_flight));
        messages.saturating_mul(self.size) - self.sent
    }

    pub(crate) fn is_awaiting_bytes(&self) -> bool {
        self.sent > self.received
    }

    /// Whether nothing may be sent, and everything sent has come back.
    pub(crate) fn is_complete(&self) -> bool {
        self.sendable() == 0 && !self.is_awaiting_bytes()
    }

    /// Counts bytes that were sent. The time of a message that they begin starts at `start`.
    pub(crate) fn add_sent(&mut self, count: u64, start: Instant) {
        let before = self.begun();
        self.sent += count;
        if self.schedule.is_none() {
            let begun = self.begun() - before;
            self.send_times.extend((0..begun).map(|_| start));
        }
    }

    /// Counts bytes that came back, and calls `record` with the time of each message that they complete.
    pub(crate) fn add_received(
        &mut self,
        count: u64,
        now: Instant,
        mut record: impl FnMut(Duration),
    ) {
        self.received += count;
        while self.received - self.completed * self.size >= self.size {
            let start = match self.schedule {
                Some(schedule) => Some(schedule.due(self.earlier + self.completed)),
                None => self.send_times.pop_front(),
            };
            self.completed += 1;
            record(now.saturating_duration_since(start.unwrap_or(now)));
        }
    }

    fn begun(&self) -> u64 {
        self.sent.div_ceil(self.size)
    }

    /// Returns when each message began, or was due, that may be sent or was, and has not come back. Without a schedule,
    /// only those count of which a byte was sent.
    pub(crate) fn outstanding(&self) -> impl Iterator<Item = Instant> {
        let scheduled = self.schedule.map(|schedule| {
            let indexes = self.earlier + self.completed..self.granted;
            indexes.map(move |index| schedule.due(index))
        });
        let sent = self.send_times.iter().copied();
        scheduled.into_iter().flatten().chain(sent)
    }

    /// Withdraws the messages of which nothing was sent, except for the first one if it has begun otherwise.
    pub(crate) fn withdraw(&mut self, has_begun: bool) {
        let begun = self.begun().max(u64::from(has_begun));
        self.granted = self.granted.min(self.earlier + begun);
    }

    /// Starts a new stream. Returns when each message that was in flight, and is lost, began or was due.
    pub(crate) fn restart(&mut self) -> Vec<Instant> {
        let begun = self.begun();
        let in_flight = (begun - self.completed) as usize;
        let lost = self.outstanding().take(in_flight).collect();
        self.earlier += begun;
        (self.completed, self.sent, self.received) = (0, 0, 0);
        self.send_times.clear();
        lost
    }

    /// Gives up all messages that may still be sent. Returns their number.
    pub(crate) fn abandon(&mut self) -> u64 {
        let rest = self.granted - self.earlier - self.completed;
        self.earlier += rest;
        rest
    }
}

#[cfg(test)]
mod tests;
