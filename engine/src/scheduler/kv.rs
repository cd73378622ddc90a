//! Who owns which KV block, and which blocks hold prefixes worth keeping.
//!
//! Knows block numbers only; the keys and values are the model's `KvPages`. Only full blocks are shared and a full
//! block is never written again, so nothing is ever copied on write.

use std::collections::{BTreeMap, HashMap, HashSet};

use bincode::{Decode, Encode};
use xxhash_rust::xxh3::xxh3_128;

/// Names a full block by its tokens and all tokens before it, and by how their rows attended where that differs: by
/// what its keys and values depend on. The same on every rank of the same block size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub struct BlockHash(pub u128);

/// Appends to `hashes`, which cover a prefix of `tokens`, those of the further full blocks. Rows from `absorbed_from` on
/// attend otherwise than those before: blocks with such rows have names of their own (PA-2).
pub(crate) fn extend_hashes(
    hashes: &mut Vec<BlockHash>,
    tokens: &[u32],
    block_size: usize,
    absorbed_from: Option<usize>,
) {
    let mut bytes = Vec::with_capacity(16 + 4 * block_size);
    for block in tokens.chunks_exact(block_size).skip(hashes.len()) {
        bytes.clear();
        let parent = hashes.last().map_or(0, |hash| hash.0);
        bytes.extend_from_slice(&parent.to_le_bytes());
        bytes.extend(block.iter().flat_map(|token| token.to_le_bytes()));
        let start = hashes.len() * block_size;
        if let Some(from) = absorbed_from.filter(|&from| from < start + block_size) {
            bytes.extend((from.saturating_sub(start) as u64).to_le_bytes());
        }
        hashes.push(BlockHash(xxh3_128(&bytes)));
    }
}

/// The hashes of the full blocks of `tokens`, all of which attended in the way of prompts: what a router compares with the ranks' caches.
pub fn block_hashes(tokens: &[u32], block_size: usize) -> Vec<BlockHash> {
    let mut hashes = Vec::with_capacity(tokens.len() / block_size);
    extend_hashes(&mut hashes, tokens, block_size, None);
    hashes
}

/// What changed in the prefix cache since the last report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct CacheChanges {
    /// Blocks that can be hit now and could not before.
    pub added: Vec<BlockHash>,
    /// Blocks that can no longer be hit.
    pub removed: Vec<BlockHash>,
}

#[derive(Clone, Debug, Default)]
struct Block {
    /// Sequences that hold it.
    refs: u32,
    /// Set while the prefix cache knows it.
    hash: Option<BlockHash>,
    /// Key in `idle_cached` while it is there.
    idle_since: u64,
}

/// All KV blocks of a rank.
///
/// Invariant (KV-1): a block is in exactly one of three states: held (`refs > 0`), idle with a hash (in
/// `idle_cached`), or idle without one (in `blank`).
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    /// Idle blocks whose content is worthless.
    blank: Vec<u32>,
    /// Idle blocks that can still be hit, by the time they became idle: the first is evicted first.
    idle_cached: BTreeMap<u64, u32>,
    cached: HashMap<BlockHash, u32>,
    clock: u64,
    added: HashSet<BlockHash>,
    removed: HashSet<BlockHash>,
}

impl BlockPool {
    /// A pool of idle blocks.
    pub(crate) fn new(num_blocks: usize) -> Self {
        let num_blocks = u32::try_from(num_blocks).expect("block numbers are u32");
        Self {
            blocks: vec![Block::default(); num_blocks as usize],
            blank: (0..num_blocks).rev().collect(),
            idle_cached: BTreeMap::new(),
            cached: HashMap::new(),
            clock: 0,
            added: HashSet::new(),
            removed: HashSet::new(),
        }
    }

    /// Blocks in all.
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that no sequence holds.
    pub(crate) fn num_idle(&self) -> usize {
        self.blank.len() + self.idle_cached.len()
    }

    /// The cached blocks of the longest known prefix of `hashes`.
    pub(crate) fn find(&self, hashes: &[BlockHash]) -> Vec<u32> {
        hashes.iter().map_while(|hash| self.cached.get(hash).copied()).collect()
    }

    /// Takes `hits` (from `find`) and `fresh` blocks without content; all or nothing.
    pub(crate) fn take(&mut self, hits: &[u32], fresh: usize) -> Option<Vec<u32>> {
        let idle_hits = hits.iter().filter(|&&block| self.blocks[block as usize].refs == 0).count();
        if self.num_idle() - idle_hits < fresh {
            return None;
        }
        for &block in hits {
            let state = &mut self.blocks[block as usize];
            if state.refs == 0 {
                self.idle_cached.remove(&state.idle_since);
            }
            state.refs += 1;
        }
        let mut table = hits.to_vec();
        for _ in 0..fresh {
            table.push(self.take_fresh());
        }
        Some(table)
    }

    fn take_fresh(&mut self) -> u32 {
        let block = self.blank.pop().unwrap_or_else(|| {
            let (_, block) = self.idle_cached.pop_first().expect("the caller counted the idle blocks");
            let hash =
                self.blocks[block as usize].hash.take().expect("idle_cached holds hashed blocks (KV-1)");
            self.cached.remove(&hash);
            if !self.added.remove(&hash) {
                self.removed.insert(hash);
            }
            block
        });
        let state = &mut self.blocks[block as usize];
        assert_eq!(state.refs, 0, "block {block} was idle and held at once");
        state.refs = 1;
        block
    }

    /// Makes a held, full and computed block hittable. Does nothing when another block has that content already.
    pub(crate) fn register(&mut self, block: u32, hash: BlockHash) {
        let state = &mut self.blocks[block as usize];
        assert!(state.refs > 0, "block {block} is registered by nobody");
        if state.hash.is_some() || self.cached.contains_key(&hash) {
            return;
        }
        state.hash = Some(hash);
        self.cached.insert(hash, block);
        if !self.removed.remove(&hash) {
            self.added.insert(hash);
        }
    }

    /// Gives up one hold of each block of a table. Later blocks become idle first, so they are evicted first: a cached
    /// block is of no use without those before it.
    pub(crate) fn release(&mut self, table: &[u32]) {
        for &block in table.iter().rev() {
            let state = &mut self.blocks[block as usize];
            assert!(state.refs > 0, "block {block} is released twice");
            state.refs -= 1;
            if state.refs > 0 {
                continue;
            }
            if state.hash.is_some() {
                state.idle_since = self.clock;
                self.idle_cached.insert(self.clock, block);
                self.clock += 1;
            } else {
                self.blank.push(block);
            }
        }
    }

    /// Net changes since the last call; bounded by the number of blocks however rarely it is called.
    pub(crate) fn take_changes(&mut self) -> CacheChanges {
        CacheChanges { added: self.added.drain().collect(), removed: self.removed.drain().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_hit_until_its_tail_is_evicted_first() {
        let hashes = block_hashes(&[1, 2, 3, 4, 5, 6, 7], 2);
        assert_eq!(hashes.len(), 3);
        let mut pool = BlockPool::new(4);
        let table = pool.take(&[], 3).unwrap();
        for (&block, &hash) in table.iter().zip(&hashes) {
            pool.register(block, hash);
        }
        pool.release(&table);
        assert_eq!(pool.find(&hashes), table);
        assert_eq!(pool.take_changes().added.len(), 3);

        let other = pool.take(&[], 2).unwrap();
        assert_eq!(pool.find(&hashes), table[..2], "the blank block goes first, then the last of the prefix");
        assert_eq!(pool.take_changes(), CacheChanges { added: vec![], removed: vec![hashes[2]] });

        assert_eq!(pool.take(&table[..2], 1), None, "hits are not counted as free blocks too");
        let again = pool.take(&table[..2], 0).unwrap();
        assert_eq!(pool.num_idle(), 0);
        pool.release(&again);
        pool.release(&other);
        assert_eq!(pool.num_idle(), 4);
    }

    #[test]
    fn hashes_depend_on_everything_before() {
        let a = block_hashes(&[1, 2, 3, 4], 2);
        let b = block_hashes(&[9, 2, 3, 4], 2);
        assert_ne!(a[1], b[1]);
        assert_eq!(a[0], block_hashes(&[1, 2, 7], 2)[0]);
    }

    #[test]
    fn a_block_with_rows_that_attended_otherwise_is_another_block() {
        let tokens: Vec<u32> = (0..12).collect();
        let named = |absorbed_from| {
            let mut hashes = Vec::new();
            extend_hashes(&mut hashes, &tokens, 4, absorbed_from);
            hashes
        };
        let prompt = block_hashes(&tokens, 4);
        assert_eq!(named(Some(12)), prompt, "a prompt has one name, whatever else a rank computes");
        let answers: Vec<Vec<BlockHash>> = [4, 5, 8].map(|from| named(Some(from))).into();
        assert!(answers.iter().all(|hashes| hashes[0] == prompt[0] && hashes[2] != prompt[2]));
        assert!(answers[2][1] == prompt[1] && answers[0][1] != prompt[1] && answers[0][1] != answers[1][1]);
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn a_double_release_is_caught() {
        let mut pool = BlockPool::new(1);
        let table = pool.take(&[], 1).unwrap();
        pool.release(&table);
        pool.release(&table);
    }
}
