//! Unix-domain sockets to listen on, and the lifetime of their files.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mio::net::UnixListener;
use socket2::{Domain, SockAddr, Socket as RawSocket, Type};

use crate::error::{error_text, escape_control, with_context};
use crate::net::address::Address;
use crate::net::platform;

/// How often to try to lock a directory, every 5 ms. Servers hold the lock for less than a millisecond, but any
/// other program can hold it for ever.
const LOCK_ATTEMPTS: u32 = 1000;

/// The file of a socket, removed on drop.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// The device and inode number tell whether the path still names this file.
    identity: (u64, u64),
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

/// Creates a socket that listens on `address`, and its file unless the name is abstract.
///
/// A stale socket file is replaced. If several servers do so at once, one succeeds, and the others fail because
/// the address is in use (Linux only).
pub(super) fn listen(
    address: &Address,
    backlog: u32,
    mode: Option<u32>,
) -> io::Result<(Option<SocketFile>, UnixListener)> {
    let socket = RawSocket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let (_lock, file) = match address {
        Address::UnixPath(path) => {
            // Held until the socket listens: before that, it looks stale to other servers.
            let lock = platform::lock_directory(path, LOCK_ATTEMPTS);
            (lock, Some(bind(&socket, path, mode)?))
        }
        Address::UnixAbstract(name) if cfg!(target_os = "linux") => {
            socket.bind(&SockAddr::unix(format!("\0{name}"))?)?;
            (None, None)
        }
        _ => return Err(ErrorKind::Unsupported.into()),
    };
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    Ok((file, OwnedFd::from(socket).into()))
}

fn bind(socket: &RawSocket, path: &Path, mode: Option<u32>) -> io::Result<SocketFile> {
    remove_stale(path)?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path)?,
    };
    if let Some(mode) = mode {
        // Set before `listen`, so that no client can connect with other permissions.
        fs::set_permissions(path, Permissions::from_mode(mode))
            .map_err(|error| with_context(&error, &format!("cannot set permissions {mode:#o}")))?;
    }
    Ok(file)
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
        let problem = "file exists and is not a socket";
        return Err(io::Error::new(ErrorKind::AlreadyExists, problem));
    }
    let probe = RawSocket::new(Domain::UNIX, Type::STREAM, None)?;
    // A connect to a listener with a full backlog would block, which also shows that it is in use.
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|error| with_context(&error, "cannot remove the stale socket")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
        _ => Err(io::Error::new(ErrorKind::AddrInUse, "address in use")),
    }
}

#[cfg(test)]
mod tests;
