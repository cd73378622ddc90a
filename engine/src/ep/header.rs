//! Step headers: how the ranks of a group stay in step without a leader.
//!
//! Before step n every rank tells every other a few dozen bytes. All ranks see the same vector of headers and apply
//! [`decide`], a pure function of it, so all take the same decision at the same step: run or sleep, commit how many
//! layers of the open plan, drop that plan. Header n+1 travels while step n runs.

use bincode::{Decode, Encode};

/// What one rank tells all others before a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct StepHeader {
    /// Whether it has, or may have, tokens to compute in this step.
    pub has_work: bool,
    /// Epoch of the plan it is staging; 0 for none.
    pub plan: u64,
    /// How many layers of that plan it has staged, in the plan's order; the committed ones count.
    pub staged: u32,
    /// Epoch of a plan it was told to abandon; 0 for none.
    pub abandon: u64,
}

/// Where a rank stands in the plans. Equal on all ranks at the same step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct PlanProgress {
    /// Epoch of the newest plan of which at least one layer was committed; 0 for the initial layout.
    pub epoch: u64,
    /// How many layers of it were committed.
    pub committed: u32,
    /// Epoch of the newest plan that has ended, by completion or abandonment. Older ones are refused.
    pub closed: u64,
}

/// What all ranks do at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Compute the step; else the group may sleep.
    pub run: bool,
    /// Bring this plan to this many committed layers (more than now).
    pub commit: Option<(u64, u32)>,
    /// Drop this plan's uncommitted layers. Taken before `commit`, which is then empty.
    pub abandon: Option<u64>,
}

/// The decision that every rank derives from the headers of a step.
///
/// A layer commits at the first step at which every rank has staged it. Abandoning beats committing: a plan that one
/// rank gives up ends at the same layer everywhere.
pub fn decide(headers: &[StepHeader], progress: PlanProgress) -> Decision {
    let run = headers.iter().any(|header| header.has_work);
    let abandon = headers.iter().map(|header| header.abandon).max().filter(|&epoch| epoch > progress.closed);
    if abandon.is_some() {
        return Decision { run, commit: None, abandon };
    }
    let plan = headers.first().map_or(0, |header| header.plan);
    let staged = headers.iter().map(|header| header.staged).min().unwrap_or(0);
    let agreed = plan > progress.closed && headers.iter().all(|header| header.plan == plan);
    let committed = if progress.epoch == plan { progress.committed } else { 0 };
    Decision { run, commit: (agreed && staged > committed).then_some((plan, staged)), abandon: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: StepHeader = StepHeader { has_work: false, plan: 0, staged: 0, abandon: 0 };

    #[test]
    fn the_group_runs_when_anyone_has_work() {
        let busy = StepHeader { has_work: true, ..IDLE };
        assert!(decide(&[IDLE, busy, IDLE], PlanProgress::default()).run);
        assert!(!decide(&[IDLE, IDLE], PlanProgress::default()).run);
    }

    #[test]
    fn a_layer_commits_when_the_last_rank_has_staged_it() {
        let staged = |count| StepHeader { plan: 1, staged: count, ..IDLE };
        let none = PlanProgress::default();
        assert_eq!(decide(&[staged(3), staged(0)], none).commit, None);
        assert_eq!(decide(&[staged(3), staged(2)], none).commit, Some((1, 2)));
        let two = PlanProgress { epoch: 1, committed: 2, closed: 0 };
        assert_eq!(decide(&[staged(3), staged(2)], two).commit, None);
        assert_eq!(decide(&[staged(3), staged(3)], two).commit, Some((1, 3)));
    }

    #[test]
    fn a_plan_that_one_rank_has_not_seen_does_not_commit() {
        let staged = StepHeader { plan: 1, staged: 3, ..IDLE };
        assert_eq!(decide(&[staged, IDLE], PlanProgress::default()).commit, None);
        assert_eq!(decide(&[IDLE, staged], PlanProgress::default()).commit, None);
    }

    #[test]
    fn abandoning_beats_committing_and_is_taken_once() {
        let staged = StepHeader { plan: 2, staged: 1, ..IDLE };
        let gives_up = StepHeader { abandon: 2, ..staged };
        let before = PlanProgress { epoch: 1, committed: 5, closed: 1 };
        let decision = decide(&[staged, gives_up], before);
        assert_eq!((decision.commit, decision.abandon), (None, Some(2)));
        let after = PlanProgress { closed: 2, ..before };
        let decision = decide(&[staged, gives_up], after);
        assert_eq!((decision.commit, decision.abandon), (None, None));
    }
}
