//! Picks the DP rank of each sequence: by KV blocks in use, prompt tokens queued, and which prompt prefixes the rank has
//! probably cached.
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
/// What a block beyond the rank's capacity costs, in blocks: its sequence would wait or preempt another.
const OVERFLOW_COST: u64 = 4;

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
        load.unseen.retain(|_, unseen| {
            unseen.reports += 1;
            unseen.reports < REPORTS_UNTIL_SEEN
        });
        load.index.set_capacity(stats.kv_blocks.max(1) as usize);
        load.stats = stats;
    }

    /// Sequences that may still be sent to `rank` before its queue is full.
    pub fn room(&self, rank: u32) -> usize {
        self.ranks.get(&rank).map_or(0, |load| self.queue_max.saturating_sub(load.waiting()))
    }

    /// The rank where `job` costs least among those that `allowed` admits.
    pub fn pick(&self, job: &Job, allowed: impl Fn(u32) -> bool) -> Option<u32> {
        let candidates = self.ranks.iter().filter(|(rank, _)| allowed(**rank));
        candidates.min_by_key(|(_, load)| self.cost(load, job)).map(|(&rank, _)| rank)
    }

    /// Records that a sequence was sent to `rank`.
    pub fn sent(&mut self, rank: u32, id: RequestId, job: &Job) {
        self.picks += 1;
        let Some(load) = self.ranks.get_mut(&rank) else { return };
        let new = Unseen {
            uncached_tokens: load.uncached_tokens(job, self.block_size),
            blocks: load.new_blocks(job, self.block_size),
            reports: 0,
        };
        load.unseen.insert(id, new);
        load.in_flight += 1;
        load.picked_at = self.picks;
        load.index.insert(&job.blocks);
    }

    /// A sequence has its first token: nothing of its prompt is queued any more.
    pub fn started(&mut self, rank: u32, id: RequestId) {
        if let Some(load) = self.ranks.get_mut(&rank) {
            load.unseen.remove(&id);
        }
    }

    /// A sequence left the rank; the blocks of `tokens`, prompt and output, may stay cached there.
    pub fn left(&mut self, rank: u32, id: RequestId, blocks: &[u64]) {
        if let Some(load) = self.ranks.get_mut(&rank) {
            load.unseen.remove(&id);
            load.in_flight = load.in_flight.saturating_sub(1);
            load.index.insert(blocks);
        }
    }

    /// Blocks' worth of work and memory, then the emptier rank, then the one picked longer ago.
    fn cost(&self, load: &RankLoad, job: &Job) -> (u64, usize, u64) {
        let block_size = self.block_size as u64;
        let unseen_tokens: u64 = load.unseen.values().map(|unseen| unseen.uncached_tokens).sum();
        let unseen_blocks: u64 = load.unseen.values().map(|unseen| unseen.blocks).sum();
        let prefill =
            load.stats.queued_prefill_tokens + unseen_tokens + load.uncached_tokens(job, self.block_size);
        let blocks =
            u64::from(load.stats.kv_blocks_used) + unseen_blocks + load.new_blocks(job, self.block_size);
        let capacity = if load.stats.kv_blocks == 0 { u64::MAX } else { u64::from(load.stats.kv_blocks) };
        let overflow = blocks.saturating_sub(capacity);
        let cost = prefill.div_ceil(block_size) + blocks + OVERFLOW_COST * overflow;
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

    /// Blocks that the sequence adds, with one for its output.
    fn new_blocks(&self, job: &Job, block_size: usize) -> u64 {
        self.uncached_tokens(job, block_size).div_ceil(block_size as u64) + 1
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
                prop_assert_eq!(load.in_flight, 0);
            }
        }
    }
}
