//! The memory that buffers may occupy, compared with the memory that the process can have.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use echoserver::Config;

/// A limit of the memory that the process can have, in bytes, and its name.
pub(crate) type MemoryLimit = (u64, &'static str);

/// Returns the lowest memory limit: of the machine, or of a control group that contains the process.
pub(crate) fn available() -> Option<MemoryLimit> {
    memory_limit(|path| fs::read_to_string(path))
}

/// Returns the default limit for the memory of all buffers: half of the available memory, but at least what the workers keep as
/// spare buffers.
pub(crate) fn default_limit(config: &Config, available: Option<MemoryLimit>) -> Option<u64> {
    available.map(|(bytes, _)| (bytes / 2).max(config.max_spare_memory()))
}

/// Logs a warning if the buffers of a server with this configuration may exceed the available memory.
pub(crate) fn warn_if_insufficient(config: &Config, available: Option<MemoryLimit>) {
    if let Some(warning) = warning(config, available) {
        log::warn!("{warning}");
    }
}

fn warning(config: &Config, limit: Option<MemoryLimit>) -> Option<String> {
    let needed = config.max_memory();
    let (available, name) = limit.filter(|(bytes, _)| *bytes < needed)?;
    Some(format!(
        "buffer memory may exceed the available memory: at most {}, {} available ({name})",
        ByteSize(needed),
        ByteSize(available),
    ))
}

/// Returns what [`available`] does. `read` reads a file. On a system other than Linux the files do not exist, and the limit is unknown.
fn memory_limit(read: impl Fn(&Path) -> io::Result<String>) -> Option<MemoryLimit> {
    let text = |path: &str| read(Path::new(path)).unwrap_or_default();
    let physical = total_memory(&text("/proc/meminfo")).map(|bytes| (bytes, "physical memory"));
    let of_cgroups = limit_files(&text("/proc/self/cgroup"))
        .into_iter()
        .filter_map(|file| read(&file).ok()?.trim().parse().ok())
        .map(|bytes| (bytes, "memory limit of the cgroup"));
    physical.into_iter().chain(of_cgroups).min()
}

/// Returns the size of the physical memory, given the text of `/proc/meminfo`.
fn total_memory(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let total = lines.find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

/// Returns the files that can contain a memory limit of the process, given the text of
/// `/proc/self/cgroup`: one for each of its control groups and for each group above.
///
/// In a container the text can name groups that are not visible; then the group at the root is its own.
/// A file contains a number of bytes, or `max`.
fn limit_files(cgroups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in cgroups.lines() {
        // HIERARCHY:CONTROLLERS:PATH, in version 2 without controllers.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (root, file) = if controllers.is_empty() {
            ("/sys/fs/cgroup", "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        } else {
            continue;
        };
        let group = Path::new(root).join(path.trim_start_matches('/'));
        let groups = group.ancestors();
        let groups = groups.take_while(|group| group.starts_with(root));
        files.extend(groups.map(|group| group.join(file)));
    }
    files
}

#[cfg(test)]
mod tests;
