//! Every way in which an actor ends leaves its cause: what it panicked of and where, what its process wrote last, whether
//! it hung, who had it ended. And what calls make of it: sent again, refused, waited for.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, ResponseFuture};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn};
use heliostat_runtime::cluster::status::{ActorState, ActorStatus, ClusterStatus};
use heliostat_runtime::cluster::{Idempotent, Named, NamedError};
use heliostat_runtime::handle::{AskError, Refusal};
use heliostat_runtime::spec::{ActorSpec, DeathCause, Progress, RestartPolicy};
use rustix::process::Signal;
use serde_json::json;

use crate::actors::counter;
use crate::harness::{TestCluster, message, signal};

/// Suffers what it is told to.
pub(crate) struct Sufferer {
    cx: ActorCx,
    handled: u32,
}

message!(/** A panic after an await. */ PanicLater() -> (), "panic_later");
message!(/** Blocks its thread, milliseconds. */ Block(u64) -> (), "block");
message!(/** Ends the process. */ Exit(i32) -> (), "exit");
message!(/** Asks for its end. */ GiveUp(String) -> (), "give_up");
message!(/** Takes memory, MiB. */ Eat(u64) -> u64, "eat");
message!(/** Answers after a while with the number of these so far. */ #[derive(serde::Deserialize)] Slow(u64) -> u32, "slow");
message!(/** How many `Slow` have begun. */ Begun() -> u32, "begun");

impl Idempotent for Slow {}

impl Actor for Sufferer {
    type Context = Context<Self>;
}

impl RemoteActor for Sufferer {
    const TYPE: &'static str = "sufferer";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<PanicLater>()
            .accept::<Block>()
            .accept::<Exit>()
            .accept::<GiveUp>()
            .accept::<Eat>()
            .accept_json::<Slow>()
            .accept::<Begun>();
    }
}

impl Spawn for Sufferer {
    type Args = ();

    async fn create((): (), cx: ActorCx) -> Result<Self, CreateError> {
        Ok(Self { cx, handled: 0 })
    }
}

impl Handler<PanicLater> for Sufferer {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: PanicLater, _: &mut Context<Self>) -> Self::Result {
        Box::pin(async {
            tokio::task::yield_now().await;
            fall_over();
        })
    }
}

#[inline(never)]
fn fall_over() {
    panic!("no luck, later");
}

impl Handler<Block> for Sufferer {
    type Result = ();

    fn handle(&mut self, Block(ms): Block, _: &mut Context<Self>) {
        std::thread::sleep(Duration::from_millis(ms));
    }
}

impl Handler<Exit> for Sufferer {
    type Result = ();

    fn handle(&mut self, Exit(code): Exit, _: &mut Context<Self>) {
        eprintln!("a library says: giving up");
        std::process::exit(code);
    }
}

impl Handler<GiveUp> for Sufferer {
    type Result = ();

    fn handle(&mut self, GiveUp(message): GiveUp, _: &mut Context<Self>) {
        self.cx.exit(DeathCause::GpuFault { message });
    }
}

impl Handler<Eat> for Sufferer {
    type Result = u64;

    fn handle(&mut self, Eat(mib): Eat, _: &mut Context<Self>) -> u64 {
        let eaten = vec![7_u8; (mib as usize) << 20];
        eaten.iter().map(|byte| u64::from(*byte)).sum()
    }
}

impl Handler<Slow> for Sufferer {
    type Result = ResponseFuture<u32>;

    fn handle(&mut self, Slow(ms): Slow, _: &mut Context<Self>) -> Self::Result {
        self.handled += 1;
        let handled = self.handled;
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            handled
        })
    }
}

impl Handler<Begun> for Sufferer {
    type Result = u32;

    fn handle(&mut self, _: Begun, _: &mut Context<Self>) -> u32 {
        self.handled
    }
}

/// Takes its time to be created.
pub(crate) struct Newborn;

/// What its creation does for 3 s.
#[derive(Debug, Clone, Copy, Encode, Decode)]
pub(crate) enum Birth {
    /// It holds its thread.
    Blocks,
    /// The same, and says how far it is.
    Tells,
    /// It waits, with its thread free.
    Awaits,
}

impl Actor for Newborn {
    type Context = Context<Self>;
}

impl RemoteActor for Newborn {
    const TYPE: &'static str = "newborn";

    fn messages(_: &mut Accepts<Self>) {}
}

impl Spawn for Newborn {
    type Args = Birth;

    async fn create(birth: Birth, cx: ActorCx) -> Result<Self, CreateError> {
        const STEPS: u64 = 10;
        for done in 0..STEPS {
            match birth {
                Birth::Blocks => std::thread::sleep(Duration::from_millis(300)),
                Birth::Tells => {
                    std::thread::sleep(Duration::from_millis(300));
                    cx.progress(Progress { phase: "stretching".into(), done, total: STEPS });
                }
                Birth::Awaits => tokio::time::sleep(Duration::from_millis(300)).await,
            }
        }
        Ok(Self)
    }
}

/// A creation that holds its thread and says nothing is a hang; one that waits or says how far it is takes its time.
pub(crate) async fn hung_in_create() {
    let cluster = TestCluster::start(&[0]).await;
    let newborn = |name: &str, birth: Birth| ActorSpec {
        hang_timeout: Some(Duration::from_secs(1)),
        restart: RestartPolicy { max_restarts: 0, ..RestartPolicy::default() },
        ..ActorSpec::of::<Newborn>(name, &birth).unwrap()
    };
    let births = [("blocks", Birth::Blocks), ("tells", Birth::Tells), ("awaits", Birth::Awaits)];
    let specs = births.map(|(name, birth)| newborn(name, birth));
    cluster.cluster.apply(specs.to_vec()).await.unwrap();
    let settled = |actor: &ActorStatus| matches!(actor.state, ActorState::Ready | ActorState::Dead { .. });
    let status = cluster
        .until("all born or dead", |status| status.actors.len() == 3 && status.actors.iter().all(settled))
        .await;
    let ActorState::Dead { cause } = &actor(&status, "blocks").state else { panic!("{status:#?}") };
    println!("  {cause}");
    let DeathCause::Hung { what, waited_ms: 950 } = cause else { panic!("{cause}") };
    assert!(what.contains("being created (Spawn::create)"), "{what}");
    assert!(what.contains("the thread waits in the kernel"), "{what}");
    assert_eq!(actor(&status, "tells").state, ActorState::Ready);
    assert_eq!(actor(&status, "awaits").state, ActorState::Ready);
    cluster.end().await;
}

/// Waits until so many `Slow` have begun.
async fn begun(named: &Named<Sufferer>, many: u32) {
    let start = Instant::now();
    while named.ask(Begun()).await.unwrap_or_default() < many {
        assert!(start.elapsed() < Duration::from_secs(20), "it never began");
        tokio::task::yield_now().await;
    }
}

fn sufferer(name: &str) -> ActorSpec {
    ActorSpec::of::<Sufferer>(name, &()).unwrap()
}

fn actor<'s>(status: &'s ClusterStatus, name: &str) -> &'s ActorStatus {
    status.actor(name).unwrap()
}

/// The next life of the actor, with the death of the one before.
async fn next_life(cluster: &TestCluster, before: &ClusterStatus, name: &str) -> ClusterStatus {
    let old = actor(before, name).incarnation;
    let reborn = |status: &ClusterStatus| {
        let actor = actor(status, name);
        actor.state == ActorState::Ready && actor.incarnation > old
    };
    cluster.until("a new incarnation", reborn).await
}

/// A panic, also one after an await, an exit, a hang, a frozen process.
pub(crate) async fn causes() {
    let cluster = TestCluster::start(&[0]).await;
    let hasty = ActorSpec { hang_timeout: Some(Duration::from_secs(1)), ..sufferer("s") };
    let named: Named<Sufferer> = cluster.cluster.spawn(hasty).await.unwrap();
    let mut before = cluster.all_ready(1).await;
    let start = Instant::now();
    let error = named.ask(PanicLater()).await.unwrap_err();
    assert!(matches!(&error, NamedError::Ask(AskError::Panicked(why)) if why == "no luck, later"), "{error}");
    println!("  the asker hears of a panic after an await after {:?}", start.elapsed());
    before = next_life(&cluster, &before, "s").await;
    println!("  and the actor is ready again after {:?}", start.elapsed());
    let cause = actor(&before, "s").last_death.clone().unwrap();
    let DeathCause::Panicked { message, location, backtrace } = &cause else { panic!("{cause}") };
    assert_eq!(message, "no luck, later");
    assert!(location.as_ref().is_some_and(|at| at.contains("causes.rs:")), "{location:?}");
    assert!(backtrace.as_ref().is_some_and(|frames| frames.contains("fall_over")), "{backtrace:?}");
    assert!(actor(&before, "s").last_words.as_ref().is_some_and(|words| words.contains("no luck, later")));

    named.ask(Exit(3)).await.unwrap_err();
    before = next_life(&cluster, &before, "s").await;
    assert_eq!(actor(&before, "s").last_death, Some(DeathCause::Exited { code: 3 }));
    assert!(actor(&before, "s").last_words.as_ref().is_some_and(|words| words.contains("giving up")));

    // What takes its time, but not more than it may, does not hang.
    named.ask(Block(600)).await.unwrap();
    let start = Instant::now();
    named.ask(Block(60_000)).await.unwrap_err();
    println!("  an actor that may block for 1 s was ended after {:?}", start.elapsed());
    before = next_life(&cluster, &before, "s").await;
    println!("  and is ready again after {:?}", start.elapsed());
    // On a quiet machine it is within the second.
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    let cause = actor(&before, "s").last_death.clone().unwrap();
    let DeathCause::Hung { what, .. } = &cause else { panic!("{cause}") };
    assert!(what.contains("it is at message \"block\"; the thread waits in the kernel"), "{what}");

    // A host that was suspended, or starved, has its actors as before.
    let pid = actor(&before, "s").pid.unwrap();
    signal(pid, Signal::STOP);
    tokio::time::sleep(Duration::from_secs(2)).await;
    signal(pid, Signal::CONT);
    tokio::time::sleep(Duration::from_secs(1)).await;
    named.ask(Block(0)).await.unwrap();
    assert_eq!(actor(&cluster.cluster.status().await.unwrap(), "s").pid, Some(pid));

    signal(actor(&before, "s").pid.unwrap(), Signal::STOP);
    let start = Instant::now();
    before = next_life(&cluster, &before, "s").await;
    println!("  a frozen process was replaced after {:?}", start.elapsed());
    let cause = actor(&before, "s").last_death.clone().unwrap().to_string();
    assert!(cause.contains("says nothing; it is stopped"), "{cause}");
    cluster.end().await;
}

/// What an actor says of its end is told, and not that it stopped thereupon.
pub(crate) async fn own_words() {
    let cluster = TestCluster::start(&[0]).await;
    let names: Vec<String> = (0..8).map(|number| format!("s{number}")).collect();
    let mut actors = Vec::new();
    for name in &names {
        let named: Named<Sufferer> = cluster.cluster.spawn(sufferer(name)).await.unwrap();
        actors.push(named);
    }
    let before = cluster.all_ready(names.len()).await;
    for (name, named) in names.iter().zip(&actors) {
        named.ask(GiveUp(format!("the memory of {name} is rotten"))).await.unwrap();
    }
    for name in &names {
        let after = next_life(&cluster, &before, name).await;
        let message = format!("the memory of {name} is rotten");
        assert_eq!(actor(&after, name).last_death, Some(DeathCause::GpuFault { message }));
    }
    cluster.end().await;
}

/// Stopped, killed: by whom. A graceful stop lets it answer what it has, and takes nothing new.
pub(crate) async fn ends_by_request() {
    let cluster = TestCluster::start(&[0]).await;
    let named: Named<Sufferer> = cluster.cluster.spawn(sufferer("s")).await.unwrap();
    cluster.all_ready(1).await;
    let asking = |ms| {
        let named = named.clone();
        tokio::spawn(async move { named.ask(Slow(ms)).await })
    };
    let late = asking(1000);
    begun(&named, 1).await;
    named.stop(Duration::from_secs(20)).await.unwrap();
    assert_eq!(late.await.unwrap().unwrap(), 1, "it had that before it was to end");
    let dead = |status: &ClusterStatus| matches!(actor(status, "s").state, ActorState::Dead { .. });
    cluster.until("finished", dead).await;
    // One that does not come to an end is killed after the grace, and at once by kill.
    for (kill, most) in [(false, 20), (true, 15)] {
        cluster.cluster.restart_actor("s").await.unwrap();
        cluster.all_ready(1).await;
        let asked = asking(60_000);
        begun(&named, 1).await;
        let start = Instant::now();
        match kill {
            true => named.kill().await.unwrap(),
            false => named.stop(Duration::from_millis(300)).await.unwrap(),
        }
        asked.await.unwrap().unwrap_err();
        let status = cluster.until("ended", dead).await;
        println!("  ended {} after {:?}", if kill { "by force" } else { "after its grace" }, start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(most));
        let ActorState::Dead { cause } = &actor(&status, "s").state else { panic!() };
        let how = if kill { "stopped: killed by request" } else { "stopped: by request" };
        let by = format!("{how}, asked for by process {}", std::process::id());
        assert!(cause.to_string().starts_with(&by), "{cause}");
    }
    cluster.end().await;
}

/// A message that may be handled twice is sent again, as often as the spec says; calls under way have a limit.
pub(crate) async fn calls_of_a_spec() {
    let cluster = TestCluster::start(&[0]).await;
    let limits = ActorSpec { max_task_retries: 1, max_pending_calls: Some(2), ..sufferer("s") };
    let named: Named<Sufferer> = cluster.cluster.spawn(limits).await.unwrap();
    let mut status = cluster.all_ready(1).await;
    let asking = |ms| {
        let named = named.clone();
        tokio::spawn(async move { named.ask_again(Slow(ms)).await })
    };
    let asked = [asking(2000), asking(2000)];
    // Another handle has places of its own.
    begun(&cluster.cluster.named("s"), 2).await;
    let full = named.ask(Begun()).await.unwrap_err();
    let NamedError::Ask(AskError::Refused(refused)) = full else { panic!("{full}") };
    assert_eq!(refused.reason, Refusal::TooManyPending(2));
    // So do callers in JSON, together: each of their calls has a handle of its own.
    let in_json = [(); 2].map(|()| {
        let cluster = cluster.cluster.clone();
        tokio::spawn(async move { cluster.ask_json("s", "slow", json!(2000)).await })
    });
    begun(&cluster.cluster.named("s"), 4).await;
    let full = cluster.cluster.ask_json("s", "slow", json!(0)).await.unwrap_err();
    let NamedError::Ask(AskError::Refused(refused)) = full else { panic!("{full}") };
    assert_eq!(refused.reason, Refusal::TooManyPending(2));
    assert_eq!((refused.message.message.as_str(), &*refused.message.value), ("slow", &json!(0)));
    signal(actor(&status, "s").pid.unwrap(), Signal::KILL);
    for asked in asked {
        assert!(asked.await.unwrap().unwrap() <= 2, "the next incarnation answers");
    }
    for asked in in_json {
        asked.await.unwrap().unwrap_err();
    }
    cluster.cluster.ask_json("s", "slow", json!(0)).await.expect("there is room again");
    status = cluster.all_ready(1).await;
    assert_eq!(actor(&status, "s").restarts, 1);
    // One that kills every incarnation is not sent for ever.
    let asked = asking(60_000);
    // The two of before came to this incarnation again.
    for slow in [3, 1] {
        begun(&named, slow).await;
        signal(actor(&status, "s").pid.unwrap(), Signal::KILL);
        status = next_life(&cluster, &status, "s").await;
    }
    let error = asked.await.unwrap().unwrap_err();
    assert!(matches!(error, NamedError::Ask(AskError::PeerLost(_))), "{error}");
    cluster.end().await;
}

/// A machine goes on without its agent: the actor that owns a GPU is not given up at once, though there is room
/// elsewhere.
pub(crate) async fn agent_gone_gpu_kept() {
    let mut cluster = TestCluster::start(&[]).await;
    cluster.start_node_with("n0", "gpus=1");
    cluster.start_node_with("n1", "gpus=1");
    cluster.until("both nodes", |status| status.nodes.len() == 2).await;
    cluster.cluster.apply(vec![counter("c")]).await.unwrap();
    let before = cluster.all_ready(1).await;
    let node = actor(&before, "c").node.clone().unwrap();
    cluster.take_node(&node).kill();
    let start = Instant::now();
    // Longer than the head waits for an agent, shorter than a worker does.
    while start.elapsed() < Duration::from_millis(2200) {
        assert_eq!(
            actor(&cluster.cluster.status().await.unwrap(), "c").incarnation,
            actor(&before, "c").incarnation
        );
        cluster.add("c").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.start_node_with(&node, "gpus=1");
    let back = |status: &ClusterStatus| {
        let ready = |node: &heliostat_runtime::cluster::status::NodeStatus| {
            node.state == heliostat_runtime::cluster::status::NodeState::Ready
        };
        status.nodes.iter().all(ready)
    };
    let after = cluster.until("the next agent has it", back).await;
    assert_eq!(actor(&after, "c").incarnation, actor(&before, "c").incarnation);
    cluster.end().await;
}

/// The kernel's word that memory ran out, where this test may make a control group.
pub(crate) async fn out_of_memory() {
    let Some(group) = MemoryGroup::create(160 << 20) else {
        println!("  no control group for memory may be made here: not tested");
        return;
    };
    let cluster = TestCluster::start(&[0]).await;
    let status = cluster.until("the node", |status| status.nodes.len() == 1).await;
    group.take(status.nodes[0].pid);
    let spec = ActorSpec { restart: RestartPolicy::never(), ..sufferer("s") };
    let named: Named<Sufferer> = cluster.cluster.spawn(spec).await.unwrap();
    cluster.all_ready(1).await;
    named.ask(Eat(1000)).await.unwrap_err();
    let dead = |status: &ClusterStatus| matches!(actor(status, "s").state, ActorState::Dead { .. });
    let status = cluster.until("dead", dead).await;
    let ActorState::Dead { cause } = &actor(&status, "s").state else { panic!() };
    println!("  {cause}");
    assert!(matches!(cause, DeathCause::OutOfMemory { .. }), "{cause}");
    cluster.end().await;
    drop(group);
}

/// A control group of either version.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn create(bytes: u64) -> Option<Self> {
        let name = format!("heliostat-test-{}", std::process::id());
        let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let (root, limit) = match own.lines().any(|line| line.contains(":memory:")) {
            true => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            false => ("/sys/fs/cgroup", "memory.max"),
        };
        let group = Self(PathBuf::from(root).join(name));
        std::fs::create_dir(&group.0).ok()?;
        std::fs::write(group.0.join(limit), bytes.to_string()).ok()?;
        // Without this it is slow death by swap.
        let _ = std::fs::write(group.0.join("memory.swap.max"), "0");
        Some(group)
    }

    /// Moves a process there; what it starts from then on is there, too.
    fn take(&self, pid: u32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}
