//! The CPU device: every operation on f32 activations, row-major, with weights in their storage type.
//!
//! Batch invariance is the rule here: the value of an output row never depends on the other rows of the call, on the
//! number of threads or on the instruction set. [`plain`] holds the specification of every operation in f64.

pub mod activation;
pub mod attention;
pub mod gemm;
pub mod norm;
pub mod plain;
pub mod quant;
pub mod rope;
pub mod router;

mod output;
mod scratch;
mod simd;

use std::num::NonZeroUsize;
use std::sync::Arc;

use rayon::prelude::*;
use thiserror::Error;

use self::scratch::Scratch;
pub use self::simd::Isa;
use self::simd::Level;

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

/// Multiplications that are worth waking other threads.
const PARALLEL_WORK_MIN: usize = 1 << 18;

/// A handle to the CPU: how many threads compute, with which instructions. Cheap to clone; clones share the threads.
#[derive(Clone, Debug)]
pub struct Cpu {
    /// None: compute on the calling thread.
    pool: Option<Arc<rayon::ThreadPool>>,
    level: Level,
    scratch: Arc<Scratch>,
}

impl Cpu {
    /// A device that computes on the calling thread.
    pub fn single_threaded() -> Cpu {
        Cpu { pool: None, level: Level::best(), scratch: Arc::default() }
    }

    /// A device of `threads` compute threads; one thread is the calling thread itself.
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn new(threads: NonZeroUsize) -> Result<Cpu, CpuError> {
        let mut cpu = Cpu::single_threaded();
        if threads.get() > 1 {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads.get())
                .thread_name(|index| format!("compute-{index}"))
                .build()
                .map_err(|error| CpuError::Threads { threads: threads.get(), reason: error.to_string() })?;
            cpu.pool = Some(Arc::new(pool));
        }
        Ok(cpu)
    }

    /// The same device with another instruction set, if this CPU has it: for tests, since results are the same.
    pub fn with_isa(&self, isa: Isa) -> Option<Cpu> {
        Level::of(isa).map(|level| Cpu { level, ..self.clone() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.level.isa()
    }

    /// How many threads compute.
    pub fn threads(&self) -> usize {
        self.pool.as_ref().map_or(1, |pool| pool.current_num_threads())
    }

    /// Runs jobs `0..jobs`, on all threads if the work, in multiplications, is worth waking them.
    fn for_each(&self, jobs: usize, work: usize, job: impl Fn(usize) + Send + Sync) {
        match &self.pool {
            Some(pool) if jobs > 1 && work >= PARALLEL_WORK_MIN => {
                pool.install(|| (0..jobs).into_par_iter().for_each(job))
            }
            Some(_) | None => (0..jobs).for_each(job),
        }
    }
}
