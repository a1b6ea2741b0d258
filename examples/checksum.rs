//! A job queue without any server: the SHA-256 of each file given, as `sha256sum` prints it, by as
//! many threads as there are CPUs.
//!
//! ```text
//! cargo run --release --example checksum -- Cargo.toml src/*.rs
//! ```
//!
//! It shows what a [`WorkQueue`] is good for on its own. Jobs are dealt to workers whose mailboxes are
//! bounded, so that the dealing waits for the work; a worker takes its jobs with `for job in receiver`,
//! and the loop ends when the queue has been dropped. Lines come in the order of the arguments. A file
//! that can't be read costs one line on stderr that names it, and the exit status, and nothing else.

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
use std::sync::{Mutex, PoisonError};
use std::thread;

use echoserver::WorkQueue;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

/// Bytes read at once.
const BLOCK_SIZE: usize = 64 << 10;

/// Jobs that wait in one worker's mailbox.
const MAX_QUEUED: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");

fn main() -> ExitCode {
    let paths: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    if paths.is_empty() {
        eprintln!("usage: checksum FILE...");
        return ExitCode::from(2);
    }
    let bar = progress_bar(&paths);
    let mut failed = false;
    in_order(
        &paths,
        |path| checksum(path, &bar),
        |path, outcome| failed |= !bar.suspend(|| print(path, outcome)),
    );
    bar.finish_and_clear();
    ExitCode::from(u8::from(failed))
}

/// A bar over the bytes of all the files; it shows only where stderr is a terminal.
fn progress_bar(paths: &[PathBuf]) -> ProgressBar {
    let sizes = paths
        .iter()
        .filter_map(|path| Some(path.metadata().ok()?.len()));
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}");
    let bar = ProgressBar::new(sizes.sum());
    bar.with_style(style.expect("the template is sound"))
}

/// The SHA-256 of a file, in hexadecimal digits.
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

/// Prints one file's line, to stdout or to stderr; says whether it is a checksum, and printed.
fn print(path: &Path, outcome: Outcome<io::Result<String>>) -> bool {
    let fault = match outcome {
        Ok(Ok(digits)) => match print_line(path, &digits) {
            Ok(()) => return true,
            Err(error) => format!("cannot print: {error}"),
        },
        Ok(Err(error)) => error.to_string(),
        Err(_panic) => "the job panicked".to_owned(),
    };
    // Whether anybody reads it is not our concern.
    let _closed = writeln!(io::stderr(), "checksum: {}: {fault}", path.display());
    false
}

/// As `sha256sum` does: a name with a line's end or a backslash in it is escaped, and marked by a
/// backslash at the front of the line.
fn print_line(path: &Path, digits: &str) -> io::Result<()> {
    let name = path.as_os_str().as_encoded_bytes();
    let escaped = escape(name);
    let mark = if *escaped == *name { "" } else { "\\" };
    let line = [mark.as_bytes(), digits.as_bytes(), b"  ", &escaped, b"\n"].concat();
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

/// What a job came to: its result, or what it panicked with.
type Outcome<R> = Result<R, Box<dyn Any + Send>>;

/// Does `work` on all `jobs`, on as many threads as there are CPUs, and hands what comes of each to
/// `report`, in the order of the jobs. A job that panics loses no other one.
fn in_order<J: Sync, R: Send>(
    jobs: &[J],
    work: impl Fn(&J) -> R + Sync,
    report: impl FnMut(&J, Outcome<R>) + Send,
) {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let (queue, receivers) = WorkQueue::bounded(MAX_QUEUED, vec![(); workers]);
    let line_up = Mutex::new(LineUp {
        next: 0,
        early: BTreeMap::new(),
        report,
    });
    thread::scope(|scope| {
        for receiver in receivers {
            scope.spawn(|| {
                for index in receiver {
                    let outcome = catch_unwind(AssertUnwindSafe(|| work(&jobs[index])));
                    let mut line_up = line_up.lock().unwrap_or_else(PoisonError::into_inner);
                    line_up.add(jobs, index, outcome);
                }
            });
        }
        for index in 0..jobs.len() {
            queue
                .push(index)
                .expect("a worker lives as long as the queue");
        }
        drop(queue);
    });
}

/// Outcomes in the order of their jobs: who is early waits.
struct LineUp<R, F> {
    next: usize,
    early: BTreeMap<usize, Outcome<R>>,
    report: F,
}

impl<R, F> LineUp<R, F> {
    fn add<J>(&mut self, jobs: &[J], index: usize, outcome: Outcome<R>)
    where
        F: FnMut(&J, Outcome<R>),
    {
        self.early.insert(index, outcome);
        while let Some(outcome) = self.early.remove(&self.next) {
            (self.report)(&jobs[self.next], outcome);
            self.next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_panics_loses_no_other() {
        let jobs: Vec<u32> = (0..1000).collect();
        let mut reported = Vec::new();
        in_order(
            &jobs,
            |job| match job % 100 {
                7 => panic!("job {job} was told to"),
                _ => job * 2,
            },
            |job, outcome| reported.push((*job, outcome.ok())),
        );
        let expected = |job: u32| (job, (job % 100 != 7).then_some(job * 2));
        assert_eq!(reported, jobs.into_iter().map(expected).collect::<Vec<_>>());
    }

    #[test]
    fn names_are_escaped_as_sha256sum_does() {
        assert_eq!(*escape(b"plain name"), *b"plain name");
        assert_eq!(*escape(b"a\\b\nc\rd"), *b"a\\\\b\\nc\\rd");
    }
}
