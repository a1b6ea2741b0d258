use super::*;

#[test]
fn timers_expire_in_order_and_not_early() {
    let mut timers = Timers::default();
    for (at, token) in [(30, 3), (10, 1), (NEVER, 9), (20, 2)] {
        timers.set(at, token);
    }
    assert_eq!(timers.next(), Some(10));
    assert_eq!(timers.pop_expired(9), None);
    assert_eq!(timers.pop_expired(20), Some((10, 1)));
    assert_eq!(timers.pop_expired(20), Some((20, 2)));
    assert_eq!(timers.pop_expired(20), None);
    assert_eq!(timers.next(), Some(30));
}

#[test]
fn rebuild_drops_the_timers_of_closed_connections() {
    let mut timers = Timers::default();
    for at in 0..265 {
        timers.set(at, 0);
        assert_eq!(timers.needs_rebuild(2), at >= 68);
        assert_eq!(timers.needs_rebuild(100), at >= 264);
    }
    assert_eq!(timers.take_tokens(), [0; 265]);
    timers.rebuild([(7, 1), (NEVER, 2)].into_iter());
    assert_eq!(timers.pop_expired(NEVER), Some((7, 1)));
    assert_eq!(timers.pop_expired(NEVER), None);
}
