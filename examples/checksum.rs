//! A [`WorkQueue`] without a server: prints the SHA-256 of each file in the format of `sha256sum`,
//! computed on all CPUs.
//!
//! ```text
//! cargo run --release --example checksum -- Cargo.toml src/*.rs
//! ```
//!
//! The main thread pushes a job for each file, and waits while the queue is full. Any idle thread of the
//! queue takes the next job. Dropping the queue runs the remaining jobs and joins the threads.
//!
//! Checksums are printed in the order of the arguments. For a file that cannot be read, one line on
//! stderr names the file and the error, and the exit status is 1. The other files are unaffected.

use std::any::Any;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread;

use echoserver::WorkQueue;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

/// Bytes per read.
const BLOCK_SIZE: usize = 64 << 10;

/// Jobs that wait in the queue.
const MAX_QUEUED: usize = 16;

fn main() -> ExitCode {
    let paths: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    if paths.is_empty() {
        eprintln!("usage: checksum FILE...");
        return ExitCode::from(2);
    }
    let bar = Arc::new(progress_bar(&paths));
    let progress = Arc::clone(&bar);
    let mut failed = false;
    let ran = run_in_order(
        paths,
        move |path| checksum(path, &progress),
        |path, outcome| failed |= !bar.suspend(|| print(path, outcome)),
    );
    bar.finish_and_clear();
    if let Err(error) = ran {
        eprintln!("checksum: cannot start a thread: {error}");
        failed = true;
    }
    ExitCode::from(u8::from(failed))
}

/// Creates a progress bar for the bytes of all files. It is shown only if stderr is a terminal.
fn progress_bar(paths: &[PathBuf]) -> ProgressBar {
    let sizes = paths
        .iter()
        .filter_map(|path| Some(path.metadata().ok()?.len()));
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}");
    let bar = ProgressBar::new(sizes.sum());
    bar.with_style(style.expect("the template is valid"))
}

/// Returns the SHA-256 of a file in hexadecimal digits.
fn checksum(path: &Path, bar: &ProgressBar) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut block = vec![0; BLOCK_SIZE];
    let mut hash = Sha256::new();
    loop {
        match file.read(&mut block) {
            Ok(0) => break,
            Ok(count) => {
                hash.update(&block[..count]);
                bar.inc(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(hex(&hash.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value)]);
    let digits = |byte: &u8| [digit(byte >> 4), digit(byte & 15)];
    bytes.iter().flat_map(digits).collect()
}

/// Prints a file's checksum to stdout, or the error to stderr. Returns whether the checksum was
/// printed.
fn print(path: &Path, outcome: Outcome<io::Result<String>>) -> bool {
    let problem = match outcome {
        Ok(Ok(digits)) => match print_line(path, &digits) {
            Ok(()) => return true,
            Err(error) => format!("cannot write to stdout: {error}"),
        },
        Ok(Err(error)) => error.to_string(),
        Err(_panic) => "the job panicked".to_owned(),
    };
    // A closed stderr must not stop the other jobs.
    let _ignored = writeln!(io::stderr(), "checksum: {}: {problem}", path.display());
    false
}

/// Prints a line in the format of `sha256sum`. A name that contains a line break or a backslash is
/// escaped, and its line starts with a backslash.
fn print_line(path: &Path, digits: &str) -> io::Result<()> {
    let name = path.as_os_str().as_encoded_bytes();
    let escaped = escape(name);
    let prefix = if *escaped == *name { "" } else { "\\" };
    let line = [prefix.as_bytes(), digits.as_bytes(), b"  ", &escaped, b"\n"].concat();
    io::stdout().write_all(&line)
}

fn escape(name: &[u8]) -> Cow<'_, [u8]> {
    if !name.iter().any(|byte| b"\\\n\r".contains(byte)) {
        return name.into();
    }
    let escape = |byte: &u8| match byte {
        b'\\' => b"\\\\".to_vec(),
        b'\n' => b"\\n".to_vec(),
        b'\r' => b"\\r".to_vec(),
        _ => vec![*byte],
    };
    name.iter().flat_map(escape).collect()
}

/// The result of a job, or the payload of its panic.
type Outcome<R> = Result<R, Box<dyn Any + Send>>;

/// Runs `work` for each job, on as many threads as there are CPUs, and passes the outcomes to `report`
/// in the order of the jobs. A panic in a job does not affect other jobs.
fn run_in_order<J: Send + 'static, R: Send + 'static>(
    jobs: Vec<J>,
    work: impl Fn(&J) -> R + Send + Sync + 'static,
    mut report: impl FnMut(&J, Outcome<R>),
) -> io::Result<()> {
    let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let (sender, outcomes) = mpsc::channel();
    let queue = WorkQueue::new(threads, MAX_QUEUED, move |(index, job): (usize, J)| {
        let outcome = catch_unwind(AssertUnwindSafe(|| work(&job)));
        // The receiver outlives the queue.
        let _sent = sender.send((index, (job, outcome)));
    })?;
    // Outcomes of later jobs, until all earlier ones have been reported.
    let (mut pending, mut next) = (BTreeMap::new(), 0);
    let mut report_all = |arrived: &mut dyn Iterator<Item = _>| {
        for (index, outcome) in arrived {
            pending.insert(index, outcome);
            while let Some((job, outcome)) = pending.remove(&next) {
                report(&job, outcome);
                next += 1;
            }
        }
    };
    for job in jobs.into_iter().enumerate() {
        queue.push(job);
        report_all(&mut outcomes.try_iter());
    }
    drop(queue);
    report_all(&mut outcomes.iter());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panicking_job_does_not_affect_others() {
        let jobs: Vec<u32> = (0..1000).collect();
        let mut reported = Vec::new();
        let ran = run_in_order(
            jobs.clone(),
            |job| match job % 100 {
                7 => panic!("job {job} panics on purpose"),
                _ => job * 2,
            },
            |job, outcome| reported.push((*job, outcome.ok())),
        );
        assert!(ran.is_ok());
        let expected = |job: u32| (job, (job % 100 != 7).then_some(job * 2));
        assert_eq!(reported, jobs.into_iter().map(expected).collect::<Vec<_>>());
    }

    #[test]
    fn names_are_escaped_like_sha256sum() {
        assert_eq!(*escape(b"plain name"), *b"plain name");
        assert_eq!(*escape(b"a\\b\nc\rd"), *b"a\\\\b\\nc\\rd");
    }
}
