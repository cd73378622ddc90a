//! What this machine has: CPUs, memory and labels. Read once, when the agent starts.

use crate::spec::{Capacity, HOST_LABEL, Labels, NODE_LABEL};

/// All CPUs and memory that this process may use.
pub(super) fn capacity() -> Capacity {
    let cpus = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    Capacity { cpus, memory: memory(), ..Capacity::default() }
}

/// The machine's memory, or the limit of this process's cgroup where that is lower.
fn memory() -> u64 {
    let machine = rustix::system::sysinfo();
    let all = (machine.totalram as u64).saturating_mul(u64::from(machine.mem_unit));
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    limit.and_then(|limit| limit.trim().parse().ok()).map_or(all, |limit: u64| all.min(limit))
}

/// What the machine calls itself.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Labels that every node has.
pub(super) fn labels(node: &str) -> Labels {
    Labels::from([(NODE_LABEL.to_owned(), node.to_owned()), (HOST_LABEL.to_owned(), host_name())])
}
