//! A TCP echo server with memcached's thread-pool design, and the small library it is made of.
//!
//! The program is for testing what talks TCP: whatever a client sends comes back, byte by byte,
//! under every load. The library gives the same server to other protocols: a [`Handler`] is
//! told of bytes and of nothing else, and a [`Server`] does the rest: many connections, few
//! threads, bounded memory, back-pressure, fairness, an end in order. There is no async runtime
//! in it and no `unsafe`, and it is meant to be read.
//!
//! 1. [A server of one's own](#a-server-of-ones-own)
//! 2. [What a handler cannot do](#what-a-handler-cannot-do)
//! 3. [The way of a connection, and of a byte](#the-way-of-a-connection-and-of-a-byte)
//! 4. [The rooms of the house](#the-rooms-of-the-house)
//! 5. [The reactor, room by room](#the-reactor-room-by-room)
//! 6. [The rules of an event loop](#the-rules-of-an-event-loop)
//! 7. [Portability](#portability)
//!
//! # A server of one's own
//!
//! This is all of a server that answers every line in capitals. It needs no crate but this one.
//!
//! ```no_run
#![doc = include_str!("../examples/upper.rs")]
//! ```
//!
//! * [`Handler::process`] is called when its connection opens, and whenever there is more
//!   input. It takes what it can use from the front of `input` ([`data`](Buffer::data),
//!   [`consume`](Buffer::consume)) and puts its answer at the end of `output`
//!   ([`push`](Buffer::push), or [`write!`]).
//! * **A message comes in pieces**, and several come in one: what is unfinished is left in
//!   `input`, and seen again with more behind it. So a handler loops for as long as there is a
//!   whole message.
//! * **An answer that doesn't fit** is left for the next call, when all of the output has been
//!   sent; its message is left in `input` too, or what it did is remembered in the handler. A
//!   client that does not read its answers is then not read either, and that is all of
//!   back-pressure.
//! * **An answer longer than the whole buffer** finds room never: it is given in parts, whose
//!   progress the handler remembers, or refused. Mind those that outgrow their question (`ß` in
//!   capitals is `SS`).
//! * **A message larger than [`Config::buffer_size`]** can't be taken as a whole: its
//!   connection is closed once it fills `input` ([`CloseReason::BufferFull`]), unless the handler takes
//!   it in parts, or answers with a refusal and [`Action::Close`].
//! * **To greet** is to push when `input` is empty, once. **To refuse** a client is to return
//!   [`Action::Close`] from the first call; **to say goodbye** is to push, and return it then.
//! * **State of a connection** is in the fields of its handler. **State of all of them** is
//!   whatever the closure given to [`Server::run`] lends to each handler, behind a lock or an
//!   atomic if it changes: handlers of several workers run at once. The closure is also told
//!   the [`Peer`].
//! * **To end the server**: [`Handle::shut_down`] from any thread, for which [`Server::handle`]
//!   is taken before [`Server::run`]; it answers what has arrived, and `run` returns what was
//!   counted.
//!
//! More of a protocol is in the repository's `examples/resp_server.rs`, a server that
//! `redis-cli` and `redis-benchmark` are content with; and `examples/checksum.rs` has a
//! [`WorkQueue`] without any server.
//!
//! # What a handler cannot do
//!
//! * **Speak unasked.** It is called when its connection has moved, and at no other time: there
//!   are no timers, and no messages from one connection to another. A chat needs another
//!   library.
//! * **Block.** Its worker serves many other connections, and they would all wait. A lock held
//!   for a moment is no harm; a query to a database is.
//! * **See its socket.** There is no way to change an option of it, or to know how it was
//!   closed.
//! * **Hold more than two buffers** of its client's bytes, without keeping them elsewhere.
//! * **Hurt others.** A panic ends its own connection; what it shares must be able to bear
//!   that.
//!
//! # The way of a connection, and of a byte
//!
//! ```text
//!            the thread that calls run                 worker-0, worker-1, ...
//!           +--------------------------+           +---------------------------+
//!  client --|--> listener -> acceptor -|- mailbox -|-> worker -> connections --|--> closed
//!           +--------------------------+  + wake   +-----------------|---------+
//!                                                                    | run
//!           +--------------------------------------------------------v---------+
//!  socket --|--> recv -> input -> Handler::process -> output -> send ----------|--> socket
//!           +------------------------------------------------------------------+
//! ```
//!
//! A connection stays with its worker. A byte stays on one thread, and goes all of its way
//! within one call, without a copy or an allocation of the library's; in an echo the two
//! buffers swap their storage. A run ends *idle* (wait for an event), *runnable* (its share is
//! spent: to the back of the run queue, and the next poll does not sleep) or *closed*, for a
//! [`CloseReason`] that is counted.
//!
//! # The rooms of the house
//!
//! | room | knows | must not know |
//! | --- | --- | --- |
//! | `server` | [`Config`], binding, who owns and joins each thread, shutting down | bytes |
//! | `acceptor` | accepting, when there is no room, dealing out | bytes, protocols |
//! | `work_queue` | one bounded mailbox per worker, whose turn it is, rousing | sockets |
//! | `worker` | its thread: one poll, its mailbox, the clock | protocols, bytes |
//! | `connections` | the table, the run queue, shares, the sweep of the idle | polls, threads, clocks |
//! | `connection` | one stream, its buffers, its handler: a state machine | polls, threads, clocks |
//! | `buffer` | a byte queue of fixed capacity, and the storage's reuse | when to read or write |
//! | `handler` | [`Handler`], [`Action`], [`Echo`] | sockets |
//! | `socket`, `unix`, `address` | TCP, Unix-domain sockets and their files, how places are written | who uses them |
//! | `stats` | counters with one writer each | what they mean to others |
//!
//! From `connections` downwards there is no I/O and no time: streams, readiness and the clock
//! come in as arguments. So the very code that serves sockets can be driven by a simulated
//! kernel.
//!
//! # The reactor, room by room
//!
//! A *reactor* waits for many sources of events in one place, and calls whoever is concerned.
//! Here there are N + 1 of them, each a thread with a poll of its own, and nobody shares one:
//!
//! 1. **The acceptor** waits for its listeners. It takes clients in batches, and deals each to
//!    the next worker in turn: connections are many and alike, so taking turns is as good as
//!    measuring load, and costs nothing. Where there is no room (connections, descriptors) it
//!    pauses, and the clients wait in the kernel's backlog, which is the queue made for it.
//! 2. **The work queue** carries the socket over. A mailbox is a bounded channel; a sleeping
//!    worker can't wait in it, as it waits in its poll already, so a waker puts an event into
//!    that poll.
//! 3. **The worker** repeats one turn: sleep in the poll, read the clock once, pass the events
//!    on. It registers a connection's socket once, for everything, edge-triggered, and never
//!    changes that.
//! 4. **Connections** runs who is ready, then who had spent their share, then the new; and it
//!    decides how long the worker may sleep: not at all while anyone is runnable, and no longer
//!    than until the next one's time is over.
//! 5. **A connection** moves bytes for as long as they move. An event says only that trying
//!    makes sense; what a system call returns is what is believed.
//! 6. **The handler** is the only part that knows what the bytes mean.
//!
//! memcached's threads are built like this; Nginx and Netty are near relatives. The
//! alternative, one reactor and a pool of threads that fetch ready connections from it, shares
//! every connection's state between threads, and pays for locks on the way of each byte.
//!
//! # The rules of an event loop
//!
//! Each was paid for by somebody. Behind each are the tests that fail without it.
//!
//! 1. **An event is a hint; what a system call returns is a fact.** The end of a stream is a
//!    read of no bytes, not a bit in an event, beside which unread data may still be waiting. A
//!    hint may come late, twice or for nothing.
//!    Pinned by `simulation_of_echo`, `the_end_awaits_the_output`.
//! 2. **No edge comes for what is already there.** That a stream is readable stays noted until
//!    a read would block; a connection that stops earlier, because its share is spent, comes
//!    back by itself.
//!    Pinned by `a_read_that_fills_the_buffer_is_followed_by_another`,
//!    `a_flood_starves_no_neighbour`, `who_has_spent_the_budget_goes_to_the_back`.
//! 3. **A short read has drained the socket only if nothing else can have cut it short.** Two
//!    things do: the stream's end, which comes in one event with the last data, and the mark of
//!    urgent data, at which every read stops. After events that speak of either, reading goes
//!    on until it would block. Otherwise one `recv` in three is saved. Urgent bytes stay in the
//!    stream, where they belong.
//!    Pinned by `an_end_that_arrives_with_the_data_is_seen`,
//!    `urgent_bytes_and_those_behind_them_belong_to_the_stream`,
//!    `a_short_read_proves_nothing_where_something_else_cuts_reads_short`,
//!    `a_message_costs_one_read_and_one_write`.
//! 4. **After the client's end comes all that is owed to it, and then the server's own end.**
//!    However late the client begins to read.
//!    Pinned by `a_late_reader_gets_more_than_the_kernel_holds`, `the_end_awaits_the_output`.
//! 5. **Write at once; interest is registered once.** Who waits for an event before each write
//!    pays for it with a round of the poll, and who changes the interest around each write,
//!    with a system call.
//!    Pinned by `a_stuck_connection_costs_no_calls_for_interest`,
//!    `a_message_costs_three_calls`.
//! 6. **`EINTR` means again; `EPIPE` and `ECONNRESET` mean that this connection is over**,
//!    quietly.
//!    Pinned by `interrupted_calls_are_made_again`, `resets_are_quiet_ends`,
//!    `sigpipe_is_nothing`.
//! 7. **A token may be stale within a batch of events**: its connection has ended, and its
//!    number must not belong to another one before the batch is over. New connections are let
//!    in after the events.
//!    Pinned by `an_event_for_nobody_is_ignored`, `simulation_of_echo`.
//! 8. **First push, then wake; on a wake, empty the mailbox.** Wakes coalesce: one per worker
//!    and batch is enough. A waker delivers for as long as it is alive, so the worker has a
//!    share in its own.
//!    Pinned by `the_item_is_there_when_the_bell_rings`,
//!    `an_item_placed_while_the_mailbox_is_emptied_rouses_anew`,
//!    `a_batch_rouses_each_worker_once`, `closes_when_dropped_but_loses_nothing`.
//! 9. **Closing with unread input sends a reset**, which can destroy what is on its way to the
//!    client. Where the server ends first, it ends its half of the stream, discards for a
//!    bounded while, then closes.
//!    Pinned by `a_handler_that_closes_is_heard_to_the_end`,
//!    `a_client_that_does_not_end_is_left_in_the_end`.
//! 10. **Nothing in accept ends the server.** What concerns one client is tried again at once;
//!     a lack of descriptors or memory pauses accepting, until a connection closes or a timer
//!     says so. On an edge-triggered listener the danger is not to spin but never to wake up
//!     again.
//!     Pinned by `passing_errors_are_tried_again_at_once`,
//!     `without_descriptors_it_pauses_and_tries_again_by_itself`,
//!     `a_freed_descriptor_ends_the_pause_at_once`, `more_clients_than_descriptors`.
//! 11. **Accepted sockets inherit options on Linux**: `TCP_NODELAY` and its like are set on the
//!     listener, once.
//!     Pinned by `a_connection_in_a_crowd_costs_at_most_eight_calls`.
//! 12. **Take many events at once**: a small array makes busy connections queue up for it.
//!     Pinned by `a_crowd_is_served_in_one_turn`.
//! 13. **Read the clock once a turn**, not once a message: who is idle is found by a sweep that
//!     is due a few times per timeout.
//!     Pinned by `sweeps_wait_for_an_eighth_of_the_timeout`,
//!     `an_idle_timeout_wakes_nobody_before_its_time`.
//!
//! # Portability
//!
//! Linux is where it is measured and tested. For macOS and Windows it is type-checked
//! (`.ci/cross-check`), and relies on nothing beyond mio there; what exists on some systems only
//! is gated:
//!
//! * Unix: `Address::UnixPath`, Unix-domain sockets. Linux and Android: `Address::UnixAbstract`, their
//!   names without a file.
//! * Linux and Android: `recv` and `send` without libc; and notice of urgent data, which lets a
//!   short read be trusted. Elsewhere reading goes on until it would block.
//! * The program handles signals, talks to a service manager and raises its descriptor limit on
//!   Unix only.
//!
//! The oldest Rust that compiles it is 1.88.
mod connection;
mod error;
mod handler;
mod net;
mod peer;
mod server;
mod stats;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod work_queue;

pub use connection::buffer::Buffer;
pub use handler::{Action, Echo, Handler};
pub use net::address::{Address, AddressError};
pub use peer::Peer;
pub use server::{Config, Handle, Server};
pub use stats::{CloseReason, Stats, WorkerStats};
pub use work_queue::{Receiver, Rejected, Wake, WorkQueue};
