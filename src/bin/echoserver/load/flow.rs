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

    /// Counts bytes that were sent. The time of a message that they begin starts at `start`.
    pub(crate) fn add_sent(&mut self, count: u64, start: Instant) {
        let before = self.sent.div_ceil(self.size);
        self.sent += count;
        if self.schedule.is_none() {
            let begun = self.sent.div_ceil(self.size) - before;
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

    /// Starts a new stream. Returns how many messages were in flight and are lost.
    pub(crate) fn restart(&mut self) -> u64 {
        let begun = self.sent.div_ceil(self.size);
        let lost = begun - self.completed;
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
mod tests {
    use hdrhistogram::Histogram;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Sends 1,000 messages a second for 20 s to a server that answers after 100 us, but stalls for the first
    /// 200 ms of each second.
    fn times_of_stalling_server(max_in_flight: u64) -> Histogram<u64> {
        let start = Instant::now();
        let mut flow = Flow::new(64, max_in_flight, u64::MAX);
        flow.schedule = Some(Schedule {
            start,
            rate: 1000.0,
            first: 0,
            step: 1,
        });
        let mut times = Histogram::new(3).unwrap();
        let mut previous_answer = start;
        for _ in 0..20_000 {
            let mut sent = flow.next_due().unwrap();
            flow.grant(1);
            if max_in_flight == 1 {
                sent = sent.max(previous_answer);
            }
            let answer = sent + MS / 10;
            let into_second = (answer - start).subsec_nanos();
            let stall = (200 * MS).saturating_sub(Duration::from_nanos(into_second.into()));
            previous_answer = answer + stall;
            flow.add_sent(flow.sendable(), sent);
            flow.add_received(64, previous_answer, |time| {
                times.record(time.as_nanos() as u64).unwrap();
            });
        }
        times
    }

    #[test]
    fn stall_counts_for_every_message_that_was_due_during_it() {
        const QUANTILES: [f64; 6] = [0.5, 0.77, 0.9, 0.99, 0.999, 1.0];
        // A fifth of the messages is due in a stall, and waits for up to 200 ms.
        let at_once = [0.1, 0.1, 100.0, 190.0, 199.0, 200.0];
        // With one in flight, those that have queued up are answered 0.1 ms apart. One due t ms after the start
        // of the stall waits for 200 - 0.9 t ms, so that 222 wait, and ten of them for more than 191 ms.
        let in_turn = [0.1, 0.1, 110.0, 191.0, 199.1, 200.0];
        for (max_in_flight, expected) in [(u64::MAX, at_once), (1, in_turn)] {
            let times = times_of_stalling_server(max_in_flight);
            assert_eq!(times.len(), 20_000);
            for (quantile, expected) in QUANTILES.into_iter().zip(expected) {
                let measured = times.value_at_quantile(quantile) as f64 / 1e6;
                let error = (measured - expected).abs();
                assert!(error < 0.01 * expected + 0.05, "{quantile}: {measured} ms");
            }
        }
    }

    #[test]
    fn messages_in_flight_are_limited_and_timed_from_their_first_byte() {
        let start = Instant::now();
        let mut flow = Flow::new(10, 2, 3);
        flow.grant(9);
        assert_eq!(flow.sendable(), 20);
        flow.add_sent(11, start);
        flow.add_sent(9, start + 5 * MS);
        assert_eq!(flow.sendable(), 0);
        let mut times = Vec::new();
        flow.add_received(19, start + 7 * MS, |time| times.push(time));
        assert_eq!((flow.sendable(), flow.is_awaiting_bytes()), (10, true));
        flow.add_received(1, start + 8 * MS, |time| times.push(time));
        assert_eq!(times, [7 * MS, 8 * MS]);
        flow.add_sent(4, start);
        assert_eq!(flow.restart(), 1);
        assert_eq!((flow.sendable(), flow.abandon()), (20, 6));
    }
}
