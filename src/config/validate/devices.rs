//! What ranks compute on: the kind of device, the devices of each node, and what matters on GPUs only.

use super::super::raw::{self, All2All, Device, Raw};
use super::super::{Cuda, Devices, Node};
use super::{Check, Count, Facts, Kind};
use heliostat_runtime::spec::{Capacity, check_labels};
use std::collections::BTreeMap;

/// Largest decode batch that runs as a graph, as vLLM's smallest default.
const GRAPH_ROWS_MAX: u32 = 256;

/// What a node is to have, before this machine is looked at.
fn wanted(raw: &Raw, node: &raw::Node) -> Device {
    node.device.unwrap_or(raw.devices.device)
}

/// The nodes of the file, or the one that an empty file means.
fn written(raw: &Raw) -> Vec<raw::Node> {
    if raw.nodes.is_empty() { vec![raw::Node::default()] } else { raw.nodes.clone() }
}

/// Whether the file means something else on another machine with other GPUs.
pub(in super::super) fn asks_for_gpus(raw: &Raw) -> bool {
    written(raw).iter().any(|node| match wanted(raw, node) {
        Device::Auto => true,
        Device::Cuda => node.host.is_none(),
        Device::Cpu => false,
    })
}

/// Whether the file leaves to the machine whether there are GPUs, or how many.
pub(in super::super) fn leaves_gpus_open(raw: &Raw) -> bool {
    written(raw).iter().any(|node| match wanted(raw, node) {
        Device::Auto => true,
        Device::Cuda => node.host.is_none() && node.devices == Count::Auto && raw.devices.cuda == Count::Auto,
        Device::Cpu => false,
    })
}

/// Writes down what devices were found on this machine, so that the file means the same wherever it is read.
pub(super) fn write_out(raw: &mut Raw, nodes: &[Node], cuda: Option<&Cuda>) {
    for node in &mut raw.nodes {
        node.device = None;
    }
    let Some(cuda) = cuda else {
        raw.devices.device = Device::Cpu;
        return;
    };
    raw.devices.device = Device::Cuda;
    raw.devices.kernel_cache = Some(cuda.kernel_cache.clone());
    let gpus = |node: &Node| match node.devices {
        Devices::Cuda { gpus, .. } => Count::Exactly(gpus),
        Devices::Cpu { .. } => Count::Auto,
    };
    if raw.nodes.is_empty() {
        raw.devices.cuda = nodes.first().map_or(Count::Auto, gpus);
    }
    for (written, node) in raw.nodes.iter_mut().zip(nodes) {
        written.devices = gpus(node);
    }
}

impl Check<'_> {
    /// What the ranks compute on, which is the same on all nodes.
    pub(super) fn kind(&mut self, raw: &Raw, facts: &Facts) -> Kind {
        let auto = if matches!(facts.gpus, Some(Ok(_))) { Kind::Cuda } else { Kind::Cpu };
        let nodes = written(raw);
        let kind_of = |node: &raw::Node| match wanted(raw, node) {
            Device::Auto => auto,
            Device::Cpu => Kind::Cpu,
            Device::Cuda => Kind::Cuda,
        };
        let kind = nodes.first().map_or(auto, kind_of);
        let other = nodes.iter().position(|node| kind_of(node) != kind);
        if let Some(i) = other {
            self.require(
                false,
                &format!("nodes.{i}.device"),
                "some nodes have CPU devices and some have GPUs, and the ranks of a group need the same",
                "write one `device` in [devices] for all",
            );
        }
        let here = nodes.iter().position(|node| node.host.is_none() && kind_of(node) == Kind::Cuda);
        if let (Some(i), Some(Err(why))) = (here, &facts.gpus) {
            let own = nodes[i].device.is_some();
            let path = if own { format!("nodes.{i}.device") } else { "devices.device".into() };
            self.require(
                false,
                &path,
                format!("no GPU of this machine can be used: {why}"),
                "CUDA needs a driver for CUDA 13.0 and an H100 or H200; write device = \"cpu\" to do without",
            );
        }
        kind
    }

    pub(super) fn nodes(&mut self, raw: &Raw, facts: &Facts, kind: Kind) -> Vec<Node> {
        let written = written(raw);
        let mut nodes: Vec<Node> = Vec::with_capacity(written.len());
        let devices = match kind {
            Kind::Cpu => self.cpu_devices(raw, facts, &written),
            Kind::Cuda => self.gpus(raw, facts, &written),
        };
        for ((i, node), devices) in written.iter().enumerate().zip(devices) {
            let name = node.name.clone().unwrap_or_else(|| format!("node-{i}"));
            let key = |leaf: &str| format!("nodes.{i}.{leaf}");
            self.require(
                nodes.iter().all(|n| n.name != name),
                &key("name"),
                format!("two nodes are named `{name}`"),
                "give each its own name",
            );
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            self.require(
                !name.is_empty() && name.chars().all(plain),
                &key("name"),
                format!("`{name}` is no name for a node"),
                "use letters, digits, `-`, `_`, `.`",
            );
            self.offer(i, node);
            nodes.push(Node {
                name,
                host: node.host.clone(),
                devices,
                cpus: match node.cpus {
                    Count::Auto => None,
                    Count::Exactly(cpus) => Some(cpus),
                },
                memory: node.memory.map(|memory| memory.0),
                resources: node.resources.clone(),
                labels: node.labels.clone(),
            });
        }
        nodes
    }

    /// Reports labels and resources that cannot be called so.
    fn offer(&mut self, i: usize, node: &raw::Node) {
        let capacity = Capacity { custom: node.resources.clone(), ..Capacity::default() };
        for (leaf, checked) in [("labels", check_labels(&node.labels)), ("resources", capacity.validate())] {
            if let Err(why) = checked {
                self.require(false, &format!("nodes.{i}.{leaf}"), why, "give it another name");
            }
        }
    }

    /// Reports a node without devices; `leaf` is the key of `[devices]` that it takes their number from.
    fn some_devices(&mut self, (i, node): (usize, &raw::Node), leaf: &str, count: u32) {
        let path = match node.devices {
            Count::Auto => format!("devices.{leaf}"),
            Count::Exactly(_) => format!("nodes.{i}.devices"),
        };
        self.require(count > 0, &path, "a node needs at least one device", "write 1 or more");
    }

    fn cpu_devices(&mut self, raw: &Raw, facts: &Facts, written: &[raw::Node]) -> Vec<Devices> {
        let count = |node: &raw::Node| node.devices.or(raw.devices.cpu);
        for node in written.iter().enumerate() {
            self.some_devices(node, "cpu", count(node.1));
        }
        // Nodes of one machine share its cores.
        let here: u32 = written.iter().filter(|n| n.host.is_none()).map(count).sum();
        let threads = raw.devices.threads.or((facts.cores / here.max(1)).max(1));
        self.require(
            threads > 0,
            "devices.threads",
            "a device needs at least one thread",
            "write 1 or more, or \"auto\"",
        );
        written.iter().map(|node| Devices::Cpu { count: count(node), threads }).collect()
    }

    /// Nodes of one machine take its GPUs one after the other.
    fn gpus(&mut self, raw: &Raw, facts: &Facts, written: &[raw::Node]) -> Vec<Devices> {
        let found = facts.gpus.as_ref().and_then(|found| found.as_ref().ok().copied());
        let alone = written.iter().filter(|n| n.host.is_none()).count() == 1;
        let mut taken: BTreeMap<Option<&str>, u32> = BTreeMap::new();
        let mut devices = Vec::with_capacity(written.len());
        for (i, node) in written.iter().enumerate() {
            let all = match raw.devices.cuda {
                Count::Exactly(n) => Some(n),
                Count::Auto if node.host.is_none() && alone => found,
                Count::Auto => None,
            };
            let count = match (node.devices, all) {
                (Count::Exactly(n), _) => n,
                (Count::Auto, Some(n)) => n,
                // That this node differs from the others was said.
                (Count::Auto, None) if wanted(raw, node) == Device::Cpu => 1,
                (Count::Auto, None) => {
                    self.uncounted(i, node, facts);
                    1
                }
            };
            self.some_devices((i, node), "cuda", count);
            let first = taken.entry(node.host.as_deref()).or_default();
            devices.push(Devices::Cuda {
                first: *first,
                gpus: count,
                ranks_per_gpu: raw.devices.ranks_per_gpu,
            });
            *first = first.saturating_add(count);
        }
        let here = taken.get(&None).copied().unwrap_or_default();
        if let Some(found) = found {
            let path =
                if written.iter().any(|n| n.devices != Count::Auto) { "nodes" } else { "devices.cuda" };
            self.require(
                here <= found,
                path,
                format!("{here} GPUs of this machine are wanted, and it shows {found}"),
                "lower the number, or see whether CUDA_VISIBLE_DEVICES hides some",
            );
        }
        devices
    }

    /// The GPUs of node `i` are not written and cannot be counted. Where there are none, that was said before.
    fn uncounted(&mut self, i: usize, node: &raw::Node, facts: &Facts) {
        let message = match (&node.host, &facts.gpus) {
            (Some(host), _) => format!("the GPUs of {host} cannot be counted from here"),
            (None, Some(Err(_))) => return,
            (None, Some(Ok(_))) => "several nodes of this machine share its GPUs".into(),
            (None, None) => "the GPUs of this machine were not counted".into(),
        };
        let help = "write how many as `devices` of the node, or as `cuda` in [devices]";
        self.require(false, &format!("nodes.{i}.devices"), message, help);
    }

    /// What matters on GPUs only. On CPUs it must not be asked for.
    pub(super) fn cuda(&mut self, raw: &Raw, facts: &Facts, kind: Kind) -> Option<Cuda> {
        let (devices, engine) = (&raw.devices, &raw.engine);
        if kind == Kind::Cpu {
            for (path, asked) in [
                ("devices.ranks_per_gpu", devices.ranks_per_gpu != 1),
                ("devices.fault_injection", devices.fault_injection),
                ("parallel.all2all_backend", raw.parallel.all2all_backend.is_some()),
                ("engine.gpu_memory_utilization", engine.gpu_memory_utilization.is_some()),
                (
                    "engine.max_cudagraph_capture_size",
                    engine.max_cudagraph_capture_size.is_some_and(|n| n > 0),
                ),
                ("engine.async_scheduling", engine.async_scheduling == Some(true)),
            ] {
                let name = path.split_once('.').map_or(path, |(_, name)| name);
                let message = match (&facts.gpus, devices.device) {
                    (Some(Err(why)), Device::Auto) => {
                        format!("`{name}` is for GPUs, and none can be used: {why}")
                    }
                    _ => format!("`{name}` is for GPUs, and the ranks compute on CPU devices"),
                };
                self.require(!asked, path, message, "leave it out, or write device = \"cuda\" in [devices]");
            }
            return None;
        }
        let all2all = raw.parallel.all2all_backend.unwrap_or(All2All::Peer);
        let ranks_per_gpu = devices.ranks_per_gpu;
        self.require(
            ranks_per_gpu > 0,
            "devices.ranks_per_gpu",
            "`ranks_per_gpu` must be at least 1",
            "leave it out for one",
        );
        let graph_rows = engine.max_cudagraph_capture_size;
        self.require(
            !(engine.enforce_eager && graph_rows.is_some_and(|n| n > 0)),
            "engine.max_cudagraph_capture_size",
            "`enforce_eager` and `max_cudagraph_capture_size` contradict each other",
            "keep one of them",
        );
        Some(Cuda {
            library_dirs: devices.library_dirs.iter().map(|path| facts.dir.join(path)).collect(),
            kernel_cache: match (&devices.kernel_cache, &facts.user_cache) {
                (Some(path), _) => facts.dir.join(path),
                (None, Some(cache)) => cache.join("heliostat/kernels"),
                (None, None) => facts.dir.join(&raw.cluster.run_dir).join("kernels"),
            },
            all2all,
            graph_rows_max: if engine.enforce_eager { 0 } else { graph_rows.unwrap_or(GRAPH_ROWS_MAX) },
            async_scheduling: engine.async_scheduling.unwrap_or(true),
            ranks_per_gpu,
            fault_injection: devices.fault_injection,
        })
    }
}
