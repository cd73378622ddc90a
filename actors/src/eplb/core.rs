//! What the EPLB actor decides: when to remap, to what, and when to give up.
//!
//! Pure: events and the time come in, actions go out. One plan is open at a time. It ends when every rank has reported
//! its end, when the group changes (the ranks then drop it by themselves), or by the watchdog, which abandons it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bincode::{Decode, Encode};
use heliostat_engine::config::ModelConfig;
use heliostat_engine::ep::{PlanProgress, Topology};
use heliostat_engine::eplb::map::Layout;
use heliostat_engine::eplb::plan::{LayerPlan, Plan};
use heliostat_engine::eplb::{ExpertMap, Gate, LoadWindow, Policy, map_balancedness, propose, rank_loads};
use heliostat_runtime::handle::ActorAddr;

use super::status::{Balancedness, EplbPulse, EplbStatus, LayerStatus, Remap, Totals, Trigger};
use crate::messages::{
    Moved, PlanEnd, PlanReport, RankJoined, RebalanceRefused, RebalanceStarted, StepLoad, StepTimes,
};

/// Ended remaps that are kept for display.
const HISTORY_MAX: usize = 64;

/// Arguments of the EPLB actor.
#[derive(Clone, Debug, Encode, Decode)]
pub struct EplbArgs {
    /// Layout before any remap.
    pub layout: Layout,
    /// Shape of the group.
    pub topology: Topology,
    /// How to balance.
    pub config: EplbConfig,
}

/// When and how the actor remaps.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct EplbConfig {
    /// Whether remaps start by themselves; on request they do anyway.
    pub enabled: bool,
    /// Steps whose loads count.
    pub window_size: u64,
    /// Steps between two remaps.
    pub step_interval: u64,
    /// How to plan.
    pub policy: Policy,
    /// What a remap at an interval must be worth; one on request need not be worth its moves.
    pub gate: Gate,
    /// Bytes of one expert, to weigh moves.
    pub bytes_per_expert: u64,
    /// A plan that makes no progress for so long is abandoned.
    pub plan_timeout: Duration,
    /// Log balancedness at every load report that fills the window.
    pub log_balancedness: bool,
}

impl EplbConfig {
    /// The same for a model: what its experts weigh, and how they are grouped.
    pub fn fit(&mut self, model: &ModelConfig) {
        let values = 3 * model.hidden_size * model.moe.intermediate_size;
        let bytes_per_value = if model.fp8_blocks { 1 } else { 2 };
        self.bytes_per_expert = (values * bytes_per_value) as u64;
        if let Policy::Deepseek { num_groups, .. } = &mut self.policy {
            *num_groups = model.moe.router.n_group;
        }
    }
}

/// What the actor must do.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    /// Send this plan to all ranks.
    Publish(Plan),
    /// Tell all ranks to drop this plan.
    Abandon(u64),
}

/// Why a rank did not take a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Untaken {
    /// It said no.
    Refused(String),
    /// No answer came.
    Untold(String),
}

/// The actor's state.
#[derive(Debug)]
pub(super) struct Core {
    args: EplbArgs,
    layout: Layout,
    progress: PlanProgress,
    /// Newest epoch that was given to a plan, or heard of.
    epoch: u64,
    membership: u64,
    joined: BTreeMap<u32, ActorAddr>,
    windows: BTreeMap<u32, LoadWindow>,
    steps_since_plan: BTreeMap<u32, u64>,
    open: Option<Open>,
    history: VecDeque<Remap>,
    totals: Totals,
    /// Loads that the last plan was made for.
    planned_loads: Vec<Vec<f32>>,
}

#[derive(Debug)]
struct Open {
    plan: Plan,
    remap: Remap,
    published_at: Duration,
    progress_at: Duration,
    reports: BTreeMap<u32, PlanReport>,
    /// Ranks that never opened it, of which no report comes.
    refused: BTreeSet<u32>,
    abandoned: bool,
}

impl Core {
    /// Nobody has joined yet.
    pub(super) fn new(args: EplbArgs) -> Self {
        Self {
            layout: args.layout.clone(),
            progress: PlanProgress::default(),
            epoch: 0,
            membership: 0,
            joined: BTreeMap::new(),
            windows: BTreeMap::new(),
            steps_since_plan: BTreeMap::new(),
            open: None,
            history: VecDeque::new(),
            totals: Totals::default(),
            planned_loads: Vec::new(),
            args,
        }
    }

    /// The group has a newer membership: whoever is in it reports anew.
    pub(super) fn on_view(&mut self, membership: u64, now: Duration) {
        if membership > self.membership {
            self.membership = membership;
            self.joined.clear();
            self.close("the group's membership changed", now);
        }
    }

    /// A rank connected. The ranks have agreed on a layout; this actor takes it.
    pub(super) fn on_joined(&mut self, joined: RankJoined, now: Duration) {
        if joined.membership < self.membership {
            return;
        }
        self.on_view(joined.membership, now);
        self.epoch = self.epoch.max(joined.progress.closed).max(joined.progress.epoch);
        let furthest = |progress: &PlanProgress| (progress.epoch, progress.committed);
        if furthest(&joined.progress) >= furthest(&self.progress) || self.joined.is_empty() {
            self.progress = joined.progress;
            self.layout = joined.layout;
        }
        self.joined.insert(joined.rank, joined.addr);
    }

    /// A rank counted tokens.
    pub(super) fn on_load(&mut self, load: &StepLoad, wall_ms: u64, now: Duration) -> Option<Action> {
        let (layers, experts) = (self.layout.layers().len(), self.layout.shape().experts as usize);
        let window_size = self.args.config.window_size;
        let window =
            self.windows.entry(load.dp).or_insert_with(|| LoadWindow::new(layers, experts, window_size));
        if !window.push(load.steps, &load.counts) {
            tracing::warn!(dp = load.dp, "dropped a load report of another shape");
            return None;
        }
        let steps = self.steps_since_plan.entry(load.dp).or_default();
        *steps += load.steps;
        if !self.args.config.enabled || *steps < self.args.config.step_interval {
            return None;
        }
        self.steps_since_plan.clear();
        match self.plan(Trigger::Interval, wall_ms, now) {
            Ok((_, plan)) => Some(Action::Publish(plan)),
            Err(why) => {
                tracing::debug!("no remap at this interval: {why}");
                None
            }
        }
    }

    /// Somebody asks for a remap.
    pub(super) fn rebalance(
        &mut self,
        wall_ms: u64,
        now: Duration,
    ) -> Result<(RebalanceStarted, Action), RebalanceRefused> {
        let (started, plan) = self.plan(Trigger::Request, wall_ms, now)?;
        Ok((started, Action::Publish(plan)))
    }

    /// A rank says how far it is. Returns whether the plan is over.
    pub(super) fn on_report(&mut self, report: PlanReport, now: Duration) -> Option<Action> {
        let open = self.open.as_mut().filter(|open| open.plan.epoch == report.epoch)?;
        open.progress_at = now;
        let failed = report.error.clone();
        open.remap.layers_committed = open.remap.layers_committed.max(report.committed);
        if let Some(why) = &failed {
            open.remap.error.get_or_insert_with(|| format!("rank {}: {why}", report.rank));
        }
        open.reports.insert(report.rank, report);
        if open.is_over(self.args.topology.size()) {
            self.close("", now);
            return None;
        }
        match self.open.as_mut() {
            Some(open) if failed.is_some() && !open.abandoned => {
                open.abandoned = true;
                Some(Action::Abandon(open.plan.epoch))
            }
            _ => None,
        }
    }

    /// A rank did not take the plan: it refused it, or could not be told and may have it or not.
    pub(super) fn on_untaken(
        &mut self,
        epoch: u64,
        rank: u32,
        why: &Untaken,
        now: Duration,
    ) -> Option<Action> {
        let open = self.open.as_mut().filter(|open| open.plan.epoch == epoch)?;
        let (Untaken::Refused(said) | Untaken::Untold(said)) = why;
        open.remap.error.get_or_insert_with(|| format!("rank {rank} did not take the plan: {said}"));
        if matches!(why, Untaken::Refused(_)) {
            open.refused.insert(rank);
        }
        if open.is_over(self.args.topology.size()) {
            self.close("", now);
            return None;
        }
        if std::mem::replace(&mut open.abandoned, true) {
            return None;
        }
        open.progress_at = now;
        Some(Action::Abandon(epoch))
    }

    /// The watchdog: abandons a plan that stands still, and forgets one that cannot even be abandoned.
    pub(super) fn on_tick(&mut self, now: Duration) -> Option<Action> {
        let open = self.open.as_mut()?;
        if now.saturating_sub(open.progress_at) < self.args.config.plan_timeout {
            return None;
        }
        let epoch = open.plan.epoch;
        if open.abandoned {
            self.close("the ranks did not confirm that they dropped it", now);
            return None;
        }
        let why = format!("no progress for {:?}", self.args.config.plan_timeout);
        open.remap.error.get_or_insert(why);
        open.abandoned = true;
        open.progress_at = now;
        Some(Action::Abandon(epoch))
    }

    /// Addresses of the ranks that are connected.
    pub(super) fn ranks(&self) -> impl Iterator<Item = (u32, &ActorAddr)> {
        self.joined.iter().map(|(rank, addr)| (*rank, addr))
    }

    fn plan(
        &mut self,
        trigger: Trigger,
        wall_ms: u64,
        now: Duration,
    ) -> Result<(RebalanceStarted, Plan), RebalanceRefused> {
        if let Some(open) = &self.open {
            return Err(RebalanceRefused::InProgress { epoch: open.plan.epoch });
        }
        let (ready, size) = (self.joined.len() as u32, self.args.topology.size() as u32);
        if ready < size {
            return Err(RebalanceRefused::NotReady { ready, size });
        }
        let loads = self.loads();
        if loads.iter().flatten().all(|&load| load == 0.0) {
            return Err(RebalanceRefused::NoLoad);
        }
        let asked = Gate::open();
        let gate = match trigger {
            Trigger::Interval => &self.args.config.gate,
            Trigger::Request => &asked,
        };
        let planned_before = !self.planned_loads.is_empty();
        if trigger == Trigger::Interval && planned_before && !gate.has_drifted(&self.planned_loads, &loads) {
            return Err(RebalanceRefused::NothingToMove);
        }
        let bytes = self.args.config.bytes_per_expert;
        let plan = propose(&self.args.config.policy, gate, &self.layout, &loads, self.epoch + 1, bytes)
            .map_err(|why| RebalanceRefused::Policy { why: why.to_string() })?
            .plan;
        if plan.is_empty() {
            return Err(RebalanceRefused::NothingToMove);
        }
        self.epoch += 1;
        let mut next = self.layout.clone();
        apply(&plan.layers, &mut next);
        self.planned_loads = loads.clone();
        let remap = Remap {
            epoch: plan.epoch,
            trigger,
            started_at_ms: wall_ms,
            duration_ms: 0,
            end: None,
            error: None,
            layers: plan.layers.len() as u32,
            layers_committed: 0,
            moves: moves(&plan),
            moved: Moved::default(),
            balancedness_before: balance(&self.layout, &loads).avg,
            balancedness_planned: balance(&next, &loads).avg,
            steps: StepTimes::default(),
        };
        let started = RebalanceStarted { epoch: plan.epoch, layers: remap.layers, moves: remap.moves };
        self.open = Some(Open {
            plan: plan.clone(),
            remap,
            published_at: now,
            progress_at: now,
            reports: BTreeMap::new(),
            refused: BTreeSet::new(),
            abandoned: false,
        });
        Ok((started, plan))
    }

    /// Ends the open plan with what was committed of it.
    fn close(&mut self, why: &str, now: Duration) {
        let Some(mut open) = self.open.take() else { return };
        let committed = open.remap.layers_committed;
        if committed > 0 {
            self.progress.epoch = open.plan.epoch;
            self.progress.committed = committed;
            apply(&open.plan.layers[..committed as usize], &mut self.layout);
        }
        self.progress.closed = open.plan.epoch;
        let whole = committed == open.remap.layers;
        open.remap.end = Some(if whole { PlanEnd::Committed } else { PlanEnd::RolledBack });
        if !whole && !why.is_empty() {
            open.remap.error.get_or_insert_with(|| why.to_owned());
        }
        let remap = open.summary(now);
        self.totals.committed += u64::from(whole);
        self.totals.rolled_back += u64::from(!whole);
        self.totals.moved.add(remap.moved);
        self.history.push_front(remap);
        self.history.truncate(HISTORY_MAX);
        self.steps_since_plan.clear();
    }

    /// Tokens of each expert over all DP ranks, `[moe layer][expert]`.
    fn loads(&self) -> Vec<Vec<f32>> {
        let shape = self.layout.shape();
        let mut sums = vec![vec![0.0; shape.experts as usize]; self.layout.layers().len()];
        for window in self.windows.values() {
            let loads = window.loads();
            sums.iter_mut().flatten().zip(loads.iter().flatten()).for_each(|(sum, load)| *sum += load);
        }
        sums
    }

    /// Balancedness of the window's load under the present map.
    pub(super) fn balancedness(&self) -> Balancedness {
        balance(&self.layout, &self.loads())
    }

    /// What changes all the time.
    pub(super) fn pulse(&self) -> EplbPulse {
        EplbPulse {
            map_epoch: self.progress.epoch,
            membership_epoch: self.membership,
            ready: self.joined.len() as u32,
            size: self.args.topology.size() as u32,
            remapping: self.open.is_some(),
            committed: self.totals.committed,
            rolled_back: self.totals.rolled_back,
            moved: self.totals.moved,
            balancedness: self.balancedness(),
        }
    }

    /// Everything there is to show.
    pub(super) fn status(&self, now: Duration) -> EplbStatus {
        let loads = self.loads();
        let shape = self.layout.shape();
        let layer = |(index, (map, loads)): (usize, (&_, &Vec<f32>))| layer_status(index, map, loads);
        EplbStatus {
            map_epoch: self.progress.epoch,
            membership_epoch: self.membership,
            enabled: self.args.config.enabled,
            policy: match self.args.config.policy {
                Policy::Deepseek { .. } => "deepseek",
                Policy::Incremental(_) => "incremental",
            }
            .to_owned(),
            step_interval: self.args.config.step_interval,
            window_steps: self.windows.values().map(LoadWindow::steps).max().unwrap_or(0),
            window_size: self.args.config.window_size,
            ranks: shape.ranks,
            ready: self.joined.len() as u32,
            size: self.args.topology.size() as u32,
            slots_per_rank: shape.slots_per_rank(),
            layers: self.layout.layers().iter().zip(&loads).enumerate().map(layer).collect(),
            balancedness: balance(&self.layout, &loads),
            open: self.open.as_ref().map(|open| open.summary(now)),
            totals: self.totals,
            history: self.history.iter().cloned().collect(),
        }
    }
}

impl Open {
    /// Whether every rank has dropped it, kept it, or never had it.
    fn is_over(&self, ranks: usize) -> bool {
        let ended = self.reports.values().filter(|report| report.end.is_some()).map(|report| report.rank);
        self.refused.iter().copied().chain(ended).collect::<BTreeSet<u32>>().len() == ranks
    }

    /// The remap with what all ranks have reported.
    fn summary(&self, now: Duration) -> Remap {
        let mut remap = self.remap.clone();
        remap.duration_ms = now.saturating_sub(self.published_at).as_millis() as u64;
        for report in self.reports.values() {
            remap.moved.add(report.moved);
            if report.steps.longest_us >= remap.steps.longest_us {
                remap.steps = report.steps;
            }
        }
        remap
    }
}

/// Changes the maps of these layers.
fn apply(layers: &[LayerPlan], layout: &mut Layout) {
    for layer in layers {
        let map = ExpertMap::new(layout.shape(), layer.physical_to_logical.clone());
        let set = map.and_then(|map| layout.set_layer(layer.layer as usize, map));
        set.expect("a plan leads from one valid layout to another");
    }
}

/// Slots whose expert changes.
fn moves(plan: &Plan) -> u32 {
    let changed = plan.layers.iter().flat_map(|layer| layer.previous.iter().zip(&layer.physical_to_logical));
    changed.filter(|(old, new)| old != new).count() as u32
}

fn balance(layout: &Layout, loads: &[Vec<f32>]) -> Balancedness {
    let layers = layout.layers().iter().zip(loads).filter(|(_, loads)| loads.iter().any(|&load| load > 0.0));
    Balancedness::of(layers.map(|(map, loads)| f64::from(map_balancedness(map, loads))))
}

fn layer_status(index: usize, map: &ExpertMap, loads: &[f32]) -> LayerStatus {
    let by_rank = rank_loads(map, &map.slot_loads(loads));
    let has_load = loads.iter().any(|&load| load > 0.0);
    LayerStatus {
        layer: index as u32,
        physical_to_logical: map.physical_to_logical().to_vec(),
        replica_counts: map.replica_counts(),
        expert_loads: loads.iter().map(|&load| load as u64).collect(),
        rank_loads: by_rank.iter().map(|&load| f64::from(load)).collect(),
        balancedness: has_load.then(|| f64::from(map_balancedness(map, loads))),
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
