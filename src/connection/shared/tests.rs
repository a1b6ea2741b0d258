use super::*;

#[test]
fn deadlines_round_up_to_an_eighth_and_are_never_early() {
    assert_eq!(deadline_after(0, 800), 800);
    assert_eq!(deadline_after(1, 800), 900);
    assert_eq!(deadline_after(7, 3), 10);
    assert_eq!(deadline_after(NEVER - 1, 3), NEVER);
}
