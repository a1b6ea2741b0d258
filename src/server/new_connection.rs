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
}

impl<'a> NewConnection<'a> {
    pub(crate) fn new(socket: &'a Socket, peer: Peer) -> Self {
        Self { socket, peer }
    }

    /// Returns the client.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
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
