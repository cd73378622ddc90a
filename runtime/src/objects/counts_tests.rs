//! The counts of processes that send each other refs: by hand, and in random histories with losses and deaths.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::counts::{Command, Counts, TRANSIT_MAX, Ticket, Told, Word};
use super::{ObjectAddr, ObjectId};
use crate::handle::ProcessId;

const T0: Duration = Duration::ZERO;

fn process(n: u64) -> ProcessId {
    ProcessId(n)
}

fn addr(owner: u64, number: u64) -> ObjectAddr {
    let id = ObjectId { owner: process(owner), number };
    ObjectAddr { id, owner: owner.to_string(), store: None, in_store: false, bytes: 1 }
}

fn ticket(sender: u64, number: u64) -> Option<Ticket> {
    Some(Ticket { sender: sender.to_string(), number })
}

#[test]
fn an_object_is_freed_with_its_last_ref() {
    let mut owner = Counts::new(process(1));
    let object = addr(1, 7);
    owner.created(object.clone(), Vec::new());
    assert_eq!(owner.borrow(object.id, process(2), None), Told::Heard);
    owner.dropped(object.id);
    assert_eq!(owner.take_commands(), [], "it is borrowed");
    owner.returned(object.id, process(2));
    assert_eq!(owner.take_commands(), [Command::Free(object.clone())]);
    assert_eq!(owner.borrow(object.id, process(3), None), Told::Gone);
}

#[test]
fn a_borrower_that_dies_has_no_refs() {
    let mut owner = Counts::new(process(1));
    let object = addr(1, 7);
    owner.created(object.clone(), Vec::new());
    for borrower in [2, 3] {
        owner.borrow(object.id, process(borrower), None);
    }
    owner.dropped(object.id);
    owner.ended(process(2));
    assert_eq!(owner.take_commands(), []);
    owner.ended(process(3));
    assert_eq!(owner.take_commands(), [Command::Free(object)]);
}

#[test]
fn a_ref_on_its_way_keeps_the_object_until_it_is_counted_or_given_up() {
    let mut owner = Counts::new(process(1));
    let object = addr(1, 7);
    owner.created(object.clone(), Vec::new());
    let first = owner.sent(object.id, T0).unwrap();
    let second = owner.sent(object.id, Duration::from_secs(1)).unwrap();
    owner.dropped(object.id);
    owner.passed(object.id, first);
    owner.passed(object.id, first);
    assert_eq!(owner.take_commands(), []);
    assert_eq!(owner.next_expiry(), Some(TRANSIT_MAX + Duration::from_secs(1)));
    owner.expire(TRANSIT_MAX);
    assert_eq!(owner.take_commands(), []);
    owner.expire(TRANSIT_MAX + Duration::from_secs(1));
    assert_eq!(owner.take_commands(), [Command::Free(object.clone())]);
    owner.passed(object.id, second);
}

#[test]
fn a_borrower_tells_its_sender_only_when_the_owner_counts_it() {
    let mut borrower = Counts::new(process(2));
    let object = addr(1, 7);
    assert!(borrower.arrived(&object, ticket(3, 9), None));
    assert_eq!(borrower.take_commands(), [Command::Tell(object.clone(), Word::Borrow)]);
    borrower.dropped(object.id);
    assert!(borrower.arrived(&object, ticket(3, 10), None));
    assert_eq!(borrower.take_commands(), [], "one word at a time");
    borrower.told(object.id, Told::Heard);
    let arrived = |number| Command::Arrived(object.id, ticket(3, number).unwrap());
    assert_eq!(borrower.take_commands(), [arrived(9), arrived(10)]);
    borrower.dropped(object.id);
    assert_eq!(borrower.take_commands(), [Command::Tell(object.clone(), Word::Return)]);
    assert!(borrower.arrived(&object, ticket(3, 11), None));
    borrower.told(object.id, Told::Heard);
    assert_eq!(borrower.take_commands(), [Command::Tell(object.clone(), Word::Borrow)], "again");
    borrower.told(object.id, Told::Heard);
    assert_eq!(borrower.take_commands(), [arrived(11)]);
}

#[test]
fn what_an_owner_has_lost_is_not_asked_for_again() {
    let mut borrower = Counts::new(process(2));
    let object = addr(1, 7);
    borrower.arrived(&object, ticket(1, 1), None);
    borrower.take_commands();
    borrower.ended(process(1));
    let arrived = Command::Arrived(object.id, ticket(1, 1).unwrap());
    assert_eq!(borrower.take_commands(), [arrived]);
    borrower.told(object.id, Told::Heard);
    borrower.dropped(object.id);
    assert_eq!(borrower.take_commands(), [Command::Forget(object.id)]);
    assert_eq!(borrower.len(), 0);
}

#[test]
fn an_object_keeps_those_that_it_has_refs_to() {
    let mut owner = Counts::new(process(1));
    let (inner, outer, outmost) = (addr(1, 7), addr(1, 8), addr(1, 9));
    owner.created(inner.clone(), Vec::new());
    owner.created(outer.clone(), vec![inner.id, inner.id]);
    owner.created(outmost.clone(), vec![outer.id]);
    owner.dropped(inner.id);
    owner.dropped(outer.id);
    assert_eq!(owner.take_commands(), []);
    owner.dropped(outmost.id);
    assert_eq!(owner.take_commands(), [outmost, outer, inner].map(Command::Free));
}

#[test]
fn an_object_that_is_read_keeps_what_it_has_refs_to_until_the_reader_is_counted() {
    let mut reader = Counts::new(process(3));
    let (inner, outer) = (addr(1, 7), addr(2, 8));
    reader.arrived(&outer, None, None);
    reader.told(outer.id, Told::Heard);
    reader.take_commands();
    assert!(reader.arrived(&inner, None, Some(outer.id)));
    reader.dropped(outer.id);
    assert_eq!(
        reader.take_commands(),
        [Command::Tell(inner.clone(), Word::Borrow)],
        "outer is not given back"
    );
    reader.told(inner.id, Told::Heard);
    assert_eq!(reader.take_commands(), [Command::Tell(outer.clone(), Word::Return)]);
    // Once it is counted another reading keeps nothing.
    reader.arrived(&outer, None, None);
    reader.arrived(&inner, None, Some(outer.id));
    reader.told(outer.id, Told::Heard);
    reader.told(outer.id, Told::Heard);
    reader.take_commands();
    reader.dropped(outer.id);
    assert_eq!(reader.take_commands(), [Command::Tell(outer, Word::Return)]);
}

/// Processes with refs to one object, messages between them, and the truth.
struct World {
    rng: StdRng,
    now: Duration,
    counts: BTreeMap<u64, Counts>,
    /// Refs that each holds.
    refs: BTreeMap<u64, u32>,
    messages: Vec<Message>,
    freed: bool,
    object: ObjectAddr,
}

enum Message {
    Ref { to: u64, ticket: Option<Ticket>, sent_at: Duration },
    Arrived { to: u64, number: u64 },
    Tell { from: u64, word: Word },
    Told { to: u64, told: Told },
}

const OWNER: u64 = 1;

impl World {
    fn new(seed: u64) -> Self {
        let object = addr(OWNER, 7);
        let mut counts: BTreeMap<u64, Counts> = (1..=4).map(|n| (n, Counts::new(process(n)))).collect();
        counts.get_mut(&OWNER).unwrap().created(object.clone(), Vec::new());
        let rng = StdRng::seed_from_u64(seed);
        let refs = BTreeMap::from([(OWNER, 1)]);
        Self { rng, now: T0, counts, refs, messages: Vec::new(), freed: false, object }
    }

    fn holders(&self) -> Vec<u64> {
        self.refs
            .iter()
            .filter(|(n, refs)| **refs > 0 && self.counts.contains_key(n))
            .map(|(n, _)| *n)
            .collect()
    }

    fn any(&mut self, of: &[u64]) -> Option<u64> {
        (!of.is_empty()).then(|| of[self.rng.random_range(0..of.len())])
    }

    fn step(&mut self, deaths: bool) {
        let id = self.object.id;
        match self.rng.random_range(0..10) {
            0..=2 => {
                let (holders, all) = (self.holders(), self.counts.keys().copied().collect::<Vec<_>>());
                let (Some(from), Some(to)) = (self.any(&holders), self.any(&all)) else { return };
                let number = self.counts.get_mut(&from).unwrap().sent(id, self.now).unwrap();
                // One in five messages is lost, one in five has several receivers.
                let kind = self.rng.random_range(0..5);
                let ticket = ticket(from, number).filter(|_| kind > 1);
                if kind > 0 {
                    self.messages.push(Message::Ref { to, ticket, sent_at: self.now });
                }
            }
            3..=4 => {
                let holders = self.holders();
                let Some(of) = self.any(&holders) else { return };
                *self.refs.get_mut(&of).unwrap() -= 1;
                self.counts.get_mut(&of).unwrap().dropped(id);
            }
            5 if deaths && self.rng.random_range(0..20) == 0 => {
                let borrowers: Vec<u64> = self.counts.keys().copied().filter(|n| *n != OWNER).collect();
                let Some(dead) = self.any(&borrowers) else { return };
                self.counts.remove(&dead);
                self.messages
                    .retain(|message| !matches!(message, Message::Tell { from, .. } if *from == dead));
                self.counts.get_mut(&OWNER).unwrap().ended(process(dead));
            }
            _ => self.deliver(),
        }
        self.execute();
    }

    fn deliver(&mut self) {
        if self.messages.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.messages.len());
        let id = self.object.id;
        match self.messages.swap_remove(at) {
            Message::Ref { to, ticket, sent_at } => {
                // A message takes less than a ref is kept for.
                assert!(self.now - sent_at < TRANSIT_MAX);
                if let Some(counts) = self.counts.get_mut(&to)
                    && counts.arrived(&self.object, ticket, None)
                {
                    *self.refs.entry(to).or_default() += 1;
                }
            }
            Message::Arrived { to, number } => {
                self.counts.get_mut(&to).into_iter().for_each(|counts| counts.passed(id, number));
            }
            Message::Tell { from, word } => {
                let owner = self.counts.get_mut(&OWNER).unwrap();
                let told = match word {
                    Word::Borrow => owner.borrow(id, process(from), None),
                    Word::Return => {
                        owner.returned(id, process(from));
                        Told::Heard
                    }
                };
                self.messages.push(Message::Told { to: from, told });
            }
            Message::Told { to, told } => {
                self.counts.get_mut(&to).into_iter().for_each(|counts| counts.told(id, told));
            }
        }
    }

    fn execute(&mut self) {
        loop {
            let commands: Vec<(u64, Command)> = self
                .counts
                .iter_mut()
                .flat_map(|(n, counts)| counts.take_commands().into_iter().map(|command| (*n, command)))
                .collect();
            if commands.is_empty() {
                return;
            }
            for (from, command) in commands {
                match command {
                    Command::Tell(_, word) => self.messages.push(Message::Tell { from, word }),
                    Command::Arrived(_, Ticket { sender, number }) => {
                        self.messages.push(Message::Arrived { to: sender.parse().unwrap(), number });
                    }
                    Command::Free(_) => {
                        // OB-1: nobody has a ref, and none is on its way from somebody who lives.
                        assert_eq!(self.holders(), [] as [u64; 0], "freed under a ref");
                        assert!(!self.freed);
                        self.freed = true;
                    }
                    Command::Forget(_) => assert!(!self.holders().contains(&from)),
                }
            }
        }
    }
}

/// OB-1, in random histories. Deaths are another test: whoever dies with a ref that it has just sent takes it along.
#[test]
fn no_history_frees_an_object_under_a_ref_and_all_free_it_in_the_end() {
    for seed in 0..300 {
        let outcome = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..200 {
                world.step(false);
            }
            heal(&mut world);
            assert!(world.freed, "OB-3: it is freed in the end");
        });
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

/// OB-3, with borrowers that die at any moment.
#[test]
fn what_the_dead_had_is_freed_in_the_end() {
    for seed in 0..300 {
        let outcome = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..200 {
                world.step(true);
                if world.freed {
                    return;
                }
            }
            heal(&mut world);
            assert!(world.freed, "it is freed in the end");
        });
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

/// All messages arrive, all refs are dropped, and all that is on its way is given up.
fn heal(world: &mut World) {
    let id = world.object.id;
    for _ in 0..1000 {
        world.deliver();
        world.execute();
        for of in world.holders() {
            *world.refs.get_mut(&of).unwrap() -= 1;
            world.counts.get_mut(&of).unwrap().dropped(id);
        }
        world.execute();
    }
    world.now += TRANSIT_MAX;
    let now = world.now;
    world.counts.values_mut().for_each(|counts| counts.expire(now));
    world.execute();
    for _ in 0..1000 {
        world.deliver();
        world.execute();
    }
}
