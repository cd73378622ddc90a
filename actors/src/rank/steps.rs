//! The steps of one membership epoch: headers, commits, computation, sleep.
//!
//! Round n: all ranks know all headers n, decide alike, send header n+1 and compute step n. When nobody has work the
//! group parks: nobody sends header n+1 before it has something to say or sees that somebody had.

use std::time::{Duration, Instant};

use heliostat_engine::ep::{Decision, EpGroup, StepHeader, decide};
use heliostat_engine::eplb::map::ExpertMap;
use heliostat_engine::model::ExchangeError;
use heliostat_engine::request::StepPhases;
use heliostat_kernels::fabric::{Event, Kind, Tag};

use super::engine::{Engine, StepWork};
use super::thread::StepThread;
use crate::messages::PlanEnd;
use crate::monitor::trace::StepSpan;

impl StepThread {
    /// Steps until the epoch ends: a newer view, a lost peer, a broken link or the actor's end.
    pub(super) fn step_until_over(&mut self, group: &mut EpGroup, epoch: u64) -> Result<(), ExchangeError> {
        self.take_commands();
        let mut sent = self.header();
        self.send_header(group, 1, sent)?;
        for round in 1.. {
            let headers = self.receive_headers(group, round)?;
            let decision = decide(&headers, self.progress);
            self.change_map(group, decision)?;
            self.take_commands();
            if self.should_leave(epoch) {
                break;
            }
            if !self.arrived.is_empty() {
                self.engine.drain(self.attention.as_mut(), &mut self.outlet)?;
                self.store_arrived();
            }
            if !decision.run {
                self.engine.drain(self.attention.as_mut(), &mut self.outlet)?;
                self.park(group, sent)?;
            }
            sent = self.header();
            self.send_header(group, round + 1, sent)?;
            if decision.run {
                group.fabric().keep_waits(self.clock.recorder.is_on());
                let began = Instant::now();
                let work = self.step(group, round)?;
                self.record(group, began, &work);
                self.report(group);
            }
        }
        Ok(())
    }

    /// What this rank says before the next step.
    fn header(&self) -> StepHeader {
        let plan = self.plan.as_ref();
        StepHeader {
            has_work: self.attention.as_ref().is_some_and(|attention| attention.has_work()),
            plan: plan.map_or(0, |plan| plan.plan.epoch),
            staged: plan.map_or(0, |plan| plan.staged()),
            abandon: self.abandon,
        }
    }

    fn send_header(&self, group: &mut EpGroup, round: u64, header: StepHeader) -> Result<(), ExchangeError> {
        let bytes = bincode::encode_to_vec(header, super::codec())
            .map_err(|why| ExchangeError::Other(format!("cannot encode a step header: {why}")))?;
        let tag = Tag { kind: Kind::Header, step: round, layer: 0 };
        for rank in 0..self.args.topology.size() {
            group.fabric().send(rank, tag, &[&bytes])?;
        }
        Ok(())
    }

    fn receive_headers(&self, group: &mut EpGroup, round: u64) -> Result<Vec<StepHeader>, ExchangeError> {
        let tag = Tag { kind: Kind::Header, step: round, layer: 0 };
        (0..self.args.topology.size())
            .map(|rank| {
                let frame = group.fabric().recv(rank, tag)?;
                let decoded = bincode::decode_from_slice(frame.payload(), super::codec());
                decoded
                    .map(|(header, _)| header)
                    .map_err(|why| ExchangeError::Other(format!("rank {rank} sent a bad step header: {why}")))
            })
            .collect()
    }

    /// Sleeps until this rank has something to say, or another has said something.
    fn park(&mut self, group: &mut EpGroup, sent: StepHeader) -> Result<(), ExchangeError> {
        self.report_idle();
        loop {
            self.take_commands();
            if self.header() != sent || self.header().has_work {
                return Ok(());
            }
            if matches!(group.fabric().wait(Kind::Header, None)?, Event::Frame { .. }) {
                return Ok(());
            }
        }
    }

    /// Carries out what the headers decided about plans.
    fn change_map(&mut self, group: &mut EpGroup, decision: Decision) -> Result<(), ExchangeError> {
        if let Some(epoch) = decision.abandon {
            self.progress.closed = epoch;
            match &self.plan {
                Some(plan) if plan.plan.epoch == epoch => self.end_plan(PlanEnd::RolledBack),
                _ => self.inbox.set_closed_plan(epoch),
            }
        }
        if let Some((epoch, upto)) = decision.commit {
            self.commit(group, epoch, upto)?;
        }
        Ok(())
    }

    /// Brings the open plan to `upto` committed layers: weights and map of a layer change together, between two steps.
    fn commit(&mut self, group: &mut EpGroup, epoch: u64, upto: u32) -> Result<(), ExchangeError> {
        let bug = |what: &str| ExchangeError::Other(format!("plan {epoch}: {what}"));
        let plan = self.plan.clone().ok_or_else(|| bug("committed by all, but not open here"))?;
        let from = if self.progress.epoch == epoch { self.progress.committed } else { 0 };
        for index in from..upto {
            let layer = plan.plan.layers.get(index as usize).ok_or_else(|| bug("has fewer layers"))?;
            let contents = plan.commit_next().ok_or_else(|| bug("a committed layer is not staged here"))?;
            let moe_layer = layer.layer as usize;
            if let Engine::Cuda { rank, .. } = &self.engine {
                rank.guard_weights()?;
            }
            self.slots.replace(moe_layer, contents).map_err(|why| bug(&why.to_string()))?;
            plan.released();
            let map = ExpertMap::new(self.layout.shape(), layer.physical_to_logical.clone())
                .and_then(|map| self.layout.set_layer(moe_layer, map));
            map.map_err(|why| bug(&why.to_string()))?;
            self.show_map(moe_layer)?;
        }
        group.set_layout(self.layout.clone());
        self.progress.epoch = epoch;
        self.progress.committed = upto;
        if upto as usize == plan.plan.layers.len() {
            self.end_plan(PlanEnd::Committed);
        } else {
            self.outlet.plan_report(&plan, upto, None, self.clock.watch());
        }
        Ok(())
    }

    /// Computes one step: the whole model on a DP rank, the MoE layers on a rank with experts only.
    fn step(&mut self, group: &mut EpGroup, round: u64) -> Result<StepWork, ExchangeError> {
        group.begin_step(round);
        let number = self.clock.steps() + 1;
        self.attention.iter_mut().for_each(|attention| attention.begin_step(number));
        self.engine.step(self.attention.as_mut(), group, &mut self.outlet)
    }

    /// Notes where the step's time went.
    fn record(&mut self, group: &mut EpGroup, began: Instant, work: &StepWork) {
        let took = began.elapsed();
        let waited = group.fabric().take_waited();
        let us = |duration: Duration| duration.as_micros() as u64;
        let phases = StepPhases {
            headers: us(waited.header),
            schedule: work.schedule,
            compute: work.compute.saturating_sub(us(waited.dispatch + waited.combine)),
            dispatch: us(waited.dispatch),
            combine: us(waited.combine),
            sample: work.sample,
        };
        self.clock.record(took, &phases);
        let number = self.clock.steps();
        let map = (self.progress.epoch, self.progress.committed);
        let waits = group.fabric().take_waits();
        self.clock.recorder.step(
            began,
            StepSpan::new(number, took, phases, (work.seqs, work.tokens), map),
            waits,
        );
    }

    /// Sends what the step brought.
    fn report(&mut self, group: &mut EpGroup) {
        let Some(attention) = &self.attention else { return };
        self.outlet.count_step();
        match &mut self.engine {
            Engine::Cpu(_) => group.drain_loads(self.outlet.load_sums()),
            Engine::Cuda { rank, .. } => rank.drain_loads(self.outlet.load_sums()),
        }
        if self.outlet.load_is_due(self.args.engine.load_report_steps) {
            self.outlet.send_load();
        }
        self.outlet.send_outputs(&attention.stats(&self.clock), attention.spans());
    }

    /// The same before a sleep, so that nobody is left with old figures.
    fn report_idle(&mut self) {
        if let Some(attention) = &self.attention {
            self.outlet.send_load();
            self.outlet.send_stats(&attention.stats(&self.clock), attention.spans());
        }
    }
}
