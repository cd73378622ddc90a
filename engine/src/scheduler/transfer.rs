//! KV blocks that go to another rank, and those that come from one: the prefix cache, filled from outside.
//!
//! A rank that goes on with a sequence has the full blocks of its prompt brought here instead of computing them. They are
//! cached like blocks of its own: whoever needs the room may evict them, and what is missing is computed.

use super::Scheduler;
use super::kv::{BlockHash, block_hashes};

impl Scheduler {
    /// Names of the full blocks of a prompt; none where nothing is cached. They are the same on every rank of the block size.
    pub fn prompt_blocks(&self, prompt: &[u32]) -> Vec<BlockHash> {
        match self.config.enable_prefix_caching {
            true => block_hashes(prompt, self.config.block_size),
            false => Vec::new(),
        }
    }

    /// The blocks that hold the longest prefix of `hashes` that is cached here. They stay what they are until the next
    /// step is scheduled or another block is taken in.
    pub fn cached(&self, hashes: &[BlockHash]) -> Vec<u32> {
        self.pool.find(hashes)
    }

    /// Whether no step is in flight. Only then may blocks be taken in (SC-2): a step that is computed again after a fault
    /// may write to blocks that were given up.
    pub fn is_settled(&self) -> bool {
        self.pipeline.is_empty()
    }

    /// Takes in blocks that were computed elsewhere, as far as there is room. `write` is told which of `hashes` goes to
    /// which block, and fills them. Returns how many of a prefix of `hashes` are here then.
    ///
    /// # Errors
    /// Those of `write`: nothing was taken in.
    ///
    /// # Panics
    /// When a step is in flight.
    pub fn take_in<E>(
        &mut self,
        hashes: &[BlockHash],
        write: impl FnOnce(&[(usize, u32)]) -> Result<(), E>,
    ) -> Result<usize, E> {
        assert!(self.is_settled(), "blocks come in between steps");
        let known = self.pool.find(hashes);
        // Held, so that what follows them does not take their place.
        let mut held = self.pool.take(&known, 0).unwrap_or_default();
        let mut fresh = Vec::new();
        for index in held.len()..hashes.len() {
            let Some(block) = self.pool.take(&[], 1) else { break };
            fresh.extend(block.into_iter().map(|block| (index, block)));
        }
        let written = write(&fresh);
        if written.is_ok() {
            fresh.iter().for_each(|&(index, block)| self.pool.register(block, hashes[index]));
        }
        held.extend(fresh.iter().map(|&(_, block)| block));
        self.pool.release(&held);
        written.map(|()| held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::super::SchedulerConfig;
    use super::*;
    use crate::batch::PrefillAttention;

    fn scheduler(num_blocks: usize) -> Scheduler {
        let config = SchedulerConfig {
            block_size: 4,
            num_blocks,
            max_num_seqs: 2,
            max_num_batched_tokens: 16,
            max_model_len: 64,
            enable_prefix_caching: true,
            prefill_attention: PrefillAttention::default(),
            max_waiting: 2,
            vocab_size: 100,
        };
        Scheduler::new(config).unwrap()
    }

    #[test]
    fn blocks_from_elsewhere_are_hit_like_blocks_of_its_own() {
        let mut scheduler = scheduler(8);
        let size = scheduler.config().block_size;
        let prompt: Vec<u32> = (0..3 * size as u32 + 1).collect();
        let hashes = scheduler.prompt_blocks(&prompt);
        assert_eq!(hashes.len(), 3);
        let mut written = Vec::new();
        let here = scheduler.take_in(&hashes[..2], |blocks| {
            written.extend_from_slice(blocks);
            Ok::<(), ()>(())
        });
        assert_eq!(here, Ok(2));
        assert_eq!(written.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1]);
        let blocks: Vec<u32> = written.iter().map(|(_, block)| *block).collect();
        assert_eq!(scheduler.cached(&hashes), blocks);
        // Only what is missing comes again.
        let here = scheduler.take_in(&hashes, |blocks| {
            assert_eq!(blocks.len(), 1);
            assert_eq!(blocks[0].0, 2);
            Ok::<(), ()>(())
        });
        assert_eq!((here, scheduler.cached(&hashes).len()), (Ok(3), 3));
        assert_eq!(scheduler.take_cache_changes().added.len(), 3);
    }

    #[test]
    fn what_could_not_be_written_is_not_cached_and_its_blocks_are_free() {
        let mut scheduler = scheduler(4);
        let prompt: Vec<u32> = (0..4 * scheduler.config().block_size as u32).collect();
        let hashes = scheduler.prompt_blocks(&prompt);
        assert_eq!(scheduler.take_in(&hashes, |_| Err("torn")), Err("torn"));
        assert!(scheduler.cached(&hashes).is_empty());
        assert_eq!(scheduler.stats().kv_blocks_used, 0);
        assert_eq!(scheduler.take_in(&hashes, |_| Ok::<(), ()>(())), Ok(4));
    }

    #[test]
    fn what_comes_in_takes_as_much_room_as_there_is() {
        let mut scheduler = scheduler(3);
        let prompt: Vec<u32> = (0..5 * scheduler.config().block_size as u32).collect();
        let hashes = scheduler.prompt_blocks(&prompt);
        assert_eq!(scheduler.take_in(&hashes, |_| Ok::<(), ()>(())), Ok(3));
        assert_eq!(scheduler.cached(&hashes).len(), 3);
    }
}
