//! Seeded simulation of the whole control plane around the real core: faults at random, then healing.
//!
//! One file per invariant; what must hold at every step is asserted by `world/checks.rs`. A failure prints its seed;
//! `replay` runs it again with the history. More seeds: `HELIOSTAT_SEEDS=10000`.

mod bundles;
mod cut_off;
mod drain;
mod fenced;
mod head_alone;
mod heals;
mod tree;
mod world;

use std::time::Duration;

use self::world::World;
use crate::mesh::Dims;
use crate::spec::{
    ActorSpec, GroupMember, Placement, PlacementGroupSpec, Resources, RestartPolicy, Strategy,
};

const RANKS: u32 = 4;
/// Name of the placement group.
const RESERVED: &str = "reserved";

/// Four ranks on devices, a subscriber, an actor that is given up early, and two in bundles.
fn specs() -> Vec<ActorSpec> {
    let patient = RestartPolicy { max_restarts: u32::MAX, ..RestartPolicy::default() };
    let rank = |rank| ActorSpec {
        resources: Resources::device(),
        restart: patient,
        group: Some(GroupMember { group: "ep".into(), rank, size: RANKS }),
        mesh: Some(Dims::new([("ranks", RANKS)]).expect("a shape")),
        ..ActorSpec::new(format!("rank-{rank}"), "rank", vec![])
    };
    let router = ActorSpec {
        restart: patient,
        subscribe: vec!["ep".into()],
        ..ActorSpec::new("router", "router", vec![])
    };
    let restart = RestartPolicy { max_restarts: 2, ..RestartPolicy::default() };
    let fragile = ActorSpec { restart, ..ActorSpec::new("fragile", "fragile", vec![]) };
    let inside = |index| ActorSpec {
        resources: Resources::device(),
        restart: patient,
        placement: Placement::Bundle { group: RESERVED.into(), index: Some(index) },
        ..ActorSpec::new(format!("inside-{index}"), "inside", vec![])
    };
    (0..RANKS).map(rank).chain([router, fragile, inside(0), inside(1)]).collect()
}

/// Two bundles, each on a node of its own.
fn placement_group() -> PlacementGroupSpec {
    let resources = Resources { cpus: 2.into(), ..Resources::device() };
    PlacementGroupSpec::new(RESERVED, 2, resources).strategy(Strategy::StrictSpread)
}

fn simulate(seed: u64) -> World {
    let mut world = World::new(seed, specs());
    world.run_for(Duration::from_secs(2));
    for _ in 0..30 {
        world.fault();
        let pause = Duration::from_millis(world.roll(1500));
        world.run_for(pause);
    }
    world.heal();
    world.run_for(Duration::from_secs(40));
    world
}

fn seeds() -> u64 {
    // Only to search for longer by hand.
    #[allow(clippy::disallowed_methods)]
    std::env::var("HELIOSTAT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(600)
}

/// Runs `check` over worlds that were broken and healed; names the seed when it panics.
fn for_all_seeds(check: impl Fn(&World) + std::panic::RefUnwindSafe) {
    for seed in 0..seeds() {
        let outcome = std::panic::catch_unwind(|| check(&simulate(seed)));
        if let Err(panic) = outcome {
            println!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// `cargo test -p heliostat-runtime --lib replay -- --ignored --nocapture`, after setting the seed.
#[test]
#[ignore = "for one seed, by hand"]
fn replay() {
    let world = simulate(0);
    for actor in world.head().actor_status() {
        println!("{} {:?} #{}", actor.name, actor.state, actor.incarnation);
    }
}
