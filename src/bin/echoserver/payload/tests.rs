use super::*;

fn bytes(connection: u64, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Payload::new(connection).fill(offset, &mut bytes);
    bytes
}

#[test]
fn stream_does_not_depend_on_how_it_is_cut() {
    let whole = bytes(7, 0, 3 * BLOCK);
    for start in [0, 1, 5, 3_001, 4_090, 4_096] {
        for length in [1, 7, 13, 64, 4_096, 8_000] {
            let mut part = bytes(7, start as u64, length);
            assert_eq!(part, whole[start..start + length], "{start} {length}");
            let found = Payload::new(7).find_difference(start as u64, &mut part);
            assert_eq!(found, None);
        }
    }
}

#[test]
fn one_wrong_byte_is_found_wherever_it_is() {
    for at in [0, 1, 8, 2_499, 4_095, 4_096, 9_999] {
        let mut wrong = bytes(1, 500, 10_000);
        let expected = wrong[at];
        wrong[at] ^= 1;
        let found = Payload::new(1).find_difference(500, &mut wrong);
        assert_eq!(found, Some((at, expected)));
    }
}

/// No stretch of 8 bytes occurs twice, in a stream or in two.
#[test]
fn streams_do_not_repeat() {
    let places = [(0, 0), (1, 0), (0, 1 << 40)];
    let streams = places.map(|(connection, offset)| bytes(connection, offset, 1 << 18));
    let windows = streams.iter().flat_map(|stream| stream.windows(8));
    let mut windows: Vec<_> = windows.collect();
    windows.sort_unstable();
    assert!(windows.windows(2).all(|pair| pair[0] != pair[1]));
}
