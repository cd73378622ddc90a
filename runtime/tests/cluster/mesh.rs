//! Meshes of real processes: spawned as one, spoken to down a tree, killed in the middle of a round.

use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, MessageResult, ResponseFuture};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn};
use heliostat_runtime::cluster::status::{ActorState, ClusterStatus};
use heliostat_runtime::handle::{ActorAddr, AskError};
use heliostat_runtime::mesh::{Dims, Mesh, MeshError, MeshSpec, RankError, Reduce};
use heliostat_runtime::spec::{
    DeathCause, PlacementGroupSpec, Quantity, Resources, RestartPolicy, Strategy, SupervisorStrategy,
};
use rustix::process::Signal;

use crate::harness::{TestCluster, is_alive, message, signal};

const PATIENCE: Duration = Duration::from_secs(30);

/// A rank that knows its place.
pub(crate) struct MeshRank {
    cx: ActorCx,
    rank: u32,
    /// As `create` saw them.
    peers: Vec<Option<ActorAddr>>,
    held: bool,
}

/// The rank that cannot be created, if there is to be one.
#[derive(Encode, Decode)]
pub(crate) struct RankArgs {
    fails: Option<u32>,
}

message!(/** Where it is. */ Whereabouts() -> String, "whereabouts");
message!(/** Rank and process id. */ Pids() -> Vec<(u32, u32)>, "pids");
message!(/** The rank that it names never answers. */ Hold(u32) -> u32, "hold");
message!(/** Whether a `Hold` has arrived. */ Holds() -> bool, "holds");
message!(/** Where its peers were when it was created. */ Peers() -> Vec<Option<ActorAddr>>, "peers");
message!(/** A rank gathers over its own mesh, itself included. */ AskPeers() -> Vec<String>, "ask_peers");

impl Reduce for Pids {
    fn reduce(mut earlier: Vec<(u32, u32)>, later: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
        earlier.extend(later);
        earlier
    }
}

impl Actor for MeshRank {
    type Context = Context<Self>;
}

impl RemoteActor for MeshRank {
    const TYPE: &'static str = "mesh-rank";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Whereabouts>().accept_reduced::<Pids>();
        m.accept::<Peers>().accept::<Hold>().accept::<Holds>().accept::<AskPeers>();
    }
}

impl Spawn for MeshRank {
    type Args = RankArgs;

    async fn create(args: RankArgs, cx: ActorCx) -> Result<Self, CreateError> {
        let seat = cx.mesh().ok_or_else(|| CreateError::Failed("not in a mesh".into()))?;
        let rank = seat.rank();
        if args.fails == Some(rank) {
            return Err(CreateError::Failed(format!("no weights for {}", seat.point())));
        }
        Ok(Self { rank, peers: seat.peers().to_vec(), cx, held: false })
    }
}

impl Handler<Whereabouts> for MeshRank {
    type Result = String;

    fn handle(&mut self, _: Whereabouts, _: &mut Context<Self>) -> String {
        let seat = self.cx.mesh().unwrap();
        format!("{} of {} in {}", seat.point(), seat.dims(), seat.name())
    }
}

impl Handler<Pids> for MeshRank {
    type Result = MessageResult<Pids>;

    fn handle(&mut self, _: Pids, _: &mut Context<Self>) -> Self::Result {
        MessageResult(vec![(self.rank, std::process::id())])
    }
}

impl Handler<Peers> for MeshRank {
    type Result = MessageResult<Peers>;

    fn handle(&mut self, _: Peers, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.peers.clone())
    }
}

impl Handler<Hold> for MeshRank {
    type Result = ResponseFuture<u32>;

    fn handle(&mut self, Hold(rank): Hold, _: &mut Context<Self>) -> Self::Result {
        self.held = true;
        let own = self.rank;
        Box::pin(async move { if own == rank { std::future::pending().await } else { own } })
    }
}

impl Handler<Holds> for MeshRank {
    type Result = bool;

    fn handle(&mut self, _: Holds, _: &mut Context<Self>) -> bool {
        self.held
    }
}

impl Handler<AskPeers> for MeshRank {
    type Result = ResponseFuture<Vec<String>>;

    fn handle(&mut self, _: AskPeers, _: &mut Context<Self>) -> Self::Result {
        let mesh: Mesh<Self> = self.cx.mesh().unwrap().mesh();
        Box::pin(async move {
            mesh.ready(PATIENCE).await.unwrap();
            mesh.gather(Whereabouts()).await.unwrap()
        })
    }
}

/// MS-4: what the ranks were told of each other when they were created, and what is so.
async fn check_peers(mesh: &Mesh<MeshRank>, of_ranks: &[u32]) {
    let now: Vec<Option<ActorAddr>> =
        mesh.view().unwrap().members.iter().map(|member| member.addr.clone()).collect();
    for rank in of_ranks {
        let told = mesh.actor(*rank).unwrap().ask(Peers()).await.unwrap();
        assert_eq!(told, now, "rank {rank}");
    }
}

fn spec(name: &str, fails: Option<u32>) -> MeshSpec {
    let dims = Dims::new([("nodes", 2), ("gpus", 4)]).unwrap();
    MeshSpec::new::<MeshRank>(name, dims, &RankArgs { fails }).unwrap()
}

async fn spawn(cluster: &TestCluster, name: &str) -> Mesh<MeshRank> {
    let start = Instant::now();
    let mesh = cluster.cluster.spawn_mesh(&spec(name, None), PATIENCE).await;
    println!("  mesh of 8 processes spawned in {:?}", start.elapsed());
    // Remembers the processes, so that the end of the cluster is checked.
    cluster.all_ready(8).await;
    mesh.unwrap()
}

/// One call spawns, one casts, one gathers, one removes.
pub(crate) async fn mesh_rounds() {
    let cluster = TestCluster::start(&[0, 0]).await;
    let mesh = spawn(&cluster, "m").await;
    let places = mesh.gather(Whereabouts()).await.unwrap();
    check_peers(&mesh, &[0, 1, 2, 3, 4, 5, 6, 7]).await;
    assert_eq!(places[6], "nodes 1, gpus 2 of nodes=2 x gpus=4 in m");
    let pids = mesh.reduce(Pids()).await.unwrap();
    assert_eq!(pids.iter().map(|(rank, _)| *rank).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7]);
    let column = mesh.at("gpus", 1).unwrap().gather(Whereabouts()).await.unwrap();
    assert_eq!(column, [places[1].clone(), places[5].clone()]);
    // A rank speaks to its peers by the same means.
    let of_rank_5 = mesh.actor(5).unwrap().ask(AskPeers()).await.unwrap();
    assert_eq!(of_rank_5, places);
    // Somebody else finds it, and the same spec again is the same mesh.
    let found: Mesh<MeshRank> = cluster.cluster.mesh("m").await.unwrap();
    assert_eq!(found.reduce(Pids()).await.unwrap(), pids);
    let again: Mesh<MeshRank> = cluster.cluster.spawn_mesh(&spec("m", None), PATIENCE).await.unwrap();
    assert_eq!(again.reduce(Pids()).await.unwrap(), pids);
    let other = MeshSpec { dims: Dims::new([("x", 3)]).unwrap(), ..spec("m", None) };
    let refused = cluster.cluster.spawn_mesh::<MeshRank>(&other, PATIENCE).await.unwrap_err();
    assert!(
        refused.to_string().contains("shape nodes=2 x gpus=4, which cannot become x=3: remove it"),
        "{refused}"
    );
    let unknown = cluster.cluster.mesh::<MeshRank>("n").await.unwrap_err();
    assert!(unknown.to_string().contains("no mesh named \"n\""), "{unknown}");
    cluster.cluster.remove_mesh("m").await.unwrap();
    cluster.until("all ranks are gone", |status| status.actors.is_empty()).await;
    assert!(pids.iter().all(|(_, pid)| !is_alive(*pid)));
    // A handle from before finds the next mesh of that name.
    let next = spawn(&cluster, "m").await.reduce(Pids()).await.unwrap();
    let start = Instant::now();
    while found.reduce(Pids()).await.ok().as_ref() != Some(&next) {
        assert!(start.elapsed() < PATIENCE, "{:?}", found.view());
        tokio::task::yield_now().await;
    }
    cluster.end().await;
}

/// kill -9 of an inner stop of the tree while a gather is under way: it is named at once, those behind it are said to be
/// behind it, and the next epoch is whole again.
pub(crate) async fn mesh_inner_killed() {
    let cluster = TestCluster::start(&[0, 0]).await;
    let mesh = spawn(&cluster, "m").await.with_fan_out(2);
    let epoch = mesh.view().unwrap().epoch;
    let pids = mesh.reduce(Pids()).await.unwrap();
    let (old, behind) = (mesh.actor(4).unwrap(), mesh.actor(7).unwrap());
    let round = {
        let mesh = mesh.clone();
        tokio::spawn(async move { mesh.gather_each(Hold(5)).await })
    };
    let start = Instant::now();
    while !behind.ask(Holds()).await.unwrap() {
        assert!(start.elapsed() < PATIENCE, "the gather never got there");
    }
    signal(pids[4].1, Signal::KILL);
    let start = Instant::now();
    let each = round.await.unwrap().unwrap();
    println!("  the gather named the killed rank after {:?}", start.elapsed());
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    for (rank, outcome) in each.into_iter().enumerate() {
        match (rank, outcome.map_err(|failed| failed.why)) {
            (4, Err(RankError::Lost(_) | RankError::Moved { .. })) => {}
            (5..8, Err(why)) => assert_eq!(why, RankError::Behind { rank: 4 }),
            (_, outcome) => assert_eq!(outcome, Ok(rank as u32)),
        }
    }
    // The head says that one is lost, and then that all are there again.
    let lost = mesh.changed(epoch).await.unwrap();
    if !lost.is_complete() {
        assert!(lost.members[4].addr.is_none());
        let error = mesh.cast(Hold(99)).await.map_err(|error| match error {
            MeshError::NotReady { ranks, .. } => ranks,
            other => panic!("{other}"),
        });
        assert!(error.is_ok() || error == Err(vec![4]), "{error:?}");
    }
    mesh.ready(PATIENCE).await.unwrap();
    println!("  all ranks ready again after {:?}", start.elapsed());
    let now = mesh.reduce(Pids()).await.unwrap();
    let replaced: Vec<u32> = (0..8).filter(|rank| now[*rank as usize] != pids[*rank as usize]).collect();
    assert_eq!(replaced, [4], "one for one");
    check_peers(&mesh, &[4]).await;
    // The handle from before reaches nobody.
    let refused = old.ask(Holds()).await.unwrap_err();
    assert!(matches!(refused, AskError::Refused(_)), "{refused}");
    cluster.all_ready(8).await;
    cluster.end().await;
}

/// A mesh over a placement group, supervised as one: who is new after the death of rank 2, for each strategy.
pub(crate) async fn mesh_strategies() {
    let cluster = TestCluster::start(&[0, 0]).await;
    cluster.until("both nodes", |status| status.nodes.len() == 2).await;
    let bundles = PlacementGroupSpec::new("pg", 2, Resources::cpus(Quantity::milli(200)));
    let group = cluster.cluster.placement_group(bundles.strategy(Strategy::StrictSpread)).await.unwrap();
    group.ready(PATIENCE).await.unwrap();
    let strategies = [
        (SupervisorStrategy::OneForOne, Some(vec![2])),
        (SupervisorStrategy::RestForOne, Some(vec![2, 3])),
        (SupervisorStrategy::OneForAll, Some(vec![0, 1, 2, 3])),
        (SupervisorStrategy::Escalate, None),
    ];
    for (strategy, replaced) in strategies {
        let dims = Dims::new([("bundles", 2), ("ranks", 2)]).unwrap();
        let spec = MeshSpec::new::<MeshRank>("m", dims, &RankArgs { fails: None }).unwrap();
        let spec = spec.supervised(strategy.clone()).over("pg", 2);
        let mesh: Mesh<MeshRank> = cluster.cluster.spawn_mesh(&spec, PATIENCE).await.unwrap();
        let status = cluster.all_ready(4).await;
        let nodes: Vec<_> = (0..4).map(|rank| status.actors[rank].node.clone().unwrap()).collect();
        assert!(nodes[0] == nodes[1] && nodes[2] == nodes[3] && nodes[0] != nodes[2], "{nodes:?}");
        let before = mesh.reduce(Pids()).await.unwrap();
        let start = Instant::now();
        signal(before[2].1, Signal::KILL);
        let Some(replaced) = replaced else {
            let down = |status: &ClusterStatus| {
                let escalated = |state: &ActorState| match state {
                    ActorState::Dead { cause } => *cause.root() == DeathCause::Killed { signal: 9 },
                    _ => false,
                };
                status.actors.iter().all(|actor| escalated(&actor.state))
            };
            cluster.until("all went down with it", down).await;
            println!("  {strategy:?}: all down after {:?}", start.elapsed());
            cluster.cluster.remove_mesh("m").await.unwrap();
            break;
        };
        let renewed = |status: &ClusterStatus| {
            let is_new = |rank: &usize| status.actors[*rank].pid != Some(before[*rank].1);
            replaced.iter().all(is_new) && status.actors.iter().all(|actor| actor.state == ActorState::Ready)
        };
        cluster.until("those that are restarted are new", renewed).await;
        mesh.ready(PATIENCE).await.unwrap();
        let now = mesh.reduce(Pids()).await.unwrap();
        println!("  {strategy:?}: whole again after {:?}", start.elapsed());
        let others: Vec<usize> = (0..4).filter(|rank| now[*rank] != before[*rank]).collect();
        assert_eq!(others, replaced, "{strategy:?}");
        cluster.cluster.remove_mesh("m").await.unwrap();
        let gone = |status: &ClusterStatus| status.actors.is_empty() && status.supervisors.is_empty();
        cluster.until("the mesh is gone with its supervisor", gone).await;
    }
    cluster.end().await;
}

/// A mesh of which one rank cannot be created is not left behind in part.
pub(crate) async fn mesh_spawn_fails() {
    let cluster = TestCluster::start(&[2]).await;
    let mut spec = spec("m", Some(6));
    spec.rank.restart = RestartPolicy::never();
    let error = cluster.cluster.spawn_mesh::<MeshRank>(&spec, PATIENCE).await.unwrap_err().to_string();
    println!("  {error}");
    assert!(error.contains("rank 6 (m-6) could not be created: no weights for nodes 1, gpus 2"), "{error}");
    cluster.until("nothing is left", |status| status.actors.is_empty()).await;
    let start = Instant::now();
    spec.rank.restart = RestartPolicy::default();
    let limit = Duration::from_secs(3);
    let error = cluster.cluster.spawn_mesh::<MeshRank>(&spec, limit).await.unwrap_err().to_string();
    println!("  {error}");
    assert!(error.contains("not ready within 3s: rank 6 (m-6) could not be created"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
    cluster.until("nothing is left", |status| status.actors.is_empty()).await;
    // A rank without a place holds the others back: none is created before all have a process.
    let mut spec = MeshSpec { dims: Dims::new([("x", 3)]).unwrap(), ..self::spec("m", None) };
    spec.rank.resources.devices = 1;
    let spawning = {
        let (cluster, spec) = (cluster.cluster.clone(), spec.clone());
        tokio::spawn(async move { cluster.spawn_mesh::<MeshRank>(&spec, limit).await })
    };
    let phase = |status: &ClusterStatus, rank: usize| match &status.actors[rank].state {
        ActorState::Starting { progress } => progress.phase.clone(),
        _ => String::new(),
    };
    cluster
        .until("ranks 0 and 1 wait for rank 2", |status| {
            status.actors.len() == 3
                && (0..2).all(|rank| phase(status, rank) == "waits for a process of rank 2")
        })
        .await;
    let error = spawning.await.unwrap().unwrap_err().to_string();
    println!("  {error}");
    assert!(error.contains("rank 2 (m-2) has no place: node n0 has 0 of 2 devices free"), "{error}");
    cluster.until("nothing is left", |status| status.actors.is_empty()).await;
    cluster.end().await;
}
