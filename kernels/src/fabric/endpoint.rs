//! Where a rank can be reached, and whether two ranks can share memory.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::{fs, io};

use bincode::{Decode, Encode};

/// Names a kernel and the namespaces of a process. Equal ids: the processes can map each other's memory through `/proc`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub struct HostId {
    boot: String,
    net_namespace: u64,
    pid_namespace: u64,
    uid: u32,
}

impl HostId {
    /// The id of this process.
    pub fn current() -> io::Result<Self> {
        Ok(Self {
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            net_namespace: fs::metadata("/proc/thread-self/ns/net")?.ino(),
            pid_namespace: fs::metadata("/proc/thread-self/ns/pid")?.ino(),
            uid: rustix::process::geteuid().as_raw(),
        })
    }
}

/// Where the listener of a rank can be reached. Announced to the other ranks by whoever supervises them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Endpoint {
    /// Kernel and namespaces of the rank.
    pub host: HostId,
    /// Address of its listener.
    pub address: SocketAddr,
}
