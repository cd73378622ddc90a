//! Picks the DP rank of each sequence: by KV blocks in use, prompt tokens queued, which prompt prefixes the rank has
//! probably cached, and how long its steps take.
//!
//! Pure. Ranks report their load after a step; what was sent since and is not in a report yet is counted here, so that
//! a burst spreads evenly.

mod prefix;

use std::collections::{BTreeMap, HashMap};

use heliostat_engine::request::{RankStats, RequestId};

pub use prefix::{PrefixIndex, block_hashes};

/// Blocks that the index of a rank holds before the rank has said how many KV blocks it has.
const INDEX_BLOCKS_DEFAULT: usize = 4096;
/// A report may have left before a sequence arrived: the second one after it surely counts it.
const REPORTS_UNTIL_SEEN: u8 = 2;
/// Blocks that a sequence takes for its output, at first.
const OUTPUT_BLOCKS: u64 = 1;
/// What a block beyond the rank's capacity costs, in blocks: its sequence would wait or preempt another.
const OVERFLOW_COST: u64 = 4;

/// The pace of a rank is counted in this part of that of the fastest.
const PACE: u64 = 16;
/// Ranks whose steps take less than this many sixteenths of the fastest one's are as fast: steps of equal ranks vary, too.
const PACE_DIFFERS: u64 = 20;
const PACE_MAX: u64 = 16 * PACE;

/// What the router must know of a sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// Tokens to prefill.
    pub tokens: usize,
    /// Hashes of their full blocks, see [`block_hashes`]; empty where the prefix cache must not serve the sequence.
    pub blocks: Vec<u64>,
}

/// The loads of all ready ranks.
#[derive(Debug)]
pub struct Router {
    block_size: usize,
    /// Sequences that may wait at one rank.
    queue_max: usize,
    ranks: BTreeMap<u32, RankLoad>,
    picks: u64,
}

#[derive(Debug)]
struct RankLoad {
    stats: RankStats,
    /// Sent, and not in a report yet.
    unseen: HashMap<RequestId, Unseen>,
    /// Sums over `unseen`.
    unseen_tokens: u64,
    unseen_blocks: u64,
    /// How long its steps take, smoothed; 0 before the first.
    step_us: u64,
    in_flight: usize,
    index: PrefixIndex,
    picked_at: u64,
}

#[derive(Debug)]
struct Unseen {
    uncached_tokens: u64,
    blocks: u64,
    reports: u8,
}

impl Router {
    /// A router without ranks. `block_size` is that of the KV cache.
    pub fn new(block_size: usize, queue_max: usize) -> Self {
        Self { block_size, queue_max, ranks: BTreeMap::new(), picks: 0 }
    }

    /// A rank became ready; it has nothing yet.
    pub fn add(&mut self, rank: u32) {
        let load = RankLoad {
            stats: RankStats::default(),
            unseen: HashMap::new(),
            unseen_tokens: 0,
            unseen_blocks: 0,
            step_us: 0,
            in_flight: 0,
            index: PrefixIndex::new(INDEX_BLOCKS_DEFAULT),
            picked_at: 0,
        };
        self.ranks.insert(rank, load);
    }

    /// A rank is gone, with all it held.
    pub fn remove(&mut self, rank: u32) {
        self.ranks.remove(&rank);
    }

    /// Takes a rank's report.
    pub fn report(&mut self, rank: u32, stats: RankStats) {
        let Some(load) = self.ranks.get_mut(&rank) else { return };
        load.age();
        if stats.steps > load.stats.steps {
            load.step_us =
                if load.step_us == 0 { stats.step_us } else { (7 * load.step_us + stats.step_us) / 8 };
        }
        load.index.set_capacity(stats.kv_blocks.max(1) as usize);
        load.stats = stats;
    }

    /// Sequences that may still be sent to `rank` before its queue is full.
    pub fn room(&self, rank: u32) -> usize {
        self.ranks.get(&rank).map_or(0, |load| self.queue_max.saturating_sub(load.waiting()))
    }

    /// The rank where `job` costs least among those that `allowed` admits.
    pub fn pick(&self, job: &Job, allowed: impl Fn(u32) -> bool) -> Option<u32> {
        let fastest = self.ranks.values().map(|load| load.step_us).filter(|&us| us > 0).min().unwrap_or(1);
        let candidates = self.ranks.iter().filter(|(rank, _)| allowed(**rank));
        candidates.min_by_key(|(_, load)| self.cost(load, job, fastest)).map(|(&rank, _)| rank)
    }

    /// Records that a sequence was sent to `rank`.
    pub fn sent(&mut self, rank: u32, id: RequestId, job: &Job) {
        self.picks += 1;
        let Some(load) = self.ranks.get_mut(&rank) else { return };
        let uncached_tokens = load.uncached_tokens(job, self.block_size);
        let blocks = uncached_tokens.div_ceil(self.block_size as u64) + OUTPUT_BLOCKS;
        let new = Unseen { uncached_tokens, blocks, reports: 0 };
        load.note(id, new);
        load.in_flight += 1;
        load.picked_at = self.picks;
        load.index.insert(&job.blocks);
    }

    /// A sequence has its first token: nothing of its prompt is queued any more.
    pub fn started(&mut self, rank: u32, id: RequestId) {
        if let Some(load) = self.ranks.get_mut(&rank) {
            load.forget(id);
        }
    }

    /// A sequence left the rank; the blocks of `tokens`, prompt and output, may stay cached there.
    pub fn left(&mut self, rank: u32, id: RequestId, blocks: &[u64]) {
        if let Some(load) = self.ranks.get_mut(&rank) {
            load.forget(id);
            load.in_flight = load.in_flight.saturating_sub(1);
            load.index.insert(blocks);
        }
    }

    /// Blocks' worth of work and memory at the rank's pace, then the emptier rank, then the one picked longer ago.
    /// `fastest` is the shortest step of all ranks.
    fn cost(&self, load: &RankLoad, job: &Job, fastest: u64) -> (u64, usize, u64) {
        let block_size = self.block_size as u64;
        let uncached = load.uncached_tokens(job, self.block_size);
        let prefill = load.stats.queued_prefill_tokens + load.unseen_tokens + uncached;
        let blocks = u64::from(load.stats.kv_blocks_used)
            + load.unseen_blocks
            + uncached.div_ceil(block_size)
            + OUTPUT_BLOCKS;
        let capacity = if load.stats.kv_blocks == 0 { u64::MAX } else { u64::from(load.stats.kv_blocks) };
        let overflow = blocks.saturating_sub(capacity);
        let work = prefill.div_ceil(block_size) + blocks;
        let cost = work * load.pace(fastest) / PACE + OVERFLOW_COST * overflow;
        (cost, load.in_flight, load.picked_at)
    }
}

impl RankLoad {
    fn waiting(&self) -> usize {
        self.stats.waiting as usize + self.unseen.len()
    }

    fn uncached_tokens(&self, job: &Job, block_size: usize) -> u64 {
        job.tokens.saturating_sub(self.index.matched(&job.blocks) * block_size) as u64
    }

    /// How long its steps take, in sixteenths of the fastest rank's.
    fn pace(&self, fastest_us: u64) -> u64 {
        let pace = self.step_us * PACE / fastest_us.max(1);
        if pace < PACE_DIFFERS { PACE } else { pace.min(PACE_MAX) }
    }

    fn note(&mut self, id: RequestId, new: Unseen) {
        self.forget(id);
        self.unseen_tokens += new.uncached_tokens;
        self.unseen_blocks += new.blocks;
        self.unseen.insert(id, new);
    }

    fn forget(&mut self, id: RequestId) {
        if let Some(old) = self.unseen.remove(&id) {
            self.unseen_tokens -= old.uncached_tokens;
            self.unseen_blocks -= old.blocks;
        }
    }

    /// Another report has come: what it surely counts is not unseen any more.
    fn age(&mut self) {
        let (tokens, blocks) = (&mut self.unseen_tokens, &mut self.unseen_blocks);
        self.unseen.retain(|_, unseen| {
            unseen.reports += 1;
            let kept = unseen.reports < REPORTS_UNTIL_SEEN;
            if !kept {
                *tokens -= unseen.uncached_tokens;
                *blocks -= unseen.blocks;
            }
            kept
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn router(ranks: u32) -> Router {
        let mut router = Router::new(16, 8);
        (0..ranks).for_each(|rank| router.add(rank));
        router
    }

    fn job(tokens: &[u32]) -> Job {
        Job { tokens: tokens.len(), blocks: block_hashes(tokens, 16) }
    }

    fn send(router: &mut Router, id: u128, job: &Job) -> u32 {
        let rank = router.pick(job, |_| true).unwrap();
        router.sent(rank, RequestId(id), job);
        rank
    }

    #[test]
    fn a_burst_between_reports_spreads() {
        let mut router = router(4);
        let mut count = [0; 4];
        for id in 0..40 {
            count[send(&mut router, id, &job(&[id as u32; 100])) as usize] += 1;
        }
        assert_eq!(count, [10; 4]);
    }

    #[test]
    fn equal_prefixes_meet_until_their_rank_is_much_busier() {
        let mut router = router(2);
        let prompt: Vec<u32> = (0..320).collect();
        let first = send(&mut router, 0, &job(&prompt));
        router.started(first, RequestId(0));
        assert_eq!(send(&mut router, 1, &job(&[&prompt[..], &[7; 20]].concat())), first);
        let busy = RankStats { kv_blocks: 1000, kv_blocks_used: 900, ..RankStats::default() };
        router.report(first, busy);
        assert_eq!(send(&mut router, 2, &job(&prompt)), 1 - first);
    }

    #[test]
    fn a_rank_that_lost_its_cache_attracts_no_more() {
        let mut router = router(2);
        let prompt = job(&(0..320).collect::<Vec<_>>());
        let first = send(&mut router, 0, &prompt);
        router.remove(first);
        router.add(first);
        assert_eq!(router.ranks[&first].index.matched(&prompt.blocks), 0);
    }

    #[test]
    fn reports_queued_prompts_and_memory_decide() {
        let mut router = router(3);
        let stats = |used, queued| RankStats {
            kv_blocks: 100,
            kv_blocks_used: used,
            queued_prefill_tokens: queued,
            ..RankStats::default()
        };
        router.report(0, stats(10, 1600));
        router.report(1, stats(60, 0));
        router.report(2, stats(30, 160));
        assert_eq!(router.pick(&job(&[1; 16]), |_| true), Some(2));
        assert_eq!(router.pick(&job(&[1; 16]), |rank| rank != 2), Some(1));
        router.report(1, stats(99, 0));
        router.report(2, stats(100, 0));
        router.report(0, stats(50, 640));
        assert_eq!(router.pick(&job(&[1; 640]), |_| true), Some(0), "the prompt fits only there");
    }

    #[test]
    fn a_slow_rank_gets_less() {
        let mut router = router(2);
        for step in 1..=10 {
            for (rank, step_us) in [(0, 10_000), (1, 30_000)] {
                router.report(rank, RankStats { steps: step, step_us, ..RankStats::default() });
            }
        }
        let mut count = [0; 2];
        for id in 0..40 {
            count[send(&mut router, id, &job(&[id as u32; 100])) as usize] += 1;
        }
        assert!((28..=32).contains(&count[0]), "{count:?}");
    }

    #[test]
    fn steps_that_are_nearly_as_long_make_no_difference() {
        let mut router = router(2);
        router.report(0, RankStats { steps: 1, step_us: 10_000, ..RankStats::default() });
        router.report(1, RankStats { steps: 1, step_us: 11_900, ..RankStats::default() });
        let first: Vec<u32> = (0..4).map(|id| send(&mut router, id, &job(&[id as u32; 100]))).collect();
        assert_eq!(first, [0, 1, 0, 1]);
    }

    #[test]
    fn a_full_queue_has_no_room_until_reports_say_so() {
        let mut router = router(1);
        for id in 0..8 {
            send(&mut router, id, &job(&[1; 5]));
        }
        assert_eq!(router.room(0), 0);
        router.report(0, RankStats { waiting: 3, ..RankStats::default() });
        assert_eq!(router.room(0), 0, "the report may be older than what was sent");
        router.report(0, RankStats { waiting: 3, ..RankStats::default() });
        assert_eq!(router.room(0), 5);
        assert_eq!(router.room(9), 0);
    }

    proptest! {
        #[test]
        fn load_stays_balanced_and_is_forgotten(lengths in prop::collection::vec(1usize..400, 1..80), ranks in 1u32..6) {
            let mut router = router(ranks);
            let mut sent = Vec::new();
            let mut tokens = vec![0; ranks as usize];
            for (id, &length) in lengths.iter().enumerate() {
                let job = job(&vec![id as u32; length]);
                let rank = send(&mut router, id as u128, &job);
                tokens[rank as usize] += length;
                sent.push((rank, RequestId(id as u128), job));
            }
            let spread = tokens.iter().max().unwrap() - tokens.iter().min().unwrap();
            prop_assert!(spread <= 400 + 32 * lengths.len(), "{tokens:?}");
            for (rank, id, job) in sent {
                router.left(rank, id, &job.blocks);
            }
            for load in router.ranks.values() {
                prop_assert!(load.unseen.is_empty());
                prop_assert_eq!((load.unseen_tokens, load.unseen_blocks), (0, 0));
                prop_assert_eq!(load.in_flight, 0);
            }
        }
    }
}
