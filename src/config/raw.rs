//! cluster.toml as written: every section, key and default, before any of it is checked.
//!
//! Nothing here opens a file or looks at the machine. `validate` turns it into the `Config` that commands use.

use super::section::{ByteSize, Count, SectionInfo, section, words};
use heliostat_runtime::spec::{Labels, Quantity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

words! {
    /// Where cluster state is kept.
    Store, "\"embedded\" or \"etcd\"" {
        /// A file store of the head, in its run directory.
        Embedded,
        /// An etcd cluster.
        Etcd,
    }
}

words! {
    /// What ranks compute on, as a user chooses it.
    Device, "\"auto\", \"cpu\" or \"cuda\"" {
        /// GPUs where this machine has such as can be used, else its cores.
        Auto,
        /// A share of a machine's cores.
        Cpu,
        /// An NVIDIA GPU.
        Cuda,
    }
}

words! {
    /// How rows travel between the GPUs of a group.
    All2All, "\"peer\" or \"nccl\"" {
        /// Peer memory over NVLink, by our own kernels.
        Peer,
        /// NCCL.
        Nccl,
    }
}

words! {
    /// How a new expert map is planned.
    Policy, "\"deepseek\" or \"incremental\"" {
        /// DeepSeek's `rebalance_experts`, exactly.
        Deepseek,
        /// The few moves from the present map that restore the balance.
        Incremental,
    }
}

words! {
    /// How rows of prompts attend.
    PrefillAttention, "\"absorbed\" or \"expanded\"" {
        /// Like generated tokens, on cached latents.
        Absorbed,
        /// On keys and values of every head.
        Expanded,
    }
}

words! {
    /// The map that serving starts with.
    PlacementStrategy, "\"linear\" or \"round_robin\"" {
        /// Consecutive experts on one rank.
        Linear,
        /// Expert e on rank e modulo ep.
        RoundRobin,
    }
}

words! {
    /// Where HTTP is served, in Ray Serve's words.
    ProxyLocation, "\"HeadOnly\", \"EveryNode\" or \"Disabled\"" {
        /// By one ingress for the cluster.
        #[serde(rename = "HeadOnly")]
        HeadOnly,
        /// By an ingress on each node.
        #[serde(rename = "EveryNode")]
        EveryNode,
        /// Nowhere.
        #[serde(rename = "Disabled")]
        Disabled,
    }
}

section! {
    /// The cluster as a whole.
    Cluster = "cluster" {
        /// Its name, as shown by `helio status`.
        name: String = "heliostat".into(),
        /// Where logs, state and sockets of this machine's processes go. A relative path starts at the directory of
        /// cluster.toml (without a file: at the current directory). One cluster per directory.
        run_dir: PathBuf = "run".into(),
        /// The cluster token: every connection between processes proves that it knows it. Needed as soon as anything
        /// listens beyond loopback. At least 16 characters; `token_file` keeps it out of this file.
        token: Option<String> = None,
        /// A file that holds the cluster token (surrounding white space is ignored).
        token_file: Option<PathBuf> = None,
    }
}

section! {
    /// The head: registry, placement and supervision. It is never on the path of a token.
    Head = "head" {
        /// Where nodes, workers and commands reach the head.
        bind: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 6379)),
        /// Host name or address by which others reach it. Needed where `bind` is a wildcard such as 0.0.0.0.
        advertise: Option<String> = None,
        /// Addresses (HOST:PORT) of the cluster's other heads, which run `helio head` with the same etcd: one leads, the
        /// others stand by and take over. With any, a leader that cannot reach etcd gives no more orders once its lease
        /// may have run out; without, it goes on from memory.
        peers: Vec<String> = Vec::new(),
        /// How long a leader may be silent in etcd before another takes over, in whole seconds. etcd itself takes up to
        /// half a second more to notice. At least 2, etcd's own minimum.
        lease_s: u32 = 2,
    }
}

section! {
    /// Encryption between the processes of the cluster: TLS on every connection of the control and request planes, with a
    /// certificate of the cluster's own CA on both sides. `helio cert` makes them. All processes have this section, or none.
    /// Not encrypted are the exchange between ranks on different machines, which the cluster token authenticates, and HTTP,
    /// which has keys of its own in `[serve]` and `[dashboard]`.
    Security = "security" {
        /// Directory with `ca.crt`, `tls.crt` and `tls.key`, as `helio cert node` writes it (and Kubernetes mounts a TLS
        /// secret). In its place the three files may be named.
        dir: Option<PathBuf> = None,
        /// Certificates of the CA, in PEM.
        ca: Option<PathBuf> = None,
        /// Certificate of this machine, in PEM, with those between it and the CA.
        cert: Option<PathBuf> = None,
        /// Its private key, in PEM.
        key: Option<PathBuf> = None,
        /// A name that the certificate of every node has. It is checked instead of the address, for machines whose
        /// addresses change. Without it, a certificate must name the address at which its process listens.
        server_name: Option<String> = None,
    }
}

section! {
    /// Where the head keeps what must survive it.
    State = "state" {
        /// `embedded`: a file store beside the head. `etcd`: an etcd cluster.
        store: Store = Store::Embedded,
        /// Directory of the embedded store. Without it: `state` in the run directory.
        dir: Option<PathBuf> = None,
        /// Addresses of the etcd servers.
        endpoints: Vec<String> = vec!["http://127.0.0.1:2379".into()],
        /// Certificate of the CA of etcd's servers, in PEM, for endpoints that begin with `https://`.
        ca: Option<PathBuf> = None,
        /// Certificate that etcd asks of its clients, in PEM.
        cert: Option<PathBuf> = None,
        /// Its private key, in PEM.
        key: Option<PathBuf> = None,
        /// Start of every key in etcd; the cluster's name is added to it.
        prefix: String = "/heliostat".into(),
    }
}

section! {
    /// One machine of the cluster. Without any `[[nodes]]` the cluster is this machine with the devices of `[devices]`.
    /// `helio up` starts a node agent for every entry without `host`; for the others it prints the `helio node` command to
    /// run there.
    Node = "nodes" repeated true {
        /// Name of the node. Without it: `node-0`, `node-1`, ...
        name: Option<String> = None,
        /// Name or address of another machine. Without it the node is this machine.
        host: Option<String> = None,
        /// How many devices it has (with CUDA: GPUs); `auto` takes the number of `[devices]`.
        devices: Count = Count::Auto,
        /// What its devices are. Without it: as in `[devices]`. All nodes of a cluster have the same.
        device: Option<Device> = None,
        /// Logical CPUs that actors can reserve; `auto` takes all there are.
        cpus: Count = Count::Auto,
        /// Memory that actors can reserve. Without it: all there is.
        memory: Option<ByteSize> = None,
        /// Anything else that actors can reserve, by name, such as `{ tpu = 4, licence = 0.5 }`.
        resources: BTreeMap<String, Quantity> = BTreeMap::new(),
        /// Labels that actors and placement groups can ask for, such as `{ zone = "a", nvlink = "rack-3" }`. Every node has
        /// `heliostat/node` and `heliostat/host`.
        labels: Labels = Labels::new(),
    }
}

section! {
    /// The devices of a node. A rank is a process that owns exactly one device. GPUs are numbered as CUDA_VISIBLE_DEVICES
    /// shows them to `helio`.
    Devices = "devices" {
        /// What ranks compute on. `auto`: CUDA where this machine has a driver and a supported GPU (H100, H200), else CPU;
        /// `helio check` says which.
        device: Device = Device::Auto,
        /// How many CPU devices a node offers. They share its cores.
        cpu: u32 = 4,
        /// Threads of one CPU device; `auto` divides the cores evenly, at least one each.
        threads: Count = Count::Auto,
        /// How many GPUs a node offers; `auto` takes all that this machine shows. For other machines it must be written.
        cuda: Count = Count::Auto,
        /// Ranks that share one GPU. More than one is for tests: they get in each other's way.
        ranks_per_gpu: u32 = 1,
        /// Lets anybody who may call actors break the GPU of a rank on purpose (`POST
        /// /api/actors/rank-0/ask/rank.break_device`). For tests of failures, and for nothing else.
        fault_injection: bool = false,
        /// Folders, on every node, to search for NVIDIA's libraries (NVRTC, NCCL) before the loader's path and
        /// /usr/local/cuda.
        library_dirs: Vec<PathBuf> = Vec::new(),
        /// Where compiled kernels are kept, on every node. Without it: `heliostat/kernels` in the user's cache directory
        /// (XDG_CACHE_HOME, else ~/.cache), so that clusters share them.
        kernel_cache: Option<PathBuf> = None,
    }
}

section! {
    /// The model that is served. Without this section none is: the cluster runs actors and jobs, and `[parallel]`, `[eplb]`,
    /// `[engine]` and `[serve]` say nothing.
    Model = "model" {
        /// A Hugging Face checkpoint directory: config.json, safetensors, tokenizer.json. A relative path starts at the
        /// directory of cluster.toml.
        path: PathBuf = "models/sundial-20m".into(),
        /// The model's name in the HTTP API. Without it: the name of the directory.
        name: Option<String> = None,
        /// Longest sequence, prompt and answer together, in tokens. Without it: the model's own limit.
        max_model_len: Option<u32> = None,
        /// Serve it from the start, as the application `cluster`. False: `helio serve deploy` says what is served.
        deploy: bool = true,
    }
}

section! {
    /// How ranks share the model.
    Parallel = "parallel" {
        /// Data-parallel ranks: each runs attention for its own sequences. Without it: one per device (with
        /// `colocate = false`: half of the devices).
        dp: Option<u32> = None,
        /// Expert-parallel ranks: each holds a share of the experts. Without it: as `dp`.
        ep: Option<u32> = None,
        /// True: DP rank i and EP rank i share device i. False: experts have devices of their own.
        colocate: bool = true,
        /// How rows travel between GPUs: `peer` (our own kernels over NVLink) or `nccl` (needs a GPU for each rank; slower,
        /// and every rank computes as many rows as the busiest). Only for CUDA devices. Without it: `peer`.
        all2all_backend: Option<All2All> = None,
        /// A rank that is silent for longer inside a step is treated as lost, in seconds.
        step_timeout_s: f64 = 30.0,
        /// Shared memory between each two ranks of one machine, per direction.
        ring_bytes: ByteSize = ByteSize(1 << 20),
    }
}

section! {
    /// Expert-parallel load balancing, under vLLM's names.
    Eplb = "eplb" {
        /// Remap experts by their load while serving. `helio eplb rebalance` works even when this is false.
        enable_eplb: bool = true,
        /// Steps over which load is summed.
        window_size: u32 = 1000,
        /// Steps between two rebalances.
        step_interval: u32 = 3000,
        /// Physical slots beyond one per expert. Experts plus these must be divisible by `ep`. Without it: about one slot
        /// per EP rank (none with one EP rank).
        num_redundant_experts: Option<u32> = None,
        /// Log the balancedness of every window.
        log_balancedness: bool = false,
        /// Move weights in the background while serving goes on. The only way in this release.
        use_async: bool = true,
        /// How a new map is planned: `deepseek` (from scratch, exactly DeepSeek's) or `incremental` (few moves).
        policy: Policy = Policy::Deepseek,
        /// A JSON file with `physical_to_logical_map` (SGLang's format) to start with.
        initial_layout: Option<PathBuf> = None,
        /// The first map where there is no `initial_layout`: `linear` or `round_robin`.
        expert_placement_strategy: PlacementStrategy = PlacementStrategy::Linear,
        /// A remap that makes no progress for so long is rolled back, in seconds.
        plan_timeout_s: f64 = 30.0,
    }
}

section! {
    /// One rank's engine, under vLLM's names.
    Engine = "engine" {
        /// Tokens per KV block. Without it: 16 on CPU devices, 64 on CUDA devices, where nothing else is possible.
        block_size: Option<u32> = None,
        /// KV blocks per DP rank. At most one of this, `kv_cache_memory_bytes` and `gpu_memory_utilization`.
        num_gpu_blocks_override: Option<u32> = None,
        /// Memory for KV blocks per DP rank. Without any of the three: 128MiB on CPU devices, `gpu_memory_utilization` on
        /// CUDA devices.
        kv_cache_memory_bytes: Option<ByteSize> = None,
        /// Share of a GPU's memory that its ranks may use for weights, buffers and KV blocks together. Only for CUDA
        /// devices. Without any of the three: 0.9.
        gpu_memory_utilization: Option<f64> = None,
        /// Most sequences of one rank that run at a time. Without it: 64 on CPU devices, 256 on CUDA devices.
        max_num_seqs: Option<u32> = None,
        /// Most tokens of one step of one rank. At least `max_num_seqs`. Without it: 512 on CPU devices, 8192 on CUDA
        /// devices.
        max_num_batched_tokens: Option<u32> = None,
        /// Reuse KV blocks of equal prefixes.
        enable_prefix_caching: bool = true,
        /// How prompts attend in models with latent attention (MLA): `absorbed`, like generated tokens, or `expanded`, on keys
        /// and values of every head that are made from the cached latents first, which is less work for long prompts. The two
        /// differ in the last bits. With `expanded`, a KV block that holds generated tokens is not shared with a prompt that
        /// repeats them. On CUDA devices keys of up to 128 + 64 and values of up to 128 elements per head.
        prefill_attention: PrefillAttention = PrefillAttention::Absorbed,
        /// Largest decode batch that runs as a CUDA graph; 0: none does. Only for CUDA devices. Without it: 256.
        max_cudagraph_capture_size: Option<u32> = None,
        /// Run without CUDA graphs, as `max_cudagraph_capture_size = 0`.
        enforce_eager: bool = false,
        /// Schedule the next step while the present one runs. Only for CUDA devices, where it is true without it.
        async_scheduling: Option<bool> = None,
    }
}

section! {
    /// The HTTP server.
    Serve = "serve" {
        /// Address to listen on. Beyond loopback `api_key_file` is needed.
        host: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST),
        /// Port to listen on.
        port: u16 = 8000,
        /// Where HTTP is served: `HeadOnly` by one ingress for the cluster, `EveryNode` by one on each node, `Disabled` by none. A
        /// document of `helio serve` that says otherwise goes above it. On a machine with several nodes the first ingress has `port`,
        /// the others have free ports, which `helio serve status` shows.
        proxy_location: ProxyLocation = ProxyLocation::HeadOnly,
        /// Name of the node with the one ingress of `HeadOnly`. Without it: that of the serve controller, while it is there.
        node: Option<String> = None,
        /// A file with the keys of which HTTP clients must send one as `Authorization: Bearer KEY`: one per line, `#` begins a
        /// comment. A key has 16 characters or more.
        api_key_file: Option<PathBuf> = None,
        /// Certificate for HTTPS, in PEM, on the machine that runs the server. Without it HTTP is not encrypted. A renewed
        /// file is taken without a restart.
        tls_cert: Option<PathBuf> = None,
        /// Its private key, in PEM.
        tls_key: Option<PathBuf> = None,
        /// Origins (`https://chat.example.com`) whose web pages may use the API; `*` lets all of them.
        cors_origins: Vec<String> = Vec::new(),
        /// Connections at a time; others wait until one is closed.
        max_connections: u32 = 4096,
        /// Requests per second of one client, which is told by its key, or without keys by its address; beyond that 429 with
        /// Retry-After. 0: no limit.
        max_requests_per_s: u32 = 0,
        /// How long a client may take to send the head of a request, in seconds, and a TLS handshake.
        header_timeout_s: f64 = 10.0,
        /// How long a client may take to send the body of a request, in seconds.
        body_timeout_s: f64 = 60.0,
        /// How long a request to the model may take until the end of its answer, in seconds; then its client gets 408, or, in a
        /// stream, an error as the last event. 0: as long as it takes.
        request_timeout_s: f64 = 0.0,
        /// Requests that may wait per DP rank; beyond that clients get 429 with Retry-After.
        max_queued_requests: u32 = 256,
        /// Largest body of a request.
        max_body_bytes: ByteSize = ByteSize(4 << 20),
    }
}

section! {
    /// Jobs: commands that users submit (`helio job`, `ray job`), over the REST API of Ray's dashboard. Whoever reaches it can
    /// run commands as the user of this cluster.
    Dashboard = "dashboard" {
        /// Run it.
        enabled: bool = true,
        /// Address to listen on. Beyond loopback `api_key_file` is needed.
        host: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST),
        /// Port to listen on.
        port: u16 = 8265,
        /// Name of the node with the jobs actor, the dashboard and the jobs that ask for nothing. Without it: the first node of
        /// the head's machine.
        node: Option<String> = None,
        /// A file with the keys of which clients must send one as `Authorization: Bearer KEY`, one per line. Commands on the
        /// head's machine take the first.
        api_key_file: Option<PathBuf> = None,
        /// Certificate for HTTPS, in PEM, on the machine that runs jobs. Without it HTTP is not encrypted.
        tls_cert: Option<PathBuf> = None,
        /// Its private key, in PEM.
        tls_key: Option<PathBuf> = None,
        /// Connections at a time; others wait until one is closed.
        max_connections: u32 = 1024,
        /// Requests per second of one client, which is told by its key, or without keys by its address; beyond that 429. 0: no
        /// limit.
        max_requests_per_s: u32 = 0,
        /// Jobs that run at once; others wait.
        max_jobs_running: u32 = 16,
        /// Jobs that may wait; one more is refused with 429.
        max_jobs_queued: u32 = 256,
        /// Ended jobs that are kept, with their logs; the oldest beyond that are forgotten.
        max_jobs_kept: u32 = 1000,
        /// Bytes of a job's log that are kept: the newest.
        max_log_bytes: ByteSize = ByteSize(64 << 20),
        /// Largest package (a zipped working directory). Unpacked it may be four times as large.
        max_package_bytes: ByteSize = ByteSize(512 << 20),
        /// All packages together; the oldest that no job waits for make room.
        max_packages_bytes: ByteSize = ByteSize(2 << 30),
        /// What a job that is stopped has between SIGTERM and SIGKILL, in seconds.
        stop_grace_s: f64 = 3.0,
        /// How long a running job lives on without its jobs actor, in seconds.
        orphan_grace_s: f64 = 30.0,
    }
}

section! {
    /// The object store of each node: large values that actors share by ref.
    Objects = "objects" {
        /// Shared memory for objects. Without it: 30 % of the machine's memory.
        memory: Option<ByteSize> = None,
        /// Where objects go that have no room in memory, on every node: each makes a directory of its own in it. Without it: in
        /// the node's run directory.
        spill_dir: Option<PathBuf> = None,
        /// Bytes of objects that may lie there; 0: none, and a full store refuses.
        spill_bytes: ByteSize = ByteSize(16 << 30),
        /// Sizes of objects for which memory is kept ready, so that a process's first put of such a size waits for no
        /// pages to be cleared. It counts as memory of the store, and is let go while more than half of that is in use.
        ready: Vec<ByteSize> = Vec::new(),
    }
}

section! {
    /// Programs of users (`helio submit`): binaries that the head keeps and nodes fetch.
    Packages = "packages" {
        /// All that the head keeps; those that no actor runs make room, the one registered first first.
        max_bytes: ByteSize = ByteSize(4 << 30),
        /// The largest.
        max_package_bytes: ByteSize = ByteSize(1 << 30),
    }
}

section! {
    /// Traces of requests, for an OpenTelemetry collector: one for each request, from HTTP to the steps of its rank. Off
    /// unless `otlp_endpoint` is written, or OpenTelemetry's own variables name an endpoint where the head is started:
    /// OTEL_EXPORTER_OTLP_ENDPOINT, _HEADERS, _TIMEOUT and _PROTOCOL, those with TRACES_ before the last word,
    /// OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_EXPORTER and OTEL_SDK_DISABLED. What is written here
    /// wins. The head hands it on: nodes need no variables.
    Telemetry = "telemetry" {
        /// Address of the collector for OTLP over HTTP (protobuf), such as `http://127.0.0.1:4318`; `/v1/traces` is added
        /// to it. Every node must reach it, without a proxy.
        otlp_endpoint: Option<String> = None,
        /// A file with headers for the collector, such as keys: one `name: value` per line, `#` begins a comment.
        headers_file: Option<PathBuf> = None,
        /// Share of the requests that are traced, of those that come without a `traceparent`. The others are traced if
        /// their client says so.
        sample_ratio: f64 = 1.0,
        /// `service.name` of all processes. Without it: `heliostat`.
        service_name: Option<String> = None,
        /// Further attributes of all processes, such as `{ "deployment.environment.name" = "prod" }`.
        resource_attributes: BTreeMap<String, String> = BTreeMap::new(),
        /// How long a message to the collector may take, in seconds. Without it: 10.
        timeout_s: Option<f64> = None,
        /// How long a span may wait for others that go with it, in seconds.
        interval_s: f64 = 5.0,
        /// Spans of one process that may wait for the collector; more are dropped and counted.
        max_queued_spans: u32 = 2048,
    }
}

section! {
    /// What happens when processes die.
    Supervision = "supervision" {
        /// Restarts of one actor within `window_s`; one more and it stays dead. The same limit holds for head and node under
        /// `helio up`.
        max_restarts: u32 = 10,
        /// The window of `max_restarts`, in seconds.
        window_s: f64 = 60.0,
        /// Delay before the second restart of a window, in milliseconds; it doubles with each further one. The first is
        /// immediate.
        backoff_min_ms: u32 = 100,
        /// Longest delay before a restart, in milliseconds.
        backoff_max_ms: u32 = 5000,
        /// How long the head waits for a node agent that ended (its connection broke) before the node's actors are lost,
        /// in seconds. `helio up` starts it again at once.
        agent_grace_s: f64 = 1.5,
        /// How long a node may be silent before its actors are lost, in seconds.
        node_grace_s: f64 = 3.0,
        /// How long a worker lives on without its node agent, in seconds. For so long the head keeps the actors of a node
        /// whose agent is gone, too, if one of them owns a GPU and still reports.
        worker_grace_s: f64 = 10.0,
        /// How often nodes report to the head, in milliseconds.
        heartbeat_ms: u32 = 500,
    }
}

/// The whole file.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Raw {
    pub(crate) cluster: Cluster,
    pub(crate) head: Head,
    pub(crate) security: Security,
    pub(crate) state: State,
    pub(crate) nodes: Vec<Node>,
    pub(crate) devices: Devices,
    /// Without it nothing is served: the cluster runs actors and jobs.
    pub(crate) model: Option<Model>,
    pub(crate) parallel: Parallel,
    pub(crate) eplb: Eplb,
    pub(crate) engine: Engine,
    pub(crate) serve: Serve,
    pub(crate) dashboard: Dashboard,
    pub(crate) objects: Objects,
    pub(crate) packages: Packages,
    pub(crate) telemetry: Telemetry,
    pub(crate) supervision: Supervision,
}

/// Every section, in the order of the documentation.
pub(crate) const SECTIONS: [SectionInfo; 16] = [
    Cluster::INFO,
    Head::INFO,
    Security::INFO,
    State::INFO,
    Node::INFO,
    Devices::INFO,
    Model::INFO,
    Parallel::INFO,
    Eplb::INFO,
    Engine::INFO,
    Serve::INFO,
    Dashboard::INFO,
    Objects::INFO,
    Packages::INFO,
    Telemetry::INFO,
    Supervision::INFO,
];
