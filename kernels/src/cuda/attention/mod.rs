//! Attention over a paged cache: absorbed latent attention ([`Mla`]), grouped-query attention ([`Gqa`]), and latent
//! attention of prompts on expanded keys and values ([`Expanded`]).
//!
//! But for the last, one path for prefill and decode: a query row is one token, and attends to positions `0..=position` of its own
//! sequence, all of which are in the cache. Specification: [`crate::cpu::plain::mla_attention`] and
//! [`crate::cpu::plain::gqa_attention`], with probabilities rounded to bf16.
//!
//! The bits of a row depend on its query, its cached positions and their number only: a long row is cut into chunks
//! by a rule of its length alone, and the chunks are added up in a fixed order. [`Mla::plan`] lists the chunks of all
//! rows on the device, longest first, once per step and for all layers; so a recorded graph follows new lengths.

mod expanded;
mod gqa;
mod mla;
mod plan;
mod prompts;

pub use expanded::{Expanded, ExpandedArgs, ExpandedDims};
pub use gqa::{Gqa, GqaArgs, GqaDims};
pub use mla::{Mla, MlaArgs, MlaDims};
pub use prompts::{Chunk, PromptLimits, PromptPlan};

use super::{Buffer, Source};

/// Positions of a page of the cache.
pub const PAGE: usize = 64;

/// The largest step that attention is made for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Query rows.
    pub rows: usize,
    /// Positions of a sequence. Longer rows are cut into chunks for which there is no room.
    pub positions: usize,
}

/// Where the rows of a step belong. All on the device, at fixed addresses.
#[derive(Clone, Copy, Debug)]
pub struct BatchMeta<'a> {
    /// `[rows]`: position of each row in its sequence; `u32::MAX`: an idle row, of which nothing is written.
    pub positions: &'a Buffer<u32>,
    /// `[rows]`: row of the block table.
    pub seq_of_row: &'a Buffer<u32>,
    /// `[sequences][blocks_max]`: pages of each sequence, in order.
    pub block_table: &'a Buffer<u32>,
    /// Entries of a row of the block table.
    pub blocks_max: usize,
}

impl BatchMeta<'_> {
    fn check(&self, rows: usize) {
        assert!(
            self.positions.len() >= rows && self.seq_of_row.len() >= rows,
            "attention: rows of the batch"
        );
        assert!(
            self.blocks_max > 0 && self.block_table.len() >= self.blocks_max,
            "attention: block table of {} by {}",
            self.block_table.len(),
            self.blocks_max
        );
    }
}

/// A source behind what attention's sources share.
macro_rules! source {
    ($name:literal $(, $part:literal)*) => {
        Source::new(
            $name,
            concat!(
                include_str!("../cu/attention.cuh"),
                $(include_str!(concat!("../cu/", $part)),)*
            ),
        )
    };
}

fn plan_source() -> Source {
    source!("attention_plan", "attention_plan.cu")
}

fn mla_source() -> Source {
    source!("mla", "mla_ptx.cuh", "mla_tile.cuh", "mla_finish.cuh", "mla.cu")
}

fn expanded_source() -> Source {
    source!("expanded", "expanded.cu")
}

fn gqa_source() -> Source {
    source!("gqa", "gqa.cu")
}
