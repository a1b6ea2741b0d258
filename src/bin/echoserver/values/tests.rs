use super::*;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn time_is_seconds_or_has_units() {
    for (text, time) in [
        ("0", Duration::ZERO),
        ("0s", Duration::ZERO),
        ("5", 5 * SECOND),
        ("5s", 5 * SECOND),
        ("0.5", SECOND / 2),
        (".5", SECOND / 2),
        ("0.5s", SECOND / 2),
        ("500ms", SECOND / 2),
        ("1m30s", 90 * SECOND),
        ("1m 30s", 90 * SECOND),
        ("1.5m", 90 * SECOND),
        ("100years", MAX_TIME),
    ] {
        assert_eq!(super::time(Duration::ZERO)(text), Ok(time), "{text}");
    }
    for text in [
        "",
        ".",
        "1.2.3",
        "-1",
        "+1",
        "1e3",
        "inf",
        "5 fortnights",
        "101years",
        "9".repeat(400).as_str(),
    ] {
        let expected = "expected a time from 0s to 100years, such as 5, 0.5, 500ms or 1m30s";
        assert_eq!(
            time(Duration::ZERO)(text),
            Err(expected.to_owned()),
            "{text}"
        );
    }
}

#[test]
fn time_has_bounds() {
    let time = time(SECOND / 1000);
    let expected = "expected a time from 1ms to 100years, such as 5, 0.5, 500ms or 1m30s";
    for (text, result) in [
        ("0", Err(expected.to_owned())),
        ("999us", Err(expected.to_owned())),
        ("0.001", Ok(SECOND / 1000)),
    ] {
        assert_eq!(time(text), result, "{text}");
    }
}

#[test]
fn keepalive_is_off_or_within_bounds() {
    for (text, seconds) in [("0", 0), ("0s", 0), ("1", 1), ("1s", 1), ("32767s", 32_767)] {
        assert_eq!(keepalive(text), Ok(seconds * SECOND), "{text}");
    }
    for text in ["1ms", "999ms", "32767s1ms", "32768", "10h", "never"] {
        let expected = "expected 0, or a time from 1s to 9h 6m 7s, such as 5, 0.5, 500ms or 1m30s";
        assert_eq!(keepalive(text), Err(expected.to_owned()), "{text}");
    }
}

#[test]
fn size_has_a_unit_or_none_and_a_lone_letter_is_a_power_of_1024() {
    for (text, bytes) in [
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("1M", 1 << 20),
        ("1g", 1 << 30),
        ("64KiB", 64 << 10),
        ("64kB", 64_000),
        ("4096", 4096),
        ("1", 1),
    ] {
        assert_eq!(size(text), Ok(bytes), "{text}");
    }
    for text in [
        "",
        "0",
        "-1",
        "K",
        "many",
        "64KiBs",
        "1073741825",
        "2GiB",
        "99999999999G",
    ] {
        let expected = "expected a size from 1B to 1GiB, such as 4096, 64K or 1MiB";
        assert_eq!(size(text), Err(expected.to_owned()), "{text}");
    }
    assert_eq!(memory("1t"), Ok(1 << 40));
    assert_eq!(memory("1PiB"), Ok(1 << 50));
    let expected = "expected a size from 1B to 1PiB, such as 512M or 2GiB";
    assert_eq!(memory("1025TiB"), Err(expected.to_owned()));
}

#[test]
fn count_has_bounds_and_no_sign() {
    let parse = count::<u16>(1..=1024);
    for (text, number) in [("1", 1), ("01", 1), ("1024", 1024)] {
        assert_eq!(parse(text), Ok(number), "{text}");
    }
    for text in [
        "",
        "0",
        "1025",
        "+1",
        "-1",
        "2.5",
        "1e3",
        "18446744073709551616",
    ] {
        assert_eq!(
            parse(text),
            Err("expected a number from 1 to 1024".to_owned()),
            "{text}"
        );
    }
    let most = usize::MAX.to_string();
    assert_eq!(count::<u64>(1..=usize::MAX)(&most), Ok(usize::MAX as u64));
    // The type has less room than the bounds.
    let expected = "expected a number from 0 to 65536".to_owned();
    assert_eq!(count::<u16>(0..=65536)("65536"), Err(expected));
}

#[test]
fn mode_is_octal() {
    for (text, bits) in [("0", 0), ("0660", 0o660), ("777", 0o777)] {
        assert_eq!(mode(text), Ok(bits), "{text}");
    }
    for text in ["", "9", "1000", "1777", "+660", "rw"] {
        let expected = "expected octal permissions up to 0777, such as 0660";
        assert_eq!(mode(text), Err(expected.to_owned()), "{text}");
    }
}

#[test]
fn rate_has_bounds() {
    for (text, messages) in [
        ("1", 1.0),
        ("0.000001", 1e-6),
        ("1e7", 1e7),
        ("100k", 1e5),
        ("0.5K", 500.0),
    ] {
        assert_eq!(rate(text), Ok(messages), "{text}");
    }
    for text in [
        "", "0", "-1", "nan", "inf", "10000001", "10001k", "k", "fast",
    ] {
        let expected =
            "expected messages per second from 0.000001 to 10000000, such as 0.1, 50000 or 50k";
        assert_eq!(rate(text), Err(expected.to_owned()), "{text}");
    }
}
