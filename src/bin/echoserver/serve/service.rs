//! The service manager's interface: inherited listening sockets and notifications. On systems other than Unix
//! there is none.

use std::io;

use echoserver::Server;

#[cfg(unix)]
pub(crate) use self::unix::*;

/// Listening sockets inherited from the service manager.
#[cfg(not(unix))]
pub(crate) struct Inherited;

#[cfg(not(unix))]
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

#[cfg(unix)]
mod unix {
    use std::env;
    use std::ffi::OsStr;
    use std::fs;
    use std::net::TcpListener;
    use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
    use std::process;
    use std::time::Duration;

    use listenfd::ListenFd;
    use socket2::SockRef;

    use super::{Server, io};
    use crate::error::with_context;

    /// Listening sockets inherited from the service manager (`LISTEN_FDS`).
    pub(crate) struct Inherited(Vec<Listener>);

    enum Listener {
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
        /// Fails if one of them is not a listening stream socket; the error gives its number.
        pub(crate) fn take() -> io::Result<Self> {
            let variable = |name| env::var(name).unwrap_or_default();
            let (pid, count) = (variable("LISTEN_PID"), variable("LISTEN_FDS"));
            let is_own = pid.is_empty() || pid == process::id().to_string();
            let number = count.parse().ok();
            let is_valid = number.is_some_and(|count: usize| count <= Self::MAX_COUNT);
            if is_own && !count.is_empty() && !is_valid {
                return Err(io::Error::other(format!(
                    "LISTEN_FDS: expected a number of descriptors up to {}, not '{count}'",
                    Self::MAX_COUNT
                )));
            }
            let first: usize = variable("LISTEN_FDS_FIRST_FD").parse().unwrap_or(3);
            let mut sockets = ListenFd::from_env();
            let mut take = |index| {
                take_listener(&mut sockets, index, first + index).map_err(|problem| {
                    io::Error::other(format!(
                        "cannot listen on inherited descriptor {}: {problem}",
                        first + index
                    ))
                })
            };
            let count = if is_own { number.unwrap_or(0) } else { 0 };
            (0..count)
                .map(&mut take)
                .collect::<io::Result<_>>()
                .map(Self)
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.0.is_empty()
        }

        /// Adds the sockets to the listeners of `server`.
        pub(crate) fn adopt_into(self, server: &mut Server) -> io::Result<()> {
            for listener in self.0 {
                match listener {
                    Listener::Tcp(listener) => server.adopt_tcp(listener),
                    Listener::Unix(listener) => server.adopt_unix(listener),
                }
                .map_err(|error| with_context(&error, "cannot listen on an inherited socket"))?;
            }
            Ok(())
        }
    }

    /// Takes the socket with this index and `descriptor`, or returns why it is no listener.
    fn take_listener(
        sockets: &mut ListenFd,
        index: usize,
        descriptor: usize,
    ) -> Result<Listener, &'static str> {
        if fs::symlink_metadata(format!("/dev/fd/{descriptor}")).is_err() {
            return Err("not open");
        }
        let listener = if let Ok(Some(tcp)) = sockets.take_tcp_listener(index) {
            Listener::Tcp(tcp)
        } else if let Ok(Some(unix)) = sockets.take_unix_listener(index) {
            Listener::Unix(unix)
        } else {
            return Err("not a TCP or Unix-domain stream socket");
        };
        let is_listening = match &listener {
            Listener::Tcp(tcp) => is_listening(&SockRef::from(tcp)),
            Listener::Unix(unix) => is_listening(&SockRef::from(unix)),
        };
        match is_listening {
            true => Ok(listener),
            false => Err("the socket is not listening"),
        }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn is_listening(socket: &SockRef<'_>) -> bool {
        socket.is_listener().unwrap_or(false)
    }

    /// Other systems do not tell.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    fn is_listening(_socket: &SockRef<'_>) -> bool {
        true
    }

    /// Notifies the service manager that the server is ready.
    pub(crate) fn notify_ready(server: &Server) {
        let addresses: Vec<_> = server.addresses().iter().map(ToString::to_string).collect();
        notify(&format!(
            "READY=1\nSTATUS=serving on {}\n",
            addresses.join(", ")
        ));
    }

    /// Notifies the service manager that the server is going to drain.
    pub(crate) fn notify_drain_delay(delay: Duration) {
        notify(&format!("STOPPING=1\nSTATUS=draining in {delay:?}\n"));
    }

    /// Notifies the service manager that the server is draining.
    pub(crate) fn notify_draining() {
        notify("STOPPING=1\nSTATUS=draining\n");
    }

    /// Notifies the service manager that the server is alive.
    pub(crate) fn notify_watchdog() {
        notify("WATCHDOG=1\n");
    }

    /// Does nothing without a service manager (`NOTIFY_SOCKET`).
    fn notify(message: &str) {
        let Some(name) = env::var_os("NOTIFY_SOCKET") else {
            return;
        };
        let sent = manager_address(&name).and_then(|address| {
            UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address)
        });
        if let Err(error) = sent {
            log::warn!("cannot notify the service manager: {error}");
        }
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

    /// Returns the time within which the service manager expects a sign of life (`WATCHDOG_USEC`), if it does.
    pub(crate) fn watchdog_timeout() -> Option<Duration> {
        env::var_os("NOTIFY_SOCKET")?;
        let is_own = env::var("WATCHDOG_PID").map_or(true, |pid| pid == process::id().to_string());
        let micros = env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
        Some(Duration::from_micros(micros)).filter(|timeout| is_own && !timeout.is_zero())
    }
}
