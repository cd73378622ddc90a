//! Placement groups and drained nodes, with real processes.

use std::time::{Duration, Instant};

use heliostat_runtime::cluster::status::{
    ActorState, ClusterStatus, NodeState, PlacementGroupState, PlacementGroupStatus,
};
use heliostat_runtime::spec::{ActorSpec, PlacementGroupSpec, Resources, Strategy};

use crate::actors::counter;
use crate::harness::TestCluster;

const LIMIT: Duration = Duration::from_secs(20);

fn devices(name: &str, bundles: usize) -> PlacementGroupSpec {
    PlacementGroupSpec::new(name, bundles, Resources::device())
}

fn nodes(group: &PlacementGroupStatus) -> Vec<&str> {
    group.bundles.iter().map(|bundle| bundle.node.as_deref().unwrap_or("-")).collect()
}

fn on<'a>(status: &'a ClusterStatus, actor: &str) -> (&'a str, Option<u32>) {
    let actor = status.actor(actor).unwrap();
    (actor.node.as_deref().unwrap_or("-"), actor.device)
}

/// Reserved all together, used by actors, kept over the head's death, waited for without a timer, placed anew.
pub(crate) async fn placement_groups() {
    let mut cluster = TestCluster::start(&[2, 2]).await;
    cluster.until("both nodes", |status| status.nodes.len() == 2).await;
    let spread =
        cluster.cluster.placement_group(devices("a", 2).strategy(Strategy::StrictSpread)).await.unwrap();
    let created = spread.ready(LIMIT).await.unwrap();
    assert_eq!(nodes(&created), ["n0", "n1"]);
    let inside = |index| ActorSpec { placement: spread.bundle(index), ..counter(&format!("in-{index}")) };
    cluster.cluster.apply(vec![inside(0), inside(1)]).await.unwrap();
    let status = cluster.all_ready(2).await;
    assert_eq!((on(&status, "in-0").0, on(&status, "in-1").0), ("n0", "n1"));
    // A device that is reserved is nobody else's, and who waits hears exactly why.
    let whole =
        cluster.cluster.placement_group(devices("b", 2).strategy(Strategy::StrictPack)).await.unwrap();
    let why = whole.ready(Duration::from_millis(200)).await.unwrap_err().to_string();
    assert!(why.contains("all bundles must be on one node") && why.contains("1 of 2 bundles fit"), "{why}");
    assert!(why.contains("node n0 has 0 of 2 devices free, 1 is wanted"), "{why}");
    let other = cluster.cluster.placement_group(devices("a", 1)).await.map(|_| ()).unwrap_err().to_string();
    assert!(other.contains("it exists with other bundles; remove it first"), "{other}");
    // The next head finds the places as they were, and restarts nothing.
    cluster.head.take().unwrap().kill();
    cluster.start_head();
    let recovered = |status: &ClusterStatus| !status.head.recovering && status.nodes.len() == 2;
    let after = cluster.until("recovered", recovered).await;
    let (before, again) = (status.actor("in-0").unwrap(), after.actor("in-0").unwrap());
    assert_eq!((before.incarnation, before.pid), (again.incarnation, again.pid));
    assert_eq!(nodes(&spread.status().await.unwrap()), ["n0", "n1"]);
    // What one gives back goes to the other as soon as its processes have ended; its actors are ended for good.
    let start = Instant::now();
    spread.remove().await.unwrap();
    whole.ready(LIMIT).await.unwrap();
    println!("  a group that waited has its bundles {:?} after the removal of another", start.elapsed());
    let status = cluster.cluster.status().await.unwrap();
    assert!(matches!(status.actor("in-0").unwrap().state, ActorState::Dead { .. }));
    assert!(spread.status().await.unwrap_err().to_string().contains("no placement group"));
    cluster.cluster.remove_actor("in-0").await.unwrap();
    cluster.cluster.remove_actor("in-1").await.unwrap();
    let whole = whole.status().await.unwrap();
    lost_bundles(&mut cluster, nodes(&whole)[0]).await;
    cluster.end().await;
}

/// A group on a node that is lost is placed anew, and its actor follows.
async fn lost_bundles(cluster: &mut TestCluster, node: &str) {
    let group = cluster.cluster.get_placement_group("b").await.unwrap();
    let spec = ActorSpec { placement: group.bundle(None), ..counter("x") };
    cluster.cluster.apply(vec![spec]).await.unwrap();
    let before = cluster.all_ready(1).await;
    assert_eq!(on(&before, "x").0, node);
    cluster.take_node(node).kill();
    let start = Instant::now();
    let moved = |status: &ClusterStatus| {
        let (at, _) = on(status, "x");
        status.actor("x").unwrap().state == ActorState::Ready && at != node && at != "-"
    };
    let after = cluster.until("its bundles are elsewhere", moved).await;
    println!("  bundles of a killed node agent, and their actor, are elsewhere after {:?}", start.elapsed());
    let group = group.status().await.unwrap();
    assert_eq!(group.state, PlacementGroupState::Created);
    assert_eq!(nodes(&group), [on(&after, "x").0; 2]);
    cluster.start_node(node, 2);
    cluster.until("the node is back", |s| s.nodes.iter().all(|n| n.state == NodeState::Ready)).await;
}

/// A gang of 128 bundles when only one such gang fits: removed and made again.
pub(crate) async fn gang_again() {
    let cluster = TestCluster::start(&[64, 64]).await;
    cluster.until("both nodes", |status| status.nodes.len() == 2).await;
    let mut times = Vec::new();
    for _ in 0..20 {
        let start = Instant::now();
        let gang = cluster.cluster.placement_group(devices("gang", 128)).await.unwrap();
        gang.ready(LIMIT).await.unwrap();
        times.push(start.elapsed());
        gang.remove().await.unwrap();
    }
    // The first has nothing to wait for.
    times.remove(0);
    times.sort_unstable();
    println!("  128 bundles again right after the removal: p50 {:?}, worst {:?}", times[9], times[18]);
    assert!(times[9] < Duration::from_millis(500), "some timer decides: {times:?}");
    cluster.end().await;
}

/// Actors leave a drained node, with their bundles; one that fits nowhere else stays until the deadline; the empty node
/// comes back, or leaves.
pub(crate) async fn drain() {
    let mut cluster = TestCluster::start(&[2, 2]).await;
    cluster.until("both nodes", |status| status.nodes.len() == 2).await;
    let group = cluster.cluster.placement_group(devices("pg", 1)).await.unwrap();
    group.ready(LIMIT).await.unwrap();
    let inside = ActorSpec { placement: group.bundle(0), ..counter("inside") };
    cluster.cluster.apply(vec![inside, counter("free")]).await.unwrap();
    let before = cluster.all_ready(2).await;
    assert_eq!((on(&before, "inside").0, on(&before, "free").0), ("n0", "n0"));
    let start = Instant::now();
    cluster.cluster.drain_node("n0", Duration::from_secs(60), false).await.unwrap();
    let state = |status: &ClusterStatus, node: &str| {
        status.nodes.iter().find(|n| n.name == node).map(|n| n.state.clone())
    };
    cluster.until("n0 is empty", |status| state(status, "n0") == Some(NodeState::Drained)).await;
    let after = cluster.all_ready(2).await;
    println!("  two actors moved off a drained node in {:?}", start.elapsed());
    assert_eq!((on(&after, "inside").0, on(&after, "free").0), ("n1", "n1"));
    assert_eq!(after.actor("free").unwrap().restarts, 0, "a move is no failure");
    // It survives the head, and nothing comes to the node meanwhile.
    cluster.head.take().unwrap().kill();
    cluster.start_head();
    let recovered = |status: &ClusterStatus| !status.head.recovering && status.nodes.len() == 2;
    cluster.until("recovered", recovered).await;
    cluster.cluster.apply(vec![counter("late")]).await.unwrap();
    let waits = |status: &ClusterStatus| match &status.actor("late").unwrap().state {
        ActorState::Pending { reason } => reason.contains("node n0 is being drained"),
        _ => false,
    };
    cluster.until("late waits", waits).await;
    cluster.cluster.undrain_node("n0").await.unwrap();
    cluster.all_ready(3).await;
    // One device is free on n1: late moves, pinned stays until the deadline and then waits.
    cluster.cluster.remove_actor("free").await.unwrap();
    cluster.cluster.apply(vec![counter("pinned")]).await.unwrap();
    let status = cluster.all_ready(3).await;
    assert_eq!((on(&status, "late").0, on(&status, "pinned").0), ("n0", "n0"));
    let start = Instant::now();
    cluster.cluster.drain_node("n0", Duration::from_millis(700), true).await.unwrap();
    cluster.until("n0 has left", |status| state(status, "n0").is_none()).await;
    assert!(start.elapsed() >= Duration::from_millis(700), "what fits nowhere else stays for its time");
    cluster.take_node("n0").ended(Duration::from_secs(5)).await;
    let waits = |status: &ClusterStatus| {
        let reason = match &status.actor("pinned").unwrap().state {
            ActorState::Pending { reason } => reason.as_str(),
            _ => "",
        };
        on(status, "late").0 == "n1" && reason == "node n1 has 0 of 2 devices free, 1 is wanted"
    };
    cluster.until("pinned waits", waits).await;
    let unknown = cluster.cluster.drain_node("n9", Duration::ZERO, false).await.unwrap_err().to_string();
    assert_eq!(unknown, "there is no node \"n9\"; nodes are n1");
    cluster.end().await;
}
