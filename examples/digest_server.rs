//! Computes without blocking: each line names a number of bytes, and the answer is the SHA-256 of as many zero
//! bytes.
//!
//! ```text
//! cargo run --release --example digest_server -- 127.0.0.1:5557 4
//! printf '3\n1000000000\n' | nc -N 127.0.0.1 5557
//! ```
//!
//! The digests are computed on a [`WorkQueue`] with as many threads as the second argument says, and sent in the
//! order of the requests. The worker of a connection waits for none of them, so other connections are served
//! meanwhile, and a client that ends its half still gets all of its answers.

use std::collections::VecDeque;
use std::env;
use std::error::Error;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use echoserver::{Action, Config, Context, Event, Handler, Server, Waker, WorkQueue};
use sha2::{Digest, Sha256};

/// Jobs that wait in the queue, of all connections together.
const MAX_QUEUED: usize = 64;

/// Answers that a connection waits for.
const MAX_PENDING: usize = 16;

/// The length of an answer: 64 digits and a line feed.
const ANSWER: usize = 65;

/// When to try again after the queue was full.
const RETRY: Duration = Duration::from_millis(10);

/// The largest number of bytes that a request may name.
const MAX_BYTES: u64 = 10_000_000_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or("127.0.0.1:5557".to_owned());
    let threads = arguments.next().unwrap_or("2".to_owned());
    let queue = WorkQueue::new(threads.parse()?, MAX_QUEUED, run)?;
    let server = Server::bind(Config::new(address.parse()?))?;
    let handle = server.handle();
    ctrlc::set_handler(move || match handle.is_shutting_down() {
        false => handle.shut_down(),
        true => handle.abort(),
    })?;
    println!("listening on {}", server.addresses()[0]);
    server.run(|_connection| DigestHandler {
        queue: &queue,
        pending: VecDeque::new(),
    })?;
    Ok(())
}

/// A request on its way to a thread of the queue.
struct Job {
    bytes: u64,
    answer: Sender<String>,
    waker: Waker,
}

fn run(job: Job) {
    // Declared first, so dropped last: `answer` is closed before the wake-up, also after a panic.
    let _wake = job.waker.wake_on_drop();
    let answer = job.answer;
    let _connection_is_closed = answer.send(digest(job.bytes));
}

fn digest(mut bytes: u64) -> String {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut hash = Sha256::new();
    while bytes > 0 {
        let count = bytes.min(ZEROS.len() as u64);
        hash.update(&ZEROS[..count as usize]);
        bytes -= count;
    }
    let digits: Vec<_> = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    digits.concat() + "\n"
}

struct DigestHandler<'a> {
    queue: &'a WorkQueue<Job>,
    /// A channel for each answer that is still to be sent, in the order of the requests.
    pending: VecDeque<Receiver<String>>,
}

impl Handler for DigestHandler<'_> {
    fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
        // Whatever the event is: send what is ready, take what there is room for, say what is missing.
        if let Err(action) = self.send(context).and_then(|()| self.take(context)) {
            return action;
        }
        match self.pending.is_empty() {
            true => Action::Continue,
            false => Action::Pending,
        }
    }
}

impl DigestHandler<'_> {
    /// Appends the answers that are ready, up to the first that is not.
    fn send(&mut self, context: &mut Context<'_>) -> Result<(), Action> {
        while let Some(answer) = self.pending.front() {
            if context.output.room() < ANSWER {
                return Err(Action::Flush);
            }
            match answer.try_recv() {
                Ok(answer) => _ = context.output.push(answer.as_bytes()),
                Err(TryRecvError::Empty) => break,
                // The job has panicked.
                Err(TryRecvError::Disconnected) => return Err(Action::Close),
            }
            self.pending.pop_front();
        }
        Ok(())
    }

    /// Pushes the requests that have arrived into the queue.
    fn take(&mut self, context: &mut Context<'_>) -> Result<(), Action> {
        while self.pending.len() < MAX_PENDING
            && let Some(line) = context.input.line()
        {
            let length = line.len();
            let Some(bytes) = parse(line) else {
                let problem = format!("expected a number of bytes up to {MAX_BYTES}\n");
                let _fits = context.output.push(problem.as_bytes());
                return Err(Action::Close);
            };
            let (answer, receiver) = channel();
            let job = Job {
                bytes,
                answer,
                waker: context.waker(),
            };
            if self.queue.try_push(job).is_err() {
                // The request stays in the input, so nothing is read from this client once its buffer is full.
                context.set_timer(Some(RETRY));
                return Err(Action::Pending);
            }
            context.input.consume(length);
            self.pending.push_back(receiver);
        }
        Ok(())
    }
}

fn parse(line: &[u8]) -> Option<u64> {
    let number = str::from_utf8(line).ok()?.trim().parse().ok()?;
    (number <= MAX_BYTES).then_some(number)
}
