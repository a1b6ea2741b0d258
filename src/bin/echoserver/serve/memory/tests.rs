use super::*;

const GIB: u64 = 1 << 30;
const MEMINFO: &str = "MemTotal:       16384 kB\nMemFree:         1024 kB\n";

/// Returns the limit in a system with these files.
fn limit(files: &[(&str, &str)]) -> Option<(u64, &'static str)> {
    let read = |path: &Path| {
        let file = files.iter().find(|(name, _)| Path::new(name) == path);
        file.map(|(_, text)| (*text).to_owned())
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    };
    memory_limit(read)
}

#[test]
fn physical_memory_is_a_limit() {
    let physical = Some((16 << 20, "physical memory"));
    assert_eq!(limit(&[("/proc/meminfo", MEMINFO)]), physical);
    for text in [
        "",
        "MemTotal: many kB\n",
        "MemTotal: 1 MB\n",
        "MemFree: 1 kB\n",
    ] {
        assert_eq!(limit(&[("/proc/meminfo", text)]), None, "{text}");
    }
    assert_eq!(limit(&[]), None);
}

#[test]
fn limit_of_a_cgroup_or_of_one_above_applies() {
    let cgroup = |bytes: u64| Some((bytes, "memory limit of the cgroup"));
    let v2 = ("/proc/self/cgroup", "0::/a/b\n");
    let unlimited = ("/sys/fs/cgroup/a/b/memory.max", "max\n");
    for (own, above, expected) in [("1000\n", "max\n", 1000), ("max\n", "2000\n", 2000)] {
        let own = ("/sys/fs/cgroup/a/b/memory.max", own);
        let above = ("/sys/fs/cgroup/a/memory.max", above);
        assert_eq!(limit(&[v2, own, above]), cgroup(expected));
    }
    assert_eq!(limit(&[v2, unlimited]), None);
    // The path is that of the host, the mount shows the container's group at the root.
    let own = ("/sys/fs/cgroup/memory.max", "3000\n");
    assert_eq!(limit(&[v2, own]), cgroup(3000));

    let v1 = ("/proc/self/cgroup", "9:cpu:/x\n4:hugetlb,memory:/a\n0::/\n");
    let own = ("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "4000\n");
    assert_eq!(limit(&[v1, own]), cgroup(4000));
    let unlimited = "9223372036854771712\n";
    let own = ("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", unlimited);
    let physical = Some((16 << 20, "physical memory"));
    assert_eq!(limit(&[v1, own, ("/proc/meminfo", MEMINFO)]), physical);
}

#[test]
fn limit_files_stay_below_the_root() {
    let group = Path::new("/sys/fs/cgroup");
    let expected = ["a/b/memory.max", "a/memory.max", "memory.max"].map(|file| group.join(file));
    assert_eq!(limit_files("0::/a/b"), expected);
    assert_eq!(limit_files("0::/"), expected[2..]);
    assert_eq!(
        limit_files("1:cpu,memories:/a\n2\n\n3:x\n"),
        [""; 0].map(PathBuf::from)
    );
}

#[test]
fn default_limit_is_half_of_the_memory() {
    let config = Config::default();
    let limit = |bytes| default_limit(&config, Some((bytes, "physical memory")));
    assert_eq!(limit(1 << 40), Some(1 << 39));
    assert_eq!(limit(1), Some(config.max_spare_memory()));
    assert!(config.max_spare_memory() >= config.min_buffer_memory());
    assert_eq!(default_limit(&config, None), None);
}

#[test]
fn warning_names_both_amounts() {
    let config = Config {
        max_connections: 8192,
        workers: 1,
        ..Config::default()
    };
    let limit = |bytes| Some((bytes, "memory limit of the cgroup"));
    assert_eq!(
        warning(&config, limit(GIB / 2)).as_deref(),
        Some(
            "buffer memory may exceed the available memory: at most 1.0 GiB, \
             512.0 MiB available (memory limit of the cgroup)"
        )
    );
    assert_eq!(warning(&config, limit(config.max_memory())), None);
    assert!(warning(&config, limit(config.max_memory() - 1)).is_some());
    assert_eq!(warning(&config, None), None);
}
