//! One rank's model on a CUDA device.
//!
//! The same arithmetic as [`crate::model`] in BF16 and FP8, with its own kernels. All buffers have fixed addresses and
//! worst-case sizes, so that a decode step is one recorded graph that remaps and new peers do not touch.

mod pool;

pub use pool::{ExpertPool, PoolError, PoolShape, PooledExpert};
