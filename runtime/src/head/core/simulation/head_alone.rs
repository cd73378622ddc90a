//! SV-2: a head that dies and comes back restarts nothing.

use std::time::Duration;

use super::world::World;
use super::{seeds, specs};

/// A head that dies and comes back, alone, changes nothing at all.
#[test]
fn a_new_head_restarts_nothing() {
    for seed in 0..seeds() {
        let mut world = World::new(seed, specs());
        world.spare();
        world.run_for(Duration::from_secs(2));
        world.kill("rank-1");
        while !(world.head().group_status()[0].complete && world.head().group_status()[0].epoch == 3) {
            world.run_for(Duration::from_millis(1));
        }
        // Shortly after: all have the view, but some of what the head did is not durable yet.
        let pause = Duration::from_millis(5 + world.roll(30));
        world.run_for(pause);
        let before: Vec<_> = world.head().actor_status();
        let epoch = world.head().group_status()[0].epoch;
        // Killed, or frozen: then it wakes after it was replaced.
        match seed % 2 {
            0 => world.crash_head(),
            _ => world.depose(false),
        }
        world.run_for(Duration::from_secs(10));
        let after = world.head().actor_status();
        let key = |actor: &crate::cluster::status::ActorStatus| {
            (actor.name.clone(), actor.incarnation, actor.pid, actor.node.clone(), actor.device)
        };
        assert_eq!(
            before.iter().map(key).collect::<Vec<_>>(),
            after.iter().map(key).collect::<Vec<_>>(),
            "seed {seed}"
        );
        assert_eq!(world.head().group_status()[0].epoch, epoch, "seed {seed}");
    }
}
