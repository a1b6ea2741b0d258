use super::*;

#[test]
fn accept_pause_never_gets_shorter() {
    let paused = Increasing::default();
    let reported = [3, 8, 7, 9].map(|ms| paused.update(Duration::from_millis(ms)).as_millis());
    assert_eq!(reported, [3, 8, 8, 9]);
}
