use super::*;

const HOUR: u64 = 3_600_000;

#[test]
fn faults_have_a_kind_and_a_time() {
    for (text, kind, when) in [
        ("close@connect", Kind::Close, When::Received(0)),
        ("cut@100B", Kind::Cut, When::Received(100)),
        ("reset@64KiB", Kind::Reset, When::Received(64 << 10)),
        ("stall@5M", Kind::Stall, When::Received(5 << 20)),
        ("stall@5m", Kind::Stall, When::Elapsed(300_000)),
        ("blackhole@1h", Kind::Blackhole, When::Elapsed(HOUR)),
        ("reset@1500us", Kind::Reset, When::Elapsed(2)),
        ("close@eof", Kind::Close, When::Eof),
        ("drop@1k", Kind::Drop, When::Received(1024)),
    ] {
        assert_eq!(text.parse(), Ok(Fault { kind, when }), "{text}");
    }
    let unit = "expected bytes or a time with a unit, connect or eof";
    let kinds = "expected close, cut, reset, stall, blackhole, corrupt, repeat, drop, not";
    for (text, error) in [
        (
            "stall",
            "expected KIND@WHEN, such as reset@64KiB or stall@5s",
        ),
        ("hang@5s", &format!("{kinds} \"hang\"")),
        ("delay@5s", &format!("{kinds} \"delay\"")),
        ("stall@5", "5 needs a unit: 5B or 5s"),
        ("stall@1.5", unit),
        ("stall@", unit),
        ("repeat@eof", "there is no byte to repeat at eof"),
        (
            "stall@2GiB",
            "expected a size from 1B to 1GiB, such as 4096, 64K or 1MiB",
        ),
    ] {
        assert_eq!(text.parse::<Fault>(), Err(error.to_owned()), "{text}");
    }
}

#[test]
fn delays_and_slices_are_values_or_ranges() {
    assert_eq!(delay("50ms"), Ok(50..=50));
    assert_eq!(delay("0.5..1"), Ok(500..=1000));
    assert_eq!(
        delay("2ms..1ms"),
        Err("the range ends before it starts".to_owned())
    );
    let piece = |sizes, pause| Ok((sizes, pause));
    assert_eq!(slice("10"), piece(10..=10, 1));
    assert_eq!(slice("1B..1KiB@20ms"), piece(1..=1024, 20));
    for text in ["", "..", "1..", "@5ms", "1@", "1@0", "5@1..2"] {
        slice(text).expect_err(text);
        delay(text).expect_err(text);
    }
    assert_eq!(share("0.1%"), Ok(0.1));
    for text in ["", "%", "-1", "101", "nan"] {
        share(text).expect_err(text);
    }
}

/// Returns for each of the first connections whether it misbehaves.
fn chosen(seed: u64, share: f64) -> Vec<bool> {
    let faults = Faults {
        plan: Plan::default(),
        share,
        seed,
        text: String::new(),
    };
    (1..=10_000)
        .map(|number| faults.handler(number).0.is_some())
        .collect()
}

#[test]
fn share_of_the_connections_depends_on_the_seed_and_the_number() {
    let count = |chosen: &[bool]| chosen.iter().filter(|it| **it).count();
    assert_eq!(chosen(1, 0.0), [false; 10_000]);
    assert_eq!(chosen(1, 100.0), [true; 10_000]);
    let half = chosen(1, 50.0);
    assert_eq!(half, chosen(1, 50.0));
    assert_ne!(half, chosen(2, 50.0));
    assert!((4_800..5_200).contains(&count(&half)), "{}", count(&half));
}
