//! Tests a [`Handler`] against a simulated kernel: thousands of schedules of everything that a
//! network can do to a connection, with no socket, no thread and no clock of their own.
//!
//! Each schedule is a few connections on one worker, and is wholly decided by a number, its seed:
//! how large the buffers are, how the bytes arrive, cut into which pieces, when the client reads, ends its
//! stream or resets it, which events come late or for nothing, when time passes and when the server
//! drains. The code under the handler is the very code that serves sockets.
//!
//! When a schedule goes wrong, its seed is printed, with what happened in a schedule as short as
//! could be found, and can be played again alone:
//!
//! ```text
//! SIMULATION_SEED=81 cargo test simulation
//! ```
//!
//! and `SIMULATION_SCHEDULES=1000000 cargo test --release simulation` plays a million of them.

mod kernel;
mod world;

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, thread};

use self::world::{Bounds, Fault, Play};
use crate::handler::Handler;

/// Of this many schedules one is the same in every run; the others are fresh.
const FRESH_TO_OLD: u64 = 4;

/// Lines of a faulty schedule that are shown: the last ones.
const MAX_TRACE: usize = 100;

/// Plays `schedules` schedules with a new handler from `handler` for each connection.
///
/// Clients say some of `words`, in any order and perhaps cut off at the end (any bytes, where
/// there are no words). `model` says what all of the input up to some byte must have brought forth
/// once the server is at rest; so its answer to a longer input begins with that to a shorter one.
/// Each word, and its answer, fits into the simulated buffers; larger ones come in pieces.
///
/// What must hold: at any moment what came back is the beginning of the model's answer; at rest it
/// is all of it, and so it is when either side has ended the connection in order, or the server
/// has been drained; no connection is ever forgotten; the handler never panics.
///
/// `SIMULATION_SCHEDULES` in the environment takes the place of `schedules`, and `SIMULATION_SEED`
/// plays the one schedule that it names.
///
/// ```
/// use echoserver::testing::simulate;
/// use echoserver::{Action, Buffer, Handler};
///
/// /// Answers each line with its length.
/// struct Measure;
///
/// impl Handler for Measure {
///     fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
///         while let Some(length) = input.data().iter().position(|&byte| byte == b'\n') {
///             if !output.push(format!("{length}\n").as_bytes()) {
///                 break; // The rest is answered when this has been sent.
///             }
///             input.consume(length + 1);
///         }
///         Action::Continue
///     }
/// }
///
/// fn model(input: &[u8]) -> Vec<u8> {
///     let lines = input.split_inclusive(|&byte| byte == b'\n');
///     let whole = lines.filter(|line| line.ends_with(b"\n"));
///     whole.flat_map(|line| format!("{}\n", line.len() - 1).into_bytes()).collect()
/// }
///
/// simulate(|| Measure, &[b"\n", b"hello\n", b"a longer line\n"], model, 1000);
/// ```
///
/// # Panics
///
/// If a schedule goes wrong: with what is wrong, the seed, and what happened before.
pub fn simulate<H: Handler>(
    handler: impl Fn() -> H + Sync,
    words: &[&[u8]],
    model: impl Fn(&[u8]) -> Vec<u8> + Sync,
    schedules: u64,
) {
    let needs = |word: &&[u8]| word.len().max(model(word).len());
    let play = Play {
        handler: &handler,
        words,
        model: &model,
        buffer_min: words.iter().map(needs).max().unwrap_or(1),
    };
    if let Some(seed) = number("SIMULATION_SEED") {
        if outcome(&play, seed, Bounds::FULL, false).is_err() {
            report(&play, seed);
        }
        return;
    }
    let schedules = number("SIMULATION_SCHEDULES").unwrap_or(schedules);
    if let Some(seed) = first_fault(&play, schedules) {
        report(&play, seed);
    }
}

/// Plays them all on all CPUs, and stops at the first that goes wrong.
fn first_fault<H: Handler>(play: &Play<'_, H>, schedules: u64) -> Option<u64> {
    let fresh = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64);
    let old = schedules / FRESH_TO_OLD;
    let (next, found) = (AtomicU64::new(0), AtomicBool::new(false));
    let search = || {
        while !found.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= schedules {
                break;
            }
            let seed = match index < old {
                true => index,
                false => fresh.wrapping_add(index),
            };
            if outcome(play, seed, Bounds::FULL, false).is_err() {
                found.store(true, Ordering::Relaxed);
                return Some(seed);
            }
        }
        None
    };
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    thread::scope(|scope| {
        let searches: Vec<_> = (0..threads).map(|_| scope.spawn(search)).collect();
        searches
            .into_iter()
            .filter_map(|thread| thread.join().ok().flatten())
            .min()
    })
}

fn number(variable: &str) -> Option<u64> {
    let value = env::var(variable).ok()?;
    match value.parse() {
        Ok(number) => Some(number),
        Err(error) => panic!("{variable}={value}: {error}"),
    }
}

/// Plays one schedule. A panic, which the code under test never lets out, is a fault like others.
fn outcome<H: Handler>(
    play: &Play<'_, H>,
    seed: u64,
    bounds: Bounds,
    trace: bool,
) -> Result<(), Fault> {
    catch_unwind(AssertUnwindSafe(|| play.run(seed, bounds, trace))).unwrap_or_else(|_| {
        Err(Fault {
            what: "the worker panicked, see above".to_owned(),
            trace: Vec::new(),
        })
    })
}

/// The smallest bounds within which `seed` still goes wrong.
fn shrink<H: Handler>(play: &Play<'_, H>, seed: u64) -> Bounds {
    let mut bounds = Bounds::FULL;
    let fails = |bounds| outcome(play, seed, bounds, false).is_err();
    for max_connections in 1..bounds.max_connections {
        let smaller = Bounds {
            max_connections,
            ..bounds
        };
        if fails(smaller) {
            bounds = smaller;
            break;
        }
    }
    for max_steps in 0..bounds.max_steps {
        let smaller = Bounds {
            max_steps,
            ..bounds
        };
        if fails(smaller) {
            return smaller;
        }
    }
    bounds
}

fn report<H: Handler>(play: &Play<'_, H>, seed: u64) -> ! {
    let bounds = shrink(play, seed);
    let Err(Fault { what, trace }) = outcome(play, seed, bounds, true) else {
        panic!("seed {seed} goes wrong at times only: is the handler or its model at random?");
    };
    let skipped = trace.len().saturating_sub(MAX_TRACE);
    panic!(
        "{what}\n\nSIMULATION_SEED={seed} plays it again. Its last lines:\n{}\n",
        trace[skipped..].join("\n")
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::buffer::Buffer;
    use crate::handler::{Action, Echo};

    const SCHEDULES: u64 = 2000;

    #[test]
    fn simulation_of_echo() {
        simulate(|| Echo, &[], <[u8]>::to_vec, SCHEDULES);
    }

    /// Gives each byte back as often as the byte says, from never to thrice.
    struct Stutter;

    impl Handler for Stutter {
        fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
            while let Some(&byte) = input.data().first() {
                if !output.push(&stutter(&[byte])) {
                    break;
                }
                input.consume(1);
            }
            Action::Continue
        }
    }

    fn stutter(input: &[u8]) -> Vec<u8> {
        let times = |byte: u8| usize::from(byte % 4);
        let repeat = |&byte: &u8| std::iter::repeat_n(byte, times(byte));
        input.iter().flat_map(repeat).collect()
    }

    #[test]
    fn simulation_of_a_handler_that_changes_lengths() {
        let words: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
        let words: Vec<&[u8]> = words.iter().map(|word| &word[..]).collect();
        simulate(|| Stutter, &words, stutter, SCHEDULES);
    }

    /// Greets, gives whole lines back, and closes after the line `quit`.
    #[derive(Default)]
    struct Lines {
        greeted: bool,
    }

    impl Handler for Lines {
        fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
            if !self.greeted {
                self.greeted = output.push(b"hi\n");
            }
            while let Some(end) = input.data().iter().position(|&byte| byte == b'\n') {
                let line = &input.data()[..=end];
                if !output.push(line) {
                    break;
                }
                let quit = line == b"quit\n";
                input.consume(end + 1);
                if quit {
                    return Action::Close;
                }
            }
            Action::Continue
        }
    }

    fn lines(input: &[u8]) -> Vec<u8> {
        let mut output = b"hi\n".to_vec();
        for line in input.split_inclusive(|&byte| byte == b'\n') {
            if line.ends_with(b"\n") {
                output.extend_from_slice(line);
            }
            if line == b"quit\n" {
                break;
            }
        }
        output
    }

    #[test]
    fn simulation_of_a_handler_that_greets_and_closes() {
        let words: [&[u8]; 4] = [b"\n", b"hello\n", b"a longer line\n", b"quit\n"];
        simulate(Lines::default, &words, lines, SCHEDULES);
    }
}
