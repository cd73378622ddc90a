//! Events in, actions out.

use heliostat_engine::eplb::{MapShape, PlacementStrategy};
use heliostat_runtime::handle::{ActorId, Incarnation, ProcessId};

use super::*;
use crate::messages::Carried;

const SHAPE: MapShape = MapShape { experts: 4, slots: 4, ranks: 2 };

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn core(enabled: bool) -> Core {
    Core::new(EplbArgs {
        layout: Layout::initial(2, SHAPE, PlacementStrategy::Linear).unwrap(),
        topology: Topology::new(2, 2, true).unwrap(),
        config: EplbConfig {
            enabled,
            window_size: 100,
            step_interval: 10,
            policy: Policy::Deepseek { num_groups: 1, num_nodes: 1 },
            gate: Gate::default(),
            bytes_per_expert: 1000,
            plan_timeout: Duration::from_secs(5),
            log_balancedness: false,
        },
    })
}

fn joined(core: &Core, rank: u32, membership: u64) -> RankJoined {
    let addr = ActorAddr {
        actor: ActorId(u64::from(rank)),
        incarnation: Incarnation(1),
        process: ProcessId(1),
        endpoint: "127.0.0.1:1".into(),
    };
    RankJoined { rank, addr, membership, progress: core.progress, layout: core.layout.clone() }
}

/// Both ranks are there and experts 0 and 1, which share a rank, are hot in both layers.
fn loaded(enabled: bool) -> Core {
    let mut core = core(enabled);
    for rank in 0..2 {
        core.on_joined(joined(&core, rank, 1), at(0));
    }
    core.on_load(&load(5), 0, at(0));
    core
}

fn load(steps: u64) -> StepLoad {
    StepLoad { dp: 0, steps, counts: vec![vec![90, 80, 10, 20]; 2] }
}

fn report(rank: u32, committed: u32, end: Option<PlanEnd>) -> PlanReport {
    let nvlink = Carried { experts: 1, bytes: 10 };
    let (moved, steps) = (Moved { nvlink, ..Moved::default() }, StepTimes::default());
    PlanReport { rank, epoch: 1, staged: 2, committed, end, moved, steps, error: None }
}

#[test]
fn a_remap_is_planned_published_and_recorded() {
    let mut core = loaded(false);
    let before = core.balancedness().avg;
    let (started, action) = core.rebalance(7, at(10)).unwrap();
    assert_eq!((started.epoch, started.layers), (1, 2));
    let Action::Publish(plan) = action else { panic!("{action:?}") };
    assert_eq!(core.rebalance(7, at(11)), Err(RebalanceRefused::InProgress { epoch: 1 }));
    assert_eq!(core.on_report(report(0, 2, Some(PlanEnd::Committed)), at(30)), None);
    assert!(core.status(at(30)).open.is_some(), "the other rank has not reported yet");
    core.on_report(report(1, 2, Some(PlanEnd::Committed)), at(40));
    let status = core.status(at(50));
    assert_eq!((status.map_epoch, status.open, status.history.len()), (1, None, 1));
    let remap = &status.history[0];
    assert_eq!((remap.end, remap.duration_ms, remap.moved.nvlink.bytes), (Some(PlanEnd::Committed), 30, 20));
    assert_eq!(status.totals, Totals { committed: 1, rolled_back: 0, moved: remap.moved });
    assert_eq!(status.layers[0].physical_to_logical, plan.layers[0].physical_to_logical);
    assert!(status.balancedness.avg > before && status.balancedness.avg > 0.9);
    assert_eq!(core.rebalance(8, at(60)), Err(RebalanceRefused::NothingToMove));
}

#[test]
fn nothing_is_planned_without_ranks_or_load() {
    let mut core = core(false);
    assert_eq!(core.rebalance(0, at(0)), Err(RebalanceRefused::NotReady { ready: 0, size: 2 }));
    for rank in 0..2 {
        core.on_joined(joined(&core, rank, 1), at(0));
    }
    assert_eq!(core.rebalance(0, at(0)), Err(RebalanceRefused::NoLoad));
}

#[test]
fn intervals_count_steps() {
    let mut core = loaded(true);
    assert_eq!(core.on_load(&load(4), 0, at(1)), None, "9 of 10 steps");
    assert!(matches!(core.on_load(&load(1), 0, at(2)), Some(Action::Publish(_))));
    assert_eq!(core.on_load(&load(100), 0, at(3)), None, "one plan at a time");
}

#[test]
fn the_watchdog_abandons_what_stands_still_and_keeps_what_was_committed() {
    let mut core = loaded(false);
    core.rebalance(0, at(0)).unwrap();
    core.on_report(report(0, 1, None), at(4_000));
    assert_eq!(core.on_tick(at(8_999)), None, "progress resets the watchdog");
    assert_eq!(core.on_tick(at(9_000)), Some(Action::Abandon(1)));
    for rank in 0..2 {
        core.on_report(report(rank, 1, Some(PlanEnd::RolledBack)), at(9_100));
    }
    let status = core.status(at(9_200));
    assert_eq!((status.history[0].end, status.history[0].layers_committed), (Some(PlanEnd::RolledBack), 1));
    assert!(status.history[0].error.as_deref().unwrap().contains("no progress"));
    let initial = Layout::initial(2, SHAPE, PlacementStrategy::Linear).unwrap();
    assert_ne!(core.layout.layer(0), initial.layer(0), "the committed layer stays");
    assert_eq!(core.layout.layer(1), initial.layer(1), "the other one never happened");
    let (started, _) = core.rebalance(0, at(9_300)).unwrap();
    assert_eq!((started.epoch, started.layers), (2, 1), "an epoch is never used twice");
}

#[test]
fn ranks_that_do_not_even_confirm_do_not_block_the_next_plan() {
    let mut core = loaded(false);
    core.rebalance(0, at(0)).unwrap();
    assert_eq!(core.on_tick(at(5_000)), Some(Action::Abandon(1)));
    assert_eq!(core.on_tick(at(5_001)), None);
    assert_eq!(core.on_tick(at(10_000)), None);
    assert_eq!(core.status(at(10_000)).history[0].end, Some(PlanEnd::RolledBack));
    assert_eq!(core.rebalance(0, at(10_001)).unwrap().0.epoch, 2);
}

#[test]
fn a_refusal_or_a_failed_stage_ends_the_plan() {
    let mut core = loaded(false);
    core.rebalance(0, at(0)).unwrap();
    let (refused, untold) = (Untaken::Refused("stale".into()), Untaken::Untold("lost".into()));
    assert_eq!(core.on_untaken(1, 1, &untold, at(1)), Some(Action::Abandon(1)));
    assert_eq!(core.on_untaken(1, 0, &refused, at(1)), None, "it is told once");
    assert!(core.status(at(1)).open.is_some(), "rank 1 may have it");
    assert_eq!(core.on_report(report(1, 0, Some(PlanEnd::RolledBack)), at(2)), None);
    let ended = core.status(at(2));
    assert!(ended.open.is_none(), "rank 0 never had it");
    assert_eq!(ended.history[0].error.as_deref(), Some("rank 1 did not take the plan: lost"));

    let mut core = loaded(false);
    core.rebalance(0, at(0)).unwrap();
    assert_eq!(core.on_untaken(1, 1, &refused, at(1)), Some(Action::Abandon(1)));
    assert_eq!(core.on_untaken(1, 0, &refused, at(1)), None);
    assert_eq!(core.rebalance(0, at(2)).unwrap().0.epoch, 2, "nobody has it, so the next may begin");

    let mut core = loaded(false);
    core.rebalance(0, at(0)).unwrap();
    let failed = PlanReport { error: Some("no space".into()), ..report(1, 0, None) };
    assert_eq!(core.on_report(failed, at(1)), Some(Action::Abandon(1)));
    assert_eq!(core.status(at(2)).open.unwrap().error.as_deref(), Some("rank 1: no space"));
}

#[test]
fn a_change_of_membership_ends_the_plan_and_the_ranks_say_what_holds() {
    let mut core = loaded(false);
    core.rebalance(0, at(0)).unwrap();
    core.on_view(2, at(5));
    assert_eq!(core.status(at(5)).history[0].end, Some(PlanEnd::RolledBack));
    let mut layout = core.layout.clone();
    layout.set_layer(1, ExpertMap::new(SHAPE, vec![3, 2, 1, 0]).unwrap()).unwrap();
    let progress = PlanProgress { epoch: 1, committed: 2, closed: 4 };
    for rank in 0..2 {
        let joined = RankJoined { progress, layout: layout.clone(), ..joined(&core, rank, 2) };
        core.on_joined(joined, at(6));
    }
    assert_eq!((&core.layout, core.progress), (&layout, progress));
    assert_eq!(core.rebalance(0, at(7)).unwrap().0.epoch, 5, "above every plan that a rank has heard of");
}
