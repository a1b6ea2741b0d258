use super::*;

#[test]
fn a_lone_letter_is_a_power_of_1024() {
    for (text, size) in [
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("1M", 1 << 20),
        ("1g", 1 << 30),
        ("64KiB", 64 << 10),
        ("64kB", 64_000),
        ("4096", 4096),
    ] {
        assert_eq!(parse_buffer_size(text), Ok(size), "{text}");
    }
}
