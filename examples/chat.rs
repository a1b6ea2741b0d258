//! A chat: every line goes to all other clients.
//!
//! ```text
//! cargo run --release --example chat -- 127.0.0.1:5556 600
//! telnet 127.0.0.1 5556
//! ```
//!
//! A client that sends nothing for as many seconds as the second argument says has to leave. One that does not read
//! for so long that its messages exceed its buffer is closed.
//!
//! A handler cannot write to another connection. It puts the line into the other's mailbox, and wakes it.

use std::collections::HashMap;
use std::env;
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use echoserver::{Action, Config, Context, Event, Handler, Server, Waker};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or("127.0.0.1:5556".to_owned());
    let idle = arguments.next().unwrap_or("600".to_owned());
    let idle = Duration::from_secs(idle.parse()?);
    let server = Server::bind(Config {
        listen: vec![address.parse()?],
        ..Config::default()
    })?;
    let handle = server.handle();
    ctrlc::set_handler(move || handle.shut_down())?;
    println!("listening on {}", server.addresses()[0]);
    let room = Room::default();
    server.run(|connection| Guest {
        name: connection.peer().to_string(),
        room: &room,
        idle,
        number: None,
    })?;
    Ok(())
}

/// The clients that are present.
#[derive(Default)]
struct Room(Mutex<Mailboxes>);

#[derive(Default)]
struct Mailboxes {
    /// By number of the client.
    of: HashMap<u64, Mailbox>,
    next_number: u64,
}

/// The lines that a client's handler has not yet taken, and how to call it.
struct Mailbox {
    lines: Vec<Arc<str>>,
    waker: Waker,
}

/// Lines that wait for a handler. Its worker takes them within a tick, so more means that its client does not read.
const MAX_LINES: usize = 10_000;

impl Room {
    fn lock(&self) -> MutexGuard<'_, Mailboxes> {
        // A panic cannot leave the mailboxes half changed, so a poisoned lock is usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a client. Returns its number, and how many others there are.
    fn enter(&self, waker: Waker) -> (u64, usize) {
        let mut room = self.lock();
        room.next_number += 1;
        let (number, others) = (room.next_number, room.of.len());
        let lines = Vec::new();
        room.of.insert(number, Mailbox { lines, waker });
        (number, others)
    }

    /// Puts a line into the mailbox of every client but its author.
    fn say(&self, author: Option<u64>, line: &str) {
        let line: Arc<str> = line.into();
        for (number, mailbox) in &mut self.lock().of {
            if Some(*number) != author && mailbox.lines.len() < MAX_LINES {
                mailbox.lines.push(Arc::clone(&line));
                mailbox.waker.wake();
            }
        }
    }

    fn take_lines(&self, number: u64) -> Vec<Arc<str>> {
        let mut room = self.lock();
        let mailbox = room.of.get_mut(&number);
        mailbox.map_or_else(Vec::new, |mailbox| std::mem::take(&mut mailbox.lines))
    }
}

/// The handler of one client.
struct Guest<'a> {
    name: String,
    room: &'a Room,
    idle: Duration,
    /// `None` until the connection has opened.
    number: Option<u64>,
}

impl Handler for Guest<'_> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        match event {
            Event::Open => {
                let (number, others) = self.room.enter(context.waker());
                let welcome = format!("* you are {}, and {others} others are here\n", self.name);
                let _fits = context.output.push(welcome.as_bytes());
                self.number = Some(number);
                self.room
                    .say(self.number, &format!("* {} has come\n", self.name));
                context.set_timer(Some(self.idle));
            }
            Event::Timer => {
                let _fits = context.output.push(b"* you were silent for too long\n");
                return Action::Close;
            }
            Event::Wake => return self.receive(context),
            Event::Input | Event::Sent | Event::Eof => {}
        }
        while let Some(line) = context.input.line() {
            let length = line.len();
            let text = String::from_utf8_lossy(line.trim_ascii_end());
            let line = format!("{}: {text}\n", self.name);
            self.room.say(self.number, &line);
            context.input.consume(length);
            context.set_timer(Some(self.idle));
        }
        Action::Continue
    }
}

impl Guest<'_> {
    /// Sends the lines in the mailbox. They are appended to those that are still being sent.
    fn receive(&mut self, context: &mut Context<'_>) -> Action {
        for line in self
            .number
            .map_or_else(Vec::new, |number| self.room.take_lines(number))
        {
            if !context.output.push(line.as_bytes()) {
                return Action::Close;
            }
        }
        Action::Continue
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.room.lock().of.remove(&number);
            self.room.say(None, &format!("* {} has left\n", self.name));
        }
    }
}
