use super::*;

#[test]
fn text_has_no_error_number_and_keeps_the_rest() {
    for (message, text) in [
        ("Address in use (os error 98)", "address in use"),
        ("a (os error 5): b (os error 6): c", "a: b: c"),
        ("a (os error 5", "a (os error 5"),
        ("plain", "plain"),
        ("", ""),
        ("Ärger", "Ärger"),
    ] {
        assert_eq!(error_text(&io::Error::other(message)), text);
    }
}

#[test]
fn context_precedes_the_cause() {
    let cause = io::Error::from(io::ErrorKind::PermissionDenied);
    let error = with_context(&with_context(&cause, "inner"), "outer");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(error.to_string(), "outer: inner: permission denied");
}

#[test]
fn excerpt_has_at_most_100_characters() {
    for (text, quoted) in [
        ("\u{e4}".repeat(100), "\u{e4}".repeat(100)),
        ("\u{e4}".repeat(101), "\u{e4}".repeat(100) + "..."),
        ("a\nb\x1b".to_owned(), r"a\nb\u{1b}".to_owned()),
        (String::new(), String::new()),
    ] {
        assert_eq!(excerpt(&text), quoted);
    }
}
