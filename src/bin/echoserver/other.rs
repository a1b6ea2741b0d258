//! The functions of `unix.rs` for other systems, which have no signals and no service manager of this kind.

use std::io;
use std::time::Duration;

use echoserver::{Address, Server};
use socket2::SockAddr;

pub(crate) const SIGUSR1: i32 = 0;

pub(crate) fn is_journal() -> bool {
    false
}

pub(crate) fn is_stderr_file() -> bool {
    false
}

pub(crate) fn is_socket_file(_address: &Address) -> bool {
    false
}

pub(crate) fn unix_address(_address: &Address) -> Option<io::Result<SockAddr>> {
    None
}

pub(crate) fn raise_descriptor_limit() -> io::Result<Option<u64>> {
    Ok(None)
}

pub(crate) fn descriptor_limit() -> Option<u64> {
    None
}

/// No inherited sockets.
pub(crate) struct Inherited;

impl Inherited {
    pub(crate) fn take() -> io::Result<Self> {
        Ok(Self)
    }

    pub(crate) fn is_empty(&self) -> bool {
        true
    }

    pub(crate) fn adopt_into(self, _server: &mut Server) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn notify(_message: &str) -> io::Result<()> {
    Ok(())
}

/// There is no value of this type.
pub(crate) enum Signals {}

impl Signals {
    pub(crate) fn register() -> io::Result<Option<Self>> {
        Ok(None)
    }

    pub(crate) fn closer(&self) -> impl FnOnce() + use<> {
        || ()
    }

    pub(crate) fn wait(&mut self, _timeout: Option<Duration>) -> io::Result<Option<Vec<i32>>> {
        match *self {}
    }
}

pub(crate) fn signal_name(_signal: i32) -> &'static str {
    "signal"
}
