use super::*;

#[test]
fn accept_pause_never_gets_shorter() {
    let paused = Increasing::default();
    let reported = [3, 8, 7, 9].map(|ms| paused.update(Duration::from_millis(ms)).as_millis());
    assert_eq!(reported, [3, 8, 8, 9]);
}

#[test]
fn path_is_found_in_origin_and_absolute_form() {
    for (target, path) in [
        ("/metrics", "/metrics"),
        ("/metrics?name[]=x#y", "/metrics"),
        ("http://host:9555/metrics", "/metrics"),
        ("HTTPS://host/metrics?x=http://y/z", "/metrics"),
        ("/a?x=http://y/z", "/a"),
        ("/http://host/metrics", "/http://host/metrics"),
        ("http://host", "/"),
        ("http://host?x", "/"),
        ("*", "*"),
    ] {
        assert_eq!(path_of(target), path, "{target}");
    }
}
