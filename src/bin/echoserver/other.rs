//! The functions of `unix.rs` for other systems, which have no signals and no service manager of this kind.

use std::io;
use std::time::Duration;

use echoserver::Server;

pub(crate) const SIGUSR1: i32 = 0;

pub(crate) fn is_journal() -> bool {
    false
}

pub(crate) fn is_stderr_file() -> bool {
    false
}

pub(crate) fn is_stdout_closed() -> bool {
    false
}

pub(crate) fn cpu_time() -> Option<Duration> {
    None
}

pub(crate) fn raise_descriptor_limit() -> io::Result<Option<u64>> {
    Ok(None)
}

pub(crate) type Adopt = Box<dyn FnOnce(&mut Server) -> io::Result<()>>;

pub(crate) fn inherited_sockets() -> io::Result<Vec<Adopt>> {
    Ok(Vec::new())
}

pub(crate) fn other_heir() -> Option<String> {
    None
}

pub(crate) fn is_ignored_at_start(_signal: i32) -> bool {
    false
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
