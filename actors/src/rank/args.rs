//! What a rank worker is told at its creation.

use std::path::PathBuf;
use std::time::Duration;

use bincode::{Decode, Encode};
use heliostat_engine::batch::PrefillAttention;
use heliostat_engine::ep::Topology;
use heliostat_engine::eplb::map::Layout;

use crate::telemetry::TelemetryArgs;

/// Arguments of the `rank` actor; the same for all ranks of a group but for `rank`.
#[derive(Clone, Debug, Encode, Decode)]
pub struct RankArgs {
    /// Index in the group.
    pub rank: u32,
    /// Before the names of the actors of its group.
    pub prefix: String,
    /// The number by which the ingress knows the first DP rank of the group.
    pub first_rank: u32,
    /// Shape of the group.
    pub topology: Topology,
    /// Checkpoint directory, on every node.
    pub model: PathBuf,
    /// Where experts lie when the EPLB actor knows nothing better.
    pub layout: Layout,
    /// One rank's engine.
    pub engine: EngineArgs,
    /// How the ranks talk.
    pub links: LinkArgs,
    /// Where it sends traces, if anywhere.
    pub telemetry: Option<TelemetryArgs>,
}

/// Bounds of one rank's engine, in vLLM's names.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct EngineArgs {
    /// Tokens per KV block.
    pub block_size: u32,
    /// Room for KV blocks.
    pub kv_cache: KvCacheArgs,
    /// Sequences that run at once.
    pub max_num_seqs: u32,
    /// Tokens per step.
    pub max_num_batched_tokens: u32,
    /// Tokens per sequence.
    pub max_model_len: u32,
    /// Share KV blocks of equal prefixes.
    pub enable_prefix_caching: bool,
    /// How rows of prompts attend.
    pub prefill_attention: PrefillAttention,
    /// Requests that wait; one more is refused.
    pub max_waiting: u32,
    /// Group steps between two load reports to the EPLB actor.
    pub load_report_steps: u32,
    /// What matters on CUDA devices only.
    pub cuda: CudaArgs,
}

/// A rank's engine on a CUDA device.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct CudaArgs {
    /// Folders to search for NVIDIA's libraries before the usual ones.
    pub library_dirs: Vec<PathBuf>,
    /// Where compiled kernels are kept.
    pub kernel_cache: Option<PathBuf>,
    /// How rows travel between GPUs.
    pub exchange: ExchangeBackend,
    /// Largest decode batch that runs as a recorded graph; 0 records none.
    pub graph_rows_max: u32,
    /// Schedule the next step while the present one runs.
    pub async_scheduling: bool,
    /// Ranks that share one GPU; 1 outside of tests.
    pub ranks_per_gpu: u32,
    /// Whether the GPU may be broken on purpose: for tests.
    pub fault_injection: bool,
}

/// How rows travel between the GPUs of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum ExchangeBackend {
    /// Peer memory over NVLink, by our own kernels.
    #[default]
    Peer,
    /// NCCL.
    Nccl,
}

/// Room for KV blocks of one DP rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum KvCacheArgs {
    /// So many blocks.
    Blocks(u32),
    /// As many as fit into so many bytes.
    Bytes(u64),
    /// On a CUDA device: what is left when weights and buffers are placed, of this many thousandths of the device's
    /// memory (vLLM's `gpu_memory_utilization`).
    Utilization(u32),
}

/// How the ranks talk during a step.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct LinkArgs {
    /// A rank that is silent for longer inside a step is treated as lost.
    pub timeout: Duration,
    /// Shared-memory ring per direction and pair, bytes.
    pub ring_bytes: u64,
    /// Proof that a connecting process belongs to the cluster.
    pub secret: Option<Vec<u8>>,
    /// Layers that may be staged ahead of the commits.
    pub stage_ahead: u32,
}
