//! PG-1 to PG-3: bundles have places all together or not at all, durable before they are used; after healing every
//! bundle has one and its actor is in it.

use super::{RESERVED, for_all_seeds};
use crate::cluster::status::{ActorState, PlacementGroupState};

#[test]
fn actors_are_in_their_bundles_after_any_faults() {
    for_all_seeds(|world| {
        let head = world.head();
        let group = head.placement_group_status().into_iter().find(|group| group.name == RESERVED);
        let group = group.expect("it was made again");
        assert_eq!(group.state, PlacementGroupState::Created);
        let actors = head.actor_status();
        for bundle in &group.bundles {
            let name = format!("inside-{}", bundle.index);
            let actor = actors.iter().find(|actor| actor.name == name).expect("applied");
            assert_eq!(actor.state, ActorState::Ready, "{name}");
            assert_eq!(actor.node, bundle.node, "{name}");
            assert!(actor.device.is_some_and(|device| bundle.devices.contains(&device)), "{name}");
            assert_eq!(bundle.actors, [name]);
        }
        assert_ne!(group.bundles[0].node, group.bundles[1].node, "each on a node of its own");
    });
}
