//! The service manager's interface: inherited listening sockets and status notifications.

use std::io;

use echoserver::Server;
#[cfg(unix)]
use listenfd::ListenFd;
#[cfg(unix)]
use sd_notify::NotifyState;

/// Listening sockets inherited from the service manager (`LISTEN_FDS`). None except on Unix.
#[cfg(unix)]
pub(crate) struct Inherited(ListenFd);
#[cfg(not(unix))]
pub(crate) struct Inherited;

#[cfg(unix)]
impl Inherited {
    /// Takes the sockets that the environment names, and removes its variables.
    ///
    /// Call it before any thread starts, because it changes the environment.
    pub(crate) fn take() -> Self {
        Self(ListenFd::from_env())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    /// Adds the sockets to the listeners of `server`.
    ///
    /// # Errors
    ///
    /// Fails if one of them is not a listening socket; the error gives its index.
    pub(crate) fn adopt_into(mut self, server: &mut Server) -> io::Result<()> {
        for index in 0..self.0.len() {
            let adopted = match self.0.take_tcp_listener(index) {
                Ok(listener) => listener.map_or(Ok(()), |listener| server.adopt_tcp(listener)),
                Err(_) => match self.0.take_unix_listener(index) {
                    Ok(listener) => listener.map_or(Ok(()), |listener| server.adopt_unix(listener)),
                    Err(error) => Err(error),
                },
            };
            adopted.map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot listen on inherited socket {index}: {error}"),
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

/// Notifies the service manager that the server is draining.
#[cfg(unix)]
pub(crate) fn notify_stopping() {
    notify(&[NotifyState::Stopping, NotifyState::Status("draining")]);
}

/// Does nothing without a service manager (`NOTIFY_SOCKET`).
#[cfg(unix)]
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("cannot notify the service manager: {error}");
    }
}
