use super::*;

#[test]
fn patience_shrinks_only_after_cases_that_wait_in_vain() {
    let seconds = Duration::from_secs;
    let mut pace = Pace::new(seconds(10));
    pace.adapt(pace, false, seconds(9));
    assert_eq!((pace.patience, pace.limit), (seconds(10), seconds(50)));
    // Cases that ran at the same time shorten it only once.
    let then = pace;
    pace.adapt(then, false, seconds(10));
    pace.adapt(then, false, seconds(50));
    assert_eq!((pace.patience, pace.limit), (seconds(5), seconds(25)));
    assert_eq!(pace.slow_cases, 1);
    for _ in 0..10 {
        pace.adapt(pace, false, seconds(50));
    }
    assert_eq!((pace.patience, pace.limit), (seconds(1), seconds(4)));
    assert_eq!(pace.slow_cases, 11);
    pace.adapt(pace, false, seconds(3));
    assert_eq!(pace.slow_cases, 0);
}
