use super::*;
use crate::connection::Resources;

fn buffer(bytes: &[u8]) -> Buffer {
    let mut buffer = Buffer::new(16).unwrap();
    assert!(buffer.push(bytes));
    buffer
}

#[test]
fn buffers_tell_their_sizes() {
    let (mut bytes, mut answer) = (buffer(b"abc"), buffer(b""));
    let (mut input, mut output) = (Input(&mut bytes), Output(&mut answer));
    assert_eq!(
        (input.len(), input.capacity(), input.is_empty()),
        (3, 16, false)
    );
    assert_eq!(
        (output.len(), output.room(), output.is_empty()),
        (0, 16, true)
    );
    assert_eq!(output.append(&mut input), 3);
    assert!(input.is_empty() && !output.is_empty());
    assert!(write!(output, "{}", 12_345).is_ok());
    assert!(write!(output, "{}", 1_234_567_890).is_err(), "truncated");
    assert_eq!(output.0.data(), b"abc1234512345678");
    assert_eq!(
        (output.len(), output.room(), output.capacity()),
        (16, 0, 16)
    );
}

#[test]
fn longest_timer_is_a_timer_too() {
    let (mut input, mut output) = (buffer(b""), buffer(b""));
    let extras = OnceCell::new();
    let resources = Resources::for_tests(1);
    let context = Context {
        input: Input(&mut input),
        output: Output(&mut output),
        extras: &extras,
        shared: &resources.shared,
    };
    context.set_timer(Some(Duration::MAX));
    let timer = || extras.get().and_then(|extras| extras.timer.get());
    assert_eq!(timer(), Some(NEVER - 1));
    context.set_timer(None);
    assert_eq!(timer(), None);
}

#[test]
fn line_ends_with_its_line_feed() {
    let mut bytes = buffer(b"ab\n\nrest");
    let mut input = Input(&mut bytes);
    assert_eq!(input.line().unwrap(), b"ab\n");
    input.consume(3);
    assert_eq!(input.line().unwrap(), b"\n");
    input.consume(1);
    assert_eq!(input.line(), None);
}

#[test]
fn line_and_frame_have_a_maximum() {
    let mut bytes = buffer(b"abc\n");
    let input = Input(&mut bytes);
    assert_eq!(input.line_within(4), Ok(Some(&b"abc\n"[..])));
    assert_eq!(input.line_within(3), Err(TooLong));
    let mut bytes = buffer(b"abc");
    let input = Input(&mut bytes);
    assert_eq!(input.line_within(4), Ok(None), "a line feed can follow");
    assert_eq!(input.line_within(3), Err(TooLong));
    let mut bytes = buffer(b"\0\0\0\x02a");
    let input = Input(&mut bytes);
    assert_eq!(input.frame_within(6), Ok(None));
    assert_eq!(input.frame_within(5), Err(TooLong), "before it has arrived");
    assert_eq!(TooLong.to_string(), "a message is longer than is allowed");
}

#[test]
fn output_can_be_taken_back_and_filled_in_place() {
    let mut bytes = buffer(b"abc");
    let mut output = Output(&mut bytes);
    let before = output.len();
    assert_eq!(output.push_some(&[b'x'; 20]), 13);
    output.truncate(before);
    output.spare()[..2].copy_from_slice(b"de");
    output.commit(2);
    assert_eq!(output.0.data(), b"abcde");
}

#[test]
fn frame_is_complete_or_absent() {
    let mut bytes = buffer(b"\0\0\0\x02ab\0\0\0\0\0\0\0");
    let mut input = Input(&mut bytes);
    assert_eq!(input.frame().unwrap(), b"\0\0\0\x02ab");
    input.consume(6);
    assert_eq!(input.frame().unwrap(), b"\0\0\0\0");
    input.consume(4);
    assert_eq!(input.frame(), None, "half a header");
    let mut bytes = buffer(b"\0\0\0\x02a");
    assert_eq!(Input(&mut bytes).frame(), None, "half a frame");
    let mut bytes = buffer(b"\xff\xff\xff\xff--");
    assert_eq!(Input(&mut bytes).frame(), None, "longer than the buffer");
}
