use super::*;
use crate::net::stream::Socket;

const BUSY: Duration = Duration::from_secs(60);

fn poller(busy_poll: Duration, max_events: usize) -> MioPoller {
    let mut poller = MioPoller::new(Clock::start(), busy_poll).unwrap();
    poller.events = Events::with_capacity(max_events);
    poller
}

/// Polls; returns whether more may be pending, and the tokens of the events.
fn poll(poller: &mut MioPoller, timeout: Option<Millis>) -> (bool, Vec<usize>) {
    let more = Poller::<Socket>::poll(poller, timeout).unwrap();
    let token = |event| match event {
        PollEvent::Wake => WAKER.0,
        PollEvent::Ready(token, readiness) => {
            assert!(readiness.writable && !readiness.readable);
            token
        }
    };
    let events = Poller::<Socket>::events(poller);
    let mut tokens: Vec<_> = events.map(token).collect();
    tokens.sort_unstable();
    (more, tokens)
}

#[test]
fn more_may_be_pending_after_a_full_batch() {
    for busy_poll in [Duration::ZERO, BUSY] {
        let mut poller = poller(busy_poll, 2);
        assert_eq!(Poller::<Socket>::max_events(&poller), 2);
        poller.waker.wake();
        assert_eq!(poll(&mut poller, None), (false, vec![WAKER.0]));
        let (mut socket, _client) = Socket::with_client();
        poller.register(&mut socket, 7).unwrap();
        poller.waker.wake();
        assert_eq!(poll(&mut poller, None), (true, vec![7, WAKER.0]));
        assert_eq!(poll(&mut poller, Some(0)), (false, vec![]));
    }
}

#[test]
fn poll_without_an_event_ends_at_its_timeout() {
    for busy_poll in [Duration::ZERO, Duration::from_millis(5), BUSY] {
        let mut poller = poller(busy_poll, 2);
        let start = Poller::<Socket>::now(&poller);
        assert_eq!(poll(&mut poller, Some(20)), (false, vec![]));
        assert!(Poller::<Socket>::now(&poller) >= start + 20);
        assert!(Poller::<Socket>::elapsed(&poller, start) >= 20);
    }
}

/// Whatever the scheduler does to this thread, it does not ask to sleep.
#[test]
#[cfg(target_os = "linux")]
fn busy_poll_does_not_sleep() {
    use procfs::FromRead;
    use procfs::process::Status;

    let sleeps = || {
        let status = Status::from_file("/proc/thread-self/status").unwrap();
        status.voluntary_ctxt_switches.unwrap()
    };
    let mut poller = poller(BUSY, 2);
    let before = sleeps();
    assert_eq!(poll(&mut poller, Some(20)), (false, vec![]));
    assert_eq!(sleeps(), before);
}
