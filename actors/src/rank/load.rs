//! From arguments to a running rank: reads and checks the checkpoint, loads what the rank owns, starts its thread.

use std::collections::VecDeque;
use std::net::{SocketAddr, ToSocketAddrs};
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use futures_util::future::join_all;
use heliostat_engine::checkpoint::{Checkpoint, CheckpointError};
use heliostat_engine::config::ModelConfig;
use heliostat_engine::cuda::{CudaOptions, CudaRank, KvRoom, LoadError, Weights};
use heliostat_engine::ep::{PlanProgress, SharedSlots, Slots};
use heliostat_engine::model::{KvPages, Model, expert_bytes};
use heliostat_engine::scheduler::{Scheduler, SchedulerConfig};
use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cuda::exchange::Transport;
use heliostat_kernels::cuda::{Device, DeviceOptions};
use heliostat_kernels::fabric::FabricListener;
use heliostat_runtime::actor::{ActorCx, CreateError};
use heliostat_runtime::spec::{DeviceKind, Progress};
use heliostat_runtime::system::{Panic, PeerEvent};

use tokio::sync::mpsc::UnboundedSender;

use super::args::{ExchangeBackend, KvCacheArgs, RankArgs};
use super::attention::Attention;
use super::borrow::Borrower;
use super::clock::StepClock;
use super::engine::{CpuEngine, Engine};
use super::grammars::Grammars;
use super::join::ExpertLoader;
use super::leases::Leases;
use super::outlet::Outlet;
use super::spans::Spans;
use super::suspect::{Notice, heed};
use super::thread::StepThread;
use super::{Rank, join, link};
use crate::deployment::rank_name;
use crate::telemetry::Tracing;

/// When a rank takes in the experts of its slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Experts {
    /// While it loads: those of the first layout.
    First,
    /// When it joins: those of the layout that the others have by then, from their GPUs as far as they hold them.
    Joining,
}

impl Experts {
    /// A rank that comes to others which run already starts again.
    pub(super) async fn of(args: &RankArgs, cx: &ActorCx) -> Self {
        let cuda = cx.device().is_some_and(|device| matches!(device.kind, DeviceKind::Cuda { .. }));
        let Some(cluster) = cx
            .cluster()
            .filter(|_| cuda && args.engine.cuda.exchange == ExchangeBackend::Peer && args.topology.ep > 1)
        else {
            return Self::First;
        };
        let others = (0..args.topology.size() as u32).filter(|&rank| rank != args.rank);
        let up =
            join_all(others.map(|rank| async move { cluster.lookup(&rank_name(&args.prefix, rank)).await }));
        if up.await.iter().any(|found| matches!(found, Ok(Some(_)))) { Self::Joining } else { Self::First }
    }
}

/// What was loaded.
pub(super) struct Loaded {
    loader: ExpertLoader,
    config: Arc<ModelConfig>,
    engine: Engine,
    attention: Option<Attention>,
    slots: SharedSlots,
    tracing: Tracing,
}

/// Reads the rank's share of the checkpoint. Blocks for as long as that takes.
pub(super) fn load(args: &RankArgs, cx: &ActorCx, experts: Experts) -> Result<Loaded, CreateError> {
    let config = Arc::new(ModelConfig::from_dir(&args.model).map_err(CreateError::failed)?);
    let checkpoint = Arc::new(Checkpoint::open(&args.model).map_err(CreateError::failed)?);
    checkpoint.validate(&config).map_err(CreateError::failed)?;
    let role = args.topology.role(args.rank as usize);
    let expert_total = match experts {
        Experts::First => expert_total(args, &checkpoint, &config).map_err(CreateError::failed)?,
        Experts::Joining => 0,
    };
    let mut dense_bytes = 0;
    let report = |done: u64, total: u64| {
        cx.progress(Progress { phase: "loading weights".to_owned(), done, total });
    };
    let mut progress = |done: u64, total: u64| {
        dense_bytes = total;
        report(done, total + expert_total);
    };
    let engine = match cx.device().map(|device| &device.kind) {
        Some(DeviceKind::Cuda { ordinal }) => {
            let rank = load_cuda(args, *ordinal, (&config, &checkpoint), &mut progress);
            let rank = Box::new(rank.map_err(CreateError::failed)?);
            Engine::Cuda { rank, depth: if args.engine.cuda.async_scheduling { 2 } else { 1 } }
        }
        Some(DeviceKind::Cpu { threads }) => load_cpu(args, *threads, (&config, &checkpoint), &mut progress)?,
        None => load_cpu(args, 1, (&config, &checkpoint), &mut progress)?,
    };
    let tracing = Tracing::of(args.telemetry.as_ref().filter(|_| role.dp.is_some()), cx);
    let attention = role.dp.map(|_| attention(args, &config, &engine, &tracing)).transpose()?;
    let loader = ExpertLoader { checkpoint, config: Arc::clone(&config), store: engine.store() };
    let layout = &args.layout;
    let slots = SharedSlots::new(Slots::new(layout.layers().len(), layout.shape().slots_per_rank() as usize));
    if let Some(ep) = role.ep.filter(|_| experts == Experts::First) {
        let mut done = dense_bytes;
        join::fill_slots(layout, ep, &slots, |moe_layer, logical| {
            let weights = loader.read(moe_layer, logical)?;
            done += weights.size_bytes() as u64;
            report(done, dense_bytes + expert_total);
            Ok(weights)
        })
        .map_err(CreateError::Failed)?;
    }
    Ok(Loaded { loader, config, engine, attention, slots, tracing })
}

/// Bytes of the experts that the rank starts with.
fn expert_total(
    args: &RankArgs,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
) -> Result<u64, CheckpointError> {
    let Some(ep) = args.topology.role(args.rank as usize).ep else { return Ok(0) };
    let mut total = 0;
    for (moe_layer, map) in args.layout.layers().iter().enumerate() {
        for &expert in map.experts_of_rank(ep as u32) {
            total += expert_bytes(checkpoint, config, moe_layer, expert as usize)?;
        }
    }
    Ok(total)
}

fn load_cpu(
    args: &RankArgs,
    threads: u32,
    (config, checkpoint): (&Arc<ModelConfig>, &Checkpoint),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Engine, CreateError> {
    let threads = NonZero::new(threads as usize).unwrap_or(NonZero::<usize>::MIN);
    let cpu = Cpu::new(threads).map_err(CreateError::failed)?;
    let model = match args.topology.role(args.rank as usize).dp {
        Some(_) => {
            let prefill = args.engine.prefill_attention;
            prefill.check(config).map_err(CreateError::failed)?;
            let model = Model::load_for(prefill, checkpoint, config, cpu.clone(), progress)
                .map_err(CreateError::failed)?;
            let block_size = args.engine.block_size as usize;
            let num_blocks = match args.engine.kv_cache {
                KvCacheArgs::Blocks(blocks) => blocks as usize,
                KvCacheArgs::Bytes(bytes) => {
                    (bytes / KvPages::bytes_per_block(config, block_size) as u64) as usize
                }
                KvCacheArgs::Utilization(_) => {
                    let why = "a share of GPU memory was given to a CPU device";
                    return Err(CreateError::Failed(why.to_owned()));
                }
            };
            Some((model, KvPages::new(config, num_blocks, block_size)))
        }
        None => None,
    };
    Ok(Engine::Cpu(Box::new(CpuEngine { cpu, model })))
}

fn load_cuda(
    args: &RankArgs,
    ordinal: u32,
    (config, checkpoint): (&Arc<ModelConfig>, &Checkpoint),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CudaRank, LoadError> {
    let (engine, cuda) = (&args.engine, &args.engine.cuda);
    let device = Device::open_with(
        ordinal,
        DeviceOptions { library_dirs: cuda.library_dirs.clone(), kernel_cache: cuda.kernel_cache.clone() },
    )?;
    let options = CudaOptions {
        topology: args.topology.clone(),
        rank: args.rank as usize,
        map: args.layout.shape(),
        rows_max: engine.max_num_batched_tokens as usize,
        seqs_max: engine.max_num_seqs as usize,
        max_model_len: engine.max_model_len as usize,
        prefill_attention: engine.prefill_attention,
        kv: match engine.kv_cache {
            KvCacheArgs::Blocks(blocks) => KvRoom::Blocks(blocks as usize),
            KvCacheArgs::Bytes(bytes) => KvRoom::Bytes(bytes),
            KvCacheArgs::Utilization(thousandths) => {
                KvRoom::Utilization(f64::from(thousandths) / 1000.0 / f64::from(cuda.ranks_per_gpu.max(1)))
            }
        },
        graph_rows_max: cuda.graph_rows_max as usize,
        transport: match cuda.exchange {
            ExchangeBackend::Peer => Transport::Peer,
            ExchangeBackend::Nccl => Transport::Nccl,
        },
        library_dirs: cuda.library_dirs.clone(),
        timeout: args.links.timeout,
        stage_ahead: args.links.stage_ahead as usize,
        fold: None,
    };
    CudaRank::load(&device, config, &options, Weights::Checkpoint(checkpoint), progress)
}

fn attention(
    args: &RankArgs,
    config: &ModelConfig,
    device: &Engine,
    tracing: &Tracing,
) -> Result<Attention, CreateError> {
    let engine = &args.engine;
    let (num_blocks, depth) = match device {
        Engine::Cpu(cpu) => (cpu.model.as_ref().map_or(0, |(_, kv)| kv.num_blocks()), 1),
        Engine::Cuda { rank, depth } => (rank.num_blocks(), *depth),
    };
    let scheduler = Scheduler::new(SchedulerConfig {
        block_size: engine.block_size as usize,
        num_blocks,
        max_num_seqs: engine.max_num_seqs as usize,
        max_num_batched_tokens: engine.max_num_batched_tokens as usize,
        max_model_len: engine.max_model_len as usize,
        enable_prefix_caching: engine.enable_prefix_caching,
        prefill_attention: engine.prefill_attention,
        max_waiting: engine.max_waiting as usize,
        vocab_size: config.vocab_size,
    })
    .map_err(CreateError::failed)?;
    Ok(Attention::new(scheduler, depth, Spans::new(tracing.clone(), args.rank)))
}

/// A free port at the address where other processes reach this one.
fn fabric_address(cx: &ActorCx) -> Result<SocketAddr, CreateError> {
    let endpoint = cx.system().endpoint();
    let resolved = endpoint.to_socket_addrs().ok().and_then(|mut addresses| addresses.next());
    let address = resolved
        .ok_or_else(|| CreateError::Failed(format!("cannot resolve this process's address {endpoint}")))?;
    Ok(SocketAddr::new(address.ip(), 0))
}

/// Starts the step thread and makes the actor.
pub(super) fn start(args: RankArgs, cx: ActorCx, loaded: Loaded) -> Result<Rank, CreateError> {
    let listener =
        FabricListener::bind(fabric_address(&cx)?, args.links.secret.clone()).map_err(CreateError::failed)?;
    let endpoint = bincode::encode_to_vec(listener.endpoint(), super::codec())
        .map_err(|why| CreateError::Failed(format!("cannot encode the address of the rank: {why}")))?;
    let (link, inbox) = link::link();
    let (notices, heard) = tokio::sync::mpsc::unbounded_channel();
    let outlet = Outlet::new(&args, cx.system().clone(), cx.addr(), notices.clone());
    let (leases, probe) = (Leases::default(), loaded.engine.probe().map_err(CreateError::failed)?);
    let thread = StepThread {
        config: Arc::clone(&loaded.config),
        loader: loaded.loader.clone(),
        engine: loaded.engine,
        attention: loaded.attention,
        slots: loaded.slots.clone(),
        layout: args.layout.clone(),
        progress: PlanProgress::default(),
        plan: None,
        abandon: 0,
        clock: StepClock::default(),
        inbox,
        listener,
        outlet,
        view: None,
        stopping: false,
        borrower: Borrower::new(cx.system(), loaded.loader.store.clone(), link.clone()),
        leases: leases.clone(),
        runtime: tokio::runtime::Handle::current(),
        exchange: 0,
        unreachable: 0,
        arrived: VecDeque::new(),
        args: args.clone(),
    };
    run_steps(thread, args.rank, notices)?;
    let stopping = link.clone();
    tokio::spawn(heed(cx.clone(), args.prefix.clone(), heard, move || stopping.is_stopped()));
    let mut peers = cx.system().peer_events();
    let (lost, lent) = (link.clone(), leases.clone());
    tokio::spawn(async move {
        while let Some(event) = peers.next().await {
            if let PeerEvent::Lost { process, .. } = event {
                lost.peer_lost(process);
                lent.borrower_lost(process);
            }
        }
    });
    cx.announce(endpoint);
    Ok(Rank {
        cx,
        link,
        slots: loaded.slots,
        loader: loaded.loader,
        peers: Vec::new(),
        staging: None,
        encoded: Arc::default(),
        leases,
        probe,
        grammars: Arc::new(Grammars::new(args.model.clone())),
        tracing: loaded.tracing,
        args,
    })
}

/// Starts the step thread; of its panic the actor hears.
fn run_steps(thread: StepThread, rank: u32, notices: UnboundedSender<Notice>) -> Result<(), CreateError> {
    let steps = move || {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| thread.run())) {
            // Without a receiver nobody is left to tell.
            let _ = notices.send(Notice::Panicked(Panic::caught(&*panic)));
        }
    };
    let started = std::thread::Builder::new().name(format!("step-{rank}")).spawn(steps);
    started.map(drop).map_err(CreateError::failed)
}
