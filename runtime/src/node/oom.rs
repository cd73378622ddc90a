//! Evidence that the kernel ended a process because memory ran out: counters of this process's control group, which its
//! workers share, or of the machine where there is none.
//!
//! The kernel counts before it kills, so whoever sees the end finds it counted.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Where kills are counted, and those that are accounted for.
#[derive(Default)]
pub(super) struct OomWatch(Mutex<Option<Counter>>);

struct Counter {
    path: PathBuf,
    scope: String,
    seen: u64,
}

impl OomWatch {
    /// Counts from now on, unless it does already. A process may be moved to another group, so this is said before each
    /// start of a worker, which then is in the same group.
    pub(super) fn count(&self) {
        let mut present = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let candidates = groups(&own).into_iter().map(|(path, group, limit)| (path, scope(&group, &limit)));
        let machine = (PathBuf::from("/proc/vmstat"), "the machine".to_owned());
        let found = candidates
            .chain([machine])
            .find_map(|(path, scope)| Some(Counter { seen: kills(&path)?, path, scope }));
        if found.as_ref().map(|counter| &counter.path) != present.as_ref().map(|counter| &counter.path) {
            *present = found;
        }
    }

    /// Whose memory ran out, if the kernel has killed one more process than was asked about.
    pub(super) fn explains_a_kill(&self) -> Option<String> {
        let mut counter = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counter = counter.as_mut()?;
        if kills(&counter.path)? <= counter.seen {
            return None;
        }
        counter.seen += 1;
        Some(counter.scope.clone())
    }
}

fn scope(group: &str, limit: &Path) -> String {
    let limit = std::fs::read_to_string(limit).ok().and_then(|limit| limit.trim().parse::<u64>().ok());
    // The first version of control groups says "no limit" by a huge one.
    match limit.filter(|limit| *limit < 1 << 60) {
        Some(limit) => format!("control group {group} (limit {} MiB)", limit >> 20),
        None => format!("control group {group}"),
    }
}

/// Files of the groups in a `/proc/<pid>/cgroup`: the counter, the name of the group, the limit. In a container the path
/// may be that of outside; then its own is at the root.
fn groups(own: &str) -> Vec<(PathBuf, String, PathBuf)> {
    let mut found = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (root, counter, limit) = match (id, controllers.split(',').any(|name| name == "memory")) {
            (_, true) => ("/sys/fs/cgroup/memory", "memory.oom_control", "memory.limit_in_bytes"),
            ("0", false) => ("/sys/fs/cgroup", "memory.events", "memory.max"),
            _ => continue,
        };
        for group in [path, "/"] {
            let dir = Path::new(root).join(group.trim_start_matches('/'));
            found.push((dir.join(counter), group.to_owned(), dir.join(limit)));
        }
    }
    found
}

/// The line `oom_kill N` of a file of counters.
fn kills(path: &Path) -> Option<u64> {
    count(&std::fs::read_to_string(path).ok()?)
}

fn count(counters: &str) -> Option<u64> {
    counters.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_of_control_groups_are_found_and_each_kill_explains_one_death() {
        assert_eq!(count("low 0\nhigh 0\noom 3\noom_kill 2\noom_group_kill 1\n"), Some(2));
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\n"), None);
        let own = "9:name=systemd:/\n4:cpu,memory:/a/b\n1:cpu:/\n0::/x.slice\n";
        let files: Vec<String> =
            groups(own).into_iter().map(|(path, ..)| path.display().to_string()).collect();
        assert_eq!(
            files,
            [
                "/sys/fs/cgroup/memory/a/b/memory.oom_control",
                "/sys/fs/cgroup/memory/memory.oom_control",
                "/sys/fs/cgroup/x.slice/memory.events",
                "/sys/fs/cgroup/memory.events",
            ]
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        let counts = |n: u32| std::fs::write(file.path(), format!("oom 9\noom_kill {n}\n")).unwrap();
        counts(1);
        let counter = Counter { path: file.path().to_owned(), scope: "control group /a".into(), seen: 1 };
        let watch = OomWatch(Mutex::new(Some(counter)));
        assert_eq!(watch.explains_a_kill(), None);
        counts(3);
        let explained: Vec<bool> = (0..3).map(|_| watch.explains_a_kill().is_some()).collect();
        assert_eq!(explained, [true, true, false]);
    }
}
