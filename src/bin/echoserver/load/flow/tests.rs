use hdrhistogram::Histogram;

use super::*;

const MS: Duration = Duration::from_millis(1);

/// Sends 1,000 messages a second for 20 s to a server that answers after 100 us, but stalls for the first
/// 200 ms of each second.
fn times_of_stalling_server(max_in_flight: u64) -> Histogram<u64> {
    let start = Instant::now();
    let mut flow = Flow::new(64, max_in_flight, u64::MAX);
    flow.schedule = Some(Schedule {
        start,
        rate: 1000.0,
        first: 0,
        step: 1,
    });
    let mut times = Histogram::new(3).unwrap();
    let mut previous_answer = start;
    for _ in 0..20_000 {
        let mut sent = flow.next_due().unwrap();
        flow.grant(1);
        if max_in_flight == 1 {
            sent = sent.max(previous_answer);
        }
        let answer = sent + MS / 10;
        let into_second = (answer - start).subsec_nanos();
        let stall = (200 * MS).saturating_sub(Duration::from_nanos(into_second.into()));
        previous_answer = answer + stall;
        flow.add_sent(flow.sendable(), sent);
        flow.add_received(64, previous_answer, |time| {
            times.record(time.as_nanos() as u64).unwrap();
        });
    }
    times
}

#[test]
fn stall_counts_for_every_message_that_was_due_during_it() {
    const QUANTILES: [f64; 6] = [0.5, 0.77, 0.9, 0.99, 0.999, 1.0];
    // A fifth of the messages is due in a stall, and waits for up to 200 ms.
    let at_once = [0.1, 0.1, 100.0, 190.0, 199.0, 200.0];
    // With one in flight, those that have queued up are answered 0.1 ms apart. One due t ms after the start
    // of the stall waits for 200 - 0.9 t ms, so that 222 wait, and ten of them for more than 191 ms.
    let in_turn = [0.1, 0.1, 110.0, 191.0, 199.1, 200.0];
    for (max_in_flight, expected) in [(u64::MAX, at_once), (1, in_turn)] {
        let times = times_of_stalling_server(max_in_flight);
        assert_eq!(times.len(), 20_000);
        for (quantile, expected) in QUANTILES.into_iter().zip(expected) {
            let measured = times.value_at_quantile(quantile) as f64 / 1e6;
            let error = (measured - expected).abs();
            assert!(error < 0.01 * expected + 0.05, "{quantile}: {measured} ms");
        }
    }
}

#[test]
fn messages_in_flight_are_limited_and_timed_from_their_first_byte() {
    let start = Instant::now();
    let mut flow = Flow::new(10, 2, 3);
    flow.grant(9);
    assert_eq!(flow.sendable(), 20);
    flow.add_sent(11, start);
    flow.add_sent(9, start + 5 * MS);
    assert_eq!(flow.sendable(), 0);
    let mut times = Vec::new();
    flow.add_received(19, start + 7 * MS, |time| times.push(time));
    assert_eq!((flow.sendable(), flow.is_awaiting_bytes()), (10, true));
    flow.add_received(1, start + 8 * MS, |time| times.push(time));
    assert_eq!(times, [7 * MS, 8 * MS]);
    flow.add_sent(4, start);
    assert_eq!(flow.restart().len(), 1);
    assert_eq!((flow.sendable(), flow.abandon()), (20, 6));
}

#[test]
fn messages_without_an_answer_are_outstanding_from_when_they_began_or_were_due() {
    let start = Instant::now();
    let mut flow = Flow::new(10, 5, u64::MAX);
    flow.grant(9);
    flow.add_sent(21, start + MS);
    flow.add_received(10, start + 2 * MS, drop);
    let outstanding: Vec<_> = flow.outstanding().collect();
    assert_eq!(outstanding, [start + MS; 2]);
    // The third has begun.
    flow.withdraw(false);
    assert_eq!((flow.sendable(), flow.is_complete()), (9, false));
    flow.add_sent(9, start + 3 * MS);
    flow.add_received(20, start + 4 * MS, drop);
    assert!(flow.is_complete() && flow.outstanding().next().is_none());

    let mut flow = Flow::new(10, 1, u64::MAX);
    flow.schedule = Some(Schedule {
        start,
        rate: 1000.0,
        first: 0,
        step: 2,
    });
    flow.grant(3);
    flow.add_sent(10, start + 9 * MS);
    flow.add_received(10, start + 10 * MS, drop);
    // One may be sent, and one waits for it.
    let outstanding: Vec<_> = flow.outstanding().collect();
    assert_eq!(outstanding, [start + 2 * MS, start + 4 * MS]);
}
