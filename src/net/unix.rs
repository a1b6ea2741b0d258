//! Unix-domain listeners, and the lifetime of their socket files.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::SocketAddr;
use std::path::{Path, PathBuf};

use mio::net::UnixListener as MioListener;
use mio::{Interest, Registry, Token};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use crate::error::{error_text, escape_control, with_context};
use crate::net::address::Address;
#[cfg(any(target_os = "linux", target_os = "android"))]
use crate::net::directory_lock;
use crate::net::listener::check_listening;

/// A Unix-domain listener. Dropping it removes the socket file it created.
#[derive(Debug)]
pub(crate) struct UnixListener {
    /// Removed on drop, before the listener is closed. In the other order a second server could find
    /// the file stale and replace it, and this drop could then remove the new file.
    _file: Option<SocketFile>,
    listener: MioListener,
    address: Address,
}

/// The file of a socket. The device and inode number tell whether the path still names this file.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl AsFd for UnixListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl UnixListener {
    /// Listens at `path`. Replaces a stale socket file. If several servers do so at once, one succeeds, and
    /// the others fail because the address is in use (Linux only).
    pub(crate) fn bind(path: &Path, backlog: u32, mode: Option<u32>) -> io::Result<Self> {
        // Held until the socket listens: before that, it looks stale to other servers.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let _lock = directory_lock::acquire(path, directory_lock::TIMEOUT);
        remove_stale(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        let file = SocketFile {
            path: path.to_owned(),
            identity: identity(path)?,
        };
        if let Some(mode) = mode {
            // Set before `listen`, so that no client can connect with other permissions.
            fs::set_permissions(path, Permissions::from_mode(mode)).map_err(|error| {
                with_context(&error, &format!("cannot set permissions {mode:#o}"))
            })?;
        }
        Self::listen(
            socket,
            backlog,
            Address::UnixPath(path.to_owned()),
            Some(file),
        )
    }

    /// Listens at a name in the abstract namespace, which uses no file.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pub(crate) fn bind_abstract(name: &str, backlog: u32) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(format!("\0{name}"))?)?;
        Self::listen(
            socket,
            backlog,
            Address::UnixAbstract(name.to_owned()),
            None,
        )
    }

    /// Takes over a socket that already listens. Its file is kept on drop.
    pub(crate) fn from_std(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        check_listening(&SockRef::from(&listener), &[Domain::UNIX], "Unix-domain")?;
        listener.set_nonblocking(true)?;
        let address = address_of(&listener.local_addr()?);
        Ok(Self {
            listener: MioListener::from_std(listener),
            address,
            _file: None,
        })
    }

    fn listen(
        socket: Socket,
        backlog: u32,
        address: Address,
        file: Option<SocketFile>,
    ) -> io::Result<Self> {
        socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            listener: MioListener::from_std(OwnedFd::from(socket).into()),
            address,
            _file: file,
        })
    }

    pub(crate) fn address(&self) -> Address {
        self.address.clone()
    }

    pub(crate) fn accept(&self) -> io::Result<mio::net::UnixStream> {
        let (stream, _unnamed) = self.listener.accept()?;
        // Fails on systems without urgent data on Unix-domain sockets, where it is not needed.
        let _unsupported = SockRef::from(&stream).set_out_of_band_inline(true);
        Ok(stream)
    }

    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(&mut self.listener, token, Interest::READABLE)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            let path = escape_control(&self.path.to_string_lossy());
            log::warn!("cannot remove {path}: {}", error_text(&error));
        }
    }
}

/// Returns the address of a Unix-domain socket.
pub(super) fn address_of(socket: &SocketAddr) -> Address {
    #[cfg(target_os = "linux")]
    if let Some(name) = std::os::linux::net::SocketAddrExt::as_abstract_name(socket) {
        return Address::UnixAbstract(String::from_utf8_lossy(name).into_owned());
    }
    Address::UnixPath(socket.as_pathname().unwrap_or(Path::new("")).to_owned())
}

/// Returns the device and inode number of the file at `path`.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|data| (data.dev(), data.ino()))
}

/// Removes a socket at `path` if no process listens on it.
fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(data) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !data.file_type().is_socket() {
        return Err(io::Error::new(
            ErrorKind::AlreadyExists,
            "file exists and is not a socket",
        ));
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A connect to a listener with a full backlog would block, which also shows that it is in use.
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path)
            .or_else(|error| match error.kind() {
                ErrorKind::NotFound => Ok(()),
                _ => Err(with_context(&error, "cannot remove the stale socket")),
            }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
        _ => Err(io::Error::new(ErrorKind::AddrInUse, "address in use")),
    }
}

#[cfg(test)]
mod tests;
