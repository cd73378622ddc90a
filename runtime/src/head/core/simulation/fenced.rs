//! HA-1, HA-2: a head that was replaced gives no order, and none of its orders is obeyed.

use std::time::Duration;

use super::world::World;
use super::{seeds, specs};

/// HA-1, HA-2: the world asserts that a leader whose lease may have run out orders nothing, and that nobody obeys an
/// older head than one that was heard of. Here: both were put to the test.
#[test]
fn an_older_head_is_fenced() {
    let (mut fenced, mut refused) = (0, 0);
    for seed in 0..seeds() {
        let mut world = World::new(seed, specs());
        world.run_for(Duration::from_secs(2));
        for _ in 0..3 {
            world.depose(true);
            world.run_for(Duration::from_secs(6));
        }
        (fenced, refused) = (fenced + world.fenced, refused + world.refused);
    }
    assert!(fenced > seeds() && refused > 0, "{fenced} orders were not given, {refused} were refused");
    println!("{fenced} orders were not given, {refused} were refused");
}
