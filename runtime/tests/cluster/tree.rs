//! Namespaces, owners and supervisors with real processes.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use heliostat_runtime::cluster::status::{ActorState, ActorStatus, ClusterStatus};
use heliostat_runtime::cluster::{Cluster, ClusterError, Named};
use heliostat_runtime::spec::{
    ActorSpec, DeathCause, Lifetime, Owner, Seat, SupervisorSpec, SupervisorStrategy, Verdict,
};
use heliostat_runtime::system::Secret;
use heliostat_runtime::wire::to_bytes;
use rustix::process::Signal;

use crate::actors::{Add, Asked, Boss, Counter, Other, SpawnOne, plain};
use crate::harness::{GRACE, Proc, TOKEN, TestCluster, is_alive, signal};

fn actor<'s>(status: &'s ClusterStatus, name: &str) -> &'s ActorStatus {
    status.actor(name).unwrap_or_else(|| panic!("no actor {name}"))
}

fn kill(status: &ClusterStatus, name: &str) {
    signal(actor(status, name).pid.unwrap(), Signal::KILL);
}

fn incarnations(status: &ClusterStatus, names: &[&str]) -> Vec<u64> {
    names.iter().map(|name| actor(status, name).incarnation.0).collect()
}

fn boss(name: &str) -> ActorSpec {
    ActorSpec::new(name, "boss", to_bytes(&()).unwrap())
}

/// The same name in two namespaces is two actors; names are taken once; types are checked.
pub(crate) async fn namespaces() {
    let cluster = TestCluster::start(&[0]).await;
    let (here, train) = (&cluster.cluster, cluster.cluster.in_namespace("train"));
    let one: Named<Counter> = here.spawn(plain("c")).await.unwrap();
    let other: Named<Counter> = train.spawn(plain("c")).await.unwrap();
    cluster.all_ready(2).await;
    assert_eq!((one.ask(Add(1)).await.unwrap(), other.ask(Add(5)).await.unwrap()), (1, 5));
    assert_eq!(here.get_actor::<Counter>("train/c").await.unwrap().ask(Add(1)).await.unwrap(), 6);
    assert_eq!(train.get_actor::<Counter>("default/c").await.unwrap().ask(Add(1)).await.unwrap(), 2);
    let error = train.spawn::<Counter>(plain("c")).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("the name is taken"), "{error}");
    let same: Named<Counter> = train.get_or_spawn(plain("c")).await.unwrap();
    assert_eq!(same.ask(Add(1)).await.unwrap(), 7, "it is the one that was there");
    let error = train.get_actor::<Other>("c").await.map(drop).unwrap_err();
    assert!(matches!(error, ClusterError::WrongType { .. }), "{error}");
    let error = train.get_actor::<Counter>("d").await.map(drop).unwrap_err();
    assert_eq!(error.to_string(), "no actor is named \"d\" in namespace \"train\"");
    let log = train.logs("c", 0, 1 << 16, Duration::from_secs(5)).await.unwrap();
    assert!(String::from_utf8_lossy(&log.bytes).contains("=== train/c, incarnation"));
    train.stop_actor("c").await.unwrap();
    let dead = |status: &ClusterStatus| matches!(actor(status, "train/c").state, ActorState::Dead { .. });
    cluster.until("train/c is stopped", dead).await;
    let error = train.get_actor::<Counter>("c").await.map(drop).unwrap_err();
    let by = format!("by request, asked for by process {}", std::process::id());
    assert!(error.to_string().contains(&by), "{error}");
    let again: Named<Counter> = train.get_or_spawn(plain("c")).await.unwrap();
    cluster.all_ready(2).await;
    assert_eq!(again.ask(Add(1)).await.unwrap(), 1, "a new life");
    cluster.end().await;
}

/// `driver HEAD`: spawns `owned` and a detached actor, and waits to be killed.
pub(crate) fn driver_process(mut args: impl Iterator<Item = String>) -> ExitCode {
    let head = args.next().unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let cluster = Cluster::connect(&head, Some(Secret::new(TOKEN))).await.unwrap();
        let driver = cluster.driver("test").await.unwrap();
        driver.cluster().spawn::<Counter>(plain("owned")).await.unwrap();
        let detached = ActorSpec { lifetime: Lifetime::Detached, ..plain("detached") };
        driver.cluster().spawn::<Counter>(detached).await.unwrap();
        std::future::pending::<()>().await;
    });
    ExitCode::SUCCESS
}

/// What a driver owns ends with it, whether it says goodbye or is killed; what an actor spawns ends with its life.
pub(crate) async fn drivers() {
    let mut cluster = TestCluster::start(&[0]).await;
    let program = std::env::current_exe().unwrap();
    let log = cluster.log("driver");
    let process = Proc::start(&program, &["driver", &cluster.endpoint], &log);
    let both = |status: &ClusterStatus| {
        let ready = status.actors.iter().filter(|actor| actor.state == ActorState::Ready);
        ready.count() == 2 && status.drivers.len() == 1
    };
    let status = cluster.until("the driver's actors", both).await;
    let owned = actor(&status, "owned").pid.unwrap();
    // A head that starts anew ends nothing: the driver comes to it.
    cluster.head.take().unwrap().kill();
    cluster.start_head();
    let back = |status: &ClusterStatus| {
        !status.head.recovering && both(status) && status.drivers.iter().all(|driver| driver.connected)
    };
    let status = cluster.until("the driver is back", back).await;
    assert_eq!(actor(&status, "owned").pid, Some(owned));
    tokio::time::sleep(GRACE + Duration::from_secs(1)).await;
    assert!(is_alive(owned), "it outlives the grace");
    process.kill();
    let start = Instant::now();
    let gone = |status: &ClusterStatus| status.actor("owned").is_none() && status.drivers.is_empty();
    cluster.until("what it owned is gone", gone).await;
    println!("  actors of a killed driver are gone after {:?}", start.elapsed());
    cluster.all_ready(1).await;
    // One that says so is gone at once.
    let driver = cluster.cluster.driver("here").await.unwrap();
    driver.cluster().spawn::<Boss>(boss("boss")).await.unwrap();
    cluster.all_ready(2).await;
    let named: Named<Boss> = cluster.cluster.named("boss");
    named.ask(SpawnOne("child".into())).await.unwrap().unwrap();
    let status = cluster.all_ready(3).await;
    let name = "boss".to_owned();
    let incarnation = Some(actor(&status, "boss").incarnation);
    let owner = Owner::Actor { name, incarnation };
    assert_eq!(actor(&status, "child").lifetime, Lifetime::Owned(owner));
    kill(&status, "boss");
    cluster.until("the child went with its owner", |status| status.actor("child").is_none()).await;
    cluster.all_ready(2).await;
    cluster.cluster.named::<Boss>("boss").ask(SpawnOne("child".into())).await.unwrap().unwrap();
    cluster.all_ready(3).await;
    let start = Instant::now();
    driver.end().await.unwrap();
    cluster.until("all that it owned", |status| status.actors.len() == 1).await;
    println!("  actors of a driver that ended are gone after {:?}", start.elapsed());
    cluster.end().await;
}

/// One-for-all and rest-for-one with processes.
pub(crate) async fn strategies() {
    let cluster = TestCluster::start(&[0]).await;
    let child = |name: &str, of: &str, order| ActorSpec { seat: Some(Seat::new(of, order)), ..plain(name) };
    let specs = ["all", "rest"].into_iter().flat_map(|of| (0..3).map(move |n| (of, n)));
    let specs = specs.map(|(of, n)| child(&format!("{of}-{n}"), of, n)).collect();
    let supervisors = vec![
        SupervisorSpec::new("all", SupervisorStrategy::OneForAll),
        SupervisorSpec::new("rest", SupervisorStrategy::RestForOne),
    ];
    cluster.cluster.apply_tree(specs, supervisors).await.unwrap();
    let names = ["all-0", "all-1", "all-2", "rest-0", "rest-1", "rest-2"];
    let before = cluster.all_ready(6).await;
    let (start, old) = (Instant::now(), incarnations(&before, &names));
    kill(&before, "all-1");
    let newer = |status: &ClusterStatus, which: &[usize]| {
        let now = incarnations(status, &names);
        which.iter().all(|at| now[*at] > old[*at])
            && status.actors.iter().all(|actor| actor.state == ActorState::Ready)
    };
    let after = cluster.until("all of all are new", |status| newer(status, &[0, 1, 2])).await;
    println!("  one-for-all of 3 is ready again after {:?}", start.elapsed());
    assert_eq!(incarnations(&after, &names)[3..], old[3..]);
    let why = actor(&after, "all-0").last_death.clone().unwrap();
    assert_eq!(*why.root(), DeathCause::Killed { signal: 9 });
    kill(&after, "rest-1");
    let after = cluster.until("the rest is new", |status| newer(status, &[4, 5])).await;
    assert_eq!(incarnations(&after, &names)[3], old[3]);
    cluster.cluster.remove_supervisor("all").await.unwrap();
    cluster.until("all is removed", |status| status.actors.len() == 3 && status.supervisors.len() == 1).await;
    cluster.end().await;
}

/// A supervisor that the user wrote is asked, and obeyed.
pub(crate) async fn judge() {
    let cluster = TestCluster::start(&[0]).await;
    let ask = SupervisorStrategy::Ask { actor: "boss".into(), otherwise: Verdict::Escalate };
    let child = |name: &str| ActorSpec { seat: Some(Seat::new("s", 0)), ..plain(name) };
    let specs = vec![boss("boss"), child("a"), child("b")];
    cluster.cluster.apply_tree(specs, vec![SupervisorSpec::new("s", ask)]).await.unwrap();
    let before = cluster.all_ready(3).await;
    let old = incarnations(&before, &["a", "b"]);
    let start = Instant::now();
    kill(&before, "a");
    let both = |status: &ClusterStatus| {
        let now = incarnations(status, &["a", "b"]);
        now.iter().zip(&old).all(|(now, old)| now > old)
    };
    cluster.until("it said: restart all", both).await;
    let status = cluster.all_ready(3).await;
    println!("  asked, and both ready again after {:?}", start.elapsed());
    kill(&status, "b");
    let dead = |status: &ClusterStatus| matches!(actor(status, "b").state, ActorState::Dead { .. });
    cluster.until("it said: stop", dead).await;
    let asked = cluster.cluster.named::<Boss>("boss").ask(Asked).await.unwrap();
    let children: Vec<&str> = asked.iter().map(|died| died.child.as_str()).collect();
    assert_eq!(children, ["a", "b"]);
    assert!(asked.iter().all(|died| died.cause == DeathCause::Killed { signal: 9 }));
    cluster.end().await;
}
