//! A lock of a directory, held while a Unix-domain listener is created in it.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::error::{error_text, escape_control};

/// Servers hold the lock for less than a millisecond, but any other program can hold it for ever.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);

/// Pause between attempts.
const INTERVAL: Duration = Duration::from_millis(5);

/// Locks the directory that contains `path` (`flock`) until the returned file is dropped.
///
/// Returns nothing if that is not possible, for example in a directory that cannot be read or that another
/// program keeps locked. The server then starts without the lock.
pub(crate) fn acquire(path: &Path, timeout: Duration) -> Option<File> {
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    let parent = parent.unwrap_or(Path::new("."));
    let directory = File::open(parent).ok()?;
    let deadline = Instant::now() + timeout;
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                thread::sleep(INTERVAL);
            }
            Err(error) => {
                let error = match error {
                    Errno::WOULDBLOCK => "another program keeps it locked".to_owned(),
                    error => error_text(&error.into()),
                };
                let parent = escape_control(&parent.to_string_lossy());
                log::warn!("cannot lock {parent}: {error}");
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests;
