//! The options that make the server misbehave, and the choice of the connections that do.

mod handler;

use std::hash::{BuildHasher, RandomState};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use clap::Args;

pub(crate) use self::handler::Faulty;
use self::handler::{Fault, KINDS, Kind, Pipeline, Plan, Random, When};
use crate::values;

/// Sizes of pieces, and the pause between them in milliseconds.
type Pieces = (RangeInclusive<u64>, u64);

/// The kinds that `--fault` takes; the others are options of their own.
const OF_FAULT: &[(Kind, &str)] = KINDS.split_at(8).0;

#[derive(Debug, Args)]
#[command(next_help_heading = "Faults, for tests of clients")]
#[group(id = "faults")]
pub(crate) struct Options {
    /// Send each byte back this long after it was received: 50ms, or 50ms..100ms; at most --buffer-size
    /// bytes wait on a connection, so --buffer-size per delay bounds its throughput
    #[arg(long, value_name = "TIME[..TIME]", value_parser = given(delay))]
    delay: Option<Given<RangeInclusive<u64>>>,

    /// Send back at most this many bytes per second on each connection
    #[arg(long, value_name = "SIZE", value_parser = given(values::size))]
    throttle: Option<Given<usize>>,

    /// Send back pieces of this size, 1 ms or the given time apart: 10B, or 1B..1KiB@20ms
    #[arg(long, value_name = "SIZE[..SIZE][@TIME]", value_parser = given(slice))]
    slice: Option<Given<Pieces>>,

    /// What goes wrong, and when; repeatable. KIND: close (after echoing what has arrived), cut (close
    /// without the rest), reset, stall, blackhole (read, never answer), corrupt (a bit), repeat or drop
    /// (a byte). WHEN: bytes received with a unit (100B, 64KiB), time since the connect (5s), connect
    /// or eof
    #[arg(long, value_name = "KIND@WHEN", value_delimiter = ',')]
    #[arg(value_parser = given(str::parse::<Fault>))]
    fault: Vec<Given<Fault>>,

    /// Chance that a connection misbehaves, in percent
    #[arg(long, value_name = "PERCENT", visible_alias = "toxicity")]
    #[arg(default_value = "100", value_parser = share)]
    fault_share: f64,

    /// Make the same choices as an earlier run [default: random, and logged]
    #[arg(long, value_name = "N", value_parser = values::count::<u64>(0..=usize::MAX))]
    fault_seed: Option<u64>,

    /// Reset a stall or blackhole after this time; also when the client ends its half, unless the
    /// buffer is full
    #[arg(long, value_name = "TIME", default_value = "60s")]
    #[arg(value_parser = values::time(Duration::from_millis(1)))]
    fault_hold: Duration,
}

/// A value, and the text that it was given as.
#[derive(Clone, Debug)]
struct Given<T> {
    text: String,
    value: T,
}

/// Returns a parser that keeps the text.
fn given<T, E>(
    parse: impl Fn(&str) -> Result<T, E> + Clone,
) -> impl Fn(&str) -> Result<Given<T>, E> + Clone {
    move |text| {
        Ok(Given {
            value: parse(text)?,
            text: text.to_owned(),
        })
    }
}

/// Parses one value or two, the second of which is not less.
fn range(
    text: &str,
    parse: impl Fn(&str) -> Result<u64, String>,
) -> Result<RangeInclusive<u64>, String> {
    let (start, end) = text.split_once("..").unwrap_or((text, text));
    let (start, end) = (parse(start)?, parse(end)?);
    let range = Some(start..=end).filter(|range| !range.is_empty());
    range.ok_or_else(|| "the range ends before it starts".to_owned())
}

/// Parses a time of at least `min` in milliseconds, rounded up.
fn millis(min: Duration, text: &str) -> Result<u64, String> {
    let time = values::time(min)(text)?;
    Ok(time.as_nanos().div_ceil(1_000_000) as u64)
}

fn delay(text: &str) -> Result<RangeInclusive<u64>, String> {
    range(text, |text| millis(Duration::ZERO, text))
}

fn slice(text: &str) -> Result<Pieces, String> {
    let (sizes, pause) = text.split_once('@').unwrap_or((text, "1ms"));
    let sizes = range(sizes, |text| values::size(text).map(|size| size as u64))?;
    // Without a pause, the kernel joins pieces.
    Ok((sizes, millis(Duration::from_millis(1), pause)?))
}

/// Parses a percentage.
fn share(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse().ok();
    let share = number.filter(|share| (0.0..=100.0).contains(share));
    share.ok_or_else(|| "expected a percentage from 0 to 100, such as 5 or 0.1".to_owned())
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected KIND@WHEN, such as reset@64KiB or stall@5s";
        let (name, when) = text.split_once('@').ok_or(expected)?;
        let found = OF_FAULT.iter().find(|(_, known)| *known == name);
        let (kind, _) = *found.ok_or_else(|| {
            let names: Vec<_> = OF_FAULT.iter().map(|(_, name)| *name).collect();
            format!("expected {}, not {name:?}", names.join(", "))
        })?;
        let when = when.parse()?;
        if kind.changes_a_byte() && when == When::Eof {
            return Err(format!("there is no byte to {name} at eof"));
        }
        Ok(Self { kind, when })
    }
}

impl FromStr for When {
    type Err = String;

    /// Parses a size or a time, both with a unit, `connect` or `eof`. As a unit, `m` is a minute and `M` is 1 MiB.
    fn from_str(text: &str) -> Result<Self, String> {
        let is_size = text.ends_with(['B', 'b', 'K', 'k', 'M', 'G', 'g']);
        let has_unit = text.ends_with(char::is_alphabetic);
        match text {
            "connect" => Ok(Self::Received(0)),
            "eof" => Ok(Self::Eof),
            _ if is_size => values::size(text).map(|size| Self::Received(size as u64)),
            _ if has_unit => millis(Duration::ZERO, text).map(Self::Elapsed),
            _ => Err(match text.parse::<u64>() {
                Ok(number) => format!("{number} needs a unit: {number}B or {number}s"),
                Err(_) => "expected bytes or a time with a unit, connect or eof".to_owned(),
            }),
        }
    }
}

impl Options {
    /// Returns what is to go wrong, if anything is.
    pub(crate) fn faults(&self) -> Option<Faults> {
        let option = |name: &str, text: &str| format!("--{name} {text}, ");
        let mut text = String::new();
        text.extend(self.delay.as_ref().map(|it| option("delay", &it.text)));
        text.extend((self.throttle.as_ref()).map(|it| option("throttle", &it.text)));
        text.extend(self.slice.as_ref().map(|it| option("slice", &it.text)));
        text.extend(self.fault.iter().map(|it| option("fault", &it.text)));
        if text.is_empty() {
            return None;
        }
        // 32 bits are enough, and easier to repeat.
        let random = || RandomState::new().hash_one(0) >> 32;
        let (share, seed) = (self.fault_share, self.fault_seed.unwrap_or_else(random));
        Some(Faults {
            plan: Plan {
                delay: self.delay.as_ref().map(|it| it.value.clone()),
                throttle: self.throttle.as_ref().map(|it| it.value as u64),
                slice: self.slice.as_ref().map(|it| it.value.clone()),
                faults: self.fault.iter().map(|it| it.value).collect(),
                hold: self.fault_hold.as_millis() as u64,
                ..Plan::default()
            },
            share,
            seed,
            text: format!("{text}--fault-share {share}, --fault-seed {seed}"),
        })
    }
}

/// What goes wrong, and how often it has.
#[derive(Debug)]
pub(crate) struct Faults {
    plan: Plan,
    /// The chance that a connection misbehaves, in percent.
    share: f64,
    seed: u64,
    /// The options in effect.
    pub(crate) text: String,
}

impl Faults {
    /// Returns the handler of a connection. Whether it misbehaves, and how, depends on the seed and the number only.
    pub(crate) fn handler(&self, number: u64) -> Faulty<'_> {
        let mut random = Random::new(self.seed, number);
        let misbehaves = f64::from(random.within(&(0..=999_999)) as u32) < self.share * 1e4;
        Faulty(misbehaves.then(|| (&self.plan, Pipeline::new(&self.plan, random))))
    }

    /// Returns the name of each kind of fault, and how often it has happened.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let names = KINDS.iter().map(|(_, name)| *name);
        names.zip(self.plan.counts.iter().map(|count| count.load(Relaxed)))
    }
}

#[cfg(test)]
mod tests;
