//! A GPU rank between two steps: launching and completing them, changing maps and peers.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use heliostat_kernels::cuda::exchange::{AbortHandle, ExchangeFailure, Member, Membership, Transport};
use heliostat_kernels::cuda::heap::HeapHandle;
use heliostat_kernels::cuda::nccl::{Nccl, NcclId};
use heliostat_kernels::cuda::{CudaError, Event, Graph, KernelTime, Pinned, Priority, Stream};

use super::inputs::STEPS_MAX;
use super::lending::PoolOffer;
use super::model::{CudaModel, StepShape};
use super::pool::{ExpertPool, PooledExpert};
use super::transfer::Staging;
use crate::batch::{Drawn, Step};
use crate::config::ModelConfig;
use crate::ep::{ExpertWeights, SharedSlots, Topology};
use crate::eplb::map::Layout;
use crate::model::{ExchangeError, Logits};
use crate::sampler::SampleError;

/// A rank's model on a GPU, ready to step once it is connected.
#[derive(Debug)]
pub struct CudaRank {
    /// Recorded decode steps, by rows. Before the model, whose communicator must outlive them.
    pub(super) graphs: BTreeMap<usize, Graph>,
    /// Largest step to record.
    pub(super) graph_rows_max: usize,
    pub(super) model: CudaModel,
    pub(super) stream: Stream,
    /// Where NCCL is searched for first.
    pub(super) library_dirs: Vec<PathBuf>,
    pub(super) in_flight: VecDeque<Launched>,
    pub(super) next_copy: usize,
    pub(super) topology: Topology,
    pub(super) rank: usize,
    /// A kernel or step that takes longer has failed.
    pub(super) timeout: Duration,
    pub(super) loads: Loads,
    pub(super) num_blocks: usize,
    /// Slots of one EP rank, per layer.
    pub(super) local_slots: usize,
    /// For measurements: made-up experts by layer and slot.
    pub(super) made_up: Vec<Vec<PooledExpert>>,
    /// Where KV blocks pass through the host.
    pub(super) staging: Staging,
}

/// What all ranks must know of a step whose rows NCCL carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupStep {
    /// Rows of the rank that has most.
    pub rows: usize,
    /// Whether all ranks only decode: then all replay a recording, else none does, for NCCL takes no mixture.
    pub decodes: bool,
}

impl GroupStep {
    /// Of a rank alone.
    pub fn of(step: &Step) -> Self {
        Self {
            rows: step.tokens.len(),
            decodes: step.seqs.iter().all(|seq| seq.len == 1 && seq.expanded == 0),
        }
    }
}

/// A step on the device.
#[derive(Debug)]
pub(super) struct Launched {
    step: Arc<Step>,
    copy: usize,
    done: Event,
    logits: Logits,
}

/// What a step brought: one result per draw of the device, and logits for the host's.
pub type StepResults = (Vec<Result<Drawn, SampleError>>, Logits);

/// Token counts on their way back.
#[derive(Debug)]
pub(super) struct Loads {
    pub(super) host: Vec<Pinned<u32>>,
    /// As of the last step that ended.
    pub(super) newest: Vec<u32>,
    /// As they were drained.
    pub(super) before: Vec<u32>,
    pub(super) experts: usize,
}

impl Loads {
    fn take(&mut self, copy: usize) {
        self.newest = self.host[copy].read(0..self.newest.len());
    }

    fn drain(&mut self, sums: &mut Vec<Vec<u32>>) {
        if sums.is_empty() {
            sums.resize(self.newest.len() / self.experts, vec![0; self.experts]);
        }
        let counts =
            self.newest.iter().zip(&self.before).map(|(newest, before)| newest.wrapping_sub(*before));
        sums.iter_mut().flatten().zip(counts).for_each(|(sum, count)| *sum = sum.saturating_add(count));
        self.before.clone_from(&self.newest);
    }
}

impl From<CudaError> for ExchangeError {
    fn from(error: CudaError) -> Self {
        if error.is_fatal() { Self::Device(error.to_string()) } else { Self::Other(error.to_string()) }
    }
}

impl From<ExchangeFailure> for ExchangeError {
    fn from(failure: ExchangeFailure) -> Self {
        match failure {
            ExchangeFailure::Aborted => Self::Aborted,
            ExchangeFailure::Silent { ranks, .. } => Self::Silent { rank: ranks.trailing_zeros() },
            ExchangeFailure::Carrier | ExchangeFailure::Overflow | ExchangeFailure::Malformed { .. } => {
                Self::Other(failure.to_string())
            }
        }
    }
}

impl CudaRank {
    /// The model's shape.
    pub fn config(&self) -> &Arc<ModelConfig> {
        &self.model.config
    }

    /// KV blocks that it has room for.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// A stream on which nothing runs, for others to see whether the device still answers. Not that of the steps: who
    /// looks at one that is being recorded spoils the recording.
    ///
    /// # Errors
    /// The device is lost.
    pub fn probe(&self) -> Result<Stream, CudaError> {
        self.stream.device().stream(Priority::Low)
    }

    /// Its expert weights, on a rank with experts.
    pub fn pool(&self) -> Option<&ExpertPool> {
        self.model.ep.as_ref().map(|ep| &ep.pool)
    }

    /// Names this rank's expert weights to its peers, who may copy from them then; none where no peer could.
    pub fn pool_offer(&self) -> Option<PoolOffer> {
        let peers = self.model.exchange.transport() == Transport::Peer;
        self.pool().filter(|_| peers).map(ExpertPool::offer)
    }

    /// Maps the expert weights of the other ranks, given by rank; returns which could not be mapped, and why. Between
    /// [`CudaRank::connect`] and the first step.
    pub fn reach_pools(&self, offers: &[Option<PoolOffer>]) -> Vec<(usize, CudaError)> {
        let of_others = offers.iter().enumerate();
        let offers: Vec<Option<PoolOffer>> =
            of_others.map(|(rank, offer)| offer.clone().filter(|_| rank != self.rank)).collect();
        self.pool().map_or_else(Vec::new, |pool| pool.reach(&offers))
    }

    /// Names this rank's memory to its peers.
    pub fn handle(&self) -> HeapHandle {
        self.model.exchange.handle()
    }

    /// Ends waits for peers from another thread.
    pub fn abort_handle(&self) -> AbortHandle {
        self.model.exchange.abort_handle()
    }

    /// Whether rows travel by NCCL: then one rank makes an [`NcclId`] for each membership, and the ranks agree on the
    /// number of rows of each step.
    pub fn is_by_nccl(&self) -> bool {
        self.model.exchange.transport() == Transport::Nccl
    }

    /// A new id for the next membership.
    ///
    /// # Errors
    /// NCCL is missing.
    pub fn new_nccl_id(&self) -> Result<NcclId, CudaError> {
        NcclId::new(&self.library_dirs)
    }

    /// Takes part in membership `epoch` with the ranks that `handles` name; by NCCL, all join the communicator `nccl` and
    /// record their steps anew. Steps in flight are forgotten.
    ///
    /// # Errors
    /// A peer's memory cannot be reached or a peer did not join, or the device is lost.
    ///
    /// # Panics
    /// By NCCL without an id.
    pub fn connect(
        &mut self,
        epoch: u64,
        handles: &[HeapHandle],
        nccl: Option<NcclId>,
    ) -> Result<(), CudaError> {
        self.in_flight.clear();
        self.stream.synchronize()?;
        if self.is_by_nccl() {
            let id = nccl.expect("all ranks were told the id");
            let place = (self.rank as u32, handles.len() as u32);
            let device = self.stream.device();
            self.graphs.clear();
            let nccl = Nccl::join(device, &self.library_dirs, id, place, self.timeout)?;
            self.model.exchange.carry_by(nccl);
        }
        let member = |rank: usize| Some(Member { rank: rank as u32, heap: handles[rank] });
        let Topology { dp, ep, .. } = self.topology;
        let membership = Membership {
            epoch,
            rank: self.rank as u32,
            dp: (0..dp).map(|dp| member(self.topology.rank_of_dp(dp))).collect(),
            ep: (0..ep).map(|ep| member(self.topology.rank_of_ep(ep))).collect(),
            slots: self.local_slots,
            timeout: self.timeout,
        };
        self.model.exchange.connect(&self.stream, membership)?;
        if self.is_by_nccl() { self.record() } else { Ok(()) }
    }

    /// For tests: loses the device, as an uncorrectable memory error does. Whoever uses it next hears of that.
    ///
    /// # Errors
    /// The device was lost before.
    pub fn break_device(&self) -> Result<(), CudaError> {
        heliostat_kernels::cuda::fault::break_device(&self.stream)
    }

    /// Ends the epoch of [`CudaRank::connect`]: what waits for peers gives up at once, and steps in flight are forgotten.
    ///
    /// # Errors
    /// The device is lost, or a kernel hangs.
    pub fn leave(&mut self, epoch: u64) -> Result<(), CudaError> {
        self.abort_handle().abort(epoch);
        self.in_flight.clear();
        if self.is_by_nccl() {
            self.graphs.clear();
        }
        let limit = self.timeout * 4;
        match self.stream.record()?.wait_within(limit)? {
            // The memory of a peer that is gone is freed by the last who lets go of it.
            true => {
                self.model.exchange.disconnect();
                self.pool().into_iter().for_each(ExpertPool::let_go);
                Ok(())
            }
            false => Err(CudaError::Other(format!("a step hung for {limit:?}"))),
        }
    }

    /// Takes the map of one MoE layer from the next step on; the slots hold its weights. Weights that are dropped after
    /// this are safe from steps in flight.
    ///
    /// # Errors
    /// A slot is empty, or the device is lost.
    pub fn set_layer(
        &mut self,
        moe_layer: usize,
        layout: &Layout,
        slots: &SharedSlots,
    ) -> Result<(), ExchangeError> {
        let map = layout.layer(moe_layer);
        let local = layout.shape().slots_per_rank() as usize;
        let places = match &self.model.ep {
            Some(_) => {
                Some((0..local).map(|slot| place(slots, moe_layer, slot)).collect::<Result<Vec<_>, _>>()?)
            }
            None => None,
        };
        self.model.tables.set(&self.stream, moe_layer, map, places.as_deref())?;
        Ok(())
    }

    /// Says that weights which are dropped from now on may be read by the steps launched so far.
    ///
    /// # Errors
    /// The device is lost.
    pub fn guard_weights(&self) -> Result<(), CudaError> {
        match &self.model.ep {
            Some(ep) => {
                ep.pool.in_use_until(self.stream.record()?);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Starts `step`; empty on a rank that only keeps its peers company. By NCCL, `group` is what all ranks agreed on; else
    /// it is this rank's own.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// If too many steps are in flight already.
    pub fn launch(&mut self, step: &Arc<Step>, group: GroupStep) -> Result<(), CudaError> {
        assert!(self.in_flight.len() < STEPS_MAX, "{} steps in flight", self.in_flight.len());
        let copy = self.next_copy;
        self.next_copy = (copy + 1) % STEPS_MAX;
        let stream = self.stream.clone();
        let (draws, host) = (step.device_draws().count(), step.host_rows().count());
        let (shape, graph) = self.shape_of(step, group);
        if let Some(dp) = &mut self.model.dp {
            dp.send(&stream, copy, step, shape)?;
        }
        match graph.and_then(|rows| self.graphs.get(&rows)) {
            Some(graph) => graph.launch(&stream)?,
            None => self.model.step(&stream, shape)?,
        }
        let mut logits = Logits { rows: Vec::new(), vocab: self.model.config.vocab_size };
        if let Some(dp) = &self.model.dp {
            dp.draws.fetch(&stream, copy, step)?;
            dp.all_loads.copy_to_pinned(&stream, &self.loads.host[copy], dp.all_loads.len())?;
            if host > 0 {
                let at = draws * logits.vocab..(draws + host) * logits.vocab;
                logits.rows = dp.buffers.logits.slice(at).download(&stream)?;
            }
        }
        let done = stream.record()?;
        self.in_flight.push_back(Launched { step: Arc::clone(step), copy, done, logits });
        Ok(())
    }

    /// Computes `step` once more with every kernel timed on its own, no step being in flight; `group` as in
    /// [`CudaRank::launch`].
    ///
    /// # Errors
    /// The device is lost.
    pub fn profile(&mut self, step: &Step, group: GroupStep) -> Result<Vec<KernelTime>, CudaError> {
        let (shape, _) = self.shape_of(step, group);
        if let Some(dp) = &mut self.model.dp {
            dp.send(&self.stream, 0, step, shape)?;
        }
        self.stream.profile(|stream| self.model.step(stream, shape))
    }

    /// What a step is computed as, and the recording to use.
    fn shape_of(&self, step: &Step, group: GroupStep) -> (StepShape, Option<usize>) {
        let bucket = self.graphs.range(group.rows..).next().map(|(&rows, _)| rows);
        match bucket.filter(|_| group.decodes) {
            Some(rows) => (StepShape { rows, logit_rows: rows, carried: rows }, Some(rows)),
            None => {
                let logit_rows = step.device_draws().count() + step.host_rows().count();
                (StepShape { rows: step.tokens.len(), logit_rows, carried: group.rows }, None)
            }
        }
    }

    /// Steps in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Waits for the oldest step in flight.
    ///
    /// # Errors
    /// A peer was lost or the device failed; all steps in flight are then void.
    ///
    /// # Panics
    /// If none is in flight.
    pub fn finish(&mut self) -> Result<StepResults, ExchangeError> {
        let launched = self.in_flight.pop_front().expect("a step is in flight");
        // Kernels give up waiting for peers by themselves; what goes on longer hangs.
        if !launched.done.wait_within(self.timeout * 4)? {
            return Err(ExchangeError::Device(format!("a step hung for {:?}", self.timeout * 4)));
        }
        self.model.exchange.status()?;
        let drawn = match &self.model.dp {
            Some(dp) => dp.draws.read(launched.copy, &launched.step),
            None => Vec::new(),
        };
        self.loads.take(launched.copy);
        Ok((drawn, launched.logits))
    }

    /// Adds the tokens routed by this rank since the last call to `sums`, `[moe layer][logical expert]`; an empty one is
    /// given its shape.
    pub fn drain_loads(&mut self, sums: &mut Vec<Vec<u32>>) {
        self.loads.drain(sums);
    }
}

fn place(slots: &SharedSlots, moe_layer: usize, slot: usize) -> Result<u32, ExchangeError> {
    let slots = slots.read();
    let content = slots.get(moe_layer, slot).map_err(|why| ExchangeError::Other(why.to_string()))?;
    match &content.weights {
        ExpertWeights::Cuda(pooled) => Ok(pooled.place()),
        ExpertWeights::Host(_) => {
            Err(ExchangeError::Other("a slot of a GPU rank lies on the host".to_owned()))
        }
    }
}
