//! A handler that contains another one. [`Masked`] inverts each byte that arrives and each that is sent, where one for TLS
//! would decrypt and encrypt. The inner handler does not know of it: events and actions pass through.
//!
//! Start it with `cargo run --example masked`. Ctrl-C ends it.

use std::io;

use echoserver::{Action, Buffer, Config, Context, Echo, Event, Handler, Server};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or("127.0.0.1:5558".to_owned());
    let server = Server::bind(Config::new(address.parse()?))?;
    let handle = server.handle();
    ctrlc::set_handler(move || handle.shut_down())?;
    println!("listening on {}", server.addresses()[0]);
    // A panic of this function closes the connection.
    server.run(|_connection| Masked::new(Echo, 4096).expect("memory for the buffers"))?;
    Ok(())
}

/// A handler whose client inverts all bytes.
#[derive(Debug)]
pub(crate) struct Masked<H> {
    inner: H,
    /// Plain bytes for the inner handler, and from it.
    input: Buffer,
    output: Buffer,
    /// What the inner handler has returned last, as far as it holds.
    announced: Action,
    /// The client has ended its half, and the inner handler was not told.
    ended: bool,
}

impl<H: Handler> Masked<H> {
    /// Wraps a handler, whose messages have at most `capacity` bytes.
    pub(crate) fn new(inner: H, capacity: usize) -> io::Result<Self> {
        Ok(Self {
            inner,
            input: Buffer::new(capacity)?,
            output: Buffer::new(capacity)?,
            announced: Action::Continue,
            ended: false,
        })
    }

    /// The call of the inner handler that an event causes at once.
    fn call_for(&self, event: Event) -> Option<Event> {
        match event {
            // Only after its bytes, and while all output is sent.
            Event::Input | Event::Eof => None,
            // This handler needed room, and not the inner one.
            Event::Sent if self.announced != Action::Flush || !self.output.is_empty() => None,
            Event::Resumed if self.announced != Action::Yield => None,
            _ if self.announced == Action::Close => None,
            _ => Some(event),
        }
    }

    /// Calls the inner handler. Returns whether what it has announced before still holds.
    fn call(&mut self, event: Event, context: &Context<'_>) -> bool {
        let before = (self.input.len(), self.output.len());
        let action =
            (self.inner).process(event, &mut context.with(&mut self.input, &mut self.output));
        let has_moved = before != (self.input.len(), self.output.len());
        // The rule of `Handler::process`.
        let holds = action == Action::Continue
            && comes_between(event)
            && match self.announced {
                Action::Flush | Action::Yield => true,
                Action::Pending => !has_moved,
                _ => false,
            };
        if !holds {
            self.announced = action;
        }
        holds
    }

    /// Masks output of the inner handler, as much as fits.
    fn mask(&mut self, context: &mut Context<'_>) {
        let count = self.output.len().min(context.output.room());
        let free = context.output.spare().iter_mut();
        for (masked, plain) in free.zip(&self.output.data()[..count]) {
            *masked = !plain;
        }
        context.output.commit(count);
        self.output.consume(count);
    }

    /// Unmasks input for the inner handler, as much as fits. Returns whether there was any.
    fn unmask(&mut self, context: &mut Context<'_>) -> bool {
        let count = context.input.len().min(self.input.room());
        let free = self.input.spare().iter_mut();
        for (plain, masked) in free.zip(&context.input.data()[..count]) {
            *plain = !masked;
        }
        self.input.commit(count);
        context.input.consume(count);
        count > 0
    }

    /// Whether there is input for the inner handler, or it is to be told of the end.
    fn has_news(&self, context: &Context<'_>) -> bool {
        match context.input.is_empty() {
            true => self.ended,
            false => self.input.room() > 0,
        }
    }
}

/// Whether a call for this event leaves what was announced before.
fn comes_between(event: Event) -> bool {
    matches!(event, Event::Timer | Event::Wake | Event::Shutdown)
}

impl<H: Handler> Handler for Masked<H> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        self.ended |= event == Event::Eof;
        let has_waited = self.announced == Action::Pending;
        let (mut due, mut holds) = (self.call_for(event), false);
        loop {
            if let Some(event) = due {
                holds = self.call(event, context);
            }
            if self.announced == Action::Reset {
                return Action::Reset;
            }
            self.mask(context);
            if !self.output.is_empty() {
                return Action::Flush;
            }
            let takes_input = matches!(self.announced, Action::Continue | Action::Pending);
            if !takes_input || !self.has_news(context) {
                break;
            }
            if !context.output.is_empty() {
                return Action::Flush;
            }
            due = Some(match self.unmask(context) {
                true => Event::Input,
                false => Event::Eof,
            });
            self.ended &= due != Some(Event::Eof);
        }
        match self.announced {
            _ if holds => Action::Continue,
            // The inner handler cannot go on.
            Action::Continue if self.input.room() == 0 => Action::Close,
            // The server has seen no byte of the answer that has ended the wait.
            Action::Continue if has_waited && comes_between(event) => Action::Yield,
            announced => announced,
        }
    }
}
