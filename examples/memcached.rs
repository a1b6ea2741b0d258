//! A memcached: the classic commands of its text protocol.
//!
//! ```text
//! cargo run --release --example memcached -- 127.0.0.1:11211 2
//! printf 'set greeting 0 60 5\r\nhello\r\nget greeting\r\nquit\r\n' | nc 127.0.0.1 11211
//! ```
//!
//! It shows how to write a protocol on this library. The file has the order in which a request is handled:
//!
//! * [`Client`] is the [`Handler`]. It takes one request after the other from the input, and leaves one that has not yet
//!   arrived completely.
//! * [`Command`] is the parser. It knows neither buffers nor items.
//! * [`Store`] has the items, which all connections share. Of the protocol it knows only answers.
//!
//! An answer line, and an item in an answer, is appended whole or not at all. If it does not fit, the request stays in the
//! input, the handler returns [`Action::Flush`], and is called again when the output is sent. To check the room before a
//! command changes anything is enough, as only the answer to a `get` can be long.
//!
//! It differs from memcached in this: when memory is full, new values are refused, as with the option `-M`. A value can have
//! exactly 1 MiB. The value after a key that is too long is discarded, and not taken for commands. A number that gets shorter
//! is not padded with blanks. There are no meta commands and no binary protocol.

use std::borrow::Cow;
use std::collections::HashMap;
use std::env;
use std::error::Error;
use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use echoserver::{Action, Config, Context, Event, Handler, Input, Output, Server};

/// The longest key, in bytes.
const MAX_KEY: usize = 250;

/// The longest value, in bytes.
const MAX_VALUE: usize = 1 << 20;

/// The longest line of a request. A `get` can have 250 keys of the maximum length.
const MAX_LINE: usize = 64 << 10;

/// The longest answer, apart from the values in it.
const MAX_ANSWER: usize = 1024;

/// The longest request and the longest part of an answer that is appended at once must fit into a buffer.
const BUFFER_SIZE: usize = MAX_LINE + MAX_VALUE + 2;

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or("127.0.0.1:11211".to_owned());
    let mut config = Config {
        buffer_size: BUFFER_SIZE,
        ..Config::new(address.parse()?)
    };
    if let Some(workers) = arguments.next() {
        config.workers = workers.parse()?;
    }
    let server = Server::bind(config)?;
    let handle = server.handle();
    ctrlc::set_handler(move || match handle.is_shutting_down() {
        false => handle.shut_down(),
        true => handle.abort(),
    })?;
    println!("listening on {}", server.addresses()[0]);
    let store = Store::new();
    server.run(|_connection| Client {
        store: &store,
        discard: 0,
        keys_answered: 0,
    })?;
    Ok(())
}

/// The handler of one connection.
struct Client<'a> {
    store: &'a Store,
    /// How many bytes at the front of the input belong to a value that is stored or refused.
    discard: usize,
    /// How many keys of the first request in the input are answered. The others did not fit into the output.
    keys_answered: usize,
}

impl Handler for Client<'_> {
    fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
        // Whatever the event is: handle the requests that are there, as long as there is room for the answers.
        let Context { input, output, .. } = context;
        loop {
            if let Err(action) = self.handle_request(input, output) {
                return action;
            }
        }
    }
}

impl Client<'_> {
    /// Handles the first request in the input. `Err` is what the server does before the next one.
    fn handle_request(
        &mut self,
        input: &mut Input<'_>,
        output: &mut Output<'_>,
    ) -> Result<(), Action> {
        let count = self.discard.min(input.len());
        input.consume(count);
        self.discard -= count;

        let bytes = input.data();
        let end = bytes.iter().take(MAX_LINE).position(|byte| *byte == b'\n');
        if end.is_none() && bytes.len() < MAX_LINE {
            return Err(Action::Continue);
        }
        if output.room() < MAX_ANSWER {
            return Err(Action::Flush);
        }
        let Some(end) = end else {
            push_line(output, "CLIENT_ERROR line too long");
            return Err(Action::Close);
        };
        let (line, rest) = bytes.split_at(end + 1);
        let words = split_words(line);
        let (words, is_silent) = split_noreply(&words);
        let answer = match Command::parse(words) {
            Ok(command) => self.execute(&command, rest, output)?,
            Err(problem) => problem.into(),
        };
        input.consume(end + 1);
        if !is_silent {
            push_line(output, &answer);
        }
        Ok(())
    }

    /// Executes a command, whose value is at the start of `rest`. Returns the last line of the answer.
    fn execute(
        &mut self,
        command: &Command<'_>,
        rest: &[u8],
        output: &mut Output<'_>,
    ) -> Result<Cow<'static, str>, Action> {
        let store = self.store;
        let answer = match *command {
            Command::Put(ref put) => self.put(put, rest)?,
            Command::Get(ref get) => self.get(get, output)?,
            Command::Touch(key, exptime) if store.touch(key, exptime) => "TOUCHED",
            Command::Delete(key) if store.delete(key) => "DELETED",
            Command::Touch(..) | Command::Delete(_) => "NOT_FOUND",
            Command::Count(key, step) => match store.count(key, step) {
                Ok(number) => return Ok(number.to_string().into()),
                Err(problem) => problem,
            },
            Command::FlushAll(at) => {
                store.flush_all(at);
                "OK"
            }
            Command::Stats => return Ok(store.stats().into()),
            Command::Version => return Ok(format!("VERSION {VERSION}").into()),
            Command::Verbosity => "OK",
            Command::Quit => return Err(Action::Close),
        };
        Ok(answer.into())
    }

    /// Stores the value at the start of `rest`, or refuses it before it has arrived.
    fn put(&mut self, put: &Put<'_>, rest: &[u8]) -> Result<&'static str, Action> {
        let length = put.length.saturating_add(2); // with the end of its line
        let answer = if put.key.len() > MAX_KEY {
            BAD_FORMAT
        } else if put.length > MAX_VALUE {
            if put.mode == Mode::Set {
                // What was to be replaced is out of date.
                self.store.delete(put.key);
            }
            TOO_LARGE
        } else {
            let data = rest.get(..length).ok_or(Action::Continue)?;
            match data.strip_suffix(b"\r\n") {
                Some(value) => self.store.put(put, value),
                None => "CLIENT_ERROR bad data chunk",
            }
        };
        self.discard = length;
        Ok(answer)
    }

    /// Appends the items of `get`, as many as fit.
    fn get(&mut self, get: &Get<'_>, output: &mut Output<'_>) -> Result<&'static str, Action> {
        for key in &get.keys[self.keys_answered..] {
            let push = |item: &Item| push_item(output, key, item, get.with_unique);
            if !self.store.get(key, get.exptime, push) {
                // The command stays in the input, and goes on with this key when the output is sent.
                return Err(Action::Flush);
            }
            self.keys_answered += 1;
        }
        self.keys_answered = 0;
        Ok("END")
    }
}

/// Appends to the output, which has room: [`Client::handle_request`] and [`push_item`] check it for several parts at once.
fn push(output: &mut Output<'_>, bytes: &[u8]) {
    let fits = output.push(bytes);
    debug_assert!(fits, "the room was checked");
}

fn push_line(output: &mut Output<'_>, line: &str) {
    push(output, line.as_bytes());
    push(output, b"\r\n");
}

/// Appends an item if it fits with the lines around it. Returns whether it does.
fn push_item(output: &mut Output<'_>, key: &[u8], item: &Item, with_unique: bool) -> bool {
    let (flags, length, unique) = (item.flags, item.value.len(), item.unique);
    if output.room() < MAX_ANSWER + length {
        return false;
    }
    push(output, b"VALUE ");
    push(output, key);
    match with_unique {
        true => push_line(output, &format!(" {flags} {length} {unique}")),
        false => push_line(output, &format!(" {flags} {length}")),
    }
    push(output, &item.value);
    push(output, b"\r\n");
    true
}

const UNKNOWN: &str = "ERROR";
const BAD_FORMAT: &str = "CLIENT_ERROR bad command line format";
const BAD_EXPTIME: &str = "CLIENT_ERROR invalid exptime argument";
const BAD_DELTA: &str = "CLIENT_ERROR invalid numeric delta argument";
const NOT_A_NUMBER: &str = "CLIENT_ERROR cannot increment or decrement non-numeric value";
const TOO_LARGE: &str = "SERVER_ERROR object too large for cache";

/// What a line asks for.
enum Command<'a> {
    Put(Put<'a>),
    Get(Get<'a>),
    /// A key, and when the item is to expire, see [`Moment::deadline`].
    Touch(&'a [u8], i64),
    Delete(&'a [u8]),
    Count(&'a [u8], Step),
    /// When.
    FlushAll(i64),
    Stats,
    Version,
    Verbosity,
    Quit,
}

/// `get`, `gets`, `gat` and `gats`.
struct Get<'a> {
    keys: &'a [&'a [u8]],
    /// When the items are to expire, if that is to change.
    exptime: Option<i64>,
    /// Whether the answer has the number that `cas` expects.
    with_unique: bool,
}

/// `set` and its relatives, whose line is followed by a value of `length` bytes.
struct Put<'a> {
    mode: Mode,
    key: &'a [u8],
    flags: u32,
    exptime: i64,
    length: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Set,
    Add,
    Replace,
    Append,
    Prepend,
    /// Replaces the item that still has this number.
    Cas(u64),
}

/// `incr` and `decr`.
#[derive(Clone, Copy)]
enum Step {
    Up(u64),
    Down(u64),
}

impl<'a> Command<'a> {
    /// Parses the words of a line. `Err` is the answer to one that is wrong.
    fn parse(words: &'a [&'a [u8]]) -> Result<Self, &'static str> {
        Ok(match *words {
            [b"set", ref rest @ ..] => Self::put(Mode::Set, rest)?,
            [b"add", ref rest @ ..] => Self::put(Mode::Add, rest)?,
            [b"replace", ref rest @ ..] => Self::put(Mode::Replace, rest)?,
            [b"append", ref rest @ ..] => Self::put(Mode::Append, rest)?,
            [b"prepend", ref rest @ ..] => Self::put(Mode::Prepend, rest)?,
            [b"cas", ref rest @ .., unique] => {
                Self::put(Mode::Cas(number(unique, BAD_FORMAT)?), rest)?
            }
            _ if words.iter().any(|word| word.len() > MAX_KEY) => return Err(BAD_FORMAT),
            [b"get", _, ..] => Self::get(&words[1..], None, false),
            [b"gets", _, ..] => Self::get(&words[1..], None, true),
            [b"gat", exptime, _, ..] => {
                Self::get(&words[2..], Some(number(exptime, BAD_EXPTIME)?), false)
            }
            [b"gats", exptime, _, ..] => {
                Self::get(&words[2..], Some(number(exptime, BAD_EXPTIME)?), true)
            }
            [b"touch", key, exptime] => Self::Touch(key, number(exptime, BAD_EXPTIME)?),
            [b"delete", key] | [b"delete", key, b"0"] => Self::Delete(key),
            [b"incr", key, delta] => Self::Count(key, Step::Up(number(delta, BAD_DELTA)?)),
            [b"decr", key, delta] => Self::Count(key, Step::Down(number(delta, BAD_DELTA)?)),
            [b"flush_all"] => Self::FlushAll(0),
            [b"flush_all", delay] => Self::FlushAll(number(delay, BAD_EXPTIME)?),
            [b"stats"] => Self::Stats,
            [b"version"] => Self::Version,
            [b"verbosity", _] => Self::Verbosity,
            [b"quit"] => Self::Quit,
            _ => return Err(UNKNOWN),
        })
    }

    fn get(keys: &'a [&'a [u8]], exptime: Option<i64>, with_unique: bool) -> Self {
        Self::Get(Get {
            keys,
            exptime,
            with_unique,
        })
    }

    /// The key may be too long here, so that its value can be discarded.
    fn put(mode: Mode, words: &[&'a [u8]]) -> Result<Self, &'static str> {
        let [key, flags, exptime, length] = *words else {
            return Err(UNKNOWN);
        };
        Ok(Self::Put(Put {
            mode,
            key,
            flags: number(flags, BAD_FORMAT)?,
            exptime: number(exptime, BAD_FORMAT)?,
            length: number::<u32>(length, BAD_FORMAT)? as usize,
        }))
    }
}

fn split_words(line: &[u8]) -> Vec<&[u8]> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let words = line.split(|&byte| byte == b' ');
    words.filter(|word| !word.is_empty()).collect()
}

/// Splits off a last word `noreply`, and returns whether it was there. It can also be a key.
fn split_noreply<'a, 'b>(words: &'a [&'b [u8]]) -> (&'a [&'b [u8]], bool) {
    match words {
        [b"get" | b"gets" | b"gat" | b"gats", ..] => (words, false),
        [front @ .., b"noreply"]
            if front.len() > 1 || matches!(front, [b"flush_all" | b"verbosity"]) =>
        {
            (front, true)
        }
        _ => (words, false),
    }
}

/// Parses a number. `problem` is the answer if it is none.
fn number<T: FromStr>(word: &[u8], problem: &'static str) -> Result<T, &'static str> {
    let digits = str::from_utf8(word).ok();
    digits.and_then(|digits| digits.parse().ok()).ok_or(problem)
}

/// The items, shared by all connections.
///
/// They are divided into shards with a lock each, so that workers rarely wait for each other. A lock is held no longer
/// than it takes to copy a value.
struct Store {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
    /// The number of the newest item.
    newest: AtomicU64,
    /// Items with this number and older ones are flushed. They are removed when their shard is full.
    flushed: AtomicU64,
    /// When all items of that time are to be flushed.
    flush_at: AtomicU64,
    /// The start on the clock that is never set, and on the one that clients use.
    started: Instant,
    started_at: u64,
}

const SHARDS: usize = 64;

/// Memory limit of a shard in bytes: 512 MiB for all shards together.
const MAX_SHARD_BYTES: usize = (512 << 20) / SHARDS;

/// Approximate memory of an item besides its key and value.
const ITEM_BYTES: usize = 100;

#[derive(Default)]
struct Shard {
    items: HashMap<Box<[u8]>, Item>,
    bytes: usize,
    /// When it was last searched for items that are no longer valid.
    cleaned: u64,
    hits: u64,
    misses: u64,
}

struct Item {
    value: Box<[u8]>,
    flags: u32,
    /// In seconds, as [`Moment::now`].
    deadline: u64,
    /// A new number for each change of the value, which `cas` compares.
    unique: u64,
}

/// What decides whether an item is still valid.
#[derive(Clone, Copy)]
struct Moment {
    /// In seconds since 1970.
    now: u64,
    flushed: u64,
}

impl Moment {
    fn is_valid(self, item: &Item) -> bool {
        item.unique > self.flushed && item.deadline > self.now
    }

    /// When an item expires: never for 0, after up to 30 days, or at a time in seconds since 1970. A negative time is over.
    fn deadline(self, exptime: i64) -> u64 {
        const MAX_DELAY: u64 = 30 * 24 * 60 * 60;
        match u64::try_from(exptime) {
            Ok(0) => u64::MAX,
            Ok(delay @ ..=MAX_DELAY) => self.now + delay,
            Ok(time) => time,
            Err(_negative) => 0,
        }
    }
}

impl Store {
    fn new() -> Self {
        let since_1970 = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::new(),
            newest: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            flush_at: AtomicU64::new(u64::MAX),
            started: Instant::now(),
            started_at: since_1970.as_secs(),
        }
    }

    fn moment(&self) -> Moment {
        let now = self.started_at + self.started.elapsed().as_secs();
        // The first one that sees it flushes.
        let is_due = |time: u64| time <= now;
        if is_due(self.flush_at.load(Ordering::Relaxed))
            && is_due(self.flush_at.swap(u64::MAX, Ordering::Relaxed))
        {
            self.flush();
        }
        let flushed = self.flushed.load(Ordering::Relaxed);
        Moment { now, flushed }
    }

    fn flush(&self) {
        let newest = self.newest.load(Ordering::Relaxed);
        self.flushed.fetch_max(newest, Ordering::Relaxed);
    }

    fn shard(&self, key: &[u8]) -> MutexGuard<'_, Shard> {
        lock(&self.shards[self.hasher.hash_one(key) as usize % SHARDS])
    }

    fn next_unique(&self) -> u64 {
        self.newest.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Calls `push` with the item of `key`, if there is one, and without a copy of it. Returns whether its answer fits.
    fn get(&self, key: &[u8], exptime: Option<i64>, push: impl FnOnce(&Item) -> bool) -> bool {
        let moment = self.moment();
        let mut shard = self.shard(key);
        let Some(item) = shard.valid(key, moment) else {
            shard.misses += 1;
            return true;
        };
        let fits = push(item);
        if fits {
            item.deadline = exptime.map_or(item.deadline, |exptime| moment.deadline(exptime));
            shard.hits += 1;
        }
        fits
    }

    /// Returns the answer to a command that stores a value.
    fn put(&self, put: &Put<'_>, value: &[u8]) -> &'static str {
        let moment = self.moment();
        let mut shard = self.shard(put.key);
        let old = shard.valid(put.key, moment);
        let (value, flags, deadline): (Box<[u8]>, _, _) = match (put.mode, old) {
            (Mode::Add, Some(_)) | (Mode::Replace | Mode::Append | Mode::Prepend, None) => {
                return "NOT_STORED";
            }
            (Mode::Cas(_), None) => return "NOT_FOUND",
            (Mode::Cas(unique), Some(old)) if old.unique != unique => return "EXISTS",
            (Mode::Append | Mode::Prepend, Some(old)) => {
                let parts = match put.mode {
                    Mode::Append => [&old.value[..], value],
                    _ => [value, &old.value],
                };
                (parts.concat().into(), old.flags, old.deadline)
            }
            _ => (value.into(), put.flags, moment.deadline(put.exptime)),
        };
        if value.len() > MAX_VALUE {
            return TOO_LARGE;
        }
        let item = Item {
            value,
            flags,
            deadline,
            unique: self.next_unique(),
        };
        match shard.insert(put.key, item, moment) {
            Ok(()) => "STORED",
            Err(problem) => problem,
        }
    }

    /// Sets the deadline of an item. Returns whether there is one.
    fn touch(&self, key: &[u8], exptime: i64) -> bool {
        let moment = self.moment();
        let mut shard = self.shard(key);
        let item = shard.valid(key, moment);
        item.map(|item| item.deadline = moment.deadline(exptime))
            .is_some()
    }

    /// Removes an item. Returns whether there was one.
    fn delete(&self, key: &[u8]) -> bool {
        let moment = self.moment();
        let mut shard = self.shard(key);
        let old = shard.items.remove(key);
        shard.bytes -= old.as_ref().map_or(0, |old| size(key, old));
        old.is_some_and(|old| moment.is_valid(&old))
    }

    /// Changes a number, and returns the new one. It starts again at 0 after the largest one, and stops at 0.
    fn count(&self, key: &[u8], step: Step) -> Result<u64, &'static str> {
        let moment = self.moment();
        let mut shard = self.shard(key);
        let old = shard.valid(key, moment).ok_or("NOT_FOUND")?;
        let value: u64 = number(old.value.trim_ascii(), NOT_A_NUMBER)?;
        let value = match step {
            Step::Up(delta) => value.wrapping_add(delta),
            Step::Down(delta) => value.saturating_sub(delta),
        };
        let item = Item {
            value: value.to_string().into_bytes().into(),
            unique: self.next_unique(),
            ..*old
        };
        shard.insert(key, item, moment)?;
        Ok(value)
    }

    /// Makes all items invalid that are there now, or at a later time.
    fn flush_all(&self, at: i64) {
        let deadline = self.moment().deadline(at);
        self.flush_at.store(deadline, Ordering::Relaxed);
        if at == 0 {
            self.flush();
        }
    }

    /// Returns the answer to `stats`.
    fn stats(&self) -> String {
        let sum = |of: fn(&Shard) -> u64| -> u64 {
            self.shards.iter().map(|shard| of(&lock(shard))).sum()
        };
        let (hits, misses) = (sum(|shard| shard.hits), sum(|shard| shard.misses));
        let lines = [
            ("pid", u64::from(std::process::id())),
            ("uptime", self.started.elapsed().as_secs()),
            ("time", self.moment().now),
            ("curr_items", sum(|shard| shard.items.len() as u64)),
            ("bytes", sum(|shard| shard.bytes as u64)),
            ("limit_maxbytes", (SHARDS * MAX_SHARD_BYTES) as u64),
            ("cmd_get", hits + misses),
            ("get_hits", hits),
            ("get_misses", misses),
        ];
        let version = format!("STAT version {VERSION}\r\n");
        let lines = lines.map(|(name, value)| format!("STAT {name} {value}\r\n"));
        version + &lines.concat() + "END"
    }
}

impl Shard {
    /// Returns the item of `key`, if it is still valid.
    fn valid(&mut self, key: &[u8], moment: Moment) -> Option<&mut Item> {
        let item = self.items.get_mut(key)?;
        moment.is_valid(item).then_some(item)
    }

    /// Puts an item in the place of the one that is there, if there is memory for it.
    fn insert(&mut self, key: &[u8], item: Item, moment: Moment) -> Result<(), &'static str> {
        let added = size(key, &item);
        if self.bytes + added > MAX_SHARD_BYTES {
            self.clean(moment);
        }
        let old = self.items.get_mut(key);
        let bytes = self.bytes + added - old.as_ref().map_or(0, |old| size(key, old));
        if bytes > MAX_SHARD_BYTES {
            return Err("SERVER_ERROR out of memory storing object");
        }
        self.bytes = bytes;
        match old {
            Some(old) => *old = item,
            None => _ = self.items.insert(key.into(), item),
        }
        Ok(())
    }

    /// Removes the items that are no longer valid, at most once in a second, as it takes some time.
    fn clean(&mut self, moment: Moment) {
        if self.cleaned < moment.now {
            self.cleaned = moment.now;
            self.items.retain(|_key, item| moment.is_valid(item));
            self.bytes = self.items.iter().map(|(key, item)| size(key, item)).sum();
        }
    }
}

fn size(key: &[u8], item: &Item) -> usize {
    ITEM_BYTES + key.len() + item.value.len()
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    // A panic cannot leave a shard half changed, so a poisoned lock is usable.
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
