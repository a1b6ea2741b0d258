use super::*;

#[test]
fn reason_is_its_own_index() {
    for (index, &reason) in CloseReason::ALL.iter().enumerate() {
        assert_eq!(reason as usize, index);
    }
}

#[test]
fn gauge_adjusts_up_and_down() {
    let gauge = Counter::default();
    gauge.adjust(0, 7);
    gauge.adjust(7, 3);
    assert_eq!(gauge.get(), 3);
}

#[test]
fn imbalances_are_reported() {
    let counters = Counters::new(2);
    counters.acceptor.accepted.add(2);
    counters.workers[0].assigned.add(1);
    let imbalance = counters.snapshot().check_balance();
    let imbalance = imbalance.expect("one connection is missing");
    assert!(
        imbalance.contains("2 connections accepted, but 1 assigned"),
        "{imbalance}"
    );

    counters.workers[1].assigned.add(1);
    counters.workers[1].bytes_in.add(10);
    counters.workers[1].bytes_out.add(6);
    counters.workers[0].discarded[CloseReason::Reset as usize].add(3);
    let imbalance = counters.snapshot().check_balance();
    let imbalance = imbalance.expect("one byte is missing");
    assert!(imbalance.contains("10 bytes in"), "{imbalance}");

    counters.workers[0].buffered.add(1);
    assert_eq!(counters.snapshot().check_balance(), None);
    let imbalance = counters.snapshot().check_final_balance();
    let imbalance = imbalance.expect("two connections are open");
    assert!(
        imbalance.contains("2 connections assigned, but 0 closed, 0 lingering, and 1 bytes still"),
        "{imbalance}"
    );
    assert_eq!(counters.snapshot().open(), 2);
}

#[test]
fn totals_are_sums_except_the_longest_tick() {
    let counters = Counters::new(2);
    for (worker, factor) in counters.workers.iter().zip([1, 10]) {
        let WorkerCounters {
            assigned,
            closed,
            bytes_in,
            bytes_out,
            bytes_generated,
            buffered,
            buffer_memory,
            discarded,
            ticks,
            bulk_turns,
            bulk,
            longest_tick,
            lingering,
        } = &***worker;
        let by_reason = closed.iter().chain(discarded);
        let numbers = [assigned, bytes_in, bytes_out, bytes_generated];
        let others = [
            buffered,
            buffer_memory,
            ticks,
            bulk_turns,
            bulk,
            longest_tick,
        ];
        let all = numbers.into_iter().chain(others).chain(by_reason);
        let all = all.chain([lingering]);
        for (number, counter) in (1..).zip(all) {
            counter.add(number * factor);
        }
    }
    let total = counters.snapshot().total();
    let expected = WorkerStats {
        assigned: 11,
        bytes_in: 22,
        bytes_out: 33,
        bytes_generated: 44,
        buffered: 55,
        buffer_memory: 66,
        ticks: 77,
        bulk_turns: 88,
        bulk: 99,
        longest_tick: Duration::from_millis(100),
        closed: ByReason(std::array::from_fn(|index| 11 * (11 + index as u64))),
        discarded: ByReason(std::array::from_fn(|index| 11 * (24 + index as u64))),
        lingering: 11 * 37,
    };
    assert_eq!(total, expected);
}

#[test]
fn expired_connections_are_closed_ones() {
    let counters = Counters::new(1);
    counters.acceptor.accepted.add(5);
    counters.acceptor.expired.add(2);
    counters.workers[0].assigned.add(3);
    let stats = counters.snapshot();
    assert_eq!((stats.open(), stats.check_balance()), (3, None));
    assert_eq!(stats.total().closed.get(CloseReason::DrainTimeout), 2);
}

#[test]
fn counts_by_reason_show_the_reasons_that_occurred() {
    let mut counts = ByReason::default();
    counts.0[CloseReason::DrainTimeout as usize] = 2;
    assert_eq!(format!("{counts:?}"), "{DrainTimeout: 2}");
}
