//! The functions of `unix.rs` for Windows, which has console events instead of signals, and no service manager of this kind.

use std::io::{self, ErrorKind};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use echoserver::Server;
use signal_hook::consts::SIGINT;
use socket2::Socket;

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

/// WSAEMFILE and WSAENOBUFS.
pub(crate) fn is_lack_of_sockets(code: i32) -> bool {
    code == 10024 || code == 10055
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

/// The registered handler of Ctrl-C and Ctrl-Break. Each is handled as SIGINT.
pub(crate) struct Signals {
    arrived: Receiver<()>,
    close: Sender<()>,
    closed: Receiver<()>,
}

impl Signals {
    pub(crate) fn register() -> io::Result<Option<Self>> {
        let (sender, arrived) = unbounded();
        let (close, closed) = bounded(1);
        // It fails if nothing waits for the events any more.
        let handler = move || {
            let _ignored = sender.send(());
        };
        ctrlc::set_handler(handler).map_err(io::Error::other)?;
        Ok(Some(Self {
            arrived,
            close,
            closed,
        }))
    }

    pub(crate) fn closer(&self) -> impl FnOnce() + use<> {
        let close = self.close.clone();
        move || {
            let _ended = close.send(());
        }
    }

    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Option<Vec<i32>>> {
        select! {
            recv(self.closed) -> _ => Ok(None),
            recv(self.arrived) -> _ => Ok(Some(vec![SIGINT])),
            default(timeout.unwrap_or(Duration::from_secs(3600))) => Ok(Some(Vec::new())),
        }
    }
}

/// Makes the calls of a socket return at once: a send that has timed out on Windows may have sent a part.
pub(crate) fn set_timeouts(socket: &Socket, _timeout: Duration) -> io::Result<()> {
    socket.set_nonblocking(true)
}

/// Repeats a call of such a socket until it does not block, or for this time.
pub(crate) fn call_with_timeout<T>(
    timeout: Duration,
    call: &mut impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let start = Instant::now();
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::WouldBlock && start.elapsed() < timeout => {
                thread::sleep(Duration::from_millis(1));
            }
            result => return result,
        }
    }
}
