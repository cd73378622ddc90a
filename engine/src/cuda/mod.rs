//! One rank's model on a CUDA device.
//!
//! The same arithmetic as [`crate::model`] in BF16 and FP8, with its own kernels. All buffers have fixed addresses and
//! worst-case sizes, so that a decode step is one recorded graph that remaps and new peers do not touch.

mod attention;
mod buffers;
mod draws;
mod feed_forward;
mod inputs;
mod layer;
mod lending;
mod load;
mod made_up;
mod model;
mod pool;
mod prompts;
mod rank;
mod source;
mod tables;
mod transfer;

pub use lending::{LentPlace, PoolOffer};
pub use load::{BLOCK_SIZE, CudaOptions, KvRoom, Weights, bytes_per_block};
pub use pool::{ExpertPool, PoolError, PoolShape, PooledExpert};
pub use rank::{CudaRank, GroupStep, StepResults};
pub use source::LoadError;
