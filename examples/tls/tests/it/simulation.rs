//! The example in the library's simulation, whose clients send bytes that are known from the start.
//!
//! With a random number generator that is not random, and a key exchange that exchanges nothing, a server answers the same
//! bytes with the same bytes. So a client can be recorded, and what a plain use of rustls answers to it is the model. The
//! same handlers run without TLS as well.
//!
//! The simulated shutdown is hidden from [`Tls`]: how much it answers before its close_notify depends on when the rest
//! arrives, which a model cannot know. The tests of ends cover it.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use echoserver::testing::{Options, simulate, simulate_with};
use echoserver::{Action, Context, Event, Handler};
use echoserver_tls::Tls;
use rustls::crypto::{
    ActiveKeyExchange, CryptoProvider, GetRandomFailed, SecureRandom, SharedSecret,
    SupportedKxGroup, ring,
};
use rustls::{ClientConfig, ClientConnection, Error, NamedGroup, ServerConfig, ServerConnection};

use crate::harness::Identity;

const SCHEDULES: u64 = 1000;

#[derive(Debug)]
struct NotRandom;

impl SecureRandom for NotRandom {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), GetRandomFailed> {
        bytes.fill(7);
        Ok(())
    }
}

#[derive(Debug)]
struct NoExchange;

impl SupportedKxGroup for NoExchange {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        Ok(Box::new(Self))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519
    }
}

impl ActiveKeyExchange for NoExchange {
    fn complete(self: Box<Self>, _peer: &[u8]) -> Result<SharedSecret, Error> {
        Ok(SharedSecret::from(&[1; 32][..]))
    }

    fn pub_key(&self) -> &[u8] {
        &[2; 32]
    }

    fn group(&self) -> NamedGroup {
        self.name()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        kx_groups: vec![&NoExchange],
        secure_random: &NotRandom,
        ..ring::default_provider()
    })
}

fn server_config() -> &'static Arc<ServerConfig> {
    static CONFIG: OnceLock<Arc<ServerConfig>> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let builder = ServerConfig::builder_with_provider(provider());
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]);
        let identity = Identity::get();
        let builder = builder.unwrap().with_no_client_auth();
        let config = builder.with_single_cert(identity.chain(), identity.key());
        Arc::new(config.unwrap())
    })
}

/// What a client sends, and what is answered to each part of it.
struct Recording {
    input: Vec<u8>,
    output: Vec<u8>,
    /// Lengths of input, and of the output that is due then.
    due: Vec<(usize, usize)>,
}

impl Recording {
    /// Records a client that sends these messages, each in a record, and then close_notify.
    fn new(messages: &[&[u8]]) -> Self {
        let builder = ClientConfig::builder_with_provider(provider());
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]);
        let builder = builder
            .unwrap()
            .with_root_certificates(Identity::get().roots());
        let config = Arc::new(builder.with_no_client_auth());
        let client = ClientConnection::new(config, "localhost".try_into().unwrap());
        let mut client = client.unwrap();
        let mut server = ServerConnection::new(Arc::clone(server_config())).unwrap();
        let mut recording = Self {
            input: Vec::new(),
            output: Vec::new(),
            due: Vec::new(),
        };
        while client.is_handshaking() || client.wants_write() {
            recording.turn(&mut client, &mut server, &[], false);
        }
        for message in messages {
            io::Write::write_all(&mut client.writer(), message).unwrap();
            let (answers, ends) = answers(message);
            recording.turn(&mut client, &mut server, &answers, ends);
            if ends {
                break;
            }
        }
        client.send_close_notify();
        recording.turn(&mut client, &mut server, &[], true);
        recording
    }

    fn turn(
        &mut self,
        client: &mut ClientConnection,
        server: &mut ServerConnection,
        answers: &[Vec<u8>],
        ends: bool,
    ) {
        let mut sent = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut sent).unwrap();
        }
        let mut rest = &sent[..];
        while !rest.is_empty() && server.read_tls(&mut rest).unwrap() > 0 {
            server.process_new_packets().unwrap();
        }
        for answer in answers {
            io::Write::write_all(&mut server.writer(), answer).unwrap();
        }
        if ends {
            server.send_close_notify();
        }
        let mut answer = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut answer).unwrap();
        }
        let mut rest = &answer[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets().unwrap();
        }
        self.input.extend(sent);
        self.output.extend(answer);
        self.due.push((self.input.len(), self.output.len()));
    }

    /// What is due for input that begins as this client's does; what follows close_notify is ignored.
    fn output(&self, input: &[u8]) -> Option<Vec<u8>> {
        let common = input.len().min(self.input.len());
        let due = self.due.iter().take_while(|(read, _)| *read <= common);
        let length = due.last().map_or(0, |(_, length)| *length);
        (input[..common] == self.input[..common]).then(|| self.output[..length].to_vec())
    }
}

/// Echoes, and takes some bytes for commands: `f` to flush, `y` to yield, `p` to be echoed later, `q` to close, `d` to drop
/// the connection.
#[derive(Default)]
struct Commands {
    last: Option<Action>,
}

impl Commands {
    fn answer(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        let mut is_due = self.last == Some(Action::Pending);
        if matches!(event, Event::Wake | Event::Timer | Event::Shutdown) {
            is_due &= event != Event::Shutdown;
            if !is_due && self.last.is_some_and(|last| last != Action::Continue) {
                return Action::Continue;
            }
            if is_due && !context.output.is_empty() {
                // Each answer in a record of its own.
                return Action::Flush;
            }
        } else if is_due {
            return Action::Pending;
        }
        while let Some(&byte) = context.input.data().first() {
            if byte == b'p' && !std::mem::take(&mut is_due) {
                let _used_by_the_simulation = context.waker();
                context.set_timer(Some(Duration::from_millis(3)));
                return Action::Pending;
            }
            if byte == b'd' {
                return Action::Reset;
            }
            if !context.output.push(&[byte]) {
                return Action::Flush;
            }
            context.input.consume(1);
            match byte {
                b'f' => return Action::Flush,
                b'y' => return Action::Yield,
                b'q' => return Action::Close,
                _ => {}
            }
        }
        Action::Continue
    }
}

impl Handler for Commands {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        let before = (context.input.len(), context.output.len());
        let action = self.answer(event, context);
        let has_moved = before != (context.input.len(), context.output.len());
        let comes_between = matches!(event, Event::Timer | Event::Wake | Event::Shutdown);
        if action != Action::Continue || !comes_between || has_moved {
            self.last = Some(action);
        }
        action
    }
}

/// What [`Commands`] answers to a message that ends with `f`, by calls, and whether it closes or drops the connection then.
fn answers(message: &[u8]) -> (Vec<Vec<u8>>, bool) {
    let mut answers = vec![Vec::new()];
    for &byte in message {
        if byte == b'p' {
            answers.push(Vec::new());
        }
        if byte == b'd' {
            return (answers, true);
        }
        answers.last_mut().unwrap().push(byte);
        if b"fy".contains(&byte) {
            answers.push(Vec::new());
        }
        if byte == b'q' {
            return (answers, true);
        }
    }
    (answers, false)
}

/// Checks that a handler is called as [`Event`] says.
struct Checked<H> {
    inner: H,
    last: Option<Action>,
    seen: Vec<Event>,
    left: usize,
}

impl<H> Checked<H> {
    fn new(inner: H) -> Self {
        Self {
            inner,
            last: None,
            seen: Vec::new(),
            left: 0,
        }
    }
}

impl<H: Handler> Handler for Checked<H> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        let once = [Event::Open, Event::Eof, Event::Shutdown];
        assert!(
            !once.contains(&event) || !self.seen.contains(&event),
            "{event:?} again"
        );
        let has_input = context.input.len() > self.left;
        let is_due = match event {
            Event::Open => self.last.is_none() && context.input.is_empty(),
            Event::Input => has_input && !self.seen.contains(&Event::Eof),
            Event::Sent => self.last == Some(Action::Flush),
            Event::Resumed => self.last == Some(Action::Yield),
            Event::Eof => matches!(self.last, Some(Action::Continue | Action::Pending)),
            _ => self.last.is_some(),
        };
        let comes_between = matches!(event, Event::Timer | Event::Wake | Event::Shutdown);
        let is_open = !matches!(self.last, Some(Action::Close | Action::Reset));
        assert!(is_due && is_open, "{event:?} after {:?}", self.last);
        assert!(event == Event::Input || !has_input, "input with {event:?}");
        assert!(
            comes_between || context.output.is_empty(),
            "output at {event:?}"
        );
        self.seen.push(event);
        let before = (context.input.len(), context.output.len());
        let action = self.inner.process(event, context);
        let has_moved = before != (context.input.len(), context.output.len());
        let holds = action == Action::Continue
            && comes_between
            && match self.last {
                Some(Action::Flush | Action::Yield) => true,
                Some(Action::Pending) => !has_moved,
                _ => false,
            };
        if !holds {
            self.last = Some(action);
        }
        self.left = context.input.len();
        action
    }
}

/// Hides the shutdown.
struct Undisturbed<H>(H);

impl<H: Handler> Handler for Undisturbed<H> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        match event {
            Event::Shutdown => Action::Continue,
            _ => self.0.process(event, context),
        }
    }
}

/// Simulates clients with TLS, and others without it, that send these messages.
fn simulate_both(clients: &[&[&[u8]]]) {
    let recordings: Vec<_> = clients
        .iter()
        .map(|messages| Recording::new(messages))
        .collect();
    let vocabulary: Vec<_> = recordings
        .iter()
        .map(|recording| &recording.input[..])
        .collect();
    let handler = || {
        let commands = Checked::new(Commands::default());
        Undisturbed(Tls::new(commands, Arc::clone(server_config())).unwrap())
    };
    let output = |input: &[u8]| {
        recordings
            .iter()
            .find_map(|recording| recording.output(input))
    };
    let options = Options {
        vocabulary: &vocabulary,
        // A message in a record of its own.
        min_buffer_size: Some(64),
        schedules: SCHEDULES,
    };
    simulate_with(
        handler,
        |seen| output(seen.input).expect("a recorded client"),
        options,
    );

    let messages: Vec<_> = clients.iter().copied().flatten().copied().collect();
    let model = |input: &[u8], _| {
        let end = input.iter().position(|byte| b"qd".contains(byte));
        let end = end.map_or(input.len(), |at| at + usize::from(input[at] == b'q'));
        input[..end].to_vec()
    };
    let handler = || Checked::new(Commands::default());
    simulate(handler, &messages, model, SCHEDULES);
}

#[test]
fn simulation_of_echo() {
    simulate_both(&[&[b"abcf"], &[b"f", b"a much longer messagef"], &[]]);
}

#[test]
fn simulation_of_answers_in_parts() {
    simulate_both(&[&[b"afbfcf", b"f"], &[b"ayycyf", b"yf"]]);
}

#[test]
fn simulation_of_late_answers() {
    simulate_both(&[&[b"apbpf", b"cf"], &[b"pppf", b"pypff"]]);
}

#[test]
fn simulation_of_closes() {
    simulate_both(&[&[b"abq", b"cf"], &[b"af", b"d", b"cf"], &[b"apq"]]);
}
