//! A small server for the Redis protocol. It shows how a [`Handler`] deals with a real protocol: incomplete messages,
//! pipelining, replies that must not be truncated, errors that close the connection, and shared state.
//!
//! ```text
//! cargo run --release --example resp_server -- 127.0.0.1:6380 2
//! redis-cli -p 6380 set greeting hello
//! redis-benchmark -p 6380 -t ping,set,get -P 16 -c 50 -n 1000000
//! ```
//!
//! The commands are PING, ECHO, SET, GET, DEL, INCR and QUIT, and as much of HELLO, COMMAND and CONFIG
//! as clients need to start. Keys do not expire, and nothing is written to disk.
//!
//! Measured relative to redis-server 7.0 (one thread, `--save "" --appendonly no`), on two CPUs that
//! the client uses too:
//!
//! | benchmark | requests per second | CPU time per request |
//! | --- | --- | --- |
//! | `-P 16`, idle machine, one run | PING 1.05 (limited by the client), SET 1.38, GET 1.41 | 0.7 to 0.8 |
//! | `-P 16`, busy machine, median of five runs | 1.2 for each | 0.7 to 0.8 |
//! | `-P 1` | 1.0 to 1.6 | 1.0 to 1.3 |
//!
//! Redis does much more for a request, so this compares event loops only.

use std::collections::HashMap;
use std::env;
use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use echoserver::{Action, Config, Context, Event, Handler, Output, Server};

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("resp_server: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves with the address and the number of workers from the command line.
fn serve() -> io::Result<()> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or("127.0.0.1:6379".to_owned());
    let mut config = Config::new(address.parse().map_err(io::Error::other)?);
    if let Some(workers) = arguments.next() {
        config.workers = workers.parse().map_err(io::Error::other)?;
    }
    let server = Server::bind(config)?;
    println!("listening on {}", server.addresses()[0]);
    let store = Store::new();
    server.run(|_connection| Resp { store: &store })?;
    Ok(())
}

/// The handler of one connection. It has no state of its own besides the unconsumed input.
struct Resp<'a> {
    store: &'a Store,
}

impl Handler for Resp<'_> {
    fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
        let Context { input, output, .. } = context;
        let (consumed, action) = self.answer(input.data(), input.capacity(), output);
        input.consume(consumed);
        action
    }
}

impl Resp<'_> {
    /// Executes the complete commands at the front of `bytes` while there is room for their replies. Returns
    /// their length and the action.
    fn answer(&self, bytes: &[u8], max_command: usize, output: &mut Output<'_>) -> (usize, Action) {
        let mut words = Vec::new();
        let mut consumed = 0;
        while consumed < bytes.len() {
            if output.room() < MAX_SMALL_REPLY {
                return (consumed, Action::Flush);
            }
            let length = match parse(&bytes[consumed..], &mut words) {
                Ok(length) => length,
                Err(ParseError::Incomplete) if bytes.len() - consumed < max_command => break,
                Err(error) => {
                    let message = match error {
                        ParseError::Incomplete => format!("command exceeds {max_command} bytes"),
                        ParseError::Invalid(problem) => format!("Protocol error: {problem}"),
                    };
                    push_error(output, message);
                    return (consumed, Action::Close);
                }
            };
            match self.execute(&words, output) {
                Reply::Pushed => consumed += length,
                Reply::PushedLast => return (consumed + length, Action::Close),
                // The next call has an empty output, and executes the command again.
                Reply::NoRoom if !output.is_empty() => return (consumed, Action::Flush),
                Reply::NoRoom => {
                    push_error(output, "the reply is too large");
                    consumed += length;
                }
            }
        }
        (consumed, Action::Continue)
    }

    /// Executes one command.
    ///
    /// `output` has room for a small reply. A command with a larger reply must not change the store,
    /// because it is executed again if its reply does not fit.
    fn execute(&self, words: &[&[u8]], output: &mut Output<'_>) -> Reply {
        let Some((name, arguments)) = words.split_first() else {
            return Reply::Pushed;
        };
        let name = &name[..name.len().min(MAX_NAME)];
        let mut upper = [0; MAX_NAME];
        let upper = &mut upper[..name.len()];
        upper.copy_from_slice(name);
        upper.make_ascii_uppercase();
        match (&*upper, arguments) {
            (b"GET", [key]) => self.store.get(key, |value| match value {
                Some(value) => push_bulk(output, value),
                None => push_line(output, "$-1"),
            }),
            (b"SET", [key, value]) => match self.store.set(key, value) {
                Ok(()) => push_line(output, "+OK"),
                Err(message) => push_error(output, message),
            },
            (b"INCR", [key]) => match self.store.increment(key) {
                Ok(value) => push_integer(output, value),
                Err(message) => push_error(output, message),
            },
            (b"DEL", [_, ..]) => push_integer(output, self.store.delete(arguments)),
            (b"PING", []) => push_line(output, "+PONG"),
            (b"PING" | b"ECHO", [text]) => push_bulk(output, text),
            (b"QUIT", _) => {
                push_line(output, "+OK");
                Reply::PushedLast
            }
            // Clients send these when they start. The answers are those of a server without options.
            (b"COMMAND", _) => push_line(output, "*0"),
            (b"CONFIG", [_, option]) => {
                let option = option[..option.len().min(MAX_NAME)]
                    .escape_ascii()
                    .to_string();
                push_line(
                    output,
                    &format!("*2\r\n${}\r\n{option}\r\n$0\r\n", option.len()),
                )
            }
            (b"HELLO", [] | [b"2", ..]) => push_line(output, HELLO),
            (b"HELLO", _) => push_line(output, "-NOPROTO unsupported protocol version"),
            (b"GET" | b"SET" | b"INCR" | b"DEL" | b"PING" | b"ECHO", _) => {
                let name = name.to_ascii_lowercase();
                let name = name.escape_ascii();
                push_error(
                    output,
                    format_args!("wrong number of arguments for '{name}' command"),
                )
            }
            _ => {
                let name = name.escape_ascii();
                push_error(output, format_args!("unknown command '{name}'"))
            }
        }
    }
}

/// Bytes of a command's name that are compared, and quoted in an error.
const MAX_NAME: usize = 16;

const HELLO: &str = "*4\r\n$6\r\nserver\r\n$11\r\nresp_server\r\n$5\r\nproto\r\n:2";

/// Whether a reply was appended to the output.
enum Reply {
    Pushed,
    /// The reply was appended, and the connection is to be closed after it.
    PushedLast,
    /// The reply does not fit; the output is unchanged.
    NoRoom,
}

/// Maximum length of all replies but bulk strings.
const MAX_SMALL_REPLY: usize = 128;

/// Appends a line. `answer` has checked that there is room for a small reply.
fn push_line(output: &mut Output<'_>, line: &str) -> Reply {
    let pushed = output.push(line.as_bytes()) && output.push(b"\r\n");
    debug_assert!(pushed, "no room for {line}");
    Reply::Pushed
}

fn push_integer(output: &mut Output<'_>, value: i64) -> Reply {
    push_line(output, &format!(":{value}"))
}

fn push_error(output: &mut Output<'_>, message: impl Display) -> Reply {
    push_line(output, &format!("-ERR {message}"))
}

/// Appends a bulk string, which can have any length, if all of it fits.
fn push_bulk(output: &mut Output<'_>, bytes: &[u8]) -> Reply {
    let length_digits = bytes.len().checked_ilog10().unwrap_or(0) as usize + 1;
    if output.room() < 1 + length_digits + 2 + bytes.len() + 2 {
        return Reply::NoRoom;
    }
    let pushed = write!(output, "${}\r\n", bytes.len()).is_ok()
        && output.push(bytes)
        && output.push(b"\r\n");
    debug_assert!(pushed, "the room was checked above");
    Reply::Pushed
}

/// Why no command was parsed.
enum ParseError {
    /// The end of the command has not arrived yet.
    Incomplete,
    /// The bytes violate the protocol, so the start of the next command is unknown.
    Invalid(String),
}

/// Maximum number of words in a command.
const MAX_WORDS: usize = 1024;

/// Parses the command at the front of `bytes` into `words`, and returns its length in bytes.
///
/// A command is an array of bulk strings (sent by programs) or a line of words (typed by people). An
/// empty command has no words.
fn parse<'a>(bytes: &'a [u8], words: &mut Vec<&'a [u8]>) -> Result<usize, ParseError> {
    words.clear();
    let mut rest = bytes;
    let line = take_line(&mut rest)?;
    if let Some(digits) = line.strip_prefix(b"*") {
        let count = number(digits, MAX_WORDS).ok_or_else(|| invalid("invalid multibulk length"))?;
        for _ in 0..count {
            words.push(take_bulk(&mut rest)?);
        }
    } else {
        let typed = line.split(u8::is_ascii_whitespace);
        words.extend(typed.filter(|word| !word.is_empty()).take(MAX_WORDS));
    }
    Ok(bytes.len() - rest.len())
}

/// Splits off a bulk string: a line with a dollar sign and the length, then the bytes and a CRLF.
fn take_bulk<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], ParseError> {
    let line = take_line(rest)?;
    let Some(digits) = line.strip_prefix(b"$") else {
        let got = line.first().unwrap_or(&b' ').escape_ascii();
        return Err(ParseError::Invalid(format!("expected '$', got '{got}'")));
    };
    let length =
        number(digits, Config::MAX_BUFFER_SIZE).ok_or_else(|| invalid("invalid bulk length"))?;
    let (bulk, after) = rest
        .split_at_checked(length)
        .ok_or(ParseError::Incomplete)?;
    let (end, after) = after.split_at_checked(2).ok_or(ParseError::Incomplete)?;
    if end != b"\r\n" {
        return Err(invalid("bulk string is longer than its length"));
    }
    *rest = after;
    Ok(bulk)
}

/// Splits off a line, and returns it without its line break.
fn take_line<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], ParseError> {
    let end = rest
        .iter()
        .position(|&byte| byte == b'\n')
        .ok_or(ParseError::Incomplete)?;
    let line = &rest[..end];
    *rest = &rest[end + 1..];
    Ok(line.strip_suffix(b"\r").unwrap_or(line))
}

fn invalid(problem: &str) -> ParseError {
    ParseError::Invalid(problem.to_owned())
}

/// Parses a length: digits only, and at most `max`.
fn number(digits: &[u8], max: usize) -> Option<usize> {
    let add = |number: usize, digit: &u8| {
        let digit = char::from(*digit).to_digit(10)? as usize;
        Some(10 * number + digit).filter(|number| *number <= max)
    };
    digits.first()?;
    digits.iter().try_fold(0, add)
}

/// The keys and values, shared by all connections.
///
/// They are divided into shards with a lock each, so that workers rarely wait for each other. A lock
/// is held no longer than it takes to copy a value.
struct Store {
    shards: [Shard; SHARDS],
    hasher: RandomState,
}

const SHARDS: usize = 64;

/// Memory limit of a shard in bytes: 256 MiB for all shards together.
const MAX_SHARD_BYTES: usize = (256 << 20) / SHARDS;

/// Approximate memory of an entry besides its key and value.
const ENTRY_BYTES: usize = 64;

/// Aligned so that no two shards share a cache line.
#[derive(Default)]
#[repr(align(128))]
struct Shard(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    map: HashMap<Box<[u8]>, Box<[u8]>>,
    bytes: usize,
}

impl Store {
    fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Shard::default()),
            hasher: RandomState::new(),
        }
    }

    /// Calls `read` with the value of `key`, which is not copied.
    fn get<T>(&self, key: &[u8], read: impl FnOnce(Option<&[u8]>) -> T) -> T {
        read(self.shard(key).map.get(key).map(|value| &**value))
    }

    fn set(&self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        self.shard(key).set(key, value)
    }

    /// Adds one to the number at `key`, which is 0 if the key does not exist.
    fn increment(&self, key: &[u8]) -> Result<i64, &'static str> {
        let mut entries = self.shard(key);
        let value = match entries.map.get(key) {
            None => 0,
            Some(digits) => {
                parse_integer(digits).ok_or("value is not an integer or out of range")?
            }
        };
        let value = value
            .checked_add(1)
            .ok_or("increment or decrement would overflow")?;
        entries.set(key, value.to_string().as_bytes())?;
        Ok(value)
    }

    /// Removes `keys`, and returns how many of them existed.
    fn delete(&self, keys: &[&[u8]]) -> i64 {
        keys.iter()
            .map(|key| i64::from(self.shard(key).delete(key)))
            .sum()
    }

    fn shard(&self, key: &[u8]) -> MutexGuard<'_, Entries> {
        let shard = &self.shards[self.hasher.hash_one(key) as usize % SHARDS];
        // A panic cannot leave the entries half changed, so a poisoned lock is usable.
        shard.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let old = self.map.get_mut(key);
        let old_size = old.as_ref().map_or(0, |old| size(key, old));
        let bytes = self.bytes - old_size + size(key, value);
        if bytes > MAX_SHARD_BYTES {
            return Err("out of memory");
        }
        self.bytes = bytes;
        match old {
            Some(old) if old.len() == value.len() => old.copy_from_slice(value),
            Some(old) => *old = value.into(),
            None => drop(self.map.insert(key.into(), value.into())),
        }
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> bool {
        let old = self.map.remove(key);
        self.bytes -= old.as_ref().map_or(0, |old| size(key, old));
        old.is_some()
    }
}

fn size(key: &[u8], value: &[u8]) -> usize {
    ENTRY_BYTES + key.len() + value.len()
}

fn parse_integer(digits: &[u8]) -> Option<i64> {
    str::from_utf8(digits).ok()?.parse().ok()
}
