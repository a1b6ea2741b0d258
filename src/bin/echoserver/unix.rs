//! What the program asks of a Unix system, and of its service manager. `other.rs` has the same for other systems.

use std::env;
use std::fs::{self, File, Metadata};
use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use echoserver::Server;
use listenfd::ListenFd;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::SigSet;
use nix::sys::time::TimeValLike;
pub(crate) use signal_hook::consts::SIGUSR1;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use socket2::Socket;

use crate::error::with_context;

// Stderr.

/// Returns whether stderr is a stream to systemd's journal, which names it by device and inode.
pub(crate) fn is_journal() -> bool {
    let stream = env::var("JOURNAL_STREAM").unwrap_or_default();
    stderr().is_some_and(|stderr| format!("{}:{}", stderr.dev(), stderr.ino()) == stream)
}

/// Returns whether stderr is a regular file.
pub(crate) fn is_stderr_file() -> bool {
    stderr().is_some_and(|stderr| stderr.is_file())
}

fn stderr() -> Option<Metadata> {
    let stderr = io::stderr().as_fd().try_clone_to_owned();
    File::from(stderr.ok()?).metadata().ok()
}

// Stdout.

/// Returns whether stdout is a pipe, a socket or a terminal whose other end is closed.
pub(crate) fn is_stdout_closed() -> bool {
    let stdout = io::stdout();
    let mut stdout = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    let closed = PollFlags::POLLERR | PollFlags::POLLHUP;
    let polled = poll(&mut stdout, PollTimeout::ZERO);
    let events = stdout[0].revents().filter(|_| polled.is_ok());
    events.is_some_and(|events| events.intersects(closed))
}

// The process.

/// Returns the CPU time that this process has used. On other systems it is unknown.
pub(crate) fn cpu_time() -> Option<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let micros = [usage.user_time(), usage.system_time()].map(|time| time.num_microseconds());
    Some(Duration::from_micros(
        micros.iter().sum::<i64>().unsigned_abs(),
    ))
}

// Descriptors.

/// Returns whether an error means that this machine has no descriptor or memory for another socket.
pub(crate) fn is_lack_of_sockets(code: i32) -> bool {
    matches!(
        Errno::from_raw(code),
        Errno::ENFILE | Errno::EMFILE | Errno::ENOBUFS
    )
}

/// Raises the descriptor limit to its maximum, and returns it. On other systems there is none.
pub(crate) fn raise_descriptor_limit() -> io::Result<Option<u64>> {
    rlimit::increase_nofile_limit(u64::MAX)
        .map(Some)
        .map_err(|error| with_context(&error, "cannot raise the descriptor limit"))
}

/// Adds an inherited socket to the listeners of a server, which checks that it is listening.
pub(crate) type Adopt = Box<dyn FnOnce(&mut Server) -> io::Result<()>>;

/// The most descriptors that a service manager may pass.
const MAX_INHERITED: usize = 1024;

/// Takes the sockets that the service manager passes (`LISTEN_FDS`), and removes the variables that name them. If they are
/// for another process, it takes none and keeps the variables: see [`other_heir`].
///
/// Call it before any thread starts, because it changes the environment, and before any file is
/// opened, which could get the number of a descriptor that is named but was not passed.
///
/// # Errors
///
/// Fails if one of them is not a stream socket; the error gives its number.
pub(crate) fn inherited_sockets() -> io::Result<Vec<Adopt>> {
    let variable = |name| env::var(name).unwrap_or_default();
    let count = variable("LISTEN_FDS");
    if count.is_empty() || other_heir().is_some() {
        return Ok(Vec::new());
    }
    let number = count.parse().ok();
    let number = number.filter(|number| *number <= MAX_INHERITED);
    let number = number.ok_or_else(|| {
        let expected = format!("expected a number of descriptors up to {MAX_INHERITED}");
        io::Error::other(format!("LISTEN_FDS: {expected}, not '{count}'"))
    })?;
    let first: usize = variable("LISTEN_FDS_FIRST_FD").parse().unwrap_or(3);
    let mut sockets = ListenFd::from_env();
    let take = |index| -> io::Result<Adopt> {
        let descriptor = first + index;
        let context = format!("cannot listen on inherited descriptor {descriptor}");
        let name = move |error| with_context(&error, &context);
        if let Ok(Some(tcp)) = sockets.take_tcp_listener(index) {
            Ok(Box::new(|server| server.adopt_tcp(tcp).map_err(name)))
        } else if let Ok(Some(unix)) = sockets.take_unix_listener(index) {
            Ok(Box::new(|server| server.adopt_unix(unix).map_err(name)))
        } else {
            let problem = "it is closed, or not a TCP or Unix-domain stream socket";
            Err(name(io::Error::other(problem)))
        }
    };
    (0..number).map(take).collect()
}

/// Returns the process (`LISTEN_PID`) for which the service manager has passed sockets, if it is not this one. A wrapper that
/// starts the program as a child of its own is such a process.
pub(crate) fn other_heir() -> Option<String> {
    env::var_os("LISTEN_FDS")?;
    let pid = env::var("LISTEN_PID").ok().filter(|pid| !pid.is_empty())?;
    (pid != process::id().to_string()).then_some(pid)
}

// Signals.

/// Registered signals.
pub(crate) struct Signals(SignalDelivery<UnixStream, SignalOnly>);

impl Signals {
    /// Registers the signals. One that arrives before [`wait`](Self::wait) is called stays pending. Signals that the
    /// parent process has blocked are unblocked. On other systems there are none.
    ///
    /// Call it before any thread starts, because threads inherit the set of blocked signals.
    pub(crate) fn register() -> io::Result<Option<Self>> {
        // A signal that arrives between the steps of its own registration would be lost.
        SigSet::all().thread_block()?;
        // A write beyond the limit of a file's size fails then, instead of ending the process.
        flag::register(SIGXFSZ, Arc::default())?;
        let is_handled = |signal: &i32| !is_ignored_at_start(*signal);
        let signals = [SIGINT, SIGHUP].into_iter().filter(is_handled);
        let signals = signals.chain([SIGTERM, SIGUSR1]);
        let (read, write) = UnixStream::pair()?;
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, signals)?;
        SigSet::empty().thread_set_mask()?;
        Ok(Some(Self(delivery)))
    }

    /// Returns a function that ends [`wait`](Self::wait).
    pub(crate) fn closer(&self) -> impl FnOnce() + use<> {
        let handle = self.0.handle();
        move || handle.close()
    }

    /// Waits for signals, at most for `timeout`. Returns those that have arrived, or `None` after the end.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Option<Vec<i32>>> {
        if self.0.handle().is_closed() {
            return Ok(None);
        }
        // Zero would be an error.
        let timeout = timeout.map(|timeout| timeout.max(Duration::from_millis(1)));
        // A signal has put a byte into the pipe.
        let pending = self.0.poll_pending(&mut |pipe: &mut UnixStream| {
            pipe.set_read_timeout(timeout)?;
            pipe.read(&mut [0])
                .map(|count| count > 0)
                .or_else(|error| match error.kind() {
                    WouldBlock | TimedOut | Interrupted => Ok(false),
                    _ => Err(error),
                })
        })?;
        Ok(Some(pending.into_iter().flatten().collect()))
    }
}

/// Whether a signal was ignored when the process started, and stays so: SIGHUP after `nohup`, or SIGINT in a background job of
/// a shell without job control, unless Ctrl-C can reach the process because stdin is a terminal. Where /proc does not tell,
/// SIGHUP counts as ignored, and keeps the effect that it had.
pub(crate) fn is_ignored_at_start(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = (status.lines())
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    let is_ignored = ignored.map_or(signal == SIGHUP, |set| set >> (signal - 1) & 1 != 0);
    is_ignored && !(signal == SIGINT && io::stdin().is_terminal())
}

/// Sets the timeout of a socket's calls.
pub(crate) fn set_timeouts(socket: &Socket, timeout: Duration) -> io::Result<()> {
    socket.set_read_timeout(Some(timeout))?;
    socket.set_write_timeout(Some(timeout))
}

/// Calls once: the socket has a timeout.
pub(crate) fn call_with_timeout<T>(
    _timeout: Duration,
    call: &mut impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    call()
}
