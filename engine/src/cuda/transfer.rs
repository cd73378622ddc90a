//! KV blocks of a GPU to and from the host: for sequences that go on at another rank.

use heliostat_kernels::cuda::{Buffer, CudaError, Pinned, Stream};

use super::load::{BLOCK_SIZE, bytes_per_block};
use super::model::{Dp, Kv};
use super::rank::CudaRank;

/// Host memory that blocks pass through.
const STAGING_BYTES: usize = 8 << 20;

/// The memory that blocks pass through, made at the first use.
#[derive(Debug, Default)]
pub(super) struct Staging(Option<Pinned<u8>>);

impl Staging {
    fn of(&mut self, stream: &Stream, block_bytes: usize) -> Result<&Pinned<u8>, CudaError> {
        match &mut self.0 {
            Some(made) => Ok(made),
            none => Ok(none.insert(stream.device().pinned(STAGING_BYTES.max(block_bytes))?)),
        }
    }
}

impl Dp {
    /// The parts of a block: those of each layer in turn.
    fn block(&self, block: u32) -> impl Iterator<Item = Buffer<u8>> {
        let parts = self.kv.iter().flat_map(|kv| match kv {
            Kv::Latent(cache) => vec![cache],
            Kv::KeysValues(keys, values) => vec![keys, values],
        });
        parts.map(move |cache| {
            let len = BLOCK_SIZE * self.config.kv_elements_per_token() / self.parts();
            let at = block as usize * len;
            cache.slice(at..at + len).cast()
        })
    }

    /// Caches of a layer.
    fn parts(&self) -> usize {
        match self.kv.first() {
            Some(Kv::KeysValues(..)) => 2,
            Some(Kv::Latent(_)) | None => 1,
        }
    }
}

impl CudaRank {
    /// Bytes of one KV block, over all layers; 0 on a rank without tokens.
    pub fn block_bytes(&self) -> usize {
        self.model.dp.as_ref().map_or(0, |dp| bytes_per_block(&dp.config))
    }

    /// What these blocks hold, one after the other, when the steps in flight are done. Blocks.
    ///
    /// # Errors
    /// The device failed.
    pub fn read_blocks(&mut self, blocks: &[u32]) -> Result<Vec<u8>, CudaError> {
        let Some(dp) = &self.model.dp else { return Ok(Vec::new()) };
        let (bytes, mut read) = (bytes_per_block(&dp.config), Vec::new());
        let staging = self.staging.of(&self.stream, bytes)?;
        for some in blocks.chunks((staging.len() / bytes).max(1)) {
            let mut at = 0;
            for part in some.iter().flat_map(|&block| dp.block(block)) {
                part.copy_to_pinned_at(&self.stream, staging, at, part.len())?;
                at += part.len();
            }
            self.stream.synchronize()?;
            read.extend(staging.read(0..at));
        }
        Ok(read)
    }

    /// Makes blocks hold what [`Self::read_blocks`] read of others. Blocks.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// If one is not of [`Self::block_bytes`].
    pub fn write_blocks(&mut self, blocks: &[(u32, &[u8])]) -> Result<(), CudaError> {
        let Some(dp) = &self.model.dp else { return Ok(()) };
        let bytes = bytes_per_block(&dp.config);
        let staging = self.staging.of(&self.stream, bytes)?;
        for some in blocks.chunks((staging.len() / bytes).max(1)) {
            let mut at = 0;
            for &(block, content) in some {
                assert_eq!(content.len(), bytes, "a block is written whole");
                staging.write(at, content);
                for part in dp.block(block) {
                    part.copy_from_pinned_at(&self.stream, staging, at, part.len())?;
                    at += part.len();
                }
            }
            // The memory is used again.
            self.stream.synchronize()?;
        }
        Ok(())
    }
}
