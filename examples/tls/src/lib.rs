//! TLS around a handler of any protocol: [`Tls`] is a [`Handler`] that contains another one.

use std::cell::Cell;
use std::io::{self, BufRead, Write};
use std::mem;
use std::sync::Arc;

use echoserver::Action::{self, Close, Continue, Flush, Pending, Reset, Yield};
use echoserver::{Buffer, Context, Event, Handler, Output};
use rustls::{Error, ServerConfig, ServerConnection};

/// A handler whose client speaks TLS. The inner handler sees plain bytes, and is called as it would be without TLS, from
/// [`Event::Open`] when the handshake is complete.
///
/// * **Ends.** The client's close_notify is the inner handler's [`Event::Eof`], and the client can still read. When the inner
///   handler is done, the client gets close_notify and then EOF. A client that ends TCP without close_notify is reset: its
///   stream may have been cut. After an error of TLS the client gets an alert and then EOF.
/// * **Shutdown.** The client gets close_notify when all that has arrived is answered. What a closed window holds back at the
///   client is not waited for. To find the end of what has arrived, this handler wakes its connection, so the inner handler
///   gets an [`Event::Wake`] or a few that it has not caused.
/// * **Timeouts** are those of the server. A handshake that stops is idle, as a silent client is: its connection is closed
///   without close_notify. So set [`Config::idle_timeout`](echoserver::Config::idle_timeout).
/// * **Memory.** Plain bytes are in two buffers as large as those of the server, which a connection has only while they hold
///   bytes. rustls keeps at most 18 KiB that were received (64 KiB in a handshake), as much plain, and 16 KiB that are to be
///   sent, and what it sends by itself. An idle connection costs about 8 kB: the state of rustls and its read buffer.
#[derive(Debug)]
pub struct Tls<H> {
    inner: H,
    session: ServerConnection,
    /// Present only while they hold bytes.
    plain: Option<Plain>,
    /// What the inner handler has returned last, as far as it holds.
    announced: Action,
    /// The inner handler was called with [`Event::Open`].
    is_open: bool,
    /// The inner handler was called with [`Event::Eof`].
    is_ended: bool,
    /// The client has ended TCP.
    is_cut: bool,
    /// In a shutdown: how many wake-ups have come in a row, and nothing else.
    wakes: Option<u8>,
}

impl<H: Handler> Tls<H> {
    /// Wraps a handler.
    ///
    /// # Errors
    ///
    /// If rustls does not accept the configuration.
    pub fn new(inner: H, config: Arc<ServerConfig>) -> Result<Self, Error> {
        let mut session = ServerConnection::new(config)?;
        session.set_buffer_limit(Some(16 << 10)); // one record
        Ok(Self {
            inner,
            session,
            plain: None,
            announced: Continue,
            is_open: false,
            is_ended: false,
            is_cut: false,
            wakes: None,
        })
    }

    /// Whether the inner handler is called for an event at once.
    fn is_due(&self, event: Event) -> bool {
        match event {
            // Only after the handshake, and after the bytes.
            Event::Open | Event::Input | Event::Eof => false,
            // This handler may have needed room, and not the inner one.
            Event::Sent => self.announced == Flush && !self.session.wants_write(),
            Event::Resumed => self.announced == Yield,
            _ => self.is_open && self.announced != Close,
        }
    }

    /// Calls the inner handler. Returns whether what it has announced before still holds.
    fn call(&mut self, event: Event, plain: &mut Plain, context: &Context<'_>) -> bool {
        let before = (plain.input.len(), plain.output.len());
        let mut inner_context = context.with(&mut plain.input, &mut plain.output);
        let action = self.inner.process(event, &mut inner_context);
        let is_same = before == (plain.input.len(), plain.output.len());
        // The rule of `Handler::process`.
        let stays = self.announced != Continue && (self.announced != Pending || is_same);
        if action == Continue && comes_between(event) && stays {
            return true;
        }
        self.announced = match action {
            Continue if self.is_ended || plain.input.room() == 0 => Close,
            action => action,
        };
        false
    }

    /// Encrypts output of the inner handler, and close_notify after the last. Returns whether all of it fits into the output,
    /// with what TLS sends by itself.
    fn encrypt(&mut self, plain: &mut Plain, output: &mut Output<'_>) -> bool {
        loop {
            let count = self.session.writer().write(plain.output.data());
            plain.output.consume(count.unwrap_or(0));
            if self.announced == Close && plain.output.is_empty() {
                self.session.send_close_notify(); // unless it was sent, or an alert
            }
            match self.session.wants_write() {
                false => return true,
                true if !matches!(self.session.write_tls(output), Ok(1..)) => return false,
                true => {}
            }
        }
    }

    /// Decrypts input until there is something to tell the inner handler. Announces the end if nothing more can be told.
    fn next_event(&mut self, plain: &mut Plain, context: &mut Context<'_>) -> Option<Event> {
        loop {
            if !self.is_open && !self.session.is_handshaking() {
                self.is_open = true;
                return Some(Event::Open);
            }
            let mut reader = self.session.reader();
            match reader.fill_buf() {
                Ok([]) => {
                    // What follows close_notify is ignored.
                    context.input.consume(context.input.len());
                    return (!mem::replace(&mut self.is_ended, true)).then_some(Event::Eof);
                }
                Ok(record) => {
                    let count = plain.input.push_some(record);
                    reader.consume(count);
                    return (count > 0).then_some(Event::Input);
                }
                Err(_would_block) => {}
            }
            if context.input.is_empty() {
                self.announced = match self.announced {
                    _ if self.is_cut => Reset,
                    // A turn with a wake-up and no output goes on to read, so a second one in a row finds all answered.
                    Continue if self.wakes >= Some(2) && context.output.is_empty() => Close,
                    announced => announced,
                };
                return None;
            }
            let mut records = context.input.data();
            let count = self.session.read_tls(&mut records).unwrap_or(0);
            context.input.consume(count);
            if count == 0 || self.session.process_new_packets().is_err() {
                self.announced = Close;
                return None;
            }
        }
    }

    fn advance(&mut self, event: Event, plain: &mut Plain, context: &mut Context<'_>) -> Action {
        self.is_cut |= event == Event::Eof;
        self.wakes = match event {
            Event::Shutdown => Some(0),
            Event::Wake => self.wakes.map(|wakes| wakes.saturating_add(1)),
            _ => self.wakes.map(|_| 0),
        };
        let has_waited = self.announced == Pending;
        let (mut due, mut holds) = (self.is_due(event).then_some(event), false);
        loop {
            if let Some(event) = due.take() {
                holds = self.call(event, plain, context);
                let is_late = event == Event::Open && self.wakes.is_some();
                due = (is_late && self.announced != Close).then_some(Event::Shutdown);
            }
            let before = self.announced;
            match before {
                Reset => return Reset,
                _ if due.is_some() => continue,
                _ if !self.encrypt(plain, &mut context.output) => return Flush,
                Continue | Pending => due = self.next_event(plain, context),
                Flush | Yield | Close => {}
            }
            if due.is_none() && self.announced == before && !self.session.wants_write() {
                break;
            }
        }
        match self.announced {
            _ if holds && comes_between(event) && self.announced != Close => Continue,
            // In a shutdown the server would close the connection, and without close_notify.
            Continue if self.wakes.is_some() && !context.output.is_empty() => Flush,
            Continue if self.wakes.is_some() => {
                context.waker().wake();
                Pending
            }
            // The server has seen no byte of the answer that has ended the wait.
            Continue if has_waited && comes_between(event) => Yield,
            announced => announced,
        }
    }
}

/// Whether a call for this event leaves what was announced before.
fn comes_between(event: Event) -> bool {
    matches!(event, Event::Timer | Event::Wake | Event::Shutdown)
}

impl<H: Handler> Handler for Tls<H> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        let Ok(mut plain) = (self.plain.take()).map_or_else(|| take_plain(context), Ok) else {
            return Reset; // out of memory
        };
        let action = self.advance(event, &mut plain, context);
        match plain.input.is_empty() && plain.output.is_empty() {
            true => SPARE.set(Some(plain)),
            false => self.plain = Some(plain),
        }
        action
    }
}

/// Plain bytes for the inner handler, and from it.
#[derive(Debug)]
struct Plain {
    input: Buffer,
    output: Buffer,
}

thread_local! {
    /// The empty buffers of a worker.
    static SPARE: Cell<Option<Plain>> = const { Cell::new(None) };
}

fn take_plain(context: &Context<'_>) -> io::Result<Plain> {
    let capacity = context.input.capacity();
    match SPARE.take() {
        Some(plain) if plain.input.capacity() == capacity => Ok(plain),
        _ => Ok(Plain {
            input: Buffer::new(capacity)?,
            output: Buffer::new(capacity)?,
        }),
    }
}
