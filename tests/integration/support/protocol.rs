//! Handlers for tests.

use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, Sender};

use echoserver::{Action, Buffer, Echo, Handler};

use super::{Client, DEADLINE, TestServer, config, ping_all};

/// A protocol made of one function.
pub(crate) struct Protocol(Box<Process>);

type Process = dyn FnMut(&mut Buffer, &mut Buffer) -> Action;

impl Protocol {
    pub(crate) fn new(process: impl FnMut(&mut Buffer, &mut Buffer) -> Action + 'static) -> Self {
        Self(Box::new(process))
    }

    pub(crate) fn echo() -> Self {
        Self::new(|input, output| Echo.process(input, output))
    }
}

impl Handler for Protocol {
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
        (self.0)(input, output)
    }
}

/// An echo server whose one worker stands still, held up by a handler, until it is released. So a
/// test can let things happen to it all at once.
pub(crate) struct HeldServer {
    // The order matters: a server that is dropped while held would wait for ever.
    release: Sender<()>,
    holder: Client,
    pub(crate) server: TestServer,
}

impl HeldServer {
    /// Holds up a server that has `count` clients already.
    pub(crate) fn new(count: usize) -> (Self, Vec<Client>) {
        let (release, until_released) = mpsc::channel();
        let (tell_held, until_held) = mpsc::channel();
        let first = Mutex::new(Some((tell_held, until_released)));
        let server = TestServer::serve(config(), move |_peer| match first.lock().unwrap().take() {
            Some((tell_held, until_released)) => hold_up(tell_held, until_released),
            None => Protocol::echo(),
        });
        let mut holder = server.connect();
        holder.ping(b"first");
        let mut clients = server.connect_many(count);
        ping_all(&mut clients, b"here");
        holder.send(b"hold");
        until_held
            .recv_timeout(DEADLINE)
            .expect("the handler is called");
        let held = Self {
            release,
            holder,
            server,
        };
        (held, clients)
    }

    /// Lets the worker go on. The connection that held it has ended then.
    pub(crate) fn release(mut self) -> TestServer {
        self.release.send(()).expect("the handler waits for it");
        self.holder.expect(b"hold");
        self.holder.end();
        self.server
    }
}

/// An echo that, once it gets `hold`, blocks its worker until it is told to go on.
fn hold_up(tell_held: Sender<()>, until_released: Receiver<()>) -> Protocol {
    Protocol::new(move |input, output| {
        if input.data() == b"hold" {
            tell_held.send(()).expect("the test waits for it");
            // A test that has failed releases it by hanging up.
            let _released = until_released.recv();
        }
        Echo.process(input, output)
    })
}
