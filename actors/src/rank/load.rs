//! From arguments to a running rank: reads and checks the checkpoint, loads what the rank owns, starts its thread.

use std::net::{SocketAddr, ToSocketAddrs};
use std::num::NonZero;
use std::sync::Arc;

use heliostat_engine::checkpoint::Checkpoint;
use heliostat_engine::config::ModelConfig;
use heliostat_engine::ep::{ExpertStore, PlanProgress, SharedSlots, Slots};
use heliostat_engine::model::{KvPages, Model, expert_bytes};
use heliostat_engine::scheduler::{Scheduler, SchedulerConfig};
use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::fabric::FabricListener;
use heliostat_runtime::actor::{ActorCx, CreateError};
use heliostat_runtime::spec::{DeviceKind, Progress};
use heliostat_runtime::system::PeerEvent;

use super::args::{KvCacheArgs, RankArgs};
use super::attention::Attention;
use super::clock::StepClock;
use super::join::ExpertLoader;
use super::link::Command;
use super::outlet::Outlet;
use super::suspect::heed;
use super::thread::StepThread;
use super::{Rank, join, link};

/// What was loaded.
pub(super) struct Loaded {
    loader: ExpertLoader,
    config: Arc<ModelConfig>,
    cpu: Cpu,
    attention: Option<Attention>,
    slots: SharedSlots,
}

/// Reads the rank's share of the checkpoint. Blocks for as long as that takes.
pub(super) fn load(args: &RankArgs, cx: &ActorCx) -> Result<Loaded, CreateError> {
    let config = Arc::new(ModelConfig::from_dir(&args.model).map_err(CreateError::failed)?);
    let checkpoint = Arc::new(Checkpoint::open(&args.model).map_err(CreateError::failed)?);
    checkpoint.validate(&config).map_err(CreateError::failed)?;
    let cpu = Cpu::new(threads(cx)?).map_err(CreateError::failed)?;
    let role = args.topology.role(args.rank as usize);
    let layout = &args.layout;
    let own: Vec<Vec<u32>> = role.ep.map_or_else(Vec::new, |ep| {
        layout.layers().iter().map(|map| map.experts_of_rank(ep as u32).to_vec()).collect()
    });
    let mut expert_total = 0;
    for (moe_layer, experts) in own.iter().enumerate() {
        for &expert in experts {
            expert_total += expert_bytes(&checkpoint, &config, moe_layer, expert as usize)
                .map_err(CreateError::failed)?;
        }
    }
    let mut dense_bytes = 0;
    let report = |done: u64, total: u64| {
        cx.progress(Progress { phase: "loading weights".to_owned(), done, total });
    };
    let attention = match role.dp {
        Some(_) => {
            let model = Model::load(&checkpoint, &config, cpu.clone(), &mut |done, total| {
                dense_bytes = total;
                report(done, total + expert_total);
            })
            .map_err(CreateError::failed)?;
            Some(attention(args, &config, model)?)
        }
        None => None,
    };
    let loader = ExpertLoader { checkpoint, config: Arc::clone(&config), store: ExpertStore::Host };
    let slots = SharedSlots::new(Slots::new(layout.layers().len(), layout.shape().slots_per_rank() as usize));
    if let Some(ep) = role.ep {
        let mut done = dense_bytes;
        join::fill_slots(layout, ep, &slots, |moe_layer, logical| {
            let weights = loader.read(moe_layer, logical)?;
            done += weights.size_bytes() as u64;
            report(done, dense_bytes + expert_total);
            Ok(weights)
        })
        .map_err(CreateError::Failed)?;
    }
    Ok(Loaded { loader, config, cpu, attention, slots })
}

/// CPU threads of the device that the rank owns.
fn threads(cx: &ActorCx) -> Result<NonZero<usize>, CreateError> {
    match cx.device().map(|device| &device.kind) {
        None => Ok(NonZero::<usize>::MIN),
        Some(DeviceKind::Cpu { threads }) => {
            Ok(NonZero::new(*threads as usize).unwrap_or(NonZero::<usize>::MIN))
        }
        Some(DeviceKind::Cuda { ordinal }) => Err(CreateError::Failed(format!(
            "device cuda:{ordinal}: CUDA ranks are not in this release; use CPU devices"
        ))),
    }
}

fn attention(args: &RankArgs, config: &ModelConfig, model: Model) -> Result<Attention, CreateError> {
    let engine = &args.engine;
    let block_size = engine.block_size as usize;
    let num_blocks = match engine.kv_cache {
        KvCacheArgs::Blocks(blocks) => blocks as usize,
        KvCacheArgs::Bytes(bytes) => {
            let per_block = KvPages::bytes_per_block(config, block_size);
            (bytes / per_block as u64) as usize
        }
        KvCacheArgs::Utilization(_) => {
            return Err(CreateError::Failed("a share of GPU memory was given to a CPU device".to_owned()));
        }
    };
    let scheduler = Scheduler::new(SchedulerConfig {
        block_size,
        num_blocks,
        max_num_seqs: engine.max_num_seqs as usize,
        max_num_batched_tokens: engine.max_num_batched_tokens as usize,
        max_model_len: engine.max_model_len as usize,
        enable_prefix_caching: engine.enable_prefix_caching,
        max_waiting: engine.max_waiting as usize,
        vocab_size: config.vocab_size,
    })
    .map_err(CreateError::failed)?;
    Ok(Attention::new(model, KvPages::new(config, num_blocks, block_size), scheduler))
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
    let role = args.topology.role(args.rank as usize);
    let me = cx.addr();
    let outlet = Outlet::new(cx.system().clone(), me, (args.rank, role.dp.map(|dp| dp as u32)), notices);
    let thread = StepThread {
        config: Arc::clone(&loaded.config),
        loader: loaded.loader.clone(),
        cpu: loaded.cpu,
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
        args: args.clone(),
    };
    std::thread::Builder::new()
        .name(format!("step-{}", args.rank))
        .spawn(move || thread.run())
        .map_err(CreateError::failed)?;
    let stopping = link.clone();
    tokio::spawn(heed(cx.clone(), heard, move || stopping.is_stopped()));
    let mut peers = cx.system().peer_events();
    let lost = link.clone();
    tokio::spawn(async move {
        while let Some(event) = peers.next().await {
            if let PeerEvent::Lost { process, .. } = event {
                lost.send(Command::PeerLost(process));
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
        encoded: std::sync::Mutex::new(None),
        args,
    })
}
