//! Prompts on expanded keys and values, through scheduler and model on the CPU: how a prompt is cut, what else runs,
//! preemption, moves to other ranks and cached prefixes change no bit of what a request gets.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use heliostat_engine::batch::PrefillAttention;
use heliostat_engine::checkpoint::Checkpoint;
use heliostat_engine::config::ModelConfig;
use heliostat_engine::model::{KvPages, LocalExperts, Model};
use heliostat_engine::request::{RankStats, Request, RequestId, SamplingParams, StopConditions};
use heliostat_engine::scheduler::{Scheduler, SchedulerConfig};
use heliostat_kernels::cpu::Cpu;

/// Tokens that every request draws.
const OUTPUT: usize = 14;

/// A token with its log-probability.
type Drawn = (u32, u32);

struct Rig {
    model: Model,
    experts: LocalExperts,
    config: Arc<ModelConfig>,
}

/// How requests are served.
#[derive(Clone, Copy, Debug)]
struct Serving {
    num_blocks: usize,
    budget: usize,
    caching: bool,
    /// After so many steps all that runs goes to another rank, whose caches are empty. Enough of them to compute the
    /// longest sequence, or it would never end.
    move_after: usize,
}

const CALM: Serving = Serving { num_blocks: 200, budget: 512, caching: false, move_after: usize::MAX };

impl Rig {
    fn load() -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/sundial-20m");
        let config = Arc::new(ModelConfig::from_dir(&dir).unwrap());
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let cpu = Cpu::single_threaded();
        let prefill = PrefillAttention::Expanded;
        let model = Model::load_for(prefill, &checkpoint, &config, cpu.clone(), &mut |_, _| ()).unwrap();
        Self { model, experts: LocalExperts::load(&checkpoint, &config, cpu).unwrap(), config }
    }

    fn scheduler(&self, serving: Serving, prefill_attention: PrefillAttention) -> (Scheduler, KvPages) {
        let config = SchedulerConfig {
            block_size: 4,
            num_blocks: serving.num_blocks,
            max_num_seqs: 6,
            max_num_batched_tokens: serving.budget,
            max_model_len: 200,
            enable_prefix_caching: serving.caching,
            prefill_attention,
            max_waiting: 32,
            vocab_size: self.config.vocab_size,
        };
        (Scheduler::new(config).unwrap(), KvPages::new(&self.config, serving.num_blocks, 4))
    }

    /// Serves each round of requests to its end before the next; what all ranks together counted.
    fn serve(
        &mut self,
        serving: Serving,
        rounds: &[&[Request]],
    ) -> (BTreeMap<RequestId, Vec<Drawn>>, RankStats) {
        self.serve_by(PrefillAttention::Expanded, serving, rounds)
    }

    fn serve_by(
        &mut self,
        prefill: PrefillAttention,
        serving: Serving,
        rounds: &[&[Request]],
    ) -> (BTreeMap<RequestId, Vec<Drawn>>, RankStats) {
        let (mut scheduler, mut kv) = self.scheduler(serving, prefill);
        let mut done: BTreeMap<RequestId, Vec<Drawn>> = BTreeMap::new();
        let (mut preemptions, mut hits, mut steps) = (0, 0, 0);
        for round in rounds {
            round.iter().for_each(|request| scheduler.add(request.clone()).unwrap());
            while scheduler.has_work() {
                let step = scheduler.schedule();
                let logits = self.model.forward(&step, &mut kv, &mut self.experts).unwrap();
                for output in scheduler.complete(&logits) {
                    let drawn = output.tokens.iter().zip(&output.logprobs);
                    let drawn = drawn.map(|(&token, logprob)| (token, logprob.logprob.to_bits()));
                    done.entry(output.id).or_default().extend(drawn);
                }
                steps += 1;
                if steps % serving.move_after == 0 {
                    let moved = scheduler.take_back();
                    preemptions += scheduler.stats().preemptions;
                    hits += scheduler.stats().prefix_hits;
                    (scheduler, kv) = self.scheduler(serving, prefill);
                    moved.into_iter().for_each(|request| scheduler.add(request).unwrap());
                }
            }
        }
        let stats = scheduler.stats();
        let (preemptions, prefix_hits) = (preemptions + stats.preemptions, hits + stats.prefix_hits);
        (done, RankStats { preemptions, prefix_hits, ..stats })
    }

    /// What each request gets alone, its prompt at once.
    fn alone(&mut self, requests: &[Request]) -> BTreeMap<RequestId, Vec<Drawn>> {
        requests.iter().flat_map(|request| self.serve(CALM, &[std::slice::from_ref(request)]).0).collect()
    }
}

fn request(id: u128, prompt: Vec<u32>) -> Request {
    let greedy = id.is_multiple_of(2);
    Request {
        id: RequestId(id),
        prompt,
        generated: Vec::new(),
        sampling: SamplingParams {
            temperature: if greedy { 0.0 } else { 0.8 },
            seed: id as u64,
            ..SamplingParams::default()
        },
        stop: StopConditions {
            max_tokens: OUTPUT as u32,
            min_tokens: 0,
            eos_token_ids: vec![],
            stop_token_ids: vec![],
        },
        logprobs: Some(1),
        prompt_logprobs: None,
        grammar: None,
        priority: 0,
        turn: 0,
    }
}

fn prompt(seed: usize, len: usize) -> Vec<u32> {
    (0..len).map(|at| ((seed * 977 + at * at * 31 + at * 7) % 4000) as u32).collect()
}

fn requests() -> Vec<Request> {
    // The last three begin alike.
    let alike = |tail: usize| [prompt(9, 21), prompt(tail, 6 + tail)].concat();
    let prompts = [prompt(1, 1), prompt(2, 33), prompt(3, 50), alike(1), alike(2), alike(5)];
    (1..).zip(prompts).map(|(id, prompt)| request(id, prompt)).collect()
}

#[test]
fn cuts_neighbours_preemption_and_moves_change_no_bit() {
    let mut rig = Rig::load();
    let requests = requests();
    let wanted = rig.alone(&requests);
    assert!(wanted.len() == requests.len() && wanted.values().all(|drawn| drawn.len() == OUTPUT));
    let tight = Serving { num_blocks: 24, budget: 9, ..CALM };
    for serving in [
        CALM,
        Serving { budget: 6, ..CALM },
        Serving { budget: 17, ..CALM },
        Serving { caching: true, budget: 30, ..CALM },
        tight,
        Serving { caching: true, ..tight },
        Serving { move_after: 3, ..CALM },
        Serving { move_after: 8, budget: 13, caching: true, ..CALM },
        Serving { move_after: 10, ..tight },
    ] {
        let (got, stats) = rig.serve(serving, &[&requests]);
        assert_eq!(got, wanted, "{serving:?}");
        assert!(stats.preemptions > 0 || serving.num_blocks > 24, "{serving:?} preempts nobody");
    }
}

#[test]
fn what_was_drawn_is_not_the_same_as_part_of_a_prompt() {
    let mut rig = Rig::load();
    let first = request(2, prompt(4, 19));
    let (answer, _) = rig.serve(CALM, &[std::slice::from_ref(&first)]);
    let answer: Vec<u32> = answer[&first.id].iter().map(|drawn| drawn.0).collect();
    // A conversation goes on: the answer is a prompt now. One more begins like the first.
    let second = request(4, [&first.prompt[..], &answer, &prompt(5, 9)].concat());
    let third = request(6, [&first.prompt[..], &prompt(6, 9)].concat());
    let all = [first.clone(), second.clone(), third.clone()];
    let wanted = rig.alone(&all);
    let serving = Serving { caching: true, ..CALM };
    let (got, stats) = rig.serve(serving, &[&all[..1], &all[1..2], &all[2..]]);
    assert_eq!(got, wanted);
    // 19 tokens are four full blocks of prompt, and those alone are shared.
    assert_eq!(stats.prefix_hits, 16 + 16);

    // Absorbed, all rows are alike: what was drawn is shared too.
    let (_, stats) = rig.serve_by(PrefillAttention::Absorbed, serving, &[&all[..1], &all[1..2], &all[2..]]);
    assert_eq!(stats.prefix_hits, 32 + 16);
}

#[test]
fn both_ways_mean_the_same() {
    let mut rig = Rig::load();
    let requests = requests();
    let (expanded, _) = rig.serve(CALM, &[&requests]);
    let (absorbed, _) = rig.serve_by(PrefillAttention::Absorbed, CALM, &[&requests]);
    let first = |drawn: &BTreeMap<RequestId, Vec<Drawn>>| -> Vec<f32> {
        drawn.values().map(|drawn| f32::from_bits(drawn[0].1)).collect()
    };
    let (expanded_first, absorbed_first) = (first(&expanded), first(&absorbed));
    assert!(expanded != absorbed, "the ways have bits of their own");
    for (x, y) in expanded_first.iter().zip(&absorbed_first) {
        assert!((x - y).abs() < 1e-3, "{expanded_first:?} {absorbed_first:?}");
    }
}

#[test]
fn models_without_latents_have_nothing_to_expand() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/models/qwen3-moe-tied");
    let config = ModelConfig::from_dir(&dir).unwrap();
    assert_eq!(PrefillAttention::Absorbed.check(&config), Ok(()));
    let why = PrefillAttention::Expanded.check(&config).unwrap_err().to_string();
    assert!(why.contains("prefill_attention") && why.contains("MLA"), "{why}");
}
