//! Storage of the paged KV cache: `[block][position in block][elements]` for each layer, f32.
//!
//! Which block holds what is the scheduler's business.

use heliostat_kernels::cpu::attention::{self, Pages, slot};

use crate::config::{Attention, ModelConfig};

/// KV blocks of all layers.
#[derive(Debug)]
pub struct KvPages {
    layers: Vec<LayerPages>,
    num_blocks: usize,
    block_size: usize,
    widths: Widths,
}

/// Elements of one position of one layer.
#[derive(Clone, Copy, Debug)]
struct Widths {
    /// Latent and rotated key together, or all keys.
    first: usize,
    /// All values; 0 with latent attention.
    second: usize,
}

#[derive(Debug)]
struct LayerPages {
    first: Vec<f32>,
    second: Vec<f32>,
}

impl KvPages {
    /// Zeroed storage of `num_blocks` blocks of `block_size` positions.
    ///
    /// # Panics
    /// If `block_size` is 0.
    pub fn new(config: &ModelConfig, num_blocks: usize, block_size: usize) -> Self {
        assert!(block_size > 0, "a block holds at least one position");
        let widths = Widths::of(config);
        let pages = |width| vec![0.0; num_blocks * block_size * width];
        let layer = |_| LayerPages { first: pages(widths.first), second: pages(widths.second) };
        Self { layers: (0..config.num_layers).map(layer).collect(), num_blocks, block_size, widths }
    }

    /// Bytes that one block takes over all layers.
    pub fn bytes_per_block(config: &ModelConfig, block_size: usize) -> usize {
        config.num_layers * block_size * config.kv_elements_per_token() * size_of::<f32>()
    }

    /// Blocks.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Positions per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Bytes of one block, over all layers.
    pub fn block_bytes(&self) -> usize {
        self.layers.len() * self.block_size * (self.widths.first + self.widths.second) * size_of::<f32>()
    }

    /// Appends what a block holds: for each layer its first rows, then its second ones, little-endian.
    pub fn read_block(&self, block: u32, to: &mut Vec<u8>) {
        for layer in &self.layers {
            for (rows, width) in [(&layer.first, self.widths.first), (&layer.second, self.widths.second)] {
                let len = self.block_size * width;
                let at = block as usize * len;
                to.extend(rows[at..at + len].iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }

    /// Makes a block hold what [`Self::read_block`] read of one.
    ///
    /// # Panics
    /// If there are not [`Self::block_bytes`] of it.
    pub fn write_block(&mut self, block: u32, mut from: &[u8]) {
        assert_eq!(from.len(), self.block_bytes(), "a block is written whole");
        let (block_size, Widths { first, second }) = (self.block_size, self.widths);
        for layer in &mut self.layers {
            for (rows, width) in [(&mut layer.first, first), (&mut layer.second, second)] {
                let len = block_size * width;
                let (own, rest) = from.split_at(len * size_of::<f32>());
                let (values, _) = own.as_chunks::<4>();
                let at = block as usize * len;
                for (to, value) in rows[at..at + len].iter_mut().zip(values) {
                    *to = f32::from_le_bytes(*value);
                }
                from = rest;
            }
        }
    }

    /// The latent row of a position, to write.
    pub(super) fn latent_mut(&mut self, layer: usize, block_table: &[u32], position: usize) -> &mut [f32] {
        let at = slot(block_table, self.block_size, position) * self.widths.first;
        &mut self.layers[layer].first[at..at + self.widths.first]
    }

    /// The key and value rows of a position, to write.
    pub(super) fn key_value_mut(
        &mut self,
        layer: usize,
        block_table: &[u32],
        position: usize,
    ) -> (&mut [f32], &mut [f32]) {
        let (slot, Widths { first, second }) = (slot(block_table, self.block_size, position), self.widths);
        let layer = &mut self.layers[layer];
        (
            &mut layer.first[slot * first..(slot + 1) * first],
            &mut layer.second[slot * second..(slot + 1) * second],
        )
    }

    /// The latents of a layer.
    pub(super) fn latents(&self, layer: usize) -> Pages<'_> {
        Pages { data: &self.layers[layer].first, block_size: self.block_size, width: self.widths.first }
    }

    /// The keys and values of a layer.
    pub(super) fn keys_values(&self, layer: usize) -> attention::KvPages<'_> {
        let values = Pages {
            data: &self.layers[layer].second,
            block_size: self.block_size,
            width: self.widths.second,
        };
        attention::KvPages { keys: self.latents(layer), values }
    }
}

impl Widths {
    fn of(config: &ModelConfig) -> Self {
        match &config.attention {
            Attention::Mla(_) => Self { first: config.kv_elements_per_token(), second: 0 },
            Attention::Gqa(gqa) => {
                let width = gqa.num_kv_heads * gqa.head_dim;
                Self { first: width, second: width }
            }
        }
    }
}
