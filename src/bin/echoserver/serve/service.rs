//! What a service manager does for a server: hands it sockets that listen already, and hears how it is.

use std::io;

use echoserver::Server;
#[cfg(unix)]
use listenfd::ListenFd;
#[cfg(unix)]
use sd_notify::NotifyState;

/// Sockets that were handed over (`LISTEN_FDS`). Elsewhere than on Unix there are none.
#[cfg(unix)]
pub(crate) struct Inherited(ListenFd);
#[cfg(not(unix))]
pub(crate) struct Inherited;

#[cfg(unix)]
impl Inherited {
    /// Takes what the environment speaks of. Before any thread starts: it changes the environment.
    pub(crate) fn take() -> Self {
        Self(ListenFd::from_env())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    /// Has `server` listen at them too.
    ///
    /// # Errors
    ///
    /// Name the socket that can't be listened at.
    pub(crate) fn give_to(mut self, server: &mut Server) -> io::Result<()> {
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

    pub(crate) fn give_to(self, _server: &mut Server) -> io::Result<()> {
        Ok(())
    }
}

/// Says that it serves.
#[cfg(unix)]
pub(crate) fn ready(server: &Server) {
    let places: Vec<_> = server.addresses().iter().map(ToString::to_string).collect();
    tell(&[
        NotifyState::Ready,
        NotifyState::Status(&format!("serving on {}", places.join(", "))),
    ]);
}

/// Says that it drains.
#[cfg(unix)]
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("draining")]);
}

/// Nobody needs to listen: without a service manager this does nothing.
#[cfg(unix)]
fn tell(what: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(what) {
        log::warn!("cannot notify the service manager: {error}");
    }
}
