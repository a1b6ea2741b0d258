//! A TCP echo server with memcached's thread-pool design, and the small library it is made of.
mod acceptor;
mod address;
mod buffer;
mod connection;
mod connections;
mod handler;
mod server;
mod socket;
mod stats;
#[cfg(unix)]
mod unix;
mod work_queue;
mod worker;

pub use address::{Address, AddressError};
pub use buffer::Buffer;
pub use handler::{Action, Echo, Handler};
pub use server::{Config, Handle, Server};
pub use socket::Peer;
pub use stats::{Reason, Stats, WorkerStats};
pub use work_queue::{Inbox, Rejected, Wake, WorkQueue};
