//! Remembers which prompt blocks a rank has probably cached.

use std::collections::{HashMap, VecDeque};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Hash of each full block of `tokens`, each over all tokens up to its end.
pub fn block_hashes(tokens: &[u32], block_size: usize) -> Vec<u64> {
    let mut bytes = Vec::with_capacity(block_size * 4);
    let mut hash = 0;
    let blocks = tokens.chunks_exact(block_size.max(1));
    let chained = blocks.map(|block| {
        bytes.clear();
        bytes.extend(block.iter().flat_map(|token| token.to_le_bytes()));
        hash = xxh3_64_with_seed(&bytes, hash);
        hash
    });
    chained.collect()
}

/// The block hashes last used at one rank, at most `capacity`.
#[derive(Debug)]
pub struct PrefixIndex {
    capacity: usize,
    /// When each was last used.
    used_at: HashMap<u64, u64>,
    /// Oldest first. An entry whose time is not the hash's last use is stale.
    order: VecDeque<(u64, u64)>,
    clock: u64,
}

impl PrefixIndex {
    /// An empty index.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, used_at: HashMap::new(), order: VecDeque::new(), clock: 0 }
    }

    /// Changes how many hashes it holds.
    pub fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
        self.evict();
    }

    /// How many leading blocks of `hashes` it holds.
    pub fn matched(&self, hashes: &[u64]) -> usize {
        hashes.iter().take_while(|hash| self.used_at.contains_key(hash)).count()
    }

    /// Adds the blocks of one sequence; its later blocks are forgotten before its earlier ones.
    pub fn insert(&mut self, hashes: &[u64]) {
        for &hash in hashes.iter().rev() {
            self.clock += 1;
            self.used_at.insert(hash, self.clock);
            self.order.push_back((hash, self.clock));
        }
        self.evict();
    }

    fn evict(&mut self) {
        while self.used_at.len() > self.capacity {
            let Some((hash, at)) = self.order.pop_front() else { break };
            if self.used_at.get(&hash) == Some(&at) {
                self.used_at.remove(&hash);
            }
        }
        if self.order.len() > 2 * self.capacity + 64 {
            let used_at = &self.used_at;
            self.order.retain(|(hash, at)| used_at.get(hash) == Some(at));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_hash_depends_on_all_before_it() {
        let one = block_hashes(&[1, 2, 3, 4, 5], 2);
        let other = block_hashes(&[9, 2, 3, 4], 2);
        assert_eq!((one.len(), other.len()), (2, 2));
        assert_ne!(one[1], other[1]);
        assert_eq!(one[0], block_hashes(&[1, 2], 2)[0]);
    }

    #[test]
    fn the_tail_of_an_old_prompt_goes_first() {
        let mut index = PrefixIndex::new(3);
        index.insert(&[1, 2, 3]);
        index.insert(&[9]);
        assert_eq!(index.matched(&[1, 2, 3]), 2);
        assert_eq!(index.matched(&[9]), 1);
    }

    proptest! {
        #[test]
        fn it_is_bounded(prompts in prop::collection::vec(prop::collection::vec(0u64..50, 0..20), 0..100)) {
            let mut index = PrefixIndex::new(10);
            for prompt in &prompts {
                index.insert(prompt);
                prop_assert!(index.used_at.len() <= 10);
                prop_assert!(index.order.len() <= 2 * 10 + 64);
            }
        }
    }
}
