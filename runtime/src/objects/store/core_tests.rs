//! What a store decides: room, readers, spilling, and the end of processes; by hand and in random histories.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::super::{ObjectAddr, ObjectError, ObjectId};
use super::core::{Client, Command, Limits, StoreCore};
use crate::handle::ProcessId;

const HERE: &str = "here";
const A: Client = Client(1);
const B: Client = Client(2);

fn id(owner: u64, number: u64) -> ObjectId {
    ObjectId { owner: ProcessId(owner), number }
}

fn addr(id: ObjectId, store: &str, bytes: u64) -> ObjectAddr {
    ObjectAddr { id, owner: "owner".into(), store: Some(store.into()), in_store: true, bytes }
}

fn store(memory: u64, disk: u64) -> StoreCore {
    store_with(memory, disk, &[])
}

fn store_with(memory: u64, disk: u64, ready: &[u64]) -> StoreCore {
    let limits =
        Limits { memory_bytes_max: memory, disk_bytes_max: disk, objects_max: 100, ready: ready.to_vec() };
    let mut core = StoreCore::new(limits);
    core.connected(A, ProcessId(1));
    core.connected(B, ProcessId(2));
    core.settled();
    core
}

/// Reserves and publishes an object of client A.
fn put(core: &mut StoreCore, number: u64, bytes: u64) {
    core.reserve(A, number, bytes);
    assert_eq!(core.take_commands(), [Command::Done(A, number, Ok(()))]);
    core.publish(A, id(1, number), bytes, bytes).unwrap();
}

#[test]
fn a_freed_segment_is_recycled_when_its_last_reader_has_closed_it() {
    let mut core = store(100, 0);
    put(&mut core, 1, 60);
    core.open(B, 5, addr(id(1, 1), HERE, 60), HERE);
    core.open(B, 6, addr(id(1, 1), HERE, 60), HERE);
    let opened = |call| Command::Opened(B, call, id(1, 1), Ok(()));
    assert_eq!(core.take_commands(), [opened(5), opened(6)]);
    core.free(A, id(1, 1));
    core.close(B, id(1, 1));
    assert_eq!(core.take_commands(), [], "it is mapped twice");
    core.close(B, id(1, 1));
    assert_eq!(core.take_commands(), [Command::Close(id(1, 1)), Command::Recycled(A, id(1, 1))]);
    assert_eq!(core.used(), (60, 0), "the owner keeps it for its next object");
    core.check();
}

#[test]
fn memory_that_others_keep_idle_makes_room() {
    let mut core = store(100, 0);
    core.reserve(A, 1, 80);
    core.reserve(B, 2, 50);
    assert_eq!(core.take_commands(), [Command::Done(A, 1, Ok(())), Command::Trim(A)]);
    core.unreserve(A, 80);
    core.trimmed(A);
    assert_eq!(core.take_commands(), [Command::Done(B, 2, Ok(()))]);
    core.check();
}

#[test]
fn memory_that_is_ready_is_given_out_made_anew_and_the_first_to_go() {
    let mut core = store_with(100, 0, &[20]);
    core.tick();
    assert_eq!(core.take_commands(), [Command::Make(20)]);
    core.tick();
    core.reserve(A, 1, 20);
    assert_eq!(core.take_commands(), [Command::Done(A, 1, Ok(()))], "it is being made");
    core.made(20, true);
    core.reserve(A, 2, 20);
    assert_eq!(core.take_commands(), [Command::Ready(A, 2, 20)]);
    assert_eq!(core.used(), (40, 0));
    core.tick();
    assert_eq!(core.take_commands(), [], "the store would be more than half full");
    core.unreserve(A, 20);
    core.tick();
    assert_eq!(core.take_commands(), [Command::Make(20)]);
    core.made(20, true);
    core.reserve(B, 3, 80);
    assert_eq!(core.take_commands(), [Command::Unready(20), Command::Done(B, 3, Ok(()))]);
    core.check();
    core.unreserve(B, 80);
    core.tick();
    assert_eq!(core.take_commands(), [Command::Make(20)]);
    core.made(20, false);
    core.tick();
    assert_eq!(core.take_commands(), [], "the machine has none");
    core.check();
}

#[test]
fn a_full_store_spills_what_nobody_reads_and_brings_it_back() {
    let mut core = store(100, 200);
    put(&mut core, 1, 60);
    core.reserve(A, 2, 60);
    assert_eq!(core.take_commands(), [Command::Evict(A, id(1, 1))]);
    core.evicted(A, id(1, 1), true);
    assert_eq!(core.take_commands(), [Command::Spill(id(1, 1))]);
    core.spilled(id(1, 1), Ok(()));
    assert_eq!(core.take_commands(), [Command::Close(id(1, 1)), Command::Done(A, 2, Ok(()))]);
    core.publish(A, id(1, 2), 60, 60).unwrap();
    core.check();
    core.open(B, 3, addr(id(1, 1), HERE, 60), HERE);
    assert_eq!(core.take_commands(), [Command::Evict(A, id(1, 2))], "the other one makes way");
    core.evicted(A, id(1, 2), true);
    core.spilled(id(1, 2), Ok(()));
    let [Command::Spill(_), Command::Close(_), Command::Load(loaded, None)] = core.take_commands()[..] else {
        panic!()
    };
    core.loaded(loaded, Ok(()));
    assert_eq!(core.take_commands(), [Command::Opened(B, 3, id(1, 1), Ok(()))]);
    core.check();
    core.free(A, id(1, 2));
    assert_eq!(core.take_commands(), [Command::Unlink(id(1, 2))]);
}

#[test]
fn a_full_store_and_a_full_disk_are_an_error_that_says_so() {
    let mut core = store(100, 100);
    put(&mut core, 1, 60);
    core.reserve(A, 2, 60);
    core.evicted(A, id(1, 1), true);
    core.spilled(id(1, 1), Err("No space left on device".into()));
    let commands = core.take_commands();
    let Some(Command::Done(A, 2, Err(ObjectError::StoreFull { asked: 60, used: 60, capacity: 100, disk }))) =
        commands.last()
    else {
        panic!("{commands:?}")
    };
    assert!(disk.contains("No space left"), "{disk}");
    core.check();
    core.reserve(A, 3, 101);
    let too_large = ObjectError::TooLarge { asked: 101, capacity: 100 };
    assert_eq!(core.take_commands(), [Command::Done(A, 3, Err(too_large))]);
}

#[test]
fn what_is_read_is_not_spilled() {
    let mut core = store(100, 100);
    put(&mut core, 1, 60);
    core.open(B, 1, addr(id(1, 1), HERE, 60), HERE);
    core.take_commands();
    core.reserve(A, 2, 60);
    assert!(matches!(core.take_commands()[..], [Command::Done(A, 2, Err(ObjectError::StoreFull { .. }))]));
    core.close(B, id(1, 1));
    core.reserve(A, 3, 60);
    core.evicted(A, id(1, 1), false);
    let commands = core.take_commands();
    assert!(matches!(
        commands[..],
        [Command::Evict(..), Command::Done(A, 3, Err(ObjectError::StoreFull { .. }))]
    ));
}

#[test]
fn the_objects_of_a_dead_owner_are_gone_but_for_those_who_read_them() {
    let mut core = store(100, 0);
    put(&mut core, 1, 60);
    core.open(B, 1, addr(id(1, 1), HERE, 60), HERE);
    core.take_commands();
    core.closed(A);
    assert_eq!(core.take_commands(), [], "it is read");
    core.open(B, 2, addr(id(1, 2), HERE, 60), HERE);
    let why = "its process has ended".to_owned();
    let died = ObjectError::OwnerDied { object: id(1, 2), why };
    assert_eq!(core.take_commands(), [Command::Opened(B, 2, id(1, 2), Err(died))]);
    core.close(B, id(1, 1));
    assert_eq!(core.take_commands(), [Command::Close(id(1, 1))]);
    assert_eq!(core.used(), (0, 0));
}

#[test]
fn a_copy_is_fetched_once_and_kept_while_somebody_has_a_ref() {
    let mut core = store(100, 0);
    let far = addr(id(9, 1), "there", 60);
    core.open(A, 1, far.clone(), HERE);
    core.open(B, 2, far.clone(), HERE);
    assert_eq!(core.take_commands(), [Command::Load(far.id, Some(far.clone()))]);
    core.loaded(far.id, Ok(()));
    assert_eq!(core.take_commands().len(), 2);
    core.close(A, far.id);
    core.close(B, far.id);
    core.forget(A, far.id);
    assert_eq!(core.take_commands(), []);
    core.forget(B, far.id);
    assert_eq!(core.take_commands(), [Command::Close(far.id)]);
    assert_eq!(core.used(), (0, 0));
}

/// OB-4: whatever happens in whatever order, every byte is accounted for, nothing waits for ever, and in the end
/// nothing is left.
#[test]
fn no_history_loses_a_byte() {
    for seed in 0..300 {
        let outcome = std::panic::catch_unwind(|| history(seed));
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

fn history(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut core = store_with(100, 80, &[8, 15, 15]);
    let (mut next, mut objects, mut mapped, mut granted) =
        (1, Vec::<ObjectId>::new(), Vec::new(), Vec::new());
    let (mut pending, mut asked, mut answered) = (Vec::new(), 0, 0);
    let sizes = std::collections::BTreeMap::from_iter((1..1000u64).map(|n| (n, n * 7 % 50 + 1)));
    for _ in 0..300 {
        match rng.random_range(0..8) {
            0 => {
                core.reserve(A, next, sizes[&next]);
                (next, asked) = (next + 1, asked + 1);
            }
            1 if !granted.is_empty() => {
                let number: u64 = granted.swap_remove(0);
                core.publish(A, id(1, number), sizes[&number], sizes[&number]).unwrap();
                objects.push(id(1, number));
            }
            2 if !objects.is_empty() => {
                let object = objects[rng.random_range(0..objects.len())];
                core.open(B, 10_000 + next, addr(object, HERE, sizes[&object.number]), HERE);
                (next, asked) = (next + 1, asked + 1);
            }
            3 => {
                let far = id(9, rng.random_range(1..20));
                core.open(B, 10_000 + next, addr(far, "there", sizes[&far.number]), HERE);
                (next, asked) = (next + 1, asked + 1);
            }
            4 if !mapped.is_empty() => core.close(B, mapped.swap_remove(0)),
            5 if !objects.is_empty() => core.free(A, objects.swap_remove(0)),
            6 => core.forget(B, id(9, rng.random_range(1..20))),
            _ if !pending.is_empty() => {
                let at = rng.random_range(0..pending.len());
                finish(&mut core, pending.swap_remove(at), rng.random_range(0..4) > 0);
            }
            _ => core.tick(),
        }
        core.check();
        take(&mut core, &mut pending, &mut granted, &mut mapped, &mut answered);
    }
    while let Some(command) = pending.pop() {
        finish(&mut core, command, true);
        take(&mut core, &mut pending, &mut granted, &mut mapped, &mut answered);
    }
    assert_eq!(asked, answered, "everybody has an answer");
    core.closed(A);
    core.closed(B);
    while let Some(command) = pending.pop() {
        finish(&mut core, command, true);
        take(&mut core, &mut pending, &mut granted, &mut mapped, &mut answered);
    }
    take(&mut core, &mut pending, &mut granted, &mut mapped, &mut answered);
    assert_eq!((core.used(), core.list().count()), ((core.check(), 0), 0), "nothing is left");
}

fn take(
    core: &mut StoreCore,
    pending: &mut Vec<Command>,
    granted: &mut Vec<u64>,
    mapped: &mut Vec<ObjectId>,
    answered: &mut u64,
) {
    for command in core.take_commands() {
        match command {
            Command::Done(_, call, result) => {
                *answered += 1;
                granted.extend(result.is_ok().then_some(call));
            }
            Command::Ready(_, call, _) => {
                *answered += 1;
                granted.push(call);
            }
            Command::Opened(_, _, object, result) => {
                *answered += 1;
                mapped.extend(result.is_ok().then_some(object));
            }
            Command::Recycled(client, object) => pending.push(Command::Recycled(client, object)),
            Command::Trim(_)
            | Command::Evict(..)
            | Command::Spill(_)
            | Command::Load(..)
            | Command::Make(_) => pending.push(command),
            Command::Close(_) | Command::Unlink(_) | Command::Unready(_) => {}
        }
    }
}

fn finish(core: &mut StoreCore, command: Command, well: bool) {
    match command {
        Command::Trim(client) => core.trimmed(client),
        Command::Evict(client, object) => core.evicted(client, object, well),
        Command::Spill(object) => core.spilled(object, if well { Ok(()) } else { Err("full".into()) }),
        Command::Load(object, _) => {
            core.loaded(object, if well { Ok(()) } else { Err(ObjectError::Freed { object }) })
        }
        Command::Recycled(client, object) => core.unreserve(client, object.number * 7 % 50 + 1),
        Command::Make(size) => core.made(size, well),
        Command::Done(..)
        | Command::Opened(..)
        | Command::Ready(..)
        | Command::Close(_)
        | Command::Unlink(_)
        | Command::Unready(_) => {}
    }
}
