//! Handlers for tests.

use std::sync::mpsc::{self, Receiver, Sender};

use echoserver::{Action, Buffer, Echo, Handler};

use super::{Client, DEADLINE, TestServer, config};

/// A protocol made of one function.
pub(crate) struct Protocol(Box<dyn FnMut(&mut Buffer, &mut Buffer) -> Action>);

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
    pub(crate) server: TestServer,
    holder: Client,
    release: Sender<()>,
}

impl HeldServer {
    pub(crate) fn new(clients: usize) -> (Self, Vec<Client>) {
        let (release, released) = mpsc::channel();
        let (held, holding) = mpsc::channel();
        let server = TestServer::serve(config(), {
            let hold = std::sync::Mutex::new(Some((held, released)));
            move |_peer| match hold.lock().unwrap().take() {
                Some((held, released)) => hold_up(held, released),
                None => Protocol::echo(),
            }
        });
        let mut holder = server.connect();
        holder.ping(b"first");
        let clients = server.connect_many(clients);
        holder.send(b"hold");
        holding
            .recv_timeout(DEADLINE)
            .expect("the handler was called");
        (
            Self {
                server,
                holder,
                release,
            },
            clients,
        )
    }

    pub(crate) fn release(mut self) -> TestServer {
        self.release.send(()).expect("the handler waits for it");
        self.holder.expect(b"hold");
        self.holder.close();
        self.server
    }
}

/// An echo that, once it gets `hold`, blocks its worker until it is told to go on.
fn hold_up(held: Sender<()>, released: Receiver<()>) -> Protocol {
    Protocol::new(move |input, output| {
        if input.data() == b"hold" {
            held.send(()).expect("the test waits for it");
            // If the test has failed, there is nothing to wait for.
            let _released = released.recv();
        }
        Echo.process(input, output)
    })
}
