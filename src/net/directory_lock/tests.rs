use super::*;

#[test]
fn lock_is_exclusive_and_optional() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo");
    let lock = |path: &Path| acquire(path, 3 * INTERVAL);
    let held = lock(&path);
    assert!(held.is_some() && lock(&path).is_none());
    drop(held);
    assert!(lock(&path).is_some());
    assert!(lock(&directory.path().join("missing/echo")).is_none());
    assert!(lock(Path::new("echo")).is_some(), "the working directory");
}

#[test]
fn lock_waits_until_another_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo");
    let held = acquire(&path, TIMEOUT);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| acquire(&path, TIMEOUT).is_some());
        thread::sleep(3 * INTERVAL);
        assert!(!waiting.is_finished());
        drop(held);
        assert!(waiting.join().unwrap());
    });
}
