//! After any faults, once all is healed, everything runs, once, and everybody knows the same.

use super::for_all_seeds;
use crate::cluster::status::ActorState;

/// Never two live incarnations, no restart without a death, no epoch with two meanings: the world asserts these at
/// every step. Here: after healing everything runs, once, and everybody knows the same.
#[test]
fn heals_after_any_faults() {
    for_all_seeds(|world| {
        let head = world.head();
        for actor in head.actor_status() {
            let given_up = actor.name == "fragile" && matches!(actor.state, ActorState::Dead { .. });
            assert!(actor.state == ActorState::Ready || given_up, "{}: {:?}", actor.name, actor.state);
            let alive = world.alive(&actor.name);
            let expected: Vec<_> = (!given_up).then_some(actor.incarnation).into_iter().collect();
            assert_eq!(alive, expected, "processes of {}", actor.name);
        }
        let group = head.group_status().remove(0);
        assert!(group.complete);
        for name in ["rank-0", "rank-1", "rank-2", "rank-3", "router"] {
            let view = world.view_of(name, "ep").unwrap_or_else(|| panic!("{name} has no view"));
            assert!(
                view.is_complete() && view.epoch == group.epoch,
                "{name} has {view:?}, epoch {}",
                group.epoch
            );
            let now = head.actor_status().into_iter().filter(|actor| actor.rank.is_some());
            let shown = view.members.iter().map(|member| member.addr.as_ref().map(|addr| addr.incarnation));
            assert!(shown.eq(now.map(|actor| Some(actor.incarnation))), "{name} has {view:?}");
        }
        assert!(head.next_deadline().is_some(), "heartbeats are watched");
    });
}
