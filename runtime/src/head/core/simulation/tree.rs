//! Supervision trees under faults: whoever is restarted together is of one round in the end.

use std::collections::BTreeMap;
use std::time::Duration;

use super::seeds;
use super::world::World;
use crate::cluster::status::{ActorState, ActorStatus};
use crate::handle::Incarnation;
use crate::spec::{ActorSpec, RestartPolicy, Seat, SupervisorSpec, SupervisorStrategy};

/// `all` restarts its three together; `rest` restarts what comes after; `low`, below `rest`, gives everything up at once.
fn tree() -> (Vec<ActorSpec>, Vec<SupervisorSpec>) {
    let restart = RestartPolicy { max_restarts: u32::MAX, ..RestartPolicy::default() };
    let child = |name: &str, supervisor: &str, order| ActorSpec {
        seat: Some(Seat::new(supervisor, order)),
        ..ActorSpec::new(name, "t", vec![])
    };
    let supervisor = |name: &str, strategy| SupervisorSpec { restart, ..SupervisorSpec::new(name, strategy) };
    let low = SupervisorSpec {
        seat: Some(Seat::new("rest", 1)),
        ..supervisor("low", SupervisorStrategy::Escalate)
    };
    let actors = vec![
        child("all-0", "all", 0),
        child("all-1", "all", 1),
        child("all-2", "all", 2),
        child("rest-0", "rest", 0),
        child("low-0", "low", 0),
        child("low-1", "low", 1),
        child("rest-2", "rest", 2),
    ];
    let all = supervisor("all", SupervisorStrategy::OneForAll);
    (actors, vec![all, supervisor("rest", SupervisorStrategy::RestForOne), low])
}

/// Who must be newer than the last killed life of whom.
const TOGETHER: [(&[&str], &[&str]); 3] = [
    (&["all-0", "all-1", "all-2"], &["all-0", "all-1", "all-2"]),
    (&["low-0", "low-1"], &["low-0", "low-1", "rest-2"]),
    (&["rest-0"], &["rest-0", "low-0", "low-1", "rest-2"]),
];

#[test]
fn who_is_restarted_together_is_of_one_round() {
    for seed in 0..seeds() {
        let outcome = std::panic::catch_unwind(|| check(seed));
        if let Err(panic) = outcome {
            println!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

fn check(seed: u64) {
    let (actors, supervisors) = tree();
    let mut world = World::with_tree(seed, actors, supervisors, 3);
    world.run_for(Duration::from_secs(2));
    for _ in 0..30 {
        world.fault();
        let pause = Duration::from_millis(world.roll(1500));
        world.run_for(pause);
    }
    world.heal();
    world.run_for(Duration::from_secs(60));
    let status = world.head().actor_status();
    let now: BTreeMap<&str, &ActorStatus> = status.iter().map(|actor| (actor.name.as_str(), actor)).collect();
    for actor in now.values() {
        assert_eq!(actor.state, ActorState::Ready, "{}", actor.name);
    }
    for (failed, restarted) in TOGETHER {
        let killed = failed.iter().filter_map(|name| world.killed.get(*name)).max();
        let killed = killed.copied().unwrap_or(Incarnation(0));
        for name in restarted {
            let life = now[name].incarnation;
            assert!(life > killed, "{name} is in life {life}, {failed:?} had a death at {killed}");
        }
    }
}
