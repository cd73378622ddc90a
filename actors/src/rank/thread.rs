//! The step thread of a rank: joins the group at every membership epoch and steps in it until the epoch ends.
//!
//! One operating-system thread owns the model, the KV cache, the scheduler and the links. It leaves an epoch when a
//! peer is lost, a newer view arrives or the actor stops; sequences, KV blocks and an unfinished batch stay, so a step
//! that was cut off is redone in the next epoch.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use heliostat_engine::config::ModelConfig;
use heliostat_engine::ep::{EpGroup, EpParts, PlanProgress, SharedSlots};
use heliostat_engine::eplb::map::Layout;
use heliostat_engine::model::ExchangeError;
use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cuda::heap::HeapHandle;
use heliostat_kernels::cuda::nccl::NcclId;
use heliostat_kernels::fabric::{Connect, Endpoint, Fabric, FabricError, FabricListener};
use heliostat_runtime::group::GroupView;

use super::args::RankArgs;
use super::attention::Attention;
use super::borrow::Borrower;
use super::clock::StepClock;
use super::engine::Engine;
use super::join::{self, ExpertLoader, JoinState, Joined};
use super::kv::StoreKv;
use super::leases::Leases;
use super::link::{Command, Inbox};
use super::outlet::Outlet;
use super::plan::OpenPlan;
use super::refill::Refill;
use crate::messages::{Moved, PlanEnd, RankJoined};

/// How long one attempt to link all ranks may take before views are looked at again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Joins in a row after which a peer's GPU counts as out of reach for good.
const UNREACHABLE_MAX: u32 = 5;

/// The thread's state.
pub(super) struct StepThread {
    pub(super) args: RankArgs,
    pub(super) config: Arc<ModelConfig>,
    pub(super) loader: ExpertLoader,
    pub(super) engine: Engine,
    /// On DP ranks.
    pub(super) attention: Option<Attention>,
    pub(super) slots: SharedSlots,
    pub(super) layout: Layout,
    pub(super) progress: PlanProgress,
    pub(super) plan: Option<Arc<OpenPlan>>,
    /// Newest plan that this rank wants to end.
    pub(super) abandon: u64,
    pub(super) clock: StepClock,
    pub(super) inbox: Inbox,
    pub(super) listener: FabricListener,
    pub(super) outlet: Outlet,
    /// Experts from peers' GPUs, when slots are filled.
    pub(super) borrower: Borrower,
    /// Experts of this rank that peers copy.
    pub(super) leases: Leases,
    /// Where waits for peers run.
    pub(super) runtime: tokio::runtime::Handle,
    /// The newest view, which the thread acts on when it has left the present epoch.
    pub(super) view: Option<GroupView>,
    pub(super) stopping: bool,
    /// Newest epoch of a GPU's exchange.
    pub(super) exchange: u64,
    /// Joins in a row at which a peer's GPU could not be reached.
    pub(super) unreachable: u32,
    /// KV blocks from other ranks, to be taken in between two steps.
    pub(super) arrived: VecDeque<StoreKv>,
}

impl StepThread {
    /// Runs until the actor stops.
    pub(super) fn run(mut self) {
        while let Some(view) = self.next_complete_view() {
            match self.connect(&view) {
                Ok(fabric) => self.live(&view, fabric),
                Err(FabricError::Argument(why)) => {
                    self.outlet.fail(format!("cannot link the group: {why}"));
                    return;
                }
                Err(FabricError::StaleEpoch { newer, .. }) => {
                    tracing::info!(
                        epoch = view.epoch,
                        newer,
                        "others are at a newer epoch: waiting for its view"
                    );
                    self.await_view_after(view.epoch);
                }
                Err(why) => {
                    tracing::warn!(epoch = view.epoch, "cannot link the group yet: {why}");
                    if let FabricError::ConnectTimeout { missing, .. } = why {
                        missing.into_iter().for_each(|rank| self.suspect(&view, rank as u32));
                    }
                }
            }
            self.inbox.set_bell(None);
        }
    }

    /// Takes commands until the newest view is complete; `None` when the actor stops.
    fn next_complete_view(&mut self) -> Option<GroupView> {
        loop {
            self.take_commands();
            if self.stopping {
                return None;
            }
            if let Some(view) = self.view.as_ref().filter(|view| view.is_complete()) {
                return Some(view.clone());
            }
            let command = self.inbox.wait()?;
            self.apply(command);
        }
    }

    /// Has a silent rank looked at.
    fn suspect(&self, view: &GroupView, rank: u32) {
        let member = view.members.get(rank as usize).filter(|_| rank != self.args.rank);
        if let Some(addr) = member.and_then(|member| member.addr.clone()) {
            self.outlet.silent(rank, addr);
        }
    }

    /// Takes commands until there is a newer view than `epoch`.
    fn await_view_after(&mut self, epoch: u64) {
        while !self.should_leave(epoch) {
            match self.inbox.wait() {
                Some(command) => self.apply(command),
                None => self.stopping = true,
            }
        }
    }

    /// Links all ranks of `view`.
    fn connect(&mut self, view: &GroupView) -> Result<Fabric, FabricError> {
        let endpoints = endpoints(view)?;
        let links = &self.args.links;
        let connect = Connect {
            connect_timeout: CONNECT_TIMEOUT,
            call_timeout: links.timeout,
            ring_bytes: links.ring_bytes as usize,
            ..Connect::new(view.epoch, self.args.rank as usize, &endpoints)
        };
        // From here on a newer view ends whatever blocks.
        self.inbox.set_bell(Some((self.listener.waker(), connect.abort.clone())));
        self.take_commands();
        if self.should_leave(view.epoch) {
            return Err(FabricError::Aborted { reason: view.epoch });
        }
        self.listener.connect(connect)
    }

    /// Joins, steps and leaves one membership epoch.
    fn live(&mut self, view: &GroupView, mut fabric: Fabric) {
        let outcome = self.join(view, &mut fabric).and_then(|()| {
            let mut group = EpGroup::new(EpParts {
                fabric,
                topology: self.args.topology.clone(),
                rank: self.args.rank as usize,
                cpu: self.cpu(),
                layout: self.layout.clone(),
                slots: self.slots.clone(),
                hidden: self.config.hidden_size,
            });
            self.step_until_over(&mut group, view.epoch)
        });
        self.attention.iter_mut().for_each(Attention::rewind);
        self.inbox.set_device(None);
        // A failure that somebody else has noticed is told first: what follows may hang on it.
        self.take_commands();
        let outcome = match (&mut self.engine, outcome) {
            // What hangs on a failed GPU is not waited for.
            (Engine::Cpu(_), outcome) | (Engine::Cuda { .. }, outcome @ Err(ExchangeError::Device(_))) => {
                outcome
            }
            // Whatever ended the epoch, the GPU may still wait for a peer that is gone.
            (Engine::Cuda { rank, .. }, outcome) => {
                let left = rank.leave(self.exchange);
                left.map_err(|why| ExchangeError::Device(why.to_string())).and(outcome)
            }
        };
        match outcome {
            Ok(()) => {}
            Err(ExchangeError::Device(why)) => {
                self.outlet.device_failed(why);
                self.stopping = true;
            }
            Err(why) => {
                if let ExchangeError::Silent { rank } = why {
                    self.suspect(view, rank);
                }
                tracing::info!(epoch = view.epoch, "left the membership epoch: {why}");
            }
        }
    }

    /// The CPU that exchanges rows; idle where a GPU does.
    fn cpu(&self) -> Cpu {
        match &self.engine {
            Engine::Cpu(engine) => engine.cpu.clone(),
            Engine::Cuda { .. } => Cpu::single_threaded(),
        }
    }

    /// Agrees with all ranks on the layout and fills the slots with it. Plans that were open are dropped.
    fn join(&mut self, view: &GroupView, fabric: &mut Fabric) -> Result<(), ExchangeError> {
        let open = self.plan.as_ref().map_or(0, |plan| plan.plan.epoch);
        let (heap, pool) = match &self.engine {
            Engine::Cpu(_) => (Vec::new(), None),
            Engine::Cuda { rank, .. } => (rank.handle().to_bytes().to_vec(), rank.pool_offer()),
        };
        let (progress, exchange) = (self.progress, self.exchange);
        let (nccl, layout) = (self.new_communicator()?, self.layout.clone());
        let mine = JoinState { progress, open, layout, heap, pool, exchange, nccl };
        let joined = join::agree(fabric, self.args.topology.size(), &mine)?;
        let device = self.connect_device(&joined)?;
        self.adopt(view, joined.progress, joined.layout)?;
        if device {
            (0..self.layout.layers().len()).try_for_each(|moe_layer| self.show_map(moe_layer))?;
        }
        join::await_filled(fabric, self.args.topology.size(), |rank| self.suspect(view, rank))?;
        self.outlet.joined(RankJoined {
            rank: self.args.rank,
            addr: self.outlet.me(),
            membership: view.epoch,
            progress: self.progress,
            layout: self.layout.clone(),
        });
        tracing::info!(epoch = view.epoch, map_epoch = self.progress.epoch, "joined the group");
        Ok(())
    }

    /// A name for the communicator of a membership, made by the first rank where NCCL carries rows; else empty.
    fn new_communicator(&self) -> Result<Vec<u8>, ExchangeError> {
        match &self.engine {
            Engine::Cuda { rank, .. } if rank.is_by_nccl() && self.args.rank == 0 => {
                // Without the library no later attempt fares better.
                rank.new_nccl_id()
                    .map(|id| id.0.to_vec())
                    .map_err(|why| ExchangeError::Device(why.to_string()))
            }
            Engine::Cuda { .. } | Engine::Cpu(_) => Ok(Vec::new()),
        }
    }

    /// Reaches the memory of the other ranks' GPUs; false on a CPU device.
    fn connect_device(&mut self, joined: &Joined) -> Result<bool, ExchangeError> {
        let Engine::Cuda { rank, .. } = &mut self.engine else { return Ok(false) };
        let bad =
            |index: usize| ExchangeError::Other(format!("rank {index} has no GPU: a group is of one kind"));
        let handle =
            |(index, bytes): (usize, &Vec<u8>)| HeapHandle::from_bytes(bytes).ok_or_else(|| bad(index));
        let heaps = joined.heaps.iter().enumerate().map(handle).collect::<Result<Vec<_>, _>>()?;
        self.exchange = joined.exchange;
        let nccl = <[u8; 128]>::try_from(&joined.nccl[..]).ok().map(NcclId);
        if rank.is_by_nccl() && nccl.is_none() {
            return Err(ExchangeError::Other("rank 0 named no communicator".to_owned()));
        }
        if let Err(why) = rank.connect(joined.exchange, &heaps, nccl) {
            self.unreachable += 1;
            let said = format!("a peer's GPU cannot be reached: {why}");
            // A peer that has just died is replaced; one that lives and cannot be reached never will be.
            let give_up = why.is_fatal() || self.unreachable == UNREACHABLE_MAX;
            return Err(if give_up { ExchangeError::Device(said) } else { ExchangeError::Other(said) });
        }
        self.unreachable = 0;
        for (peer, why) in rank.reach_pools(&joined.pools) {
            if why.is_fatal() {
                return Err(why.into());
            }
            tracing::warn!(peer, "its experts come through the hosts: {why}");
        }
        rank.guard_weights()?;
        self.inbox.set_device(Some((rank.abort_handle(), joined.exchange)));
        Ok(true)
    }

    /// Tells the GPU where the experts of a layer lie now.
    pub(super) fn show_map(&mut self, moe_layer: usize) -> Result<(), ExchangeError> {
        match &mut self.engine {
            Engine::Cpu(_) => Ok(()),
            Engine::Cuda { rank, .. } => rank.set_layer(moe_layer, &self.layout, &self.slots),
        }
    }

    /// Takes the layout that was agreed on, and fills the slots with it.
    fn adopt(
        &mut self,
        view: &GroupView,
        progress: PlanProgress,
        layout: Layout,
    ) -> Result<(), ExchangeError> {
        let role = self.args.topology.role(self.args.rank as usize);
        if let Some(ep) = role.ep {
            let peers = view.members.iter().filter_map(|member| member.addr.clone()).collect();
            let mut refill = Refill {
                topology: &self.args.topology,
                rank: self.args.rank as usize,
                layout: &layout,
                staged: self.plan.as_deref(),
                loader: &self.loader,
                runtime: &self.runtime,
                borrower: Borrower { peers, ..self.borrower.clone() },
                moved: Moved::default(),
            };
            join::fill_slots(&layout, ep, &self.slots, |moe_layer, logical| refill.bring(moe_layer, logical))
                .map_err(ExchangeError::Other)?;
            if refill.moved != Moved::default() {
                tracing::info!(moved = ?refill.moved, "filled the slots");
            }
        }
        self.layout = layout;
        self.progress = progress;
        self.end_plan(PlanEnd::RolledBack);
        self.inbox.set_closed_plan(self.progress.closed);
        Ok(())
    }

    /// Reports the open plan's end, if one is open, and forgets it.
    pub(super) fn end_plan(&mut self, end: PlanEnd) {
        if let Some(plan) = self.plan.take() {
            let committed = if self.progress.epoch == plan.plan.epoch { self.progress.committed } else { 0 };
            self.progress.closed = self.progress.closed.max(plan.plan.epoch);
            self.outlet.plan_report(&plan, committed, Some(end), self.clock.end_watch());
            plan.end();
            self.leases.plan_ended(plan.plan.epoch);
            self.outlet.plan_ended(self.progress, &self.layout);
        }
        self.inbox.set_closed_plan(self.progress.closed);
    }

    /// Takes all commands that wait.
    pub(super) fn take_commands(&mut self) {
        while let Some(command) = self.inbox.take() {
            self.apply(command);
        }
        self.store_arrived();
        if let Some(attention) = &self.attention {
            self.inbox.set_waiting(attention.waiting());
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => match &mut self.attention {
                Some(attention) => attention.submit(*submission, &mut self.outlet),
                None => tracing::error!("a request came to a rank without an attention role"),
            },
            Command::Abort(id) => self.attention.iter_mut().for_each(|attention| attention.abort(id)),
            Command::FindKv(prompt, reply) => {
                let _ = reply.send(self.find_kv(&prompt));
            }
            Command::ReadKv(ask, reply) => {
                let _ = reply.send(self.read_kv(&ask));
            }
            Command::StoreKv(arrived) => self.arrived.push_back(arrived),
            Command::Fetched(fetched) => {
                self.attention.iter_mut().for_each(|attention| attention.fetched(&fetched));
            }
            Command::PeerLost(process) => {
                self.attention.iter_mut().for_each(|attention| attention.abort_all_of(process));
                self.outlet.forget(process);
            }
            Command::Open(plan) if plan.plan.epoch > self.progress.closed => {
                if let Err(why) = plan.plan.check(&self.layout) {
                    plan.fail(why.to_string());
                    self.abandon = plan.plan.epoch;
                }
                self.clock.begin_watch();
                self.plan = Some(plan);
            }
            Command::Open(plan) => {
                tracing::info!(epoch = plan.plan.epoch, "dropped a plan that has already ended");
            }
            Command::Abandon(epoch) => self.abandon = self.abandon.max(epoch),
            Command::BreakDevice => {
                if let Engine::Cuda { rank, .. } = &self.engine {
                    tracing::warn!("the GPU is broken on purpose: {:?}", rank.break_device());
                }
            }
            Command::DeviceFailed(why) => {
                self.outlet.device_failed(why);
                self.stopping = true;
            }
            Command::ReportLoad(reply) => {
                // Replies are dropped when the asker has given up, here and below.
                let _ = reply.send(self.outlet.take_load());
            }
            Command::AttachEplb(eplb, reply) => {
                let open = self.plan.as_ref().map(|plan| plan.plan.epoch);
                let now = (self.progress, self.layout.clone());
                let _ = reply.send(self.outlet.attach_eplb(eplb, now, open));
            }
            Command::AttachIngress(ingress) => {
                let attention = self.attention.as_ref();
                let stats = attention.map(|attention| (attention.stats(&self.clock), attention.spans()));
                let (stats, spans) = stats.unwrap_or_default();
                self.outlet.attach_ingress(ingress, &stats, spans);
            }
            Command::StartTrace(steps_max) => self.clock.recorder.start(steps_max as usize),
            Command::TakeTrace(reply) => {
                let _ = reply.send(self.clock.recorder.take(self.args.rank));
            }
            Command::View(view) => {
                if self.view.as_ref().is_none_or(|old| old.epoch < view.epoch) {
                    self.view = Some(view);
                }
            }
            Command::Stop => self.stopping = true,
        }
    }

    /// Whether the epoch of `view` should be left.
    pub(super) fn should_leave(&self, epoch: u64) -> bool {
        self.stopping || self.view.as_ref().is_some_and(|view| view.epoch > epoch)
    }
}

/// Where all ranks of a view can be reached.
fn endpoints(view: &GroupView) -> Result<Vec<Endpoint>, FabricError> {
    let decode =
        |bytes: &[u8]| bincode::decode_from_slice(bytes, super::codec()).map(|(endpoint, _)| endpoint);
    view.members
        .iter()
        .map(|member| {
            decode(&member.join_info).map_err(|why| {
                FabricError::Argument(format!("rank {} announced no usable address: {why}", member.rank))
            })
        })
        .collect()
}
