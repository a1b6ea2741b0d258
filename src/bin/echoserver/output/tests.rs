use super::*;

#[test]
fn long_text_loses_its_middle() {
    for (text, short) in [
        ("", ""),
        ("12345678", "12345678"),
        ("123456789", "1234...6789"),
        ("ääääääääß", "ääää...äääß"),
    ] {
        assert_eq!(shorten(text, 8), short);
    }
}
