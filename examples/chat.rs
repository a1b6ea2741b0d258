//! A chat: every line goes to all other clients.
//!
//! ```text
//! cargo run --release --example chat -- 127.0.0.1:5556 600
//! telnet 127.0.0.1 5556
//! ```
//!
//! A client has to leave when it sends nothing for as many seconds as the second argument says, and when it reads so
//! slowly that too many lines wait for it.
//!
//! A handler cannot write to another connection. It puts the line into the other's mailbox, and wakes it.

use std::collections::{HashMap, VecDeque};
use std::env;
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use echoserver::{Action, Config, Context, Event, Handler, Server, TooLong, Waker};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or("127.0.0.1:5556".to_owned());
    let idle = arguments.next().unwrap_or("600".to_owned());
    let idle = Duration::from_secs(idle.parse()?);
    let server = Server::bind(Config::new(address.parse()?))?;
    let handle = server.handle();
    ctrlc::set_handler(move || match handle.is_shutting_down() {
        false => handle.shut_down(),
        true => handle.abort(),
    })?;
    println!("listening on {}", server.addresses()[0]);
    let room = Room::default();
    server.run(|connection| Guest {
        name: connection.peer().to_string(),
        room: &room,
        idle,
        number: None,
        unsent: VecDeque::new(),
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

/// The longest line, in bytes.
const MAX_LINE: usize = 1000;

/// Lines that wait to be sent to a client. One that reads so slowly that there are more has to leave.
const MAX_UNSENT: usize = 10_000;

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
            if Some(*number) != author && mailbox.lines.len() <= MAX_UNSENT {
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
    /// `None` before the connection has opened and after it has left the room.
    number: Option<u64>,
    unsent: VecDeque<Arc<str>>,
}

impl Handler for Guest<'_> {
    fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
        let action = match event {
            Event::Open => self.enter(context),
            Event::Input => self.say_lines(context),
            Event::Wake | Event::Sent | Event::Resumed => self.send_lines(context),
            Event::Timer => {
                let _fits = context.output.push(b"* you were silent for too long\n");
                Action::Close
            }
            Event::Shutdown => {
                let _fits = context.output.push(b"* the chat ends\n");
                Action::Close
            }
            _ => Action::Continue,
        };
        if action == Action::Close {
            // The connection can take some seconds to close. A reset drops the handler at once.
            self.leave();
        }
        action
    }
}

impl Guest<'_> {
    fn enter(&mut self, context: &mut Context<'_>) -> Action {
        let (number, others) = self.room.enter(context.waker());
        let welcome = format!("* you are {}, and {others} others are here\n", self.name);
        let _fits = context.output.push(welcome.as_bytes());
        self.number = Some(number);
        self.room
            .say(self.number, &format!("* {} has come\n", self.name));
        context.set_timer(Some(self.idle));
        Action::Continue
    }

    /// Takes the lines that the client has sent to all others.
    fn say_lines(&mut self, context: &mut Context<'_>) -> Action {
        loop {
            let line = match context.input.line_within(MAX_LINE) {
                Ok(Some(line)) => line,
                Ok(None) => return Action::Continue,
                Err(TooLong) => return refuse(context),
            };
            let length = line.len();
            let text = String::from_utf8_lossy(line.trim_ascii_end());
            let line = format!("{}: {text}\n", self.name);
            self.room.say(self.number, &line);
            context.input.consume(length);
            context.set_timer(Some(self.idle));
        }
    }

    /// Sends the lines of the others, as many as fit.
    fn send_lines(&mut self, context: &mut Context<'_>) -> Action {
        if let Some(number) = self.number {
            self.unsent.extend(self.room.take_lines(number));
        }
        if self.unsent.len() > MAX_UNSENT {
            return Action::Reset;
        }
        while let Some(line) = self.unsent.front() {
            if !context.output.push(line.as_bytes()) {
                return Action::Flush;
            }
            self.unsent.pop_front();
        }
        Action::Continue
    }

    fn leave(&mut self) {
        if let Some(number) = self.number.take() {
            self.room.lock().of.remove(&number);
            self.room.say(None, &format!("* {} has left\n", self.name));
        }
    }
}

fn refuse(context: &mut Context<'_>) -> Action {
    let problem = format!("* lines have at most {MAX_LINE} bytes\n");
    let _fits = context.output.push(problem.as_bytes());
    Action::Close
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}
