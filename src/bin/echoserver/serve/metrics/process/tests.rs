use super::*;

#[test]
fn state_is_parsed_and_absent_without_proc() {
    let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 4 0 999 8192000 300 1 2 3\n";
    let status = "Name:\ta) b\nVmSize:\t    8000 kB\nVmRSS:\t    1200 kB\nThreads:\t4\n";
    let metrics = parse(stat, status).unwrap();
    let values = metrics.map(|(name, _, value)| format!("{name} {value}"));
    let expected = [
        "cpu_seconds_total 2",
        "virtual_memory_bytes 8192000",
        "resident_memory_bytes 1228800",
        "threads 4",
    ];
    assert_eq!(values, expected);
    assert_eq!(parse("", ""), None);
    assert_eq!(parse(stat, "Name:\ta\n"), None);
}

#[test]
fn soft_limit_is_the_first_number_of_its_line() {
    let limits = "Limit   Soft Limit Hard Limit Units\nMax open files   1024   4096   files\n";
    assert_eq!(number(limits, "Max open files"), Some(1024.0));
    let unlimited = "Max open files   unlimited   unlimited   files\n";
    assert_eq!(number(unlimited, "Max open files"), None);
}
