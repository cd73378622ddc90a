//! DR-1, DR-2: a drained node is empty and stays so, and nobody else is disturbed.

use std::time::Duration;

use super::world::World;
use super::{seeds, specs};
use crate::cluster::status::{ActorState, ActorStatus, NodeState};

#[test]
fn a_drained_node_is_empty_and_stays_so() {
    for seed in 0..seeds() / 4 {
        // Room on two nodes for everything, however it lies.
        let mut world = World::with_devices(seed, specs(), 5);
        world.spare();
        world.run_for(Duration::from_secs(3));
        let before = world.head().actor_status();
        world.drain("a", Duration::from_secs(30));
        world.run_for(Duration::from_secs(4));
        // What it did is durable: a new head goes on with it.
        world.crash_head();
        world.run_for(Duration::from_secs(10));
        assert_eq!(world.head().node_status()[0].state, NodeState::Drained, "seed {seed}");
        let after = world.head().actor_status();
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(after.state, ActorState::Ready, "seed {seed}: {}", after.name);
            assert_ne!(after.node.as_deref(), Some("a"), "seed {seed}: {}", after.name);
            assert_eq!(after.restarts, before.restarts, "seed {seed}: a move is no failure");
            let moved = before.node.as_deref() == Some("a");
            let key = |actor: &ActorStatus| (actor.incarnation, actor.node.clone());
            assert_eq!(key(before) != key(after), moved, "seed {seed}: {}", after.name);
        }
    }
}

/// What fits nowhere else stays until the deadline, and is not lost then.
#[test]
fn what_fits_nowhere_else_stays_until_the_deadline() {
    let mut world = World::new(7, specs());
    world.spare();
    world.run_for(Duration::from_secs(3));
    world.drain("a", Duration::from_secs(30));
    world.run_for(Duration::from_secs(4));
    world.drain("b", Duration::from_secs(5));
    world.run_for(Duration::from_secs(3));
    let there = |world: &World| {
        let actors = world.head().actor_status();
        actors
            .into_iter()
            .filter(|actor| actor.node.as_deref() == Some("b"))
            .map(|actor| actor.name)
            .collect::<Vec<_>>()
    };
    // c has three devices, and more than three want one.
    assert!(!there(&world).is_empty(), "they have nowhere to go");
    world.run_for(Duration::from_secs(5));
    assert_eq!(there(&world), Vec::<String>::new());
    assert_eq!(world.head().node_status()[1].state, NodeState::Drained);
    world.undrain("a");
    world.undrain("b");
    world.run_for(Duration::from_secs(5));
    assert!(world.head().actor_status().iter().all(|actor| actor.state == ActorState::Ready));
}
