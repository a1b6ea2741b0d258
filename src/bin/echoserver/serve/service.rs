//! Notifications of the service manager, and its watchdog, which learns regularly that all workers run.

use std::env;
use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::iter;
use std::process;
use std::sync::Mutex;
use std::time::Duration;

use echoserver::{Address, Handle, Stats};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::serve::background::BackgroundThread;

/// Pings per timeout. The service manager acts if all but the first are missing.
const PINGS: u32 = 4;

/// How soon to repeat a notification that the service manager had no room for, if it expects no pings.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

const PING: &str = "WATCHDOG=1\n";

/// Notifications that the service manager had no room for, without pings. The next one takes them along. `None` if it had
/// room for the last one.
static UNSENT: Mutex<Option<String>> = Mutex::new(None);

/// Notifies the service manager that the server is ready. Returns a thread that repeats it if the manager had no room, unless
/// the pings of its watchdog do.
pub(crate) fn notify_ready(addresses: &[Address]) -> io::Result<Option<BackgroundThread>> {
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    let addresses = addresses.join(", ");
    notify(&format!("READY=1\nSTATUS=serving on {addresses}\n"));
    if UNSENT.lock().expect("no panic").is_none() || watchdog_timeout().is_some() {
        return Ok(None);
    }
    BackgroundThread::repeat("notify", RETRY_INTERVAL, || notify("")).map(Some)
}

/// Sends a message to the service manager, if there is one (`NOTIFY_SOCKET`). Never blocks: a manager that is stopped must
/// not hold up the start or a shutdown.
pub(crate) fn notify(message: &str) {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let mut unsent = UNSENT.lock().expect("no panic");
    let text = [unsent.as_deref().unwrap_or_default(), message].concat();
    if text.is_empty() {
        return;
    }
    match send(&name, &text) {
        Ok(_) => *unsent = None,
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            if unsent.is_none() {
                log::warn!("the service manager reads no notifications; they are sent again later");
            }
            let before = unsent.get_or_insert_default();
            if message != PING {
                *before = text;
            }
        }
        Err(error) => log::warn!("cannot notify the service manager: {error}"),
    }
}

fn send(name: &OsStr, message: &str) -> io::Result<usize> {
    // A name that starts with `@` is in Linux' abstract namespace.
    let address = match name.to_str().and_then(|name| name.strip_prefix('@')) {
        Some(name) => SockAddr::unix(format!("\0{name}")),
        None => SockAddr::unix(name),
    };
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    socket.set_nonblocking(true)?;
    socket.send_to(message.as_bytes(), &address?)
}

/// Returns the time within which the service manager expects a sign of life (`WATCHDOG_USEC`), if it does.
pub(crate) fn watchdog_timeout() -> Option<Duration> {
    env::var_os("NOTIFY_SOCKET")?;
    let is_own = env::var("WATCHDOG_PID").map_or(true, |pid| pid == process::id().to_string());
    let micros = env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    Some(Duration::from_micros(micros)).filter(|timeout| is_own && !timeout.is_zero())
}

/// Starts a thread that wakes all workers `PINGS` times per `timeout` and notifies the service manager each
/// time that all have run a tick.
pub(crate) fn start_watchdog(timeout: Duration, server: Handle) -> io::Result<BackgroundThread> {
    let interval = (timeout / PINGS).max(Duration::from_millis(1));
    let mut before = server.stats();
    server.wake_workers();
    BackgroundThread::repeat("watchdog", interval, move || {
        let now = server.stats();
        match stuck_worker(&before, &now) {
            // Workers end during a shutdown. It has a deadline.
            Some(worker) if !server.is_shutting_down() => {
                log::error!("worker {worker} is stuck: no tick within {interval:?}");
            }
            _ => notify(PING),
        }
        before = now;
        server.wake_workers();
    })
}

/// Returns the first worker that has run no tick in between.
fn stuck_worker(before: &Stats, now: &Stats) -> Option<usize> {
    iter::zip(&before.workers, &now.workers).position(|(before, now)| before.ticks == now.ticks)
}
