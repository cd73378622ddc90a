//! Executes what `core` decides: writes records, starts keepers, watches them, wakes those who follow.
//!
//! [`Jobs`] is a handle for any thread. One lock holds the state; whoever changes it writes the record before letting go,
//! so that the disk never shows an earlier state than an answer.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use heliostat_runtime::spec::Device;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::core::{Command, End, ErrorType, Job, JobsState, Limits, ProcessId, Refused, Status};
use super::keeper::{self, Order};
use super::log::{self, Chunk};
use super::package::PackageError;
use super::process::{self, Keeper};
use super::relay::Remote;
use super::request::Submission;
use super::reserve::{self, Pool, Seen};
use super::store::{self, Lock, Store, Upload};

/// How long the actor before this one may take to be gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(20);
/// Lines and characters of a log that the message of a failed job shows, as Ray does.
const TAIL: (usize, usize) = (10, 20_000);
/// How much larger than a package what it unpacks to may be.
const UNPACKED_FACTOR: u64 = 4;

/// How jobs are run.
#[derive(Clone, Debug)]
pub struct JobsConfig {
    /// Where everything is kept.
    pub dir: PathBuf,
    /// Bounds.
    pub limits: Limits,
    /// Program and first arguments of a keeper; the job's directory follows.
    pub keeper: Vec<String>,
    /// Where the head listens: HELIOSTAT_ADDRESS of entrypoints.
    pub head: String,
    /// The program `helio`: HELIOSTAT_PROGRAM of entrypoints.
    pub program: PathBuf,
    /// File of the cluster token: HELIOSTAT_TOKEN_FILE of entrypoints.
    pub token_file: Option<PathBuf>,
    /// File that names certificates: HELIOSTAT_TLS of entrypoints.
    pub tls_file: Option<PathBuf>,
    /// Name of the node that runs jobs.
    pub node: String,
    /// Where REST is served.
    pub url: String,
    /// Bytes of a job's log that are kept.
    pub log_bytes_max: u64,
    /// Largest package.
    pub package_bytes_max: u64,
    /// All packages together.
    pub packages_bytes_max: u64,
    /// Between SIGTERM and SIGKILL.
    pub stop_grace: Duration,
    /// How long a job lives on without a jobs actor.
    pub orphan_grace: Duration,
}

/// Why jobs cannot be run in a directory.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The disk.
    #[error("cannot keep jobs in {dir}: {source}")]
    Io {
        /// The directory.
        dir: String,
        /// What the system says.
        source: io::Error,
    },
    /// Another actor.
    #[error("another process runs the jobs in {0}")]
    Taken(String),
}

/// Why a submission is refused.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// By the rules.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Its package is not there.
    #[error(
        "runtime_env.working_dir: package {0} was not uploaded, or made room for newer ones; upload it again"
    )]
    NoPackage(String),
    /// It cannot be written.
    #[error("the job cannot be kept: {0}")]
    Store(io::Error),
}

/// All jobs of the cluster. Cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    inner: Arc<Inner>,
}

struct Inner {
    config: JobsConfig,
    store: Store,
    state: Mutex<JobsState>,
    keepers: Mutex<HashMap<String, Keeper>>,
    /// Where jobs get what they ask for; none outside of a cluster.
    pool: Option<Arc<Pool>>,
    reservations: Mutex<HashMap<String, Reservation>>,
    /// Counts changes of states.
    changed: watch::Sender<u64>,
    runtime: tokio::runtime::Handle,
    _lock: Lock,
}

/// What is, or was, set aside for a job.
#[derive(Debug)]
struct Reservation {
    /// The job needs it no more.
    released: CancellationToken,
    /// Ends when it was given back.
    task: JoinHandle<()>,
    /// Where, once that is known.
    node: Option<String>,
    devices: Vec<Device>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl Jobs {
    /// Takes the directory, finds what still runs, and starts what waits. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The directory cannot be used, or another actor has it.
    pub(super) async fn open(config: JobsConfig, pool: Option<Pool>) -> Result<Self, OpenError> {
        let dir = config.dir.display().to_string();
        let failed = |source| OpenError::Io { dir: dir.clone(), source };
        let store = Store::open(&config.dir).map_err(failed)?;
        let waiting = async {
            loop {
                match store.lock() {
                    Ok(None) => tokio::time::sleep(Duration::from_millis(20)).await,
                    Ok(Some(lock)) => return Ok(lock),
                    Err(error) => return Err(error),
                }
            }
        };
        let lock = match tokio::time::timeout(LOCK_PATIENCE, waiting).await {
            Ok(lock) => lock.map_err(failed)?,
            Err(_) => return Err(OpenError::Taken(dir)),
        };
        let kept = store.load().map_err(failed)?;
        let state = Mutex::new(JobsState::new(config.limits, kept));
        let inner = Inner {
            config,
            store,
            state,
            keepers: Mutex::default(),
            pool: pool.map(Arc::new),
            reservations: Mutex::default(),
            changed: watch::Sender::new(0),
            runtime: tokio::runtime::Handle::current(),
            _lock: lock,
        };
        let jobs = Self { inner: Arc::new(inner) };
        jobs.recover();
        Ok(jobs)
    }

    /// How jobs are run.
    pub fn config(&self) -> &JobsConfig {
        &self.inner.config
    }

    /// Adopts the keepers of an earlier actor; jobs that it was about to start may have one, too.
    fn recover(&self) {
        let unfinished: Vec<(String, Status, Option<ProcessId>)> = held(&self.inner.state)
            .list()
            .into_iter()
            .filter(|job| !job.status.is_terminal())
            .map(|job| (job.id.clone(), job.status, job.keeper))
            .collect();
        for (id, status, known) in unfinished {
            let dir = self.inner.store.job_dir(&id);
            let keeper = known.or_else(|| keeper::kept(&dir).map(|kept| kept.keeper));
            let adopted = keeper.and_then(|keeper| Keeper::adopt(keeper).ok().flatten());
            match adopted {
                Some(keeper) => {
                    tracing::info!(job = id, pid = keeper.id().pid, "adopted");
                    self.change(|state| state.started(&id, keeper.id()));
                    self.watch(id, keeper);
                }
                // It waits still, or its keeper never came to claim it.
                None if status == Status::Pending && !dir.join(store::CLAIM).exists() => {}
                None => self.settle(&id),
            }
        }
        self.change(JobsState::recovered);
        if let Some(pool) = self.inner.pool.clone() {
            let jobs = self.clone();
            let is_known = move |id: &str| jobs.get(id).is_some_and(|job| !job.status.is_terminal());
            self.inner.runtime.spawn(async move { pool.sweep(is_known).await });
        }
    }

    /// Takes a job and returns its id.
    ///
    /// # Errors
    /// It is refused, or cannot be written.
    pub fn submit(&self, id: Option<String>, submission: Submission) -> Result<String, SubmitError> {
        if let Some(package) =
            submission.package.as_deref().filter(|name| !self.inner.store.has_package(name))
        {
            return Err(SubmitError::NoPackage(package.to_owned()));
        }
        let id = id.unwrap_or_else(new_id);
        let mut state = held(&self.inner.state);
        let commands = state.submit(&id, submission, now())?;
        let job = state.get(&id).cloned();
        if let Some(Err(error)) = job.map(|job| self.inner.store.save(&job)) {
            state.withdraw(&id);
            return Err(SubmitError::Store(error));
        }
        self.perform(&mut state, commands.into_iter().skip(1));
        Ok(id)
    }

    /// One job.
    pub fn get(&self, id: &str) -> Option<Job> {
        held(&self.inner.state).get(id).cloned()
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<Job> {
        held(&self.inner.state).list().into_iter().cloned().collect()
    }

    /// Process id of a job's shell, while it is known.
    pub fn driver_pid(&self, id: &str) -> Option<u32> {
        keeper::kept(&self.inner.store.job_dir(id))?.driver.map(|driver| driver.pid)
    }

    /// Asks for the end of a job; false where it has ended.
    ///
    /// # Errors
    /// There is no such job.
    pub fn stop(&self, id: &str) -> Result<bool, Refused> {
        let mut state = held(&self.inner.state);
        let (stopped, commands) = state.stop(id, now())?;
        self.perform(&mut state, commands);
        Ok(stopped)
    }

    /// Forgets an ended job.
    ///
    /// # Errors
    /// There is no such job, or it has not ended.
    pub fn delete(&self, id: &str) -> Result<(), Refused> {
        let mut state = held(&self.inner.state);
        let commands = state.delete(id)?;
        self.perform(&mut state, commands);
        Ok(())
    }

    /// A part of a job's log.
    ///
    /// # Errors
    /// The disk.
    pub fn read_log(&self, id: &str, offset: u64, max: usize) -> io::Result<Chunk> {
        log::read(&self.log_dir(id), offset, max)
    }

    /// All that is kept of a job's log.
    ///
    /// # Errors
    /// The disk.
    pub fn whole_log(&self, id: &str) -> io::Result<Chunk> {
        log::read_all(&self.log_dir(id))
    }

    fn log_dir(&self, id: &str) -> PathBuf {
        self.inner.store.job_dir(id).join(store::LOG)
    }

    /// Tells of every change of a state.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// Whether a package was uploaded.
    pub fn has_package(&self, name: &str) -> bool {
        self.inner.store.has_package(name)
    }

    /// Begins to take a package.
    ///
    /// # Errors
    /// The disk.
    pub fn receive(&self, name: &str) -> io::Result<Upload> {
        self.inner.store.receive(name, self.inner.config.package_bytes_max)
    }

    /// Keeps an uploaded package; the oldest make room.
    ///
    /// # Errors
    /// It is not what its name promises, or the disk fails.
    pub fn keep(&self, upload: Upload) -> Result<(), PackageError> {
        let mut needed: Vec<String> = held(&self.inner.state)
            .list()
            .into_iter()
            .filter(|job| job.status == Status::Pending)
            .filter_map(|job| job.submission.package.clone())
            .collect();
        needed.push(upload.name().to_owned());
        upload.finish()?;
        let room = self.inner.store.make_room(self.inner.config.packages_bytes_max, &needed);
        room.map_err(|source| PackageError::Io { path: "packages".into(), source })
    }

    fn change(&self, event: impl FnOnce(&mut JobsState) -> Vec<Command>) {
        let mut state = held(&self.inner.state);
        let commands = event(&mut state);
        self.perform(&mut state, commands);
    }

    /// Under the lock: files are small, everything long is a task.
    fn perform(&self, state: &mut JobsState, commands: impl IntoIterator<Item = Command>) {
        for command in commands {
            match command {
                Command::Save(id) => {
                    if let Some(Err(error)) = state.get(&id).map(|job| self.inner.store.save(job)) {
                        tracing::error!(job = id, %error, "a job's record cannot be written");
                    }
                }
                Command::Reserve(id) => {
                    if let Some(submission) = state.get(&id).map(|job| job.submission.clone()) {
                        self.reserve(id, submission);
                    }
                }
                Command::Release(id) => {
                    if let Some(reservation) = held(&self.inner.reservations).get(&id) {
                        reservation.released.cancel();
                    }
                }
                Command::Start(id) => {
                    if let Some(submission) = state.get(&id).map(|job| job.submission.clone()) {
                        self.inner.runtime.spawn(self.clone().start(id, submission));
                    }
                }
                Command::Stop(id) => {
                    if let Some(keeper) = held(&self.inner.keepers).get(&id) {
                        keeper.terminate();
                    }
                }
                Command::Forget(id) => {
                    held(&self.inner.reservations).retain(|of, it| *of != id || !it.task.is_finished());
                    if let Err(error) = self.inner.store.forget(&id) {
                        tracing::warn!(job = id, %error, "a job's files cannot be removed");
                    }
                }
            }
        }
        self.inner.changed.send_modify(|count| *count += 1);
    }

    /// Has it set aside from now on; what an earlier job of that id had is given back before.
    fn reserve(&self, id: String, submission: Submission) {
        let mut reservations = held(&self.inner.reservations);
        let before = reservations.remove(&id).map(|before| {
            before.released.cancel();
            before.task
        });
        let (jobs, job, released) = (self.clone(), id.clone(), CancellationToken::new());
        let until = released.clone();
        let task = self.inner.runtime.spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            match jobs.inner.pool.clone() {
                Some(pool) => pool.hold(&job, &submission, until, |seen| jobs.seen(&job, seen)).await,
                None => jobs.seen(&job, Seen::Refused("no cluster is there to set it aside".to_owned())),
            }
        });
        reservations.insert(id, Reservation { released, task, node: None, devices: Vec::new() });
    }

    fn seen(&self, id: &str, seen: Seen) {
        self.change(|state| match seen {
            Seen::Reserved { node, devices } => {
                if let Some(reservation) = held(&self.inner.reservations).get_mut(id) {
                    (reservation.node, reservation.devices) = (Some(node), devices);
                }
                state.reserved(id)
            }
            Seen::Waits(why) => {
                state.waits(id, &why);
                Vec::new()
            }
            Seen::Lost(why) => state.unreserved(id, why),
            Seen::Refused(why) => state.refused(id, why, now()),
        });
    }

    async fn start(self, id: String, submission: Submission) {
        let (jobs, job) = (self.clone(), id.clone());
        let started = tokio::task::spawn_blocking(move || jobs.prepare(&job, &submission)).await;
        let failed = match started {
            Ok(Ok(keeper)) => {
                // Known before the state says so: a stop must find it.
                held(&self.inner.keepers).insert(id.clone(), keeper.clone());
                self.change(|state| state.started(&id, keeper.id()));
                return self.watch(id, keeper);
            }
            Ok(Err(failed)) => failed,
            Err(panic) => (ErrorType::JobSupervisorActorStartFailure, panic.to_string()),
        };
        self.inner.store.remove_work_dir(&id);
        self.change(|state| state.not_started(&id, failed.0, failed.1, now()));
    }

    /// Makes the working directory, unless the job runs elsewhere, and starts the keeper.
    fn prepare(&self, id: &str, submission: &Submission) -> Result<Keeper, (ErrorType, String)> {
        let config = &self.inner.config;
        let not_started = |why: String| {
            (ErrorType::JobSupervisorActorStartFailure, format!("the job cannot be started: {why}"))
        };
        let no_directory =
            |why: String| (ErrorType::RuntimeEnvSetupFailure, format!("runtime_env.working_dir: {why}"));
        let unpacked_max = config.package_bytes_max.saturating_mul(UNPACKED_FACTOR);
        let (node, devices) = {
            let reservations = held(&self.inner.reservations);
            let reserved = reservations.get(id);
            reserved.map_or((None, Vec::new()), |reserved| (reserved.node.clone(), reserved.devices.clone()))
        };
        let remote = match node.filter(|node| *node != config.node) {
            Some(node) => {
                let package = submission.package.as_deref().map(|name| self.inner.store.package(name));
                let package = package.transpose().map_err(|why| no_directory(why.to_string()))?;
                Some(self.remote(id, node, package, unpacked_max))
            }
            None => {
                let work = self.inner.store.make_work_dir(id, submission.package.as_deref(), unpacked_max);
                work.map_err(|why| no_directory(why.to_string()))?;
                None
            }
        };
        let dir = self.inner.store.job_dir(id);
        let order = Order {
            gpus: devices.iter().filter_map(Device::gpu).collect(),
            devices: devices.iter().map(|device| device.index).collect(),
            id: id.to_owned(),
            entrypoint: submission.entrypoint.clone(),
            env: self.environment(id, submission, remote.is_none()),
            log_bytes_max: config.log_bytes_max,
            stop_grace: config.stop_grace,
            lock: self.inner.store.lock_path(),
            orphan_grace: config.orphan_grace,
            remote,
            passing: false,
        };
        let start = || {
            store::write_json(&dir.join(store::ORDER), &order)?;
            Keeper::start(&config.keeper, &dir)
        };
        start().map_err(|why| not_started(why.to_string()))
    }

    fn remote(
        &self,
        id: &str,
        node: String,
        package: Option<(PathBuf, String)>,
        unpacked_max: u64,
    ) -> Remote {
        let JobsConfig { head, token_file, tls_file, .. } = self.inner.config.clone();
        Remote { node, group: reserve::name(id), head, token_file, tls_file, package, unpacked_max }
    }

    /// What a job's environment has beside that of its node. What is a matter of the node is added there.
    fn environment(&self, id: &str, submission: &Submission, is_here: bool) -> BTreeMap<String, String> {
        let config = &self.inner.config;
        let mut env = submission.env_vars.clone();
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let here = [("HELIOSTAT_PROGRAM", path(&config.program)), ("HELIOSTAT_ADDRESS", config.head.clone())];
        let files = [("HELIOSTAT_TOKEN_FILE", &config.token_file), ("HELIOSTAT_TLS", &config.tls_file)];
        let files = files.into_iter().filter_map(|(name, file)| Some((name, path(file.as_ref()?))));
        let anywhere = [
            ("HELIOSTAT_JOB_ID", id.to_owned()),
            ("HELIOSTAT_DASHBOARD", config.url.clone()),
            // Where Ray's own job client looks for a cluster.
            ("RAY_API_SERVER_ADDRESS", config.url.clone()),
            ("PYTHONUNBUFFERED", "1".to_owned()),
        ];
        for (name, value) in here.into_iter().filter(|_| is_here).chain(files).chain(anywhere) {
            env.entry(name.to_owned()).or_insert(value);
        }
        env
    }

    /// The node that a job runs on, or ran on.
    pub fn node_of(&self, id: &str) -> String {
        let reserved = held(&self.inner.reservations).get(id).and_then(|reserved| reserved.node.clone());
        let ordered = || {
            let order: Order = store::read_json(&self.inner.store.job_dir(id).join(store::ORDER)).ok()?;
            Some(order.remote?.node)
        };
        reserved.or_else(ordered).unwrap_or_else(|| self.inner.config.node.clone())
    }

    fn watch(&self, id: String, keeper: Keeper) {
        held(&self.inner.keepers).insert(id.clone(), keeper.clone());
        let jobs = self.clone();
        self.inner.runtime.spawn(async move {
            keeper.ended().await;
            let dir = jobs.inner.store.job_dir(&id);
            // The one that was started may have found the job claimed by another.
            let other = keeper::kept(&dir).map(|kept| kept.keeper).filter(|other| *other != keeper.id());
            match other.and_then(|other| Keeper::adopt(other).ok().flatten()) {
                Some(other) => jobs.watch(id, other),
                None => {
                    held(&jobs.inner.keepers).remove(&id);
                    jobs.settle(&id);
                }
            }
        });
    }

    /// No keeper runs any more: takes down how the job ended.
    fn settle(&self, id: &str) {
        let dir = self.inner.store.job_dir(id);
        let end = keeper::ended(&dir).unwrap_or(End::Lost);
        if let (End::Lost, Some(driver)) = (&end, keeper::kept(&dir).and_then(|kept| kept.driver)) {
            process::kill_group(driver);
        }
        let tail = log::tail(&self.log_dir(id), TAIL.0, TAIL.1);
        self.inner.store.remove_work_dir(id);
        self.change(|state| state.ended(id, end, &tail, now()));
    }
}

/// An id as Ray's clients know them.
fn new_id() -> String {
    const ALPHABET: &[u8] = b"abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789";
    let random = (0..16).map(|_| ALPHABET[rand::random_range(0..ALPHABET.len())] as char);
    format!("raysubmit_{}", random.collect::<String>())
}
