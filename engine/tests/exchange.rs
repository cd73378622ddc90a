//! The exchange against all experts in one process: any shape of the group and any layout, bit for bit.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

mod models;

use std::path::Path;
use std::sync::Arc;

use heliostat_engine::batch::{Batch, BatchSeq, LogitRows};
use heliostat_engine::checkpoint::Checkpoint;
use heliostat_engine::config::ModelConfig;
use heliostat_engine::ep::{EpGroup, EpParts, ExpertWeights, SharedSlots, Slot, Slots, Topology};
use heliostat_engine::eplb::{ExpertMap, Layout, MapShape};
use heliostat_engine::model::{KvPages, LocalExperts, Model, load_expert};
use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::fabric::{Connect, Endpoint, FabricListener};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use models::models;

const STEPS: u64 = 3;

/// A layout in which every expert has a slot and nothing else is sure.
fn random_layout(config: &ModelConfig, ranks: u32, rng: &mut ChaCha8Rng) -> Layout {
    let experts = config.moe.num_experts as u32;
    let slots = (experts + rng.random_range(0..9)).next_multiple_of(ranks);
    let shape = MapShape { experts, slots, ranks };
    let map = |_| {
        let extra = (experts..slots).map(|_| rng.random_range(0..experts)).collect::<Vec<_>>();
        let mut held: Vec<u32> = (0..experts).chain(extra).collect();
        held.shuffle(rng);
        ExpertMap::new(shape, held).unwrap()
    };
    Layout::new((0..config.moe_layers()).map(map).collect()).unwrap()
}

/// Tokens of `dp` at `step`: none at some steps, so that idle ranks take part.
fn batch(dp: usize, step: u64, vocab: usize) -> Batch {
    let len = (dp + 2 * step as usize) % 5;
    if len == 0 {
        return Batch::default();
    }
    let context = (0..step).map(|step| (dp + 2 * step as usize) % 5).sum::<usize>();
    let token = |position| (position * 37 + dp * 101 + 5) as u32 % vocab as u32;
    Batch {
        tokens: (context..context + len).map(token).collect(),
        positions: (context as u32..(context + len) as u32).collect(),
        seqs: vec![BatchSeq {
            start: 0,
            len,
            context,
            block_table: vec![0, 1],
            logits: LogitRows::All,
            expanded: 0,
        }],
    }
}

/// One rank of a group: runs all steps and returns its logits.
fn run_rank(listener: &FabricListener, endpoints: &[Endpoint], setup: &Setup, rank: usize) -> Vec<Vec<f32>> {
    let Setup { topology, layout, config, checkpoint } = setup;
    let role = topology.role(rank);
    let shape = layout.shape();
    let slots = SharedSlots::new(Slots::new(layout.layers().len(), shape.slots_per_rank() as usize));
    if let Some(ep) = role.ep {
        for (moe_layer, map) in layout.layers().iter().enumerate() {
            let slot = |logical: &u32| {
                let expert = load_expert(checkpoint, config, moe_layer, *logical as usize).unwrap();
                Slot { logical: *logical, weights: ExpertWeights::Host(Arc::new(expert)) }
            };
            let contents = map.experts_of_rank(ep as u32).iter().map(slot).enumerate().collect();
            slots.replace(moe_layer, contents).unwrap();
        }
    }
    let cpu = Cpu::single_threaded();
    let fabric = listener.connect(Connect::new(1, rank, endpoints)).unwrap();
    let mut group = EpGroup::new(EpParts {
        fabric,
        topology: topology.clone(),
        rank,
        cpu: cpu.clone(),
        layout: layout.clone(),
        slots,
        hidden: config.hidden_size,
    });
    let Some(dp) = role.dp else {
        for step in 0..STEPS {
            group.begin_step(step);
            (0..config.moe_layers()).for_each(|moe_layer| group.serve(moe_layer).unwrap());
        }
        return Vec::new();
    };
    let mut model = Model::load(checkpoint, config, cpu, &mut |_, _| ()).unwrap();
    let mut kv = KvPages::new(config, 2, 16);
    (0..STEPS)
        .map(|step| {
            group.begin_step(step);
            model.forward(&batch(dp, step, config.vocab_size), &mut kv, &mut group).unwrap().rows
        })
        .collect()
}

struct Setup {
    topology: Topology,
    layout: Layout,
    config: Arc<ModelConfig>,
    checkpoint: Checkpoint,
}

#[test]
fn any_group_and_layout_computes_the_bits_of_one_process() {
    for dir in models() {
        compare(&dir);
    }
}

fn compare(dir: &Path) {
    let mut rng = ChaCha8Rng::seed_from_u64(20);
    let config = Arc::new(ModelConfig::from_dir(dir).unwrap());
    let mut model =
        Model::load(&Checkpoint::open(dir).unwrap(), &config, Cpu::single_threaded(), &mut |_, _| ())
            .unwrap();
    let mut experts =
        LocalExperts::load(&Checkpoint::open(dir).unwrap(), &config, Cpu::single_threaded()).unwrap();
    for (dp, ep, colocate) in
        [(1, 1, true), (2, 2, true), (4, 4, true), (1, 4, true), (4, 2, true), (2, 3, false)]
    {
        let topology = Topology::new(dp, ep, colocate).unwrap();
        let setup = Setup {
            layout: random_layout(&config, ep as u32, &mut rng),
            checkpoint: Checkpoint::open(dir).unwrap(),
            config: Arc::clone(&config),
            topology,
        };
        let size = setup.topology.size();
        let listener = || FabricListener::bind(([127, 0, 0, 1], 0).into(), None).unwrap();
        let listeners: Vec<FabricListener> = std::iter::repeat_with(listener).take(size).collect();
        let endpoints: Vec<Endpoint> = listeners.iter().map(FabricListener::endpoint).collect();
        let (setup, endpoints) = (&setup, &endpoints);
        let logits: Vec<Vec<Vec<f32>>> = std::thread::scope(|scope| {
            let ranks: Vec<_> = listeners
                .iter()
                .enumerate()
                .map(|(rank, listener)| scope.spawn(move || run_rank(listener, endpoints, setup, rank)))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        for dp_rank in 0..dp {
            let mut kv = KvPages::new(&config, 2, 16);
            for step in 0..STEPS {
                let alone = model
                    .forward(&batch(dp_rank, step, config.vocab_size), &mut kv, &mut experts)
                    .unwrap()
                    .rows;
                let got = &logits[setup.topology.rank_of_dp(dp_rank)][step as usize];
                assert!(
                    *got == alone,
                    "{dir:?}, dp {dp} x ep {ep}: DP rank {dp_rank} differs at step {step}"
                );
            }
        }
    }
}
