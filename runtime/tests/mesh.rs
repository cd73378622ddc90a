//! Rounds over systems that stand for processes: who is in a result, in which order, and who is named when it is not
//! whole. Real processes that are killed are in `tests/cluster`.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, Message, MessageResult, ResponseFuture};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, RemoteActor, WireMessage};
use heliostat_runtime::group::{GroupView, Member, MemberState};
use heliostat_runtime::handle::{ActorAddr, ActorId, Incarnation};
use heliostat_runtime::mesh::{Dims, Mesh, MeshError, RankError, Reduce, RoundFailure};
use heliostat_runtime::system::{SpawnOptions, System, SystemConfig};

const MESH: &str = "m";

/// A rank that says its number.
struct Rank {
    rank: u32,
    cast: Vec<u64>,
}

macro_rules! message {
    ($name:ident $fields:tt -> $result:ty, $wire:literal) => {
        #[derive(Debug, Clone, Encode, Decode)]
        struct $name $fields;
        impl Message for $name {
            type Result = $result;
        }
        impl WireMessage for $name {
            const NAME: &'static str = $wire;
        }
    };
}

message!(Note(u64) -> (), "note");
message!(Noted() -> Vec<u64>, "noted");
message!(Name() -> String, "name");
message!(Bytes(Vec<u8>) -> Vec<u8>, "bytes");
// The rank that it names panics.
message!(Panic(u32) -> u32, "panic");
// The rank that it names answers after so many milliseconds.
message!(Late(u32, u64) -> u32, "late");
message!(BadReduce() -> u32, "bad_reduce");
message!(Unlisted() -> u32, "unlisted");

impl Reduce for Name {
    fn reduce(earlier: String, later: String) -> String {
        format!("({earlier} {later})")
    }
}

impl Reduce for Bytes {
    fn reduce(earlier: Vec<u8>, later: Vec<u8>) -> Vec<u8> {
        earlier.iter().zip(&later).map(|(a, b)| a.wrapping_add(*b)).collect()
    }
}

impl Reduce for BadReduce {
    fn reduce(_: u32, _: u32) -> u32 {
        panic!("cannot add");
    }
}

impl Reduce for Panic {
    fn reduce(earlier: u32, later: u32) -> u32 {
        earlier + later
    }
}

impl Actor for Rank {
    type Context = Context<Self>;
}

impl RemoteActor for Rank {
    const TYPE: &'static str = "rank";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Note>().accept::<Noted>().accept::<Late>();
        m.accept_reduced::<Name>().accept_reduced::<Bytes>().accept_reduced::<Panic>();
        m.accept_reduced::<BadReduce>();
    }
}

macro_rules! handle {
    ($message:ident, $result:ty, |$rank:ident, $m:ident| $body:expr) => {
        impl Handler<$message> for Rank {
            type Result = $result;
            fn handle(&mut self, $m: $message, _: &mut Context<Self>) -> Self::Result {
                let $rank = self;
                $body
            }
        }
    };
}

handle!(Note, (), |rank, m| rank.cast.push(m.0));
handle!(Noted, MessageResult<Noted>, |rank, _m| MessageResult(rank.cast.clone()));
handle!(Name, String, |rank, _m| rank.rank.to_string());
handle!(Bytes, MessageResult<Bytes>, |_rank, m| MessageResult(m.0));
handle!(BadReduce, u32, |rank, _m| rank.rank);
handle!(Unlisted, u32, |rank, _m| rank.rank);
handle!(Panic, u32, |rank, m| {
    assert!(rank.rank != m.0, "rank {} was asked to", m.0);
    rank.rank
});
handle!(Late, ResponseFuture<u32>, |rank, m| {
    let own = rank.rank;
    Box::pin(async move {
        if own == m.0 {
            tokio::time::sleep(Duration::from_millis(m.1)).await;
        }
        own
    })
});

/// Some systems with ranks.
struct World {
    systems: Vec<System>,
    addrs: Vec<ActorAddr>,
    dims: Dims,
}

impl World {
    /// Rank `i` lives in system `layout[i]`. All systems are in epoch 1.
    async fn start(layout: &[usize]) -> Self {
        let mut systems = Vec::new();
        for _ in 0..=*layout.iter().max().unwrap() {
            systems.push(System::start(SystemConfig::loopback()).await.unwrap());
        }
        let dims = Dims::new([("x", layout.len() as u32)]).unwrap();
        let mut world = Self { systems, addrs: Vec::new(), dims };
        for (rank, system) in layout.iter().enumerate() {
            let addr = world.spawn(rank as u32, *system, 1);
            world.addrs.push(addr);
        }
        for system in &world.systems {
            system.join_mesh(world.view(1)).unwrap();
        }
        world
    }

    fn spawn(&self, rank: u32, system: usize, incarnation: u64) -> ActorAddr {
        let id = ActorId::named(&format!("{MESH}-{rank}"));
        let options = SpawnOptions { id, incarnation: Incarnation(incarnation), mailbox_capacity: 4096 };
        self.systems[system].spawn(options, move || Rank { rank, cast: Vec::new() }).unwrap()
    }

    /// All ranks are ready.
    fn view(&self, epoch: u64) -> GroupView {
        let member = |(rank, addr): (usize, &ActorAddr)| Member {
            rank: rank as u32,
            addr: Some(addr.clone()),
            join_info: Vec::new(),
            state: MemberState::Ready,
        };
        GroupView { group: MESH.into(), epoch, members: self.addrs.iter().enumerate().map(member).collect() }
    }

    /// The mesh, as somebody in the first system sees it.
    fn mesh(&self) -> Mesh<Rank> {
        self.systems[0].mesh(MESH, self.dims.clone())
    }

    async fn end(self) {
        for system in self.systems {
            system.shutdown().await;
        }
    }
}

fn failure<T: std::fmt::Debug>(outcome: Result<T, MeshError>) -> RoundFailure {
    match outcome.unwrap_err() {
        MeshError::Ranks(failure) => failure,
        other => panic!("{other}"),
    }
}

fn ranks(failure: &RoundFailure) -> Vec<u32> {
    failure.failed.iter().map(|failed| failed.rank).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_ranks_hear_and_answer_in_order_whatever_the_tree() {
    let world = World::start(&[0, 0, 1, 2, 2, 2, 0, 3, 4, 1, 1]).await;
    for fan_out in [2, 3, 64] {
        let mesh = world.mesh().with_fan_out(fan_out);
        mesh.cast(Note(fan_out.into())).await.unwrap();
        let names: Vec<String> = (0..11).map(|rank| rank.to_string()).collect();
        assert_eq!(mesh.gather(Name()).await.unwrap(), names);
        let reduced = mesh.reduce(Name()).await.unwrap();
        assert_eq!(reduced, "((((0 1) (2 3)) ((4 5) (6 7))) ((8 9) 10))", "MS-3, fan-out {fan_out}");
    }
    assert_eq!(world.mesh().gather(Noted()).await.unwrap(), vec![vec![2, 3, 64]; 11]);
    let part = world.mesh().range("x", 1..10).unwrap().every("x", 4).unwrap();
    part.cast(Note(5)).await.unwrap();
    assert_eq!(part.gather(Name()).await.unwrap(), ["1", "5", "9"]);
    assert_eq!(part.actor(1).unwrap().ask(Name()).await.unwrap(), "5");
    let noted = world.mesh().gather(Noted()).await.unwrap();
    let heard: Vec<usize> = (0..11).filter(|rank| noted[*rank].last() == Some(&5)).collect();
    assert_eq!(heard, [1, 5, 9]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_answers_are_reduced_as_well() {
    let world = World::start(&[0, 1, 2, 3, 4]).await;
    let sum = world.mesh().reduce(Bytes(vec![3; 300_000])).await.unwrap();
    assert!(sum.len() == 300_000 && sum.iter().all(|byte| *byte == 15));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_panics_is_named_and_nobody_else() {
    let world = World::start(&[0, 1, 2, 3, 4, 5, 6]).await;
    let each = world.mesh().gather_each(Panic(4)).await.unwrap();
    for (rank, outcome) in each.into_iter().enumerate() {
        match rank {
            4 => assert_eq!(outcome.unwrap_err().why, RankError::Panicked("rank 4 was asked to".into())),
            _ => assert_eq!(outcome, Ok(rank as u32)),
        }
    }
    // It is gone now; a reduction says so, too.
    let failed = failure(world.mesh().reduce(Panic(99)).await);
    assert_eq!(ranks(&failed), [4]);
    // Or it is going.
    let why = failed.to_string();
    assert!(why.contains("no such actor") || why.contains("panicked"), "{failed}");
    let failed = failure(world.mesh().cast(Note(1)).await);
    assert_eq!(ranks(&failed), [4]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_rank_is_named_and_nobody_above_it() {
    let world = World::start(&[0, 1, 2, 3, 4, 5, 6, 7]).await;
    let mesh = world.mesh().with_fan_out(2).with_deadline(Duration::from_secs(3));
    // The deepest leaf.
    let start = Instant::now();
    let failed = failure(mesh.gather(Late(7, 60_000)).await);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!((ranks(&failed), &failed.failed[0].why), (vec![7], &RankError::Deadline));
    let each = mesh.gather_each(Late(6, 60_000)).await.unwrap();
    assert_eq!(each.iter().filter(|outcome| outcome.is_ok()).count(), 7, "the others' answers are there");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_goes_during_a_round_is_named_and_those_behind_it_are_said_to_be_behind() {
    let world = World::start(&[0, 1, 2, 3, 4, 5, 6, 7]).await;
    let mesh = world.mesh().with_fan_out(2);
    // Stop 4 sees to 5, 6 and 7.
    let round = tokio::spawn(async move { mesh.gather_each(Late(5, 60_000)).await });
    let asked = async {
        while !world.systems[4].is_connected(world.systems[6].process()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), asked).await.unwrap();
    world.systems[4].shutdown().await;
    let each = round.await.unwrap().unwrap();
    for (rank, outcome) in each.into_iter().enumerate() {
        match (rank, outcome.map_err(|failed| failed.why)) {
            (4, Err(RankError::Lost(_) | RankError::Stopped)) => {}
            (5..8, Err(why)) => assert_eq!(why, RankError::Behind { rank: 4 }),
            (_, outcome) => assert_eq!(outcome, Ok(rank as u32)),
        }
    }
    world.end().await;
}

/// MS-2: ranks answer in the epoch that they are in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rounds_of_another_epoch() {
    let mut world = World::start(&[0, 1, 2]).await;
    let mesh = world.mesh();
    mesh.gather(Name()).await.unwrap();
    // Rank 0's process has heard of epoch 2, the caller (in process 1) not yet: its round waits until it has.
    let outside: Mesh<Rank> = world.systems[1].mesh(MESH, world.dims.clone());
    world.addrs[0] = world.spawn(0, 0, 2);
    world.systems[0].join_mesh(world.view(2)).unwrap();
    let waiting = {
        let outside = outside.clone();
        tokio::spawn(async move { outside.gather(Name()).await })
    };
    let soon = outside.with_deadline(Duration::from_millis(100)).gather(Name()).await;
    assert!(matches!(soon, Err(MeshError::Deadline(_))), "{soon:?}");
    world.systems[1].join_mesh(world.view(2)).unwrap();
    // A round of epoch 2 waits for a process that has yet to hear of it.
    assert!(!waiting.is_finished());
    world.systems[2].join_mesh(world.view(2)).unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), ["0", "1", "2"]);
    // A view never goes back.
    world.systems[0].join_mesh(world.view(1)).unwrap();
    assert_eq!(mesh.view().unwrap().epoch, 2);
    // A deeper stop that is ahead takes no part.
    world.systems[2].join_mesh(world.view(3)).unwrap();
    let failed = failure(mesh.gather(Name()).await);
    assert_eq!((ranks(&failed), &failed.failed[0].why), (vec![2], &RankError::Moved { epoch: 3 }));
    world.end().await;
}

/// A rank whose process is silent for good is given up when a view says so, without any deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_ends_the_wait_for_a_rank_that_is_gone() {
    let mut world = World::start(&[0, 1, 2, 3]).await;
    let mesh = world.mesh();
    let round = {
        let mesh = mesh.clone();
        tokio::spawn(async move { mesh.gather_each(Late(3, 60_000)).await })
    };
    let asked = async {
        while !world.systems[0].is_connected(world.systems[3].process()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), asked).await.unwrap();
    world.addrs[3].incarnation = Incarnation(2);
    world.systems[0].join_mesh(world.view(2)).unwrap();
    let each = tokio::time::timeout(Duration::from_secs(5), round).await.unwrap().unwrap().unwrap();
    assert_eq!(each[3].as_ref().unwrap_err().why, RankError::Moved { epoch: 2 });
    assert_eq!(each.iter().filter(|outcome| outcome.is_ok()).count(), 3);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_are_named() {
    let world = World::start(&[0, 1, 1]).await;
    let mesh = world.mesh();
    let failed = failure(mesh.gather(Unlisted()).await);
    assert!(ranks(&failed) == [0, 1, 2] && failed.to_string().contains("does not accept"), "{failed}");
    let failed = failure(mesh.reduce(BadReduce()).await);
    assert!(failed.to_string().contains("in Reduce::reduce: cannot add"), "{failed}");
    assert!(mesh.at("y", 0).unwrap_err().to_string().contains("there are: x"));
    assert!(mesh.actor(3).unwrap_err().to_string().contains("no position 3"));
    let mut view = world.view(2);
    view.members[1].addr = None;
    world.systems[0].join_mesh(view).unwrap();
    let error = mesh.gather(Name()).await.unwrap_err();
    assert!(matches!(&error, MeshError::NotReady { ranks, epoch: 2, .. } if ranks == &[1]), "{error}");
    let ready = mesh.ready(Duration::from_millis(20)).await.unwrap_err();
    assert!(ready.to_string().contains("[1]"), "{ready}");
    world.end().await;
}

/// Every queue has a bound: rounds under way in a process, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_rounds_are_declined() {
    let world = World::start(&[0, 1]).await;
    let mesh = world.mesh().at("x", 1).unwrap();
    let mut rounds: Vec<_> = (0..1100).map(|_| Box::pin(mesh.gather(Late(1, 60_000)))).collect();
    let declined = async {
        loop {
            for round in &mut rounds {
                if let Some(outcome) = futures_util::FutureExt::now_or_never(round.as_mut()) {
                    return outcome;
                }
            }
            tokio::task::yield_now().await;
        }
    };
    let outcome = tokio::time::timeout(Duration::from_secs(10), declined).await.unwrap();
    let failed = failure(outcome).to_string();
    assert!(failed.contains("1024 rounds under way"), "{failed}");
    world.end().await;
}
