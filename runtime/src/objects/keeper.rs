//! Does for a process what its counts want done: speaks with owners, senders of refs, and the store of its node.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler};
use tokio::sync::{Mutex, Semaphore};

use super::counts::{Command, Told, Whereabouts, Word};
use super::link::{self, Ends, StoreLink};
use super::messages::{
    BorrowObject, Fate, FateOf, KeepForActor, ReadObject, RefArrived, ReturnObject, ToProcess, ToStore,
};
use super::pool::Known;
use super::store::StoreActor;
use super::table::Table;
use super::{CHUNK_BYTES, ObjectAddr, ObjectError, ObjectId};
use crate::actor::{Accepts, RemoteActor};
use crate::backoff::Backoff;
use crate::handle::{ActorId, Handle, ProcessId};
use crate::system::{PeerEvent, SpawnOptions, System};

/// Owners that are told at once.
const TELLING_MAX: usize = 64;
/// Limit of a question to a store or a process.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the first word of a store is waited for.
const GREETING_MAX: Duration = Duration::from_secs(1);
/// How long a process may be out of reach, without anybody who knows, before it counts as ended.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Starts it.
pub(super) fn start(table: &Arc<Table>, system: &System) {
    let served = table.clone();
    if let Err(error) =
        system.spawn(SpawnOptions::well_known(ActorId::OBJECTS), move || OwnerActor { table: served })
    {
        tracing::error!(%error, "the objects of this process cannot be reached");
    }
    let (keeping, staying) = (table.clone(), table.clone());
    system.runtime().spawn(async move {
        tokio::select! {
            () = keep(&keeping) => {}
            () = stay_connected(&staying) => {}
            () = keeping.stop.cancelled() => {}
        }
        if let Some(link) = keeping.link.send_replace(None) {
            link.end();
        }
    });
}

async fn keep(table: &Arc<Table>) {
    let Some(mut peers) = table.system().map(|system| system.peer_events()) else { return };
    let telling = Arc::new(Semaphore::new(TELLING_MAX));
    let looking = Arc::new(Mutex::new(HashSet::new()));
    loop {
        let (commands, expiry) = {
            let mut counts = table.counts();
            counts.expire(table.now());
            (counts.take_commands(), counts.next_expiry())
        };
        let Some(system) = table.system() else { return };
        for command in commands {
            execute(table, &system, &telling, command).await;
        }
        let expired = async {
            match expiry {
                Some(at) => tokio::time::sleep(at.saturating_sub(table.now())).await,
                None => std::future::pending().await,
            }
        };
        drop(system);
        tokio::select! {
            () = table.news.notified() => {}
            () = expired => {}
            event = peers.next() => match event {
                Some(PeerEvent::Lost { process, .. }) => look_after(table, &looking, process).await,
                Some(PeerEvent::Missed(_)) => {
                    let others = table.counts().others();
                    for process in others {
                        look_after(table, &looking, process).await;
                    }
                }
                Some(PeerEvent::Connected { .. }) => {}
                None => return,
            },
        }
    }
}

async fn execute(table: &Arc<Table>, system: &System, telling: &Arc<Semaphore>, command: Command) {
    match command {
        Command::Tell(addr, word) => {
            let (table, system, telling) = (table.clone(), system.clone(), telling.clone());
            system.runtime().clone().spawn(async move {
                let _place = telling.acquire().await;
                tell(&table, &system, &addr, word).await;
                table.news.notify_one();
            });
        }
        Command::Arrived(object, ticket) if ticket.sender == table.endpoint() => {
            table.counts().passed(object, ticket.number);
            table.news.notify_one();
        }
        Command::Arrived(object, ticket) => {
            let sender: Handle<OwnerActor> = system.handle_at(&ticket.sender, ActorId::OBJECTS);
            // If it does not arrive, the sender waits out the time.
            if let Err(refused) = sender.tell(RefArrived { object, number: ticket.number }) {
                tracing::debug!(%object, reason = %refused.reason, "the sender of a ref was not told");
            }
        }
        Command::Free(addr) if addr.in_store => {
            table.pool().free(addr.id.number);
            to_store(table, ToStore::Free { object: addr.id }).await;
        }
        Command::Free(addr) => drop(table.small().remove(&addr.id.number)),
        Command::Forget(object) => to_store(table, ToStore::Forget { object }).await,
    }
}

async fn to_store(table: &Table, message: ToStore) {
    let link = table.link.borrow().clone();
    if let Some(link) = link {
        link.tell(message).await;
    }
}

/// Where the store of this node listens, if there is one. Others ask there whether this process lives.
async fn greeted(table: &Table) -> Option<String> {
    if table.store.borrow().is_none() {
        return None;
    }
    let mut link = table.link.subscribe();
    let there = tokio::time::timeout(GREETING_MAX, link.wait_for(Option::is_some)).await.ok()?.ok()?;
    there.as_ref().map(|link| link.endpoint.clone())
}

/// Tells an owner until it has heard, or is known to have ended.
async fn tell(table: &Arc<Table>, system: &System, addr: &ObjectAddr, word: Word) {
    let owner: Handle<OwnerActor> = system.handle_at(&addr.owner, ActorId::OBJECTS);
    let object = addr.id;
    let store = greeted(table).await;
    let mut backoff = Backoff::reconnect();
    loop {
        let by = table.process;
        let told = match word {
            Word::Borrow => owner.ask(BorrowObject { object, by, store: store.clone() }).await.ok(),
            Word::Return => owner.ask(ReturnObject { object, by }).await.ok().map(|()| true),
        };
        if let Some(there) = told {
            table.counts().told(object, if there { Told::Heard } else { Told::Gone });
            return;
        }
        let at = Whereabouts { store: addr.store.clone(), endpoint: Some(addr.owner.clone()) };
        match fate(system, object.owner, &at).await {
            Fate::Lives => backoff.pause().await,
            Fate::Ended(_) | Fate::Unknown => {
                table.counts().told(object, Told::Gone);
                return;
            }
        }
        if table.stop.is_cancelled() {
            return;
        }
    }
}

/// The connection with a process broke: finds out whether it has ended, if that matters.
async fn look_after(table: &Arc<Table>, looking: &Arc<Mutex<HashSet<ProcessId>>>, process: ProcessId) {
    let Some(at) = table.counts().matters(process) else { return };
    let Some(system) = table.system() else { return };
    if !looking.lock().await.insert(process) {
        return;
    }
    let (table, looking) = (table.clone(), looking.clone());
    system.runtime().clone().spawn(async move {
        let (mut backoff, mut seen) = (Backoff::reconnect(), false);
        loop {
            match fate(&system, process, &at).await {
                Fate::Lives if std::mem::replace(&mut seen, true) => {}
                Fate::Lives => table.counts().back(process),
                Fate::Ended(_) | Fate::Unknown => table.counts().ended(process),
            }
            table.news.notify_one();
            // What is about to end still lives for those who ask too early.
            let over = system.is_connected(process) || table.counts().matters(process).is_none();
            if over || table.stop.is_cancelled() {
                break;
            }
            backoff.pause().await;
        }
        looking.lock().await.remove(&process);
    });
}

/// Whether a process lives: its node's store knows at once. Where that does not, it may answer itself; `Unknown` when
/// neither could be asked for `PATIENCE`.
pub(super) async fn fate(system: &System, process: ProcessId, at: &Whereabouts) -> Fate {
    let (started, mut backoff) = (Instant::now(), Backoff::reconnect());
    let asked = FateOf { process };
    loop {
        if let Some(store) = &at.store {
            let store: Handle<StoreActor> = system.handle_at(store, ActorId::OBJECTS);
            match store.with_deadline(ANSWER_TIMEOUT).ask(asked.clone()).await {
                Ok(Fate::Unknown) | Err(_) => {}
                Ok(known) => return known,
            }
        }
        if let Some(endpoint) = &at.endpoint {
            let itself: Handle<OwnerActor> = system.handle_at(endpoint, ActorId::OBJECTS);
            if let Ok(Fate::Lives) = itself.with_deadline(ANSWER_TIMEOUT).ask(asked.clone()).await {
                return Fate::Lives;
            }
        }
        if system.is_connected(process) {
            return Fate::Lives;
        }
        if started.elapsed() >= PATIENCE {
            return Fate::Unknown;
        }
        backoff.pause().await;
    }
}

/// Keeps in touch with the store of the node, or with the one that takes its place.
async fn stay_connected(table: &Arc<Table>) {
    let mut store = table.store.subscribe();
    let Ok(path) = store.wait_for(Option::is_some).await.map(|path| path.clone()) else { return };
    let path: PathBuf = path.unwrap_or_default();
    let mut backoff = Backoff::reconnect();
    loop {
        match StoreLink::connect(&path, table.process).await {
            Ok((link, ends)) => {
                backoff.reset();
                let (over, ()) = tokio::join!(speak(table, &link, ends), introduce(table, &link));
                tracing::warn!(store = %path.display(), ?over, "the object store of this node is away");
                table.link.send_replace(None);
                link.end();
                table.pool().store_lost();
            }
            Err(error) => tracing::debug!(store = %path.display(), %error, "no object store yet"),
        }
        backoff.pause().await;
    }
}

/// Reads and writes until the connection is over.
async fn speak(table: &Table, link: &Arc<StoreLink>, ends: Ends) -> std::io::Result<()> {
    let Ends { stream, mut inbox, outgoing } = ends;
    let read = async {
        while let Some((message, fd)) = inbox.next(&stream, link::carries).await? {
            told(table, link, message, fd).await;
        }
        Ok(())
    };
    tokio::select! {
        over = link::write(&stream, outgoing) => over,
        over = read => over,
    }
}

/// Tells a new store what there is, and only then has it used.
async fn introduce(table: &Table, link: &Arc<StoreLink>) {
    let known = table.pool().known();
    for known in known {
        let id = |number| ObjectId { owner: table.process, number };
        match known {
            Known::Memory(number, bytes, segment) => {
                if let Err(error) = link.publish(id(number), bytes, segment, || {}).await {
                    tracing::warn!(object = %id(number), %error, "the new object store does not take an object");
                }
            }
            Known::Spilled(number, bytes) => link.tell(ToStore::Spilled { object: id(number), bytes }).await,
        }
    }
    table.link.send_replace(Some(link.clone()));
    // What was freed meanwhile.
    let freed = table.pool().freeing();
    for number in freed {
        link.tell(ToStore::Free { object: ObjectId { owner: table.process, number } }).await;
    }
}

/// The store says something.
async fn told(table: &Table, link: &Arc<StoreLink>, message: ToProcess, fd: Option<OwnedFd>) {
    match message {
        ToProcess::Welcome { .. } => {}
        ToProcess::Done { call, result } => link.answered(call, result.map(|()| None)),
        ToProcess::Opened { call, result } => link.answered(call, result.map(|()| fd)),
        ToProcess::Ready { call } => link.answered(call, Ok(fd)),
        ToProcess::Recycled { object } => {
            let bytes = table.pool().recycled(object.number);
            if bytes > 0 {
                link.tell(ToStore::Unreserve { bytes }).await;
            }
        }
        ToProcess::Trim => {
            let bytes = table.pool().trim();
            link.tell(ToStore::Unreserve { bytes }).await;
            link.tell(ToStore::Trimmed).await;
        }
        ToProcess::Evict { object } => {
            let done = table.pool().evict(object.number);
            link.tell(ToStore::Evicted { object, done }).await;
        }
    }
}

/// Speaks for the objects of this process to others.
pub(super) struct OwnerActor {
    table: Arc<Table>,
}

impl Actor for OwnerActor {
    type Context = Context<Self>;
}

impl RemoteActor for OwnerActor {
    const TYPE: &'static str = "owner";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<BorrowObject>()
            .accept::<ReturnObject>()
            .accept::<RefArrived>()
            .accept::<KeepForActor>()
            .accept::<ReadObject>()
            .accept::<FateOf>();
    }
}

impl Handler<BorrowObject> for OwnerActor {
    type Result = bool;

    fn handle(&mut self, said: BorrowObject, _: &mut Context<Self>) -> bool {
        self.table.counts().borrow(said.object, said.by, said.store) == Told::Heard
    }
}

impl Handler<ReturnObject> for OwnerActor {
    type Result = ();

    fn handle(&mut self, said: ReturnObject, _: &mut Context<Self>) {
        self.table.counts().returned(said.object, said.by);
        self.table.news.notify_one();
    }
}

impl Handler<RefArrived> for OwnerActor {
    type Result = ();

    fn handle(&mut self, said: RefArrived, _: &mut Context<Self>) {
        self.table.counts().passed(said.object, said.number);
        self.table.news.notify_one();
    }
}

impl Handler<KeepForActor> for OwnerActor {
    type Result = ();

    fn handle(&mut self, said: KeepForActor, _: &mut Context<Self>) {
        self.table.keep_for(&said.life, &said.objects);
        self.table.news.notify_one();
    }
}

impl Handler<ReadObject> for OwnerActor {
    type Result = Result<Vec<u8>, ObjectError>;

    fn handle(&mut self, wanted: ReadObject, _: &mut Context<Self>) -> Self::Result {
        let ReadObject { object, offset, max } = wanted;
        let small =
            self.table.small().get(&object.number).filter(|_| object.owner == self.table.process).cloned();
        let bytes = small.ok_or(ObjectError::Freed { object })?;
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let to = from.saturating_add(max.min(CHUNK_BYTES) as usize).min(bytes.len());
        Ok(bytes[from..to].to_vec())
    }
}

impl Handler<FateOf> for OwnerActor {
    type Result = actix::MessageResult<FateOf>;

    fn handle(&mut self, asked: FateOf, _: &mut Context<Self>) -> Self::Result {
        actix::MessageResult(match asked.process == self.table.process {
            true => Fate::Lives,
            false => Fate::Ended("another process has its place".to_owned()),
        })
    }
}
