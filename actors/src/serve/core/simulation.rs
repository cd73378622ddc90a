//! Random documents, loads, deaths and controllers that start anew; then healing. Prints its seed.
//!
//! Checks at every step that SD-1 holds, that numbers are never used twice, and that nothing runs that is not known;
//! at the end that everything is as the last document says.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::tests::{replicas, target};
use super::*;

const SEEDS: u64 = 60;
const STEPS: u32 = 400;

struct World {
    rng: StdRng,
    state: ServeState,
    now: Duration,
    /// Replicas whose actors are there, and whether they serve.
    actors: BTreeMap<u64, Health>,
    seen: Seen,
    /// The highest number that was ever given out.
    numbers: u64,
    healing: bool,
}

impl World {
    fn deploy(&mut self) {
        let names = ["a", "b", "c"];
        let mut targets = Vec::new();
        for name in names {
            if self.healing || self.rng.random_bool(0.7) {
                targets.push(target(
                    name,
                    self.rng.random_range(1..4),
                    replicas(self.rng.random_range(1..4)),
                ));
            }
        }
        self.state.deploy(targets, 1).unwrap();
    }

    fn faults(&mut self) {
        let numbers: Vec<u64> = self.actors.keys().copied().collect();
        for number in numbers {
            let health = match self.rng.random_range(0..40) {
                0 => Health::Broken("a fault".into()),
                1 => Health::Starting("a rank is lost".into()),
                2 => Health::Unplaced("no device".into()),
                _ => continue,
            };
            self.actors.insert(number, health);
        }
        if self.rng.random_bool(0.02) {
            self.state = ServeState::restore(&self.state.snapshot().unwrap()).unwrap();
            self.now = Duration::ZERO;
        }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.rng.random_range(100..900));
        // Most of what starts serves after a while.
        for health in self.actors.values_mut() {
            let comes = matches!(health, Health::Starting(_) | Health::Unplaced(_));
            if comes && (self.healing || self.rng.random_bool(0.5)) {
                *health = Health::Ready;
            }
        }
        self.seen.health = self.actors.clone();
        let draining = self.state.replicas().filter(|(_, _, replica)| replica.stage == Stage::Draining);
        let draining: Vec<u64> = draining.map(|(_, _, replica)| replica.number).collect();
        self.seen.draining =
            draining.into_iter().map(|number| (number, u64::from(self.rng.random_bool(0.6)))).collect();
        let before: BTreeMap<u64, Stage> =
            self.state.replicas().map(|(_, _, replica)| (replica.number, replica.stage)).collect();
        let commands = self.state.step(self.now, 1, &self.seen);
        self.check(&before);
        for command in commands {
            match command {
                Command::Persist | Command::EnsureIngress(_) | Command::RemoveIngress(_) => {}
                Command::Ensure(number) => {
                    self.actors.entry(number).or_insert(Health::Starting("new".into()));
                }
                Command::Remove(number) => {
                    self.actors.remove(&number);
                }
            }
        }
    }

    fn check(&mut self, before: &BTreeMap<u64, Stage>) {
        for (app, state) in self.state.apps() {
            for (name, deployment) in &state.deployments {
                let serving = |replica: &&Replica| replica.stage == Stage::Running;
                let running = deployment.replicas().iter().filter(serving).count();
                let drained = deployment.replicas().iter().filter(|replica| {
                    replica.stage == Stage::Draining && before.get(&replica.number) == Some(&Stage::Running)
                });
                if drained.count() > 0 {
                    assert!(running >= deployment.replicas_wanted() as usize, "SD-1: {app}/{name}");
                }
            }
        }
        for (_, _, replica) in self.state.replicas() {
            if !before.contains_key(&replica.number) {
                assert!(replica.number > self.numbers, "a number was used twice");
            }
        }
        let newest = self.state.replicas().map(|(_, _, replica)| replica.number).max().unwrap_or(0);
        self.numbers = self.numbers.max(newest);
    }
}

#[test]
fn whatever_happens_the_last_document_is_served_in_the_end() {
    for seed in 0..SEEDS {
        let mut world = World {
            rng: StdRng::seed_from_u64(seed),
            state: ServeState::default(),
            now: Duration::ZERO,
            actors: BTreeMap::new(),
            seen: Seen::default(),
            numbers: 0,
            healing: false,
        };
        eprintln!("seed {seed}");
        for _ in 0..STEPS {
            if world.rng.random_bool(0.03) {
                world.deploy();
            }
            world.faults();
            world.step();
        }
        world.healing = true;
        // What broke last may have been given up: the second time nothing does.
        for _ in 0..2 {
            world.deploy();
            (0..STEPS).for_each(|_| world.step());
        }
        for (app, state) in world.state.apps() {
            let deployment = &state.deployments[app];
            assert_eq!(deployment.state().0, DeploymentState::Healthy, "{app}: {:?}", deployment.state());
            assert_eq!(deployment.replicas().len(), deployment.replicas_wanted() as usize, "{app}");
        }
        assert_eq!(world.actors.len(), world.state.replicas().count(), "nothing runs that is not known");
    }
}
