//! Objects between real processes: on a node, between nodes, and when somebody is killed.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, ResponseFuture};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn, WireMessage};
use heliostat_runtime::cluster::Named;
use heliostat_runtime::objects::{ObjectError, ObjectPlace, ObjectRef, Objects, StoreStatus};
use heliostat_runtime::spec::{ActorSpec, Placement};
use rustix::process::Signal;

use crate::harness::{TestCluster, signal};

pub(crate) const MIB: usize = 1 << 20;

/// Makes, holds and reads objects.
pub(crate) struct Vault {
    objects: Objects,
    held: HashMap<String, ObjectRef>,
}

macro_rules! messages {
    ($($name:ident($($field:ty),*) = $wire:literal -> $result:ty;)*) => {
        $(
            #[derive(Encode, Decode, Clone)]
            pub(crate) struct $name($(pub(crate) $field),*);
            impl actix::Message for $name {
                type Result = $result;
            }
            impl WireMessage for $name {
                const NAME: &'static str = $wire;
            }
        )*
    };
}

messages! {
    Make(u64, u8) = "make" -> Result<ObjectRef, ObjectError>;
    Hold(String, ObjectRef) = "hold" -> ();
    Show(String) = "show" -> Option<ObjectRef>;
    Release(String) = "release" -> ();
    Read(ObjectRef) = "read" -> Result<Seen, ObjectError>;
    Wrap(Vec<ObjectRef>) = "wrap" -> Result<ObjectRef, ObjectError>;
    Unwrap(ObjectRef) = "unwrap" -> Result<(), ObjectError>;
}

/// What an object looks like: its size, its first and last byte, and whether the memory is the store's own.
#[derive(Encode, Decode, Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    bytes: u64,
    pub(crate) first: u8,
    last: u8,
    /// Device and inode of the memory that is read; those of its owner, if nothing was copied.
    memory: Option<(String, u64)>,
}

/// The file behind the memory at that address.
fn memory_at(address: usize) -> Option<(String, u64)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (from, to) = fields[0].split_once('-')?;
        let range = usize::from_str_radix(from, 16).ok()?..usize::from_str_radix(to, 16).ok()?;
        let inode = fields.get(4)?.parse().ok()?;
        (range.contains(&address) && inode != 0).then(|| (fields[3].to_owned(), inode))
    })
}

async fn seen(objects: Objects, object: ObjectRef) -> Result<Seen, ObjectError> {
    let bytes = objects.get(&object).await?;
    let (first, last) = (bytes[0], bytes[bytes.len() - 1]);
    Ok(Seen { bytes: bytes.len() as u64, first, last, memory: memory_at(bytes.as_ptr() as usize) })
}

impl Actor for Vault {
    type Context = Context<Self>;
}

impl RemoteActor for Vault {
    const TYPE: &'static str = "vault";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Make>().accept::<Hold>().accept::<Show>().accept::<Release>().accept::<Read>();
        m.accept::<Wrap>().accept::<Unwrap>();
    }
}

impl Spawn for Vault {
    type Args = ();

    async fn create((): (), cx: ActorCx) -> Result<Self, CreateError> {
        Ok(Self { objects: cx.cluster().unwrap().objects(), held: HashMap::new() })
    }
}

impl Handler<Make> for Vault {
    type Result = ResponseFuture<Result<ObjectRef, ObjectError>>;

    fn handle(&mut self, Make(bytes, fill): Make, _: &mut Context<Self>) -> Self::Result {
        let objects = self.objects.clone();
        Box::pin(async move { objects.put(&vec![fill; bytes as usize]).await })
    }
}

impl Handler<Hold> for Vault {
    type Result = ();

    fn handle(&mut self, Hold(name, object): Hold, _: &mut Context<Self>) {
        self.held.insert(name, object);
    }
}

impl Handler<Show> for Vault {
    type Result = Option<ObjectRef>;

    fn handle(&mut self, Show(name): Show, _: &mut Context<Self>) -> Self::Result {
        self.held.get(&name).cloned()
    }
}

impl Handler<Release> for Vault {
    type Result = ();

    fn handle(&mut self, Release(name): Release, _: &mut Context<Self>) {
        self.held.remove(&name);
    }
}

impl Handler<Read> for Vault {
    type Result = ResponseFuture<Result<Seen, ObjectError>>;

    fn handle(&mut self, Read(object): Read, _: &mut Context<Self>) -> Self::Result {
        Box::pin(seen(self.objects.clone(), object))
    }
}

/// Puts refs into an object.
impl Handler<Wrap> for Vault {
    type Result = ResponseFuture<Result<ObjectRef, ObjectError>>;

    fn handle(&mut self, Wrap(refs): Wrap, _: &mut Context<Self>) -> Self::Result {
        let objects = self.objects.clone();
        Box::pin(async move { objects.put_value(&refs).await })
    }
}

/// Holds the first ref that is in an object, as `inner`, and lets go of the object.
impl Handler<Unwrap> for Vault {
    type Result = actix::ResponseActFuture<Self, Result<(), ObjectError>>;

    fn handle(&mut self, Unwrap(object): Unwrap, _: &mut Context<Self>) -> Self::Result {
        let objects = self.objects.clone();
        let reading = async move { objects.get_value::<Vec<ObjectRef>>(&object).await };
        let read = actix::fut::wrap_future::<_, Self>(reading);
        Box::pin(actix::fut::ActorFutureExt::map(read, |refs, vault, _| {
            vault.held.insert("inner".into(), refs?.remove(0));
            Ok(())
        }))
    }
}

fn vault(name: &str, node: &str) -> ActorSpec {
    let mut spec = ActorSpec::of::<Vault>(name, &()).unwrap();
    spec.placement = Placement::Node(node.into());
    spec.restart.max_restarts = 0;
    spec
}

/// A cluster with vaults `a` and `b` on the first node, and `far` on the second, if there is one.
pub(crate) async fn vaults(nodes: &[u32]) -> TestCluster {
    let cluster = TestCluster::start(nodes).await;
    let mut specs = vec![vault("a", "n0"), vault("b", "n0")];
    if nodes.len() > 1 {
        specs.push(vault("far", "n1"));
    }
    let actors = specs.len();
    cluster.cluster.apply(specs).await.unwrap();
    cluster.all_ready(actors).await;
    cluster
}

pub(crate) fn named(cluster: &TestCluster, name: &str) -> Named<Vault> {
    cluster.cluster.named(name)
}

pub(crate) async fn make(cluster: &TestCluster, name: &str, bytes: usize, fill: u8) -> ObjectRef {
    named(cluster, name).ask(Make(bytes as u64, fill)).await.unwrap().unwrap()
}

pub(crate) async fn read(cluster: &TestCluster, name: &str, object: &ObjectRef) -> Result<Seen, ObjectError> {
    named(cluster, name).ask(Read(object.clone())).await.unwrap()
}

/// Waits until the stores are as wanted; how long that took.
pub(crate) async fn stores(
    cluster: &TestCluster,
    what: &str,
    wanted: impl Fn(&[StoreStatus]) -> bool,
) -> Duration {
    let start = Instant::now();
    loop {
        let stores = cluster.cluster.object_stores().await.unwrap();
        if wanted(&stores) {
            return start.elapsed();
        }
        if start.elapsed() > Duration::from_secs(15) {
            cluster.print_logs();
            panic!("never: {what}: {stores:#?}");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn no_objects(stores: &[StoreStatus]) -> bool {
    stores.iter().all(|store| store.objects.is_empty())
}

/// Put and get on a node: shared memory, no copies, and nothing is left when the last ref is gone.
pub(crate) async fn objects_on_a_node() {
    let cluster = vaults(&[0]).await;
    let object = make(&cluster, "a", 8 * MIB, 7).await;
    let (here, there) =
        (read(&cluster, "a", &object).await.unwrap(), read(&cluster, "b", &object).await.unwrap());
    assert_eq!((here.bytes, here.first, here.last), (8 * MIB as u64, 7, 7));
    assert!(here.memory.is_some());
    assert_eq!(here, there, "OB-2: both read the same memory");
    // A driver on the machine of a node maps it as well.
    let mine = seen(cluster.cluster.objects(), object.clone()).await.unwrap();
    assert_eq!(mine.memory, here.memory);
    // Small objects travel.
    let small = make(&cluster, "a", 100, 3).await;
    assert_eq!(read(&cluster, "b", &small).await.unwrap().last, 3);
    assert_eq!(cluster.cluster.objects().get(&small).await.unwrap().len(), 100);
    // Refs that others hold keep the object, and come back in answers.
    named(&cluster, "b").ask(Hold("x".into(), object.clone())).await.unwrap();
    drop(object);
    stores(&cluster, "only b holds it", |stores| stores[0].objects.len() == 1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let back = named(&cluster, "b").ask(Show("x".into())).await.unwrap().unwrap();
    assert_eq!(read(&cluster, "a", &back).await.unwrap().first, 7);
    drop(back);
    named(&cluster, "b").ask(Release("x".into())).await.unwrap();
    let took = stores(&cluster, "freed", no_objects).await;
    println!("  freed {took:?} after the last ref");
    // An object keeps those that it has refs to, also of another owner; who reads it holds them for itself.
    let inner = make(&cluster, "a", 2 * MIB, 5).await;
    let outer = named(&cluster, "b").ask(Wrap(vec![inner.clone()])).await.unwrap().unwrap();
    drop(inner);
    tokio::time::sleep(Duration::from_millis(200)).await;
    named(&cluster, "a").ask(Unwrap(outer.clone())).await.unwrap().unwrap();
    named(&cluster, "a").ask(Release("inner".into())).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    cluster.cluster.objects().get_value::<Vec<ObjectRef>>(&outer).await.unwrap();
    let inner = cluster.cluster.objects().get_value::<Vec<ObjectRef>>(&outer).await.unwrap().remove(0);
    drop(outer);
    assert_eq!(read(&cluster, "b", &inner).await.unwrap().first, 5);
    drop(inner);
    let took = stores(&cluster, "freed with what it was in", no_objects).await;
    println!("  freed {took:?} after the last ref to what was in another object");
    cluster.end().await;
}

/// kill -9 of a borrower: what it held is freed. kill -9 of an owner: its objects are lost, by name and at once.
pub(crate) async fn objects_after_deaths() {
    let cluster = vaults(&[0, 0]).await;
    let status = cluster.all_ready(3).await;
    let pid = |name: &str| status.actor(name).unwrap().pid.unwrap();
    let object = make(&cluster, "a", 2 * MIB, 1).await;
    for name in ["b", "far"] {
        named(&cluster, name).ask(Hold("x".into(), object.clone())).await.unwrap();
    }
    drop(object);
    tokio::time::sleep(Duration::from_millis(300)).await;
    signal(pid("b"), Signal::KILL);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let is_there = |stores: &[StoreStatus]| stores.iter().any(|store| store.objects.len() == 1);
    stores(&cluster, "the other borrower keeps it", is_there).await;
    signal(pid("far"), Signal::KILL);
    let took = stores(&cluster, "freed", no_objects).await;
    println!("  freed {took:?} after the last borrower was killed");
    assert!(took < Duration::from_secs(15));

    let (large, small) = (make(&cluster, "a", 2 * MIB, 1).await, make(&cluster, "a", 10, 1).await);
    signal(pid("a"), Signal::KILL);
    let killed = Instant::now();
    for object in [&large, &small] {
        let lost = loop {
            match cluster.cluster.objects().get(object).await {
                Err(lost) => break lost,
                // It may be asked before the process is gone.
                Ok(_) => assert!(killed.elapsed() < Duration::from_secs(15)),
            }
        };
        assert!(matches!(lost, ObjectError::OwnerDied { .. }), "{lost}");
        println!("  {lost}, after {:?}", killed.elapsed());
    }
    assert!(killed.elapsed() < Duration::from_secs(15), "no time-out is waited for");
    stores(&cluster, "nothing is left", no_objects).await;
    cluster.end().await;
}

/// Between nodes: copied once, kept while somebody there has a ref, and quick words pass large ones.
pub(crate) async fn objects_between_nodes() {
    let cluster = vaults(&[0, 0]).await;
    let object = make(&cluster, "a", 64 * MIB + 5, 9).await;
    let start = Instant::now();
    let there = read(&cluster, "far", &object).await.unwrap();
    println!("  64 MiB to another node in {:?}", start.elapsed());
    assert_eq!((there.bytes, there.first, there.last), (64 * MIB as u64 + 5, 9, 9));
    let again = Instant::now();
    named(&cluster, "far").ask(Hold("x".into(), object.clone())).await.unwrap();
    let second = read(&cluster, "far", &object).await.unwrap();
    println!("  again in {:?}", again.elapsed());
    assert_eq!(second.first, 9);
    let copy = |stores: &[StoreStatus]| {
        stores.iter().flat_map(|store| &store.objects).filter(|o| o.state == ObjectPlace::Copy).count()
    };
    stores(&cluster, "one copy", |stores| copy(stores) == 1).await;
    named(&cluster, "far").ask(Release("x".into())).await.unwrap();
    stores(&cluster, "no copy", |stores| copy(stores) == 0).await;
    // While large objects are on their way, small questions to the same processes are answered.
    let many: Vec<ObjectRef> =
        futures_util::future::join_all((0..4).map(|n| make(&cluster, "a", 64 * MIB, n))).await;
    let reading = futures_util::future::join_all(many.iter().map(|object| read(&cluster, "far", object)));
    let took = Mutex::new(Vec::new());
    let asking = async {
        loop {
            let start = Instant::now();
            named(&cluster, "far").ask(Show("nothing".into())).await.unwrap();
            cluster.cluster.status().await.unwrap();
            took.lock().unwrap().push(start.elapsed());
        }
    };
    tokio::select! {
        all = reading => assert!(all.into_iter().all(|seen| seen.is_ok())),
        () = asking => {}
    }
    let took = took.into_inner().unwrap();
    println!("  {} questions during the transfer, the slowest took {:?}", took.len(), took.iter().max());
    assert!(took.len() > 10, "they did not wait for the transfer");
    drop((many, object));
    stores(&cluster, "freed on both nodes", no_objects).await;
    cluster.end().await;
}

/// kill -9 of the node agent: objects and their mappings survive, and the next agent's store has them again.
pub(crate) async fn objects_after_the_agent() {
    let mut cluster = vaults(&[0]).await;
    let object = make(&cluster, "a", 2 * MIB, 5).await;
    let before = read(&cluster, "b", &object).await.unwrap();
    let held = cluster.cluster.objects().get(&object).await.unwrap();
    cluster.take_node("n0").kill();
    assert_eq!(held[MIB], 5, "what is mapped stays");
    cluster.start_node("n0", 0);
    let after = read(&cluster, "b", &object).await.unwrap();
    assert_eq!(after, before, "the same memory");
    let second = make(&cluster, "a", 2 * MIB, 6).await;
    assert_eq!(read(&cluster, "b", &second).await.unwrap().first, 6);
    assert_eq!(held[MIB], 5);
    drop((held, object, second));
    stores(&cluster, "freed", no_objects).await;
    cluster.end().await;
}

/// A file system of that size, where this process may mount one.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(at: &'a Path, bytes: usize) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(at))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

/// A full store spills and brings back; a full disk is an error that says so, and hurts nothing that is there.
pub(crate) async fn objects_on_disk() {
    let spill = tempfile::tempdir().unwrap();
    let dir = spill.path().join("small");
    let small = Small::mount(&dir, 40 * MIB);
    println!(
        "  a disk that is full: {}",
        if small.is_some() { "a small tmpfs" } else { "by configuration only" }
    );
    // What else lies there is nobody's but the user's.
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("mine"), "mine").unwrap();
    let spill_max = if small.is_some() { 1 << 40 } else { 40 * MIB };
    let mut cluster = TestCluster::start(&[]).await;
    let more = [&(40 * MIB).to_string(), &*dir.to_string_lossy(), &spill_max.to_string()];
    cluster.start_node_and("n0", "0", &more);
    cluster.cluster.apply(vec![vault("a", "n0"), vault("b", "n0")]).await.unwrap();
    cluster.all_ready(2).await;
    let mut objects = Vec::new();
    let full = loop {
        match named(&cluster, "a").ask(Make(16 * MIB as u64, objects.len() as u8)).await.unwrap() {
            Ok(object) => objects.push(object),
            Err(error) => break error,
        }
        assert!(objects.len() < 10);
    };
    println!("  after {} objects of 16 MiB: {full}", objects.len());
    assert_eq!(objects.len(), 4, "two in memory, two on disk");
    let ObjectError::StoreFull { disk, .. } = &full else { panic!("{full}") };
    let why = if small.is_some() { "No space left on device" } else { "are on disk" };
    assert!(disk.contains(why), "{disk}");
    for (n, object) in objects.iter().enumerate() {
        for name in ["a", "b"] {
            let start = Instant::now();
            let seen =
                read(&cluster, name, object).await.unwrap_or_else(|error| panic!("{n} in {name}: {error}"));
            println!("  {name} has read object {n} in {:?}", start.elapsed());
            assert_eq!((seen.bytes, seen.first, seen.last), (16 * MIB as u64, n as u8, n as u8));
        }
    }
    objects.truncate(1);
    stores(&cluster, "freed in memory and on disk", |stores| stores[0].objects.len() == 1).await;
    assert_eq!(make(&cluster, "a", 16 * MIB, 77).await.len(), 16 * MIB as u64, "there is room again");
    drop(objects);
    stores(&cluster, "nothing is left", |stores| no_objects(stores) && stores[0].spilled == 0).await;
    let spilled = || std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let own: Vec<_> = spilled().filter(|path| path.is_dir()).collect();
    assert_eq!(own.len(), 1, "{own:?}");
    assert_eq!(std::fs::read_dir(&own[0]).unwrap().count(), 0, "nor on disk");
    cluster.end().await;
    assert!(dir.join("mine").exists(), "a store removes what is its own");
}
