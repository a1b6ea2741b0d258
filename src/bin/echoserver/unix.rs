//! What the program asks of a Unix system, and of its service manager. `other.rs` has the same for other systems.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::process;
use std::sync::Arc;
use std::time::Duration;

use echoserver::{Address, Server};
use listenfd::ListenFd;
use nix::sys::signal::SigSet;
use rlimit::Resource;
pub(crate) use signal_hook::consts::SIGUSR1;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use signal_hook::low_level;
use socket2::SockAddr;

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

// Addresses.

/// Returns whether a listener at this address has a file.
pub(crate) fn is_socket_file(address: &Address) -> bool {
    matches!(address, Address::UnixPath(_))
}

/// Returns the address of a Unix-domain socket.
pub(crate) fn unix_address(address: &Address) -> Option<io::Result<SockAddr>> {
    match address {
        Address::UnixPath(path) => Some(SockAddr::unix(path)),
        #[cfg(target_os = "linux")]
        Address::UnixAbstract(name) => Some(SockAddr::unix(format!("\0{name}"))),
        _ => None,
    }
}

// Descriptors.

/// Raises the descriptor limit to its maximum, and returns it. On other systems there is none.
pub(crate) fn raise_descriptor_limit() -> io::Result<Option<u64>> {
    rlimit::increase_nofile_limit(u64::MAX)
        .map(Some)
        .map_err(|error| with_context(&error, "cannot raise the descriptor limit"))
}

/// Returns the limit of descriptors that may be open.
pub(crate) fn descriptor_limit() -> Option<u64> {
    rlimit::getrlimit(Resource::NOFILE)
        .ok()
        .map(|(soft, _hard)| soft)
}

// Sockets of the service manager.

/// Sockets inherited from the service manager (`LISTEN_FDS`), with their descriptors.
pub(crate) struct Inherited(Vec<(usize, Socket)>);

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Inherited {
    /// The most descriptors that a service manager may pass.
    const MAX_COUNT: usize = 1024;

    /// Takes the sockets that the environment names, and removes its variables.
    ///
    /// Call it before any thread starts, because it changes the environment, and before any file is
    /// opened, which could get the number of a descriptor that is named but was not passed.
    ///
    /// # Errors
    ///
    /// Fails if one of them is not a stream socket; the error gives its number.
    pub(crate) fn take() -> io::Result<Self> {
        let variable = |name| env::var(name).unwrap_or_default();
        let (pid, count) = (variable("LISTEN_PID"), variable("LISTEN_FDS"));
        let is_own = pid.is_empty() || pid == process::id().to_string();
        let number = if is_own && !count.is_empty() {
            count.parse().ok().filter(|count| *count <= Self::MAX_COUNT)
        } else {
            Some(0)
        };
        let number = number.ok_or_else(|| {
            let expected = format!("expected a number of descriptors up to {}", Self::MAX_COUNT);
            io::Error::other(format!("LISTEN_FDS: {expected}, not '{count}'"))
        })?;
        let first: usize = variable("LISTEN_FDS_FIRST_FD").parse().unwrap_or(3);
        let mut sockets = ListenFd::from_env();
        let take = |index| {
            let descriptor = first + index;
            let socket = if fs::symlink_metadata(format!("/dev/fd/{descriptor}")).is_err() {
                return Err(cannot_listen(descriptor, &io::Error::other("not open")));
            } else if let Ok(Some(tcp)) = sockets.take_tcp_listener(index) {
                Socket::Tcp(tcp)
            } else if let Ok(Some(unix)) = sockets.take_unix_listener(index) {
                Socket::Unix(unix)
            } else {
                let error = io::Error::other("not a TCP or Unix-domain stream socket");
                return Err(cannot_listen(descriptor, &error));
            };
            Ok((descriptor, socket))
        };
        (0..number).map(take).collect::<io::Result<_>>().map(Self)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the sockets to the listeners of `server`, which checks that they are listening.
    pub(crate) fn adopt_into(self, server: &mut Server) -> io::Result<()> {
        for (descriptor, socket) in self.0 {
            match socket {
                Socket::Tcp(listener) => server.adopt_tcp(listener),
                Socket::Unix(listener) => server.adopt_unix(listener),
            }
            .map_err(|error| cannot_listen(descriptor, &error))?;
        }
        Ok(())
    }
}

fn cannot_listen(descriptor: usize, error: &io::Error) -> io::Error {
    let context = format!("cannot listen on inherited descriptor {descriptor}");
    with_context(error, &context)
}

/// Sends a message to the service manager, if there is one (`NOTIFY_SOCKET`).
pub(crate) fn notify(message: &str) -> io::Result<()> {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let socket = UnixDatagram::unbound()?;
    socket.send_to_addr(message.as_bytes(), &manager_address(&name)?)?;
    Ok(())
}

/// Returns the address of the service manager. A name that starts with `@` is in Linux' abstract
/// namespace.
fn manager_address(name: &OsStr) -> io::Result<SocketAddr> {
    #[cfg(target_os = "linux")]
    {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::ffi::OsStrExt;

        if let Some(name) = name.as_bytes().strip_prefix(b"@") {
            return SocketAddr::from_abstract_name(name);
        }
    }
    SocketAddr::from_pathname(name)
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
        let hangup = Some(SIGHUP).filter(|_| !is_hangup_ignored());
        let signals = [SIGTERM, SIGINT, SIGUSR1].into_iter().chain(hangup);
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
        let mut wait = |pipe: &mut UnixStream| wait_for_byte(pipe, timeout);
        let pending = self.0.poll_pending(&mut wait)?;
        Ok(Some(pending.into_iter().flatten().collect()))
    }
}

pub(crate) fn signal_name(signal: i32) -> &'static str {
    low_level::signal_name(signal).unwrap_or("signal")
}

/// Whether SIGHUP was ignored when the process started, as `nohup` does. Where /proc does not tell, it counts
/// as ignored, and keeps the effect that it had.
fn is_hangup_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    (status.lines())
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .is_none_or(|set| set & 1 != 0)
}

/// Waits until a signal has put a byte into the pipe; returns whether one has.
fn wait_for_byte(pipe: &mut UnixStream, timeout: Option<Duration>) -> io::Result<bool> {
    // Zero would be an error.
    pipe.set_read_timeout(timeout.map(|timeout| timeout.max(Duration::from_millis(1))))?;
    match pipe.read(&mut [0]) {
        Ok(count) => Ok(count > 0),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => Ok(false),
            _ => Err(error),
        },
    }
}
