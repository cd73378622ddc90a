//! A job on another node than the jobs actor's: an actor in the job's bundle that has a keeper run it there, and says what
//! it writes and how it ends.
//!
//! A job runs at most once, and an actor may be created again where its bundle was moved to. So the actor only makes ready;
//! the job is begun by whoever follows it, and that is asked of one incarnation, once. The keeper is the same as that of other jobs. It ends its job soon after this actor is gone, however that went, so that
//! nothing is left on the node.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use actix::{Actor, Context, Handler, Message, MessageResult};
use bincode::{Decode, Encode};
use futures_util::stream;
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, Items, RemoteActor, Spawn, StreamMessage};
use heliostat_runtime::objects::ObjectRef;
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use super::core::End;
use super::keeper::{self, Order};
use super::package;
use super::process::Keeper;
use super::{log, store};
use crate::messages::wire;

wire! {
    StopJob => "job.stop",
}

/// How long the job lives on without this actor.
const ALONE: Duration = Duration::from_millis(500);
/// How often a log is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes of a log in one message.
const PART: usize = 256 << 10;

/// What is to be run.
#[derive(Clone, Debug, Encode, Decode)]
pub struct RunnerArgs {
    /// The keeper's [`Order`] as JSON; its lock and its grace are this node's affair.
    pub order: String,
    /// The working directory's package and its SHA-256; an empty directory without one.
    pub package: Option<(ObjectRef, String)>,
    /// Bytes that it may unpack to.
    pub unpacked_max: u64,
}

/// The actor.
pub struct JobRunner {
    dir: TempDir,
    order: Order,
    running: Option<Running>,
}

/// A job that was begun.
struct Running {
    keeper: Keeper,
    /// While this is held the keeper goes on.
    _lock: File,
}

impl Actor for JobRunner {
    type Context = Context<Self>;

    fn stopped(&mut self, _: &mut Self::Context) {
        self.stop();
    }
}

impl RemoteActor for JobRunner {
    const TYPE: &'static str = "job";

    fn messages(m: &mut Accepts<Self>) {
        m.accept_stream::<FollowJob>().accept::<StopJob>();
    }
}

impl Spawn for JobRunner {
    type Args = RunnerArgs;

    async fn create(args: RunnerArgs, cx: ActorCx) -> Result<Self, CreateError> {
        let cluster = cx.cluster().ok_or_else(|| CreateError::Failed("jobs run in a cluster".to_owned()))?;
        let package = match &args.package {
            Some((object, sha256)) => {
                let bytes = cluster.objects().get(object).await.map_err(CreateError::failed)?;
                Some((bytes, sha256.as_str()))
            }
            None => None,
        };
        let mut order: Order = serde_json::from_str(&args.order).map_err(CreateError::failed)?;
        let dir = TempDir::with_prefix("heliostat-job-").map_err(CreateError::failed)?;
        let work = dir.path().join(store::WORK);
        std::fs::create_dir(&work).map_err(CreateError::failed)?;
        if let Some((bytes, sha256)) = package {
            let failed =
                |why: package::PackageError| CreateError::Failed(format!("runtime_env.working_dir: {why}"));
            package::check(&bytes, sha256).map_err(failed)?;
            package::unpack_from(io::Cursor::new(&*bytes), &work, args.unpacked_max).map_err(failed)?;
        }
        order.lock = dir.path().join("lock");
        order.orphan_grace = ALONE;
        order.passing = true;
        // Those of the jobs actor's machine, which this one may not have.
        for name in ["HELIOSTAT_TOKEN_FILE", "HELIOSTAT_TLS"] {
            if order.env.get(name).is_some_and(|path| !Path::new(path).exists()) {
                order.env.remove(name);
            }
        }
        let program = std::env::current_exe().map_err(CreateError::failed)?;
        for (name, value) in
            [("HELIOSTAT_PROGRAM", program.to_string_lossy()), ("HELIOSTAT_ADDRESS", cluster.head().into())]
        {
            order.env.entry(name.to_owned()).or_insert_with(|| value.into_owned());
        }
        Ok(Self { dir, order, running: None })
    }
}

impl JobRunner {
    /// Starts the keeper, unless that was done.
    fn begin(&mut self) -> io::Result<Keeper> {
        if let Some(running) = &self.running {
            return Ok(running.keeper.clone());
        }
        let lock = File::options().create_new(true).write(true).mode(0o600).open(&self.order.lock)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        store::write_json(&self.dir.path().join(store::ORDER), &self.order)?;
        // The binary that this worker runs, even where its file was replaced since.
        let keeper = Keeper::start(&["/proc/self/exe".to_owned(), "entrypoint".to_owned()], self.dir.path())?;
        self.running = Some(Running { keeper: keeper.clone(), _lock: lock });
        Ok(keeper)
    }

    fn stop(&self) {
        self.running.iter().for_each(|running| running.keeper.terminate());
    }
}

/// Begins the job, and tells what it writes, from the start, and at last how it ended.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct FollowJob;

/// A word of a job.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Said {
    /// It wrote this.
    Output(Vec<u8>),
    /// It wrote more than is kept, faster than it could be read: so many bytes are not here.
    Skipped(u64),
    /// It is over.
    Ended(End),
}

impl Message for FollowJob {
    type Result = Items<Said>;
}

impl StreamMessage for FollowJob {
    type Item = Said;
    const NAME: &'static str = "job.follow";
}

/// Where a log was read to, and whether nothing more is written.
struct Reading {
    offset: u64,
    skipped: u64,
    over: bool,
}

impl Handler<FollowJob> for JobRunner {
    type Result = Items<Said>;

    fn handle(&mut self, _: FollowJob, _: &mut Self::Context) -> Self::Result {
        let (dir, keeper) = match self.begin() {
            Ok(keeper) => (self.dir.path().to_path_buf(), keeper),
            Err(why) => {
                let why = format!("the entrypoint could not be started: {why}");
                return Items::new(stream::iter([Said::Ended(End::NotStarted { why })]));
            }
        };
        let reading = Some(Reading { offset: 0, skipped: 0, over: false });
        Items::new(stream::unfold(reading, move |reading| {
            let (dir, keeper) = (dir.clone(), keeper.clone());
            async move {
                let mut reading = reading?;
                loop {
                    if reading.skipped > 0 {
                        let skipped = std::mem::take(&mut reading.skipped);
                        return Some((Said::Skipped(skipped), Some(reading)));
                    }
                    let chunk = log::read(&dir.join(store::LOG), reading.offset, PART).unwrap_or_default();
                    if !chunk.bytes.is_empty() {
                        reading.skipped = chunk.start - reading.offset;
                        reading.offset = chunk.start;
                        if reading.skipped == 0 {
                            reading.offset += chunk.bytes.len() as u64;
                            return Some((Said::Output(chunk.bytes), Some(reading)));
                        }
                        continue;
                    }
                    if reading.over {
                        return Some((Said::Ended(keeper::ended(&dir).unwrap_or(End::Lost)), None));
                    }
                    tokio::select! {
                        () = keeper.ended() => reading.over = true,
                        () = tokio::time::sleep(LOOK) => {}
                    }
                }
            }
        }))
    }
}

/// Asks for the end of the job: SIGTERM to all its processes, then SIGKILL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct StopJob;

impl Handler<StopJob> for JobRunner {
    type Result = MessageResult<StopJob>;

    fn handle(&mut self, _: StopJob, _: &mut Self::Context) -> Self::Result {
        self.stop();
        MessageResult(())
    }
}
