//! What is killed, and what must be true afterwards.

use std::path::Path;
use std::time::{Duration, Instant};

use heliostat_runtime::cluster::status::{ActorState, ClusterStatus, NodeState};
use heliostat_runtime::spec::{ActorSpec, DeathCause, RestartPolicy};
use heliostat_runtime::wire::to_bytes;
use rustix::process::Signal;

use crate::actors::{Add, CounterArgs, Crash, Seen, Views, counter, now_us, ranks, watcher};
use crate::harness::{GRACE, Proc, TestCluster, free_port, is_alive, signal};

fn pid(status: &ClusterStatus, actor: &str) -> u32 {
    status.actor(actor).unwrap().pid.unwrap()
}

fn incarnations(status: &ClusterStatus) -> Vec<(String, u64, Option<u32>)> {
    status.actors.iter().map(|actor| (actor.name.clone(), actor.incarnation.0, actor.pid)).collect()
}

fn is_unreachable(status: &ClusterStatus) -> bool {
    status.nodes.iter().any(|node| matches!(node.state, NodeState::Unreachable { .. }))
}

async fn views(cluster: &TestCluster, actor: &str) -> Vec<Seen> {
    cluster.ask(actor, || Views).await.0
}

/// kill -9 of a worker: survivors and subscribers hear of it, a new incarnation takes its place.
pub(crate) async fn worker_killed() {
    let cluster = TestCluster::start(&[3]).await;
    let start = Instant::now();
    cluster.cluster.apply(ranks(3).into_iter().chain([watcher()]).collect()).await.unwrap();
    let status = cluster.all_ready(4).await;
    println!("  4 actors ready after apply: {:?}", start.elapsed());
    assert_eq!(status.group("ranks").unwrap().epoch, 1);
    assert_eq!(cluster.add("rank-0").await, 1);
    assert_eq!(cluster.add("rank-0").await, 2);
    for round in 0..3 {
        let before = cluster.all_ready(4).await;
        let epoch = before.group("ranks").unwrap().epoch;
        let killed_at = now_us();
        signal(pid(&before, "rank-0"), Signal::KILL);
        let after = cluster
            .until("rank-0 is back", |status| {
                status.group("ranks").is_some_and(|g| g.epoch == epoch + 2 && g.complete)
            })
            .await;
        let (value, _) = cluster.ask("rank-0", || Add(1)).await;
        let back = now_us() - killed_at;
        assert_eq!(value, 1, "the state of the old incarnation is gone");
        assert!(after.actor("rank-0").unwrap().incarnation > before.actor("rank-0").unwrap().incarnation);
        assert_eq!(after.actor("rank-0").unwrap().last_death, Some(DeathCause::Killed { signal: 9 }));
        for name in ["rank-1", "watcher"] {
            let seen = views(&cluster, name).await;
            let lost = seen.iter().find(|seen| seen.epoch == epoch + 1).unwrap();
            let complete = seen.iter().find(|seen| seen.epoch == epoch + 2).unwrap();
            assert!(lost.incarnations[0] == 0 && !lost.complete && complete.complete);
            let (lost, complete) = (lost.at_us - killed_at, complete.at_us - killed_at);
            println!(
                "  round {round}, {name}: loss heard after {lost} us, complete again after {complete} us"
            );
        }
        println!("  round {round}: rank-0 answers again after {back} us");
    }
    cluster.end().await;
}

/// A panic ends one incarnation, with its message.
pub(crate) async fn actor_panics() {
    let cluster = TestCluster::start(&[1]).await;
    cluster.cluster.apply(vec![counter("c")]).await.unwrap();
    let before = cluster.all_ready(1).await;
    let error = cluster.counter("c").ask(Crash).await.unwrap_err();
    assert!(error.to_string().contains("crashed on request"), "{error}");
    let old = before.actor("c").unwrap().incarnation;
    let ready = |status: &ClusterStatus| {
        let actor = status.actor("c").unwrap();
        actor.state == ActorState::Ready && actor.incarnation > old
    };
    let status = cluster.until("a new incarnation", ready).await;
    let cause = status.actor("c").unwrap().last_death.clone();
    let panicked = |cause: &DeathCause| matches!(cause, DeathCause::Panicked { message, .. } if message == "crashed on request");
    assert!(cause.as_ref().is_some_and(panicked), "{cause:?}");
    cluster.end().await;
}

/// kill -9 of the node agent: its workers serve on and the next agent takes them over.
pub(crate) async fn agent_killed() {
    let mut cluster = TestCluster::start(&[2]).await;
    cluster.cluster.apply(ranks(2)).await.unwrap();
    let before = cluster.all_ready(2).await;
    cluster.take_node("n0").kill();
    let start = Instant::now();
    cluster.until("node is unreachable", is_unreachable).await;
    println!("  head noticed after {:?}", start.elapsed());
    assert_eq!(cluster.add("rank-1").await, 1, "it serves meanwhile");
    let start = Instant::now();
    cluster.start_node("n0", 2);
    let after = cluster.until("node is back", |status| !is_unreachable(status)).await;
    println!("  taken over after {:?}", start.elapsed());
    assert_eq!(incarnations(&after), incarnations(&before));
    assert_eq!(after.group("ranks").unwrap().epoch, 1);
    // The new agent watches what it did not start. Its workers are in touch with it and outlive the grace.
    tokio::time::sleep(GRACE + Duration::from_secs(1)).await;
    assert_eq!(incarnations(&cluster.all_ready(2).await), incarnations(&before));
    let start = Instant::now();
    signal(pid(&before, "rank-0"), Signal::KILL);
    let epoch = |status: &ClusterStatus| status.group("ranks").unwrap().epoch;
    cluster.until("loss", |status| epoch(status) == 2).await;
    println!("  death of an adopted worker noticed after {:?}", start.elapsed());
    cluster.all_ready(2).await;
    cluster.end().await;
}

/// An agent that does not come back: its workers end by themselves, its actors wait for a place.
pub(crate) async fn agent_gone() {
    let mut cluster = TestCluster::start(&[1]).await;
    cluster.cluster.apply(vec![counter("c")]).await.unwrap();
    let before = cluster.all_ready(1).await;
    cluster.take_node("n0").kill();
    let start = Instant::now();
    let pending = |status: &ClusterStatus| match &status.actor("c").unwrap().state {
        ActorState::Pending { reason } => reason.contains("node n0 is lost"),
        _ => false,
    };
    cluster.until("pending with a reason", pending).await;
    println!("  node declared lost after {:?}", start.elapsed());
    while is_alive(pid(&before, "c")) {
        assert!(start.elapsed() < GRACE * 3, "an orphan");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("  worker gone after {:?}", start.elapsed());
    cluster.start_node("n0", 1);
    cluster.all_ready(1).await;
    cluster.end().await;
}

/// kill -9 of the head: serving goes on, and the next head finds everything as it was.
pub(crate) async fn head_killed() {
    let mut cluster = TestCluster::start(&[2]).await;
    cluster.cluster.apply(ranks(2).into_iter().chain([watcher()]).collect()).await.unwrap();
    let before = cluster.all_ready(3).await;
    assert_eq!(cluster.add("rank-0").await, 1);
    for round in 0..2 {
        cluster.head.take().unwrap().kill();
        let start = Instant::now();
        for n in 1..=20 {
            assert_eq!(cluster.add("rank-0").await, 1 + round * 20 + n, "served without a head");
        }
        println!("  20 asks without a head took {:?}", start.elapsed());
        let start = Instant::now();
        cluster.start_head();
        let after = cluster
            .until("recovered", |status| {
                let known = status.group("ranks").is_some_and(|group| group.complete && group.epoch > 0);
                known && !status.head.recovering && status.nodes.iter().all(|n| n.state == NodeState::Ready)
            })
            .await;
        println!("  new head has everything after {:?}", start.elapsed());
        assert_eq!(incarnations(&after), incarnations(&before));
        assert_eq!(after.group("ranks").unwrap().epoch, 1, "nobody left, so no new epoch");
    }
    let incarnation = before.actor("rank-1").unwrap().incarnation;
    // A worker that dies while there is no head is restarted by the next one.
    cluster.head.take().unwrap().kill();
    signal(pid(&before, "rank-1"), Signal::KILL);
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster.start_head();
    let is_back = |status: &ClusterStatus| {
        let group = status.group("ranks").unwrap();
        status.actor("rank-1").unwrap().incarnation > incarnation && group.complete && group.epoch > 1
    };
    let after = cluster.until("rank-1 is back", is_back).await;
    assert_eq!(after.actor("rank-1").unwrap().restarts, 1);
    assert_eq!(after.actor("rank-0").unwrap().pid, before.actor("rank-0").unwrap().pid);
    let now: Vec<u64> = after.actors[..2].iter().map(|actor| actor.incarnation.0).collect();
    let start = Instant::now();
    while views(&cluster, "watcher").await.last().is_none_or(|view| view.incarnations != now) {
        assert!(start.elapsed() < Duration::from_secs(10), "the watcher was not told");
    }
    cluster.end().await;
}

/// An actor that cannot live is given up with its cause, and applying it again revives it.
pub(crate) async fn restart_limit() {
    let cluster = TestCluster::start(&[1]).await;
    let restart =
        RestartPolicy { max_restarts: 2, backoff_min: Duration::from_millis(20), ..RestartPolicy::default() };
    let args = to_bytes(&CounterArgs { fail: Some("no weights in /nowhere".into()) }).unwrap();
    let spec = ActorSpec { restart, args, ..counter("c") };
    cluster.cluster.apply(vec![spec.clone()]).await.unwrap();
    let dead = |status: &ClusterStatus| match &status.actor("c").unwrap().state {
        ActorState::Dead { cause } => cause.to_string().contains("no weights in /nowhere"),
        _ => false,
    };
    let status = cluster.until("given up", dead).await;
    assert_eq!(status.actor("c").unwrap().restarts, 2);
    let applied = cluster.cluster.apply(vec![spec]).await.unwrap();
    assert_eq!(applied.restarted, 1);
    let status = cluster.until("given up again", dead).await;
    assert_eq!(status.actor("c").unwrap().restarts, 4);
    cluster.cluster.apply(vec![counter("c")]).await.unwrap();
    cluster.all_ready(1).await;
    let error = cluster.cluster.apply(vec![counter("a b")]).await.unwrap_err();
    assert!(error.to_string().contains("letters, digits"), "{error}");
    cluster.end().await;
}

/// A host that is gone: its actors move to devices that are free elsewhere.
pub(crate) async fn node_lost() {
    let cluster = TestCluster::start(&[1, 2]).await;
    cluster.until("both nodes", |status| status.nodes.len() == 2).await;
    cluster.cluster.apply(ranks(2)).await.unwrap();
    let before = cluster.all_ready(2).await;
    assert_eq!(before.actor("rank-0").unwrap().node.as_deref(), Some("n0"));
    // A frozen host keeps its connections open and says nothing.
    let agent = before.nodes.iter().find(|node| node.name == "n0").unwrap().pid;
    let worker = pid(&before, "rank-0");
    signal(agent, Signal::STOP);
    signal(worker, Signal::STOP);
    let start = Instant::now();
    cluster.until("unreachable", is_unreachable).await;
    println!("  frozen node noticed after {:?}", start.elapsed());
    let moved = |status: &ClusterStatus| {
        let actor = status.actor("rank-0").unwrap();
        actor.node.as_deref() == Some("n1") && status.group("ranks").unwrap().complete
    };
    let after = cluster.until("moved", moved).await;
    println!("  moved to another node after {:?}", start.elapsed());
    assert!(matches!(after.actor("rank-0").unwrap().last_death, Some(DeathCause::NodeLost { .. })));
    // It thaws: what it still runs is fenced, and it takes new work.
    signal(agent, Signal::CONT);
    signal(worker, Signal::CONT);
    let start = Instant::now();
    while is_alive(worker) {
        assert!(start.elapsed() < Duration::from_secs(10), "an old incarnation lives on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("  old incarnation ended {:?} after the thaw", start.elapsed());
    cluster
        .until("n0 is back", |status| status.nodes.iter().all(|node| node.state == NodeState::Ready))
        .await;
    cluster.cluster.apply(vec![counter("c"), counter("d")]).await.unwrap();
    let full = |status: &ClusterStatus| match &status.actor("d").unwrap().state {
        ActorState::Pending { reason } => reason.contains("node n1 has 0 of 2 devices free, 1 is wanted"),
        _ => false,
    };
    let status = cluster.until("d waits", full).await;
    assert_eq!(status.actor("c").unwrap().node.as_deref(), Some("n0"));
    cluster.cluster.remove_actor("c").await.unwrap();
    cluster.all_ready(3).await;
    cluster.end().await;
}

/// SIGTERM of an agent, stopping and removing actors, shutdown.
pub(crate) async fn orderly_ends() {
    let mut cluster = TestCluster::start(&[2]).await;
    cluster.cluster.apply_exactly(vec![counter("a"), counter("b")]).await.unwrap();
    let before = cluster.all_ready(2).await;
    cluster.cluster.stop_actor("a").await.unwrap();
    let dead = |status: &ClusterStatus| matches!(status.actor("a").unwrap().state, ActorState::Dead { .. });
    cluster.until("a is stopped", dead).await;
    assert!(!is_alive(pid(&before, "a")));
    assert_eq!(cluster.cluster.lookup("a").await.unwrap(), None);
    cluster.cluster.restart_actor("a").await.unwrap();
    let before = cluster.all_ready(2).await;
    let node = cluster.take_node("n0");
    let start = Instant::now();
    node.terminate();
    node.ended(Duration::from_secs(5)).await;
    println!("  node left after {:?}", start.elapsed());
    assert!(!is_alive(pid(&before, "a")) && !is_alive(pid(&before, "b")));
    cluster.until("no node", |status| status.nodes.is_empty()).await;
    cluster.start_node("n0", 2);
    cluster.all_ready(2).await;
    let applied = cluster.cluster.apply_exactly(vec![counter("b")]).await.unwrap();
    assert_eq!((applied.removed, applied.unchanged), (1, 1));
    cluster.all_ready(1).await;
    let start = Instant::now();
    cluster.end().await;
    println!("  cluster shut down after {:?}", start.elapsed());
}

/// Logs are kept over incarnations and can be followed.
pub(crate) async fn logs() {
    let cluster = TestCluster::start(&[1]).await;
    cluster.cluster.apply(vec![counter("c")]).await.unwrap();
    let before = cluster.all_ready(1).await;
    let (mut text, mut next) = (String::new(), 0);
    while text.matches("creating c").count() < 2 {
        let chunk = cluster.cluster.logs("c", next, 1 << 16, Duration::from_secs(5)).await.unwrap();
        assert!(!chunk.bytes.is_empty(), "nothing came: {text}");
        text.push_str(&String::from_utf8_lossy(&chunk.bytes));
        next = chunk.next;
        if text.matches("creating c").count() == 1 && is_alive(pid(&before, "c")) {
            signal(pid(&before, "c"), Signal::KILL);
        }
    }
    assert_eq!(text.matches("=== c, incarnation").count(), 2, "{text}");
    let error = cluster.cluster.logs("x", 0, 1, Duration::ZERO).await.unwrap_err();
    assert!(error.to_string().contains("no actor is named"), "{error}");
    cluster.all_ready(1).await;
    cluster.end().await;
}

/// etcd is killed: the head goes on from memory, says so, and writes what it owes when etcd is back.
pub(crate) async fn etcd_killed() {
    let program = Path::new("/usr/bin/etcd");
    if !program.exists() {
        return println!("  no etcd here");
    }
    let dir = tempfile::tempdir().unwrap();
    let (client, peer) = (format!("127.0.0.1:{}", free_port()), format!("http://127.0.0.1:{}", free_port()));
    let url = format!("http://{client}");
    let data = dir.path().join("etcd").to_string_lossy().into_owned();
    let cluster_arg = format!("default={peer}");
    let args = [
        ["--data-dir", &data],
        ["--listen-client-urls", &url],
        ["--advertise-client-urls", &url],
        ["--listen-peer-urls", &peer],
        ["--initial-advertise-peer-urls", &peer],
        ["--initial-cluster", &cluster_arg],
    ];
    let args = args.concat();
    let log = dir.path().join("etcd.log");
    let etcd = Proc::start(program, &args, &log);
    let start = Instant::now();
    let serves = async || etcd_client::Client::connect([&url], None).await?.status().await;
    while let Err(error) = serves().await {
        assert!(start.elapsed() < Duration::from_secs(30), "etcd: {error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut cluster = TestCluster::start_on(dir, format!("etcd:{client}"), &[2]).await;
    cluster.cluster.apply(ranks(2)).await.unwrap();
    let before = cluster.all_ready(2).await;
    etcd.kill();
    signal(pid(&before, "rank-0"), Signal::KILL);
    let start = Instant::now();
    cluster.until("healed without etcd", |status| status.group("ranks").is_some_and(|g| g.epoch == 3)).await;
    println!("  healed without etcd after {:?}", start.elapsed());
    let status = cluster.until("said so", |status| status.state_store.error.is_some()).await;
    println!("  status: {:?}", status.state_store);
    let _etcd = Proc::start(program, &args, &log);
    let start = Instant::now();
    let after = cluster.until("written", |status| status.state_store.error.is_none()).await;
    println!("  all written {:?} after etcd was started", start.elapsed());
    cluster.head.take().unwrap().kill();
    cluster.start_head();
    let recovered =
        cluster.until("recovered", |status| !status.head.recovering && !is_unreachable(status)).await;
    assert_eq!(incarnations(&recovered), incarnations(&after));
    cluster.end().await;
}
