//! The service manager's interface: inherited listening sockets and status notifications.

use std::io;
#[cfg(unix)]
use std::net::TcpListener;
#[cfg(unix)]
use std::os::unix::net::UnixListener;

use echoserver::Server;
#[cfg(unix)]
use listenfd::ListenFd;
#[cfg(unix)]
use sd_notify::NotifyState;

#[cfg(unix)]
use crate::serve::with_context;

/// Listening sockets inherited from the service manager (`LISTEN_FDS`). None except on Unix.
#[cfg(unix)]
pub(crate) struct Inherited(Vec<Option<Listener>>);
#[cfg(not(unix))]
pub(crate) struct Inherited;

#[cfg(unix)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

#[cfg(unix)]
impl Inherited {
    /// Takes the sockets that the environment names, and removes its variables.
    ///
    /// Call it before any thread starts, because it changes the environment, and before any file is opened,
    /// which could get the number of a descriptor that is named but was not passed.
    pub(crate) fn take() -> Self {
        let mut sockets = ListenFd::from_env();
        let count = sockets.len();
        let take = |index| match sockets.take_tcp_listener(index) {
            Ok(listener) => listener.map(Listener::Tcp),
            Err(_) => match sockets.take_unix_listener(index) {
                Ok(listener) => listener.map(Listener::Unix),
                Err(_) => None,
            },
        };
        Self((0..count).map(take).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the sockets to the listeners of `server`.
    ///
    /// # Errors
    ///
    /// Fails if one of them is not a listening socket; the error gives its index.
    pub(crate) fn adopt_into(self, server: &mut Server) -> io::Result<()> {
        for (index, listener) in self.0.into_iter().enumerate() {
            let adopted = match listener {
                Some(Listener::Tcp(listener)) => server.adopt_tcp(listener),
                Some(Listener::Unix(listener)) => server.adopt_unix(listener),
                None => Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "not a TCP or Unix-domain stream socket",
                )),
            };
            adopted.map_err(|error| {
                with_context(
                    &error,
                    &format!("cannot listen on inherited socket {index}"),
                )
            })?;
        }
        Ok(())
    }
}

#[cfg(not(unix))]
impl Inherited {
    pub(crate) fn take() -> Self {
        Self
    }

    pub(crate) fn is_empty(&self) -> bool {
        true
    }

    pub(crate) fn adopt_into(self, _server: &mut Server) -> io::Result<()> {
        Ok(())
    }
}

/// Notifies the service manager that the server is ready.
#[cfg(unix)]
pub(crate) fn notify_ready(server: &Server) {
    let addresses: Vec<_> = server.addresses().iter().map(ToString::to_string).collect();
    notify(&[
        NotifyState::Ready,
        NotifyState::Status(&format!("serving on {}", addresses.join(", "))),
    ]);
}

/// Notifies the service manager that the server is draining, or is going to.
#[cfg(unix)]
pub(crate) fn notify_stopping(status: &str) {
    notify(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Does nothing without a service manager (`NOTIFY_SOCKET`).
#[cfg(unix)]
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("cannot notify the service manager: {error}");
    }
}
