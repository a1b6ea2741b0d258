//! A thread-pool TCP server in memcached's design for a protocol of your own, and the echo server that is made of it.
//!
//! You write a [`Handler`], which turns received bytes into bytes to send; a [`Server`] provides many connections on few
//! threads, bounded memory, backpressure, fairness and a graceful shutdown. The crate contains no async runtime and no
//! `unsafe`, and it is written to be read. This server returns every byte:
//!
//! ```no_run
//! use echoserver::{Action, Config, Context, Event, Handler, Server};
//!
//! struct Echo;
//!
//! impl Handler for Echo {
//!     fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
//!         context.output.append(&mut context.input);
//!         Action::Continue
//!     }
//! }
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let server = Server::bind(Config::new("127.0.0.1:5555".parse()?))?;
//!     server.run(|_connection| Echo)?;
//!     Ok(())
//! }
//! ```
//!
//! 1. [The map](#the-map)
//! 2. [Writing a server](#writing-a-server)
//! 3. [What the library promises](#what-the-library-promises)
//! 4. [Limits of a handler](#limits-of-a-handler)
//! 5. [The rules of the event loop](#the-rules-of-the-event-loop)
//! 6. [Portability](#portability)
//!
//! # The map
//!
//! ```text
//!            the thread that calls run                 worker-0, worker-1, ...
//!           +--------------------------+           +---------------------------+
//!  client --|--> listener -> acceptor -|-- queue --|-> worker -> table --------|--> closed
//!           +--------------------------+  + wake-up+-----------------|---------+
//!                                                                    | drive
//!           +--------------------------------------------------------v---------+
//!  socket --|--> recv -> input -> Handler::process -> output -> send ----------|--> socket
//!           +------------------------------------------------------------------+
//! ```
//!
//! A connection stays with its worker, and so do its bytes. If the socket accepts the output at once, one function call
//! receives, processes and sends, without an allocation. An echo swaps the storage of the two buffers and copies
//! nothing.
//!
//! A module imports only modules below it in this table.
//!
//! | module | contains |
//! | --- | --- |
//! | `bin/echoserver` | the program: command line, log, signals, metrics, and the commands `check`, `load` and `plot` |
//! | `testing` | a simulated operating system, for the tests of this crate and of handlers |
//! | `server` | [`Config`], [`Server`], [`Handle`]: binding, ownership of every thread, shutdown |
//! | `server::worker` | the event loop of one thread: sleep in the poll, read the clock, handle the events |
//! | `server::table` | the connections of a worker: table, run queue, deadlines, and how long the worker may sleep |
//! | `server::timers` | when to look at a deadline |
//! | `server::acceptor` | accepts in batches; pauses at a limit and after errors; the backlog at shutdown |
//! | `server::dispatcher` | one bounded queue per worker, filled round-robin, and its notification |
//! | `server::control` | what the threads share: the places for connections, and the request to shut down |
//! | `server::new_connection` | [`NewConnection`], from which a handler is made |
//! | `net` | addresses, listeners, streams and polls of the operating system |
//! | `work_queue` | [`WorkQueue`]: threads that share jobs |
//! | `connection` | one connection as a state machine: stream, buffers, handler |
//! | `connection::handler` | [`Handler`], [`Event`], [`Action`], [`Context`], [`Echo`] |
//! | `connection::shared` | what a connection sees of its worker: counters, time, timeouts, the shutdown |
//! | `connection::waker` | [`Waker`], and a worker's queue of wake-ups |
//! | `connection::buffer` | [`Buffer`], a byte queue of fixed capacity, and the pool of pairs of them |
//! | `notify` | the flag that coalesces notifications |
//! | `stats` | counters with one writer each |
//! | `system` | what the server asks of the operating system; `net` and `testing` answer |
//! | `peer` | [`Peer`], the client of a connection |
//! | `error` | the text of errors |
//!
//! `connection` and its modules, `server::table` and `server::timers` do not poll and read no clock: streams, readiness
//! and time are arguments. A simulated kernel therefore drives exactly the code that serves sockets.
//!
//! Tests are in `tests.rs` beside a module, and in `tests/`, whose README describes their layers. `benches/` and
//! `packaging/` have a README as well.
//!
//! # Writing a server
//!
//! **Echo**, as above. A [`Handler`] is one value per connection. It is called for each [`Event`], takes bytes from the front of
//! [`input`](Context::input), appends bytes to [`output`](Context::output), and returns an [`Action`]: what the
//! server does next.
//!
//! **Lines.** A message arrives in pieces, and several can arrive at once. A handler therefore loops over the
//! complete messages and leaves an unfinished one in `input`; the next call sees it again with more bytes
//! appended. The loop must not end with a complete message left for [`Action::Continue`]: no event would come for it.
//! If an answer does not fit into `output`, leave its message in `input` and return [`Action::Flush`]: the handler is
//! called again when `output` is empty. While output is pending, the server does not read from that client: this is
//! backpressure. The complete server:
//!
//! ```no_run
#![doc = include_str!("../examples/upper.rs")]
//! ```
//!
//! **Frames.** Binary protocols put a length before each message. A frame must fit into
//! [`Config::buffer_size`] with its header of four bytes. One that fills `input` and is not consumed closes its
//! connection ([`CloseReason::BufferFull`]): the client gets the earlier answers, then EOF. To send an error
//! message first, use [`Input::frame_within`], and return [`Action::Close`]; [`Input::line_within`] does the same for lines.
//! Here each frame is answered with a frame of its reversed contents:
//!
//! ```
//! # use echoserver::{Action, Context, Event, Handler};
//! struct Reverse;
//!
//! impl Handler for Reverse {
//!     fn process(&mut self, event: Event, context: &mut Context<'_>) -> Action {
//!         while let Some(frame) = context.input.frame() {
//!             let length = frame.len();
//!             // Check before the frame is reversed: after `Flush`, the same frame is handled again.
//!             if context.output.room() < length {
//!                 return Action::Flush;
//!             }
//!             context.input.data_mut()[4..length].reverse();
//!             let _fits = context.output.push(&context.input.data()[..length]);
//!             context.input.consume(length);
//!         }
//!         if event == Event::Eof && !context.input.is_empty() {
//!             log::info!("client closed in the middle of a frame");
//!         }
//!         Action::Continue
//!     }
//! }
//! ```
//!
//! **Jobs.** Slow work must not block the event loop. A [`WorkQueue`] runs it on threads of its own, and a [`Waker`]
//! has the handler called when the job is done. Until then the handler returns [`Action::Pending`], so that neither
//! the client's EOF, an idle timeout nor a shutdown closes the connection before its answer:
//!
//! ```no_run
//! # use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
//! # use std::time::Duration;
//! # use echoserver::{Action, Config, Context, Event, Handler, Server, Waker, WorkQueue};
//! struct Job {
//!     line: Vec<u8>,
//!     answer: Sender<Vec<u8>>,
//!     waker: Waker,
//! }
//!
//! fn run(job: Job) {
//!     // Declared first, so dropped last: `answer` is closed before the wake-up, also after a panic.
//!     let _wake = job.waker.wake_on_drop();
//!     let answer = job.answer;
//!     let result = job.line.to_ascii_uppercase(); // Here: a database, a file, a computation.
//!     let _connection_is_closed = answer.send(result);
//! }
//!
//! struct Slow<'a> {
//!     queue: &'a WorkQueue<Job>,
//!     answer: Option<Receiver<Vec<u8>>>,
//! }
//!
//! impl Handler for Slow<'_> {
//!     fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
//!         if !context.output.is_empty() {
//!             return Action::Flush; // Woken while an answer is being sent.
//!         }
//!         if let Some(answer) = &self.answer {
//!             let answer = match answer.try_recv() {
//!                 Ok(answer) => answer,
//!                 Err(TryRecvError::Empty) => return Action::Pending, // Called for another reason.
//!                 Err(TryRecvError::Disconnected) => return Action::Close, // The job has panicked.
//!             };
//!             self.answer = None;
//!             return match context.output.push(&answer) {
//!                 true => Action::Flush, // The next line when this answer is sent.
//!                 false => Action::Close, // It is longer than the whole buffer.
//!             };
//!         }
//!         let Some(line) = context.input.line() else {
//!             return Action::Continue;
//!         };
//!         let length = line.len();
//!         let (sender, receiver) = channel();
//!         let job = Job { line: line.to_vec(), answer: sender, waker: context.waker() };
//!         match self.queue.try_push(job) {
//!             Ok(()) => {
//!                 context.input.consume(length);
//!                 self.answer = Some(receiver);
//!             }
//!             // The queue is full. The line stays in the input until the timer expires.
//!             Err(_job) => context.set_timer(Some(Duration::from_millis(10))),
//!         }
//!         Action::Pending
//!     }
//! }
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let queue = WorkQueue::new(4, 100, run)?;
//!     let server = Server::bind(Config::new("127.0.0.1:5555".parse()?))?;
//!     server.run(|_connection| Slow { queue: &queue, answer: None })?;
//!     Ok(())
//! }
//! ```
//!
//! **Slices.** The server is fair in bytes: it bounds what a turn reads and sends, but cannot divide a call. A handler that
//! needs more than a millisecond for what one read brings does a part, and returns [`Action::Yield`] to be called again after
//! the others. `Context` can be taken apart, so that input and output are borrowed by themselves; ask it for
//! [`now`](Context::now), timer and waker before:
//!
//! ```
//! # use echoserver::{Action, Context, Event, Handler};
//! /// Answers each line with its number of words, at most 100 lines in a call.
//! struct Words;
//!
//! impl Handler for Words {
//!     fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
//!         let Context { input, output, .. } = context;
//!         for _ in 0..100 {
//!             let Some(line) = input.line() else {
//!                 return Action::Continue;
//!             };
//!             let words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
//!             if !output.push(format!("{}\n", words.count()).as_bytes()) {
//!                 return Action::Flush;
//!             }
//!             let length = line.len();
//!             input.consume(length);
//!         }
//!         Action::Yield // Call again for the other lines, with `Event::Resumed`.
//!     }
//! }
//! ```
//!
//! **Signals.** [`Handle::shut_down`] ends the server from any thread: it answers what clients have sent, and [`Server::run`]
//! returns the counters. The library itself handles no signal. With the crate `ctrlc`, for SIGINT and with its feature `termination`
//! for SIGTERM:
//!
//! ```no_run
//! use echoserver::{Config, Echo, Server};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let server = Server::bind(Config::new("127.0.0.1:5555".parse()?))?;
//!     let handle = server.handle();
//!     ctrlc::set_handler(move || match handle.is_shutting_down() {
//!         false => handle.shut_down(),
//!         true => handle.abort(), // The second signal.
//!     })?;
//!     let stats = server.run(|_connection| Echo)?;
//!     println!("served {} connections", stats.accepted);
//!     Ok(())
//! }
//! ```
//!
//! More that protocols need:
//!
//! * **A greeting** is appended in the first call, for [`Event::Open`]. **To refuse** a client, return
//!   [`Action::Close`] from that call. **To send a last message**, append it and return [`Action::Close`].
//! * **An answer longer than the whole buffer** is sent in parts: append what fits, keep the progress in the handler
//!   and return [`Action::Flush`].
//! * **A message that depends on time** is sent when the timer expires: [`Context::set_timer`]. **A rate limit** measures time
//!   with [`Context::now`], which is simulated as well, and returns [`Action::Pending`] with a timer when it is used up.
//! * **A farewell**, or an answer that announces the end, is for [`Event::Shutdown`]. **A client that does not read** or breaks
//!   the protocol can be reset: [`Action::Reset`].
//! * **A layer** such as TLS, a header in front of the stream or a limit is a handler that contains another one:
//!   [`Context::with`], which shows a complete one.
//! * **A message from another connection** goes through shared state: put it where the other handler finds it, and
//!   use that connection's [`Waker`], once for all messages of a call. A shutdown immediately closes connections that only wait
//!   for input, so a wake-up can be too late for them. **Bound what waits** for a receiver in two ways: a sender returns
//!   [`Action::Pending`] with a timer while a receiver is far behind, and a receiver is reset if its `output` has not become
//!   empty for some time. Messages that wait do not show a slow client: its turn may not have come.
//! * **What an operator should know** about a connection, such as a user or an error, is in the log record of its end:
//!   [`Context::set_note`].
//! * **State of a connection** belongs in the fields of its handler. **State shared by connections** is
//!   passed to each handler by the closure given to [`Server::run`]. If it changes, it needs a lock or an
//!   atomic, because the workers run in parallel. A handler that panics while it holds a mutex poisons it for all others:
//!   recover with [`PoisonError::into_inner`](std::sync::PoisonError::into_inner) if the data is usable. The closure
//!   receives a [`NewConnection`]: the [`Peer`], the address that it has connected to, and a number.
//! * **To run the server on another thread** whose handlers borrow, use [`std::thread::scope`].
//! * **To test a handler**, run it in `testing::simulate`, with the feature `testing`, and behind a socket: bind port 0,
//!   connect to [`Server::addresses`], shut down and join. The example of [`Server`] does that. On Linux a shutdown waits 100 ms
//!   for clients whose handshake is in progress, or a quarter of [`Config::drain_timeout`] if that is shorter: a test with
//!   many servers sets 10 ms, or calls [`Handle::abort`] when its clients are done.
//!
//! The repository's `examples/` have larger servers: `memcached.rs`, a whole protocol with shared state,
//! `digest_server.rs` with jobs, `chat.rs` with wakers, timers and a farewell, and `masked.rs`, a wrapper.
//! `tls/`, a package of its own, is TLS around any handler.
//!
//! # What the library promises
//!
//! `docs/contract.md` has twelve promises with numbers. The library keeps them for every handler, with these limits:
//!
//! * *Complete* (2): a connection that is closed for any reason but its handler's [`Action::Close`] is reset if its buffers
//!   still hold bytes or an answer is still to come. A handler that closes by itself ends the stream with a clean EOF, and
//!   discards input that it has not consumed. So does the end after `BufferFull` or a panic, and an unfinished message at the
//!   client's EOF is no answer either.
//! * *Bounded* (3), *idle is free* (4): for the two buffers of the server. What a handler stores, and a [`Buffer`] of its own,
//!   come on top.
//! * *Fair* (5): in bytes. A call of a handler is never interrupted; one that takes long delays all others of its worker.
//! * *Drain* (9): from [`Handle::shut_down`] on. Its deadline is [`Config::drain_timeout`].
//! * *Isolated* (6), *out of descriptors* (7), *accounted* (8) and *timeouts depend on the client* (12): as they are.
//!
//! *Byte-exact* (1) is the echo's. Signals, the exit status, one line for each error and a log that never blocks (9 to 11)
//! are the program's: see `src/bin/echoserver/`.
//!
//! # Limits of a handler
//!
//! * **It must not block.** Its worker serves many other connections, which would all wait. A lock held
//!   for a moment does no harm; a database query does: use a [`WorkQueue`].
//! * **It has no access to its socket**: it can neither set socket options nor learn how the connection
//!   was closed. It is dropped then, without a call.
//! * **It sees at most one buffer of input at a time**, unless it stores more elsewhere.
//! * **It cannot pause input**, and does not need to: while output is pending or work is left ([`Action::Yield`]), the server
//!   does not read.
//! * **It cannot open connections.** A proxy needs another library, or blocking sockets on a [`WorkQueue`].
//! * **A panic closes only its own connection**; data that it shares must tolerate that. (With
//!   `panic = "abort"` a panic ends the process.)
//!
//! # The rules of the event loop
//!
//! A *reactor* waits for many event sources in one place and calls the code that handles each event. This server has one
//! for accepting and one per worker, each a thread with a poll of its own, as in memcached. Round-robin needs no
//! measurement of load. In nginx each worker accepts by itself. An alternative is one reactor and a thread pool that
//! takes ready connections from it: it shares the state of every connection between threads and needs locks on the path
//! of each byte.
//!
//! In one tick, a worker drives the connections with an event, then those that were woken, at most 128 and until they have
//! sent 256 KiB, then new ones, and closes those that have expired. A connection whose last turn has moved 32 KiB or more, or was
//! ended by [`Action::Yield`], is *bulk*: what happens to it only marks it, and a few of those that are marked get a turn at the
//! end of each tick. So a small message does not wait for the floods. A turn ends *idle* (wait for an event), *runnable* (the
//! budget is used, and the next poll does not sleep) or *closed*, with a [`CloseReason`] that is counted.
//!
//! Each rule comes from a real bug. A test that fails without a rule names it.
//!
//! 1. **An event is a hint; the result of a system call is a fact.** The end of a stream is a read of zero bytes, not a
//!    bit in an event: unread data may precede it. Events can be late, duplicate or spurious.
//! 2. **No edge announces what is already there.** Readiness is kept until a call would block. A connection that stops
//!    earlier, because its budget is used, is put into the run queue.
//! 3. **A short read of TCP proves that the receive queue is empty, except at EOF and at the urgent mark.** EOF arrives in
//!    one event with the last data, and every read stops at the urgent mark. After an event with either, reading
//!    continues until it would block. In all other cases the second `recv` of each message, which would only return
//!    `EAGAIN`, is saved. Urgent bytes stay in the stream (`SO_OOBINLINE`).
//! 4. **After the client's EOF, send all pending output before closing the socket**, however late the client starts to
//!    read.
//! 5. **Write at once, register interest once.** Waiting for an event before each write costs a poll, and changing the
//!    interest around each write costs a system call.
//! 6. **Retry after `EINTR`; `EPIPE` and `ECONNRESET` end this connection only**, without a log entry above debug level.
//! 7. **A token can be stale within a batch of events.** The connection may have been closed earlier in the batch, so its
//!    token must not be reused before the batch is complete. New connections are registered after the events.
//! 8. **Push first, then wake. On a wake-up, clear the flag, then empty the queue.** Wake-ups coalesce: one per worker and
//!    batch is enough. Dropping mio's waker removes its event from the poll, so it lives as long as the loop.
//! 9. **Closing a socket with unread input sends a reset**, which can destroy output in flight. When the server ends a
//!    connection, it shuts its write half down, discards input until EOF or a deadline, and then closes. When it must
//!    abandon output, it resets on purpose (`SO_LINGER` 0), so that the client can tell a truncated stream from a
//!    complete one.
//! 10. **No `accept` error stops the server.** An error that concerns one client is retried at once, but 16 consecutive
//!     errors pause accepting. Lack of descriptors or memory pauses accepting, with growing backoff, until a connection
//!     closes or a timer expires. With an edge-triggered listener the risk is a lost wake-up, not a busy loop.
//! 11. **On Linux, accepted sockets inherit options from the listener**, so `TCP_NODELAY`, keepalive and
//!     `TCP_NOTSENT_LOWAT` are set once, on the listener.
//! 12. **Take many events per poll.** With a small array, busy connections wait for a place in it. Before a deadline
//!     expires, handle the events that the kernel already knows of: the process may have been stopped, or one batch may
//!     not hold them all.
//! 13. **Read the clock per tick** (at its start, and at its end for the length of the longest one), not per message, and
//!     schedule nothing per message: progress moves a deadline, but sets no timer.
//!
//! # Portability
//!
//! The server is tested and measured on Linux, for x86_64. On aarch64, big-endian s390x and 32-bit i686, and on Windows, the unit
//! tests and all cases of `echoserver check` pass, under emulation (`.ci/platforms`); macOS and FreeBSD are type-checked
//! (`.ci/cross-check`). Elsewhere than on Linux, socket I/O uses only mio and socket2. Platform-specific parts are gated:
//!
//! * Unix: `Address::UnixPath`. Linux: `Address::UnixAbstract`, Unix-domain sockets without a file.
//! * Linux: `recv` and `send` without libc's wrappers, and events for urgent data, which allow a short read to be
//!   trusted. On other systems every read continues until it would block.
//! * The program handles signals (on Windows, Ctrl-C and Ctrl-Break) and, on Unix, notifies a service manager and raises its
//!   descriptor limit.
//!
//! The minimum supported Rust version is 1.88.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;

// Examples that are tested in the simulation name the crate as users do.
#[cfg(test)]
extern crate self as echoserver;

mod connection;
mod error;
mod net;
mod notify;
mod peer;
mod server;
mod stats;
mod system;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod work_queue;

pub use connection::buffer::Buffer;
pub use connection::handler::{Action, Context, Echo, Event, Handler, Input, Output, TooLong};
pub use connection::waker::{WakeOnDrop, Waker};
pub use net::address::{Address, AddressError};
pub use peer::Peer;
pub use server::new_connection::NewConnection;
pub use server::{Config, Handle, Server};
pub use stats::{ByReason, CloseReason, Number, Stats, Value, WorkerStats};
pub use work_queue::WorkQueue;
