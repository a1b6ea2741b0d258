use super::*;

#[test]
fn templates_are_parsed() {
    let text = |text: &str| Part::Text(text.to_owned());
    for (template, parts) in [
        ("", vec![]),
        ("hi }", vec![text("hi }")]),
        (
            r"a\n\{\\",
            vec![text("a"), text("\n"), text("{"), text("\\")],
        ),
        ("{peer}-{local}", vec![Part::Peer, text("-"), Part::Local]),
        ("{pid}", vec![text(&process::id().to_string())]),
    ] {
        assert_eq!(template.parse(), Ok(Greeting(parts)), "{template}");
    }
    "x".repeat(MAX_LENGTH).parse::<Greeting>().unwrap();
    "x".repeat(MAX_LENGTH + 1).parse::<Greeting>().unwrap_err();
    for template in ["{", "{}", "{Peer}", "{peer", "a\\", r"\x", r"\ä"] {
        template.parse::<Greeting>().expect_err(template);
    }
}
