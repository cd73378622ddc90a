//! The CPU device: every operation on f32 activations, row-major, with weights in their storage type.
//!
//! Batch invariance is the rule here: the value of an output row never depends on the other rows of the call, on the
//! number of threads or on the instruction set. [`plain`] holds the specification of every operation in f64.

pub mod activation;
pub mod attention;
pub mod gemm;
pub mod norm;
pub mod plain;
pub mod rope;
pub mod router;

use std::num::NonZeroUsize;
use std::sync::Arc;

use thiserror::Error;

/// Why a CPU device could not be made.
#[derive(Debug, Error)]
pub enum CpuError {
    /// The threads could not be started.
    #[error("cannot start {threads} compute threads: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        reason: String,
    },
}

/// A handle to the CPU: how many threads compute. Cheap to clone; clones share the threads.
#[derive(Clone, Debug)]
pub struct Cpu {
    /// None: compute on the calling thread.
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl Cpu {
    /// A device that computes on the calling thread.
    pub fn single_threaded() -> Cpu {
        Cpu { pool: None }
    }

    /// A device of `threads` compute threads; one thread is the calling thread itself.
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn new(threads: NonZeroUsize) -> Result<Cpu, CpuError> {
        if threads.get() == 1 {
            return Ok(Cpu::single_threaded());
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|error| CpuError::Threads { threads: threads.get(), reason: error.to_string() })?;
        Ok(Cpu { pool: Some(Arc::new(pool)) })
    }

    /// How many threads compute.
    pub fn threads(&self) -> usize {
        self.pool.as_ref().map_or(1, |pool| pool.current_num_threads())
    }
}
