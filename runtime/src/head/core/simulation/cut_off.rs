//! HA-7: a head that lost all nodes lets another try.

use std::time::Duration;

use super::specs;
use super::world::World;
use crate::cluster::status::{ActorState, NodeState, NodeStatus};

/// A head that hears of no node any more says so before it gives their actors up, and one that never heard of them does
/// not.
#[test]
fn a_head_that_lost_all_nodes_lets_another_try() {
    let mut world = World::new(1, specs());
    world.spare();
    world.run_for(Duration::from_secs(2));
    assert!(!world.head().is_cut_off());
    world.freeze_all();
    while !world.head().is_cut_off() {
        world.run_for(Duration::from_millis(10));
    }
    let silent = |node: &NodeStatus| matches!(node.state, NodeState::Unreachable { .. });
    assert!(world.head().node_status().iter().all(silent), "no actor was given up yet");
    world.depose(false);
    world.run_for(Duration::from_millis(2600));
    assert!(!world.head().is_cut_off(), "the next one has heard of none yet");
    world.run_for(Duration::from_secs(20));
    assert!(!world.head().is_cut_off());
    assert!(world.head().actor_status().iter().all(|actor| actor.state == ActorState::Ready));
}
