//! A new connection, as the handler factory sees it.

use std::io;

use crate::net::address::Address;
use crate::net::stream::Socket;
use crate::peer::Peer;

/// A new connection, for which [`Server::run`](crate::Server::run) creates a handler.
#[derive(Clone, Copy, Debug)]
pub struct NewConnection<'a> {
    socket: &'a Socket,
    peer: Peer,
    number: u64,
}

impl<'a> NewConnection<'a> {
    pub(crate) fn new(socket: &'a Socket, peer: Peer, number: u64) -> Self {
        Self {
            socket,
            peer,
            number,
        }
    }

    /// Returns the client.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Returns the number of the connection: 1 for the first that the server has accepted, and one more for each that
    /// follows, whichever worker serves it. Handlers are not created in this order.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Returns the address that the client has connected to. A dual-stack listener reports IPv4 clients with
    /// an IPv4 address.
    ///
    /// # Errors
    ///
    /// Each call is a system call, and fails as that does.
    pub fn local_address(&self) -> io::Result<Address> {
        self.socket.local_address()
    }
}
