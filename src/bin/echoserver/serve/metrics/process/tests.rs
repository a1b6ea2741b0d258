use super::*;

#[test]
fn state_is_parsed_and_absent_without_proc() {
    let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 4 0 999 8192000 300 1 2 3\n";
    let status = "Name:\ta) b\nVmSize:\t    8000 kB\nVmRSS:\t    1200 kB\nThreads:\t4\n";
    let state = ProcessState {
        cpu: Duration::from_secs(2),
        virtual_bytes: 8000 * 1024,
        resident_bytes: 1200 * 1024,
        threads: 4,
    };
    assert_eq!(ProcessState::parse(stat, status), Some(state));
    assert_eq!(ProcessState::parse("", ""), None);
    assert_eq!(ProcessState::parse(stat, "Name:\ta\n"), None);
}
