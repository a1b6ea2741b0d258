//! mio's poll, and the clock, as the [`Poller`] of the event loops.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token, Waker};

use crate::net::Register;
use crate::net::stream::readiness;
use crate::system::{Millis, PollEvent, Poller, Wake};

/// Events per poll. A smaller number adds latency when many connections are busy.
const MAX_EVENTS: usize = 1024;

/// The waker's token. Other tokens are indices.
const WAKER: Token = Token(usize::MAX);

/// The time since the server was created.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(self) -> Millis {
        self.0.elapsed().as_millis() as Millis
    }
}

/// A mio poll with its waker and its clock.
#[derive(Debug)]
pub(crate) struct MioPoller {
    poll: Poll,
    /// Kept here, because a waker that is dropped removes its event from the poll.
    pub(crate) waker: Arc<Waker>,
    events: Events,
    clock: Clock,
    /// How long to poll without sleeping before each sleep. It saves the latency of going to sleep and
    /// being woken.
    busy_poll: Duration,
}

impl MioPoller {
    pub(crate) fn new(clock: Clock, busy_poll: Duration) -> io::Result<Self> {
        let poll = Poll::new()?;
        Ok(Self {
            waker: Arc::new(Waker::new(poll.registry(), WAKER)?),
            poll,
            events: Events::with_capacity(MAX_EVENTS),
            clock,
            busy_poll,
        })
    }

    fn poll_once(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
        match self.poll.poll(&mut self.events, timeout) {
            Ok(()) => Ok(self.events.iter().count() == self.events.capacity()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                self.events.clear();
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }
}

impl<S: Register> Poller<S> for MioPoller {
    fn poll(&mut self, timeout: Option<Millis>) -> io::Result<bool> {
        let timeout = timeout.map(Duration::from_millis);
        if self.busy_poll.is_zero() || timeout == Some(Duration::ZERO) {
            return self.poll_once(timeout);
        }
        let spin = timeout.map_or(self.busy_poll, |timeout| timeout.min(self.busy_poll));
        let start = Instant::now();
        while start.elapsed() < spin {
            let full = self.poll_once(Some(Duration::ZERO))?;
            if !self.events.is_empty() {
                return Ok(full);
            }
        }
        let rest = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
        self.poll_once(rest)
    }

    fn max_events(&self) -> usize {
        self.events.capacity()
    }

    fn events(&self) -> impl Iterator<Item = PollEvent> {
        self.events.iter().map(|event| match event.token() {
            WAKER => PollEvent::Wake,
            Token(token) => PollEvent::Ready(token, readiness(event)),
        })
    }

    fn now(&self) -> Millis {
        self.clock.now()
    }

    fn elapsed(&self, since: Millis) -> Millis {
        self.clock.now().saturating_sub(since)
    }

    fn register(&mut self, source: &mut S, token: usize) -> io::Result<()> {
        source.register(self.poll.registry(), Token(token))
    }
}

impl Wake for mio::Waker {
    fn wake(&self) {
        if let Err(error) = mio::Waker::wake(self) {
            log::error!("cannot wake an event loop: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
