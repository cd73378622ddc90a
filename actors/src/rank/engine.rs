//! Where a rank computes: on the CPU, step by step, or on a GPU, with the next step queued while the present one runs.

use std::sync::Arc;

use heliostat_engine::batch::Step;
use heliostat_engine::cuda::{CudaRank, GroupStep, StepResults};
use heliostat_engine::ep::{EpGroup, ExpertStore};
use heliostat_engine::model::{ExchangeError, KvPages, Model};
use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cuda::{CudaError, Stream};

use super::attention::Attention;
use super::clock::Lap;
use super::outlet::Outlet;
use crate::messages::KvForm;

/// The rank's device with what lies on it.
pub(super) enum Engine {
    Cpu(Box<CpuEngine>),
    Cuda {
        rank: Box<CudaRank>,
        /// Steps in flight at a time.
        depth: usize,
    },
}

/// A CPU device.
pub(super) struct CpuEngine {
    pub(super) cpu: Cpu,
    /// On DP ranks.
    pub(super) model: Option<(Model, KvPages)>,
}

/// What one step was, with the microseconds that its parts took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StepWork {
    /// Sequences of the batch.
    pub(super) seqs: u32,
    /// Rows of the batch.
    pub(super) tokens: u32,
    /// To choose it.
    pub(super) schedule: u64,
    /// To compute it, waits for other ranks included.
    pub(super) compute: u64,
    /// To draw and hand out.
    pub(super) sample: u64,
}

impl StepWork {
    fn of(step: &Step) -> Self {
        let (seqs, tokens) = (step.batch.seqs.len() as u32, step.batch.tokens.len() as u32);
        Self { seqs, tokens, ..Self::default() }
    }
}

impl Engine {
    /// Where expert weights lie.
    pub(super) fn store(&self) -> ExpertStore {
        match self {
            Self::Cpu(_) => ExpertStore::Host,
            Self::Cuda { rank, .. } => {
                rank.pool().map_or(ExpertStore::Host, |pool| ExpertStore::Cuda(pool.clone()))
            }
        }
    }

    /// What tells whether a GPU still answers.
    pub(super) fn probe(&self) -> Result<Option<Stream>, CudaError> {
        match self {
            Self::Cpu(_) => Ok(None),
            Self::Cuda { rank, .. } => rank.probe().map(Some),
        }
    }

    /// Computes or starts one step, which may have no tokens: those of other ranks still need this rank's experts. When
    /// the exchange fails the step stays in flight and is computed again in the next epoch.
    pub(super) fn step(
        &mut self,
        attention: Option<&mut Attention>,
        group: &mut EpGroup,
        outlet: &mut Outlet,
    ) -> Result<StepWork, ExchangeError> {
        match self {
            Self::Cpu(engine) => engine.step(attention, group, outlet),
            Self::Cuda { rank, depth } => {
                let mut lap = Lap::begin();
                let Some(attention) = attention else {
                    launch(rank, group, &Arc::default())?;
                    finish_idle(rank, *depth - 1)?;
                    return Ok(StepWork { compute: lap.us(), ..StepWork::default() });
                };
                let step = attention.schedule();
                let mut work = StepWork::of(&step);
                launch(rank, group, &step)?;
                attention.prepare_masks();
                work.schedule = lap.us();
                finish(rank, attention, outlet, *depth - 1, &mut work)?;
                Ok(work)
            }
        }
    }

    /// How its KV blocks lie.
    pub(super) fn kv_form(&self) -> KvForm {
        match self {
            Self::Cpu(engine) => {
                let bytes = engine.model.as_ref().map_or(0, |(_, kv)| kv.block_bytes());
                KvForm { is_cuda: false, block_bytes: bytes as u64 }
            }
            Self::Cuda { rank, .. } => KvForm { is_cuda: true, block_bytes: rank.block_bytes() as u64 },
        }
    }

    /// What KV blocks hold, one after the other. Waits for the steps in flight.
    pub(super) fn read_kv(&mut self, blocks: &[u32]) -> Result<Vec<u8>, CudaError> {
        match self {
            Self::Cpu(engine) => {
                let mut read = Vec::new();
                if let Some((_, kv)) = &engine.model {
                    blocks.iter().for_each(|&block| kv.read_block(block, &mut read));
                }
                Ok(read)
            }
            Self::Cuda { rank, .. } => rank.read_blocks(blocks),
        }
    }

    /// Makes KV blocks hold what was read of others of the same form.
    pub(super) fn write_kv(&mut self, blocks: &[(u32, &[u8])]) -> Result<(), CudaError> {
        match self {
            Self::Cpu(engine) => {
                if let Some((_, kv)) = &mut engine.model {
                    blocks.iter().for_each(|&(block, content)| kv.write_block(block, content));
                }
                Ok(())
            }
            Self::Cuda { rank, .. } => rank.write_blocks(blocks),
        }
    }

    /// Ends the steps in flight, before a sleep.
    pub(super) fn drain(
        &mut self,
        attention: Option<&mut Attention>,
        outlet: &mut Outlet,
    ) -> Result<(), ExchangeError> {
        match (self, attention) {
            (Self::Cpu(_), _) => Ok(()),
            (Self::Cuda { rank, .. }, Some(attention)) => {
                finish(rank, attention, outlet, 0, &mut StepWork::default())
            }
            (Self::Cuda { rank, .. }, None) => finish_idle(rank, 0),
        }
    }
}

/// Starts a step. Where NCCL carries rows, all ranks first agree on how many; the step before runs meanwhile.
fn launch(rank: &mut CudaRank, group: &mut EpGroup, step: &Arc<Step>) -> Result<(), ExchangeError> {
    let own = GroupStep::of(step);
    if !rank.is_by_nccl() {
        return Ok(rank.launch(step, own)?);
    }
    let [rows, prefills] = group.largest([own.rows as u32, u32::from(!own.decodes)])?;
    Ok(rank.launch(step, GroupStep { rows: rows as usize, decodes: prefills == 0 })?)
}

/// Ends the oldest steps until `left` are in flight.
fn finish(
    rank: &mut CudaRank,
    attention: &mut Attention,
    outlet: &mut Outlet,
    left: usize,
    work: &mut StepWork,
) -> Result<(), ExchangeError> {
    let mut lap = Lap::begin();
    while rank.in_flight() > left {
        let results: StepResults = rank.finish()?;
        work.compute += lap.us();
        attention.complete_drawn(&results, outlet);
        work.sample += lap.us();
    }
    Ok(())
}

/// The same on a rank without sequences.
fn finish_idle(rank: &mut CudaRank, left: usize) -> Result<(), ExchangeError> {
    while rank.in_flight() > left {
        rank.finish()?;
    }
    Ok(())
}

impl CpuEngine {
    fn step(
        &mut self,
        attention: Option<&mut Attention>,
        group: &mut EpGroup,
        outlet: &mut Outlet,
    ) -> Result<StepWork, ExchangeError> {
        let mut lap = Lap::begin();
        match (attention, &mut self.model) {
            (Some(attention), Some((model, kv))) => {
                let step = attention.schedule();
                let mut work = StepWork { schedule: lap.us(), ..StepWork::of(&step) };
                let logits = model.forward(&step, kv, group)?;
                work.compute = lap.us();
                attention.complete(&logits, outlet);
                work.sample = lap.us();
                Ok(work)
            }
            _ => {
                (0..group.moe_layers()).try_for_each(|moe_layer| group.serve(moe_layer))?;
                Ok(StepWork { compute: lap.us(), ..StepWork::default() })
            }
        }
    }
}
