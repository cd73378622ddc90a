//! A pool of workers that run functions: each call goes to a worker that is free, and again to another if that one dies.
//!
//! Free places are tokens in a channel: whoever calls takes one and gives it back, so a worker never has more than it
//! may, nobody polls, and callers wait in the order in which they came. The place of a worker that died comes back when
//! its next incarnation is ready.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::{Mutex, Semaphore, mpsc};

use super::actor::{CallFunction, FUNCTIONS, FunctionActor};
use super::{FunctionError, RemoteFunction};
use crate::cluster::status::ActorState;
use crate::cluster::{Cluster, ClusterError, Named, NamedError, SpawnFailed};
use crate::handle::AskError;
use crate::objects::{encode_args, scope};
use crate::spec::{ActorSpec, Placement, Resources, RestartPolicy};
use crate::wire::{from_bytes, to_bytes};

/// How long a worker may take to be back before its place is given up.
const BACK_PATIENCE: Duration = Duration::from_secs(120);

/// How a pool is made.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Worker processes. Default: 2.
    pub workers: u32,
    /// Calls that one worker runs at once. Default: 1.
    pub calls_per_worker: u32,
    /// Calls that may wait for a free worker; one more waits outside, at its caller. Default: 10,000.
    pub waiting_max: usize,
    /// How often a call is made again whose worker died. A function that must not run twice takes 0. Default: 3, as Ray.
    pub retries_max: u32,
    /// What each worker needs.
    pub resources: Resources,
    /// Where workers may go.
    pub placement: Placement,
    /// How often a worker is started again.
    pub restart: RestartPolicy,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            workers: 2,
            calls_per_worker: 1,
            waiting_max: 10_000,
            retries_max: 3,
            resources: Resources::default(),
            placement: Placement::default(),
            restart: RestartPolicy::default(),
        }
    }
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// It would have no place for a call.
    #[error("a pool needs at least one worker, one call per worker and one call that waits")]
    Empty,
    /// A worker did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnFailed),
    /// The head does not answer.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The function, or the program that has it.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// Its workers died.
    #[error("function {name:?}: its worker was lost {times} times, at last: {why}")]
    Lost {
        /// Its name.
        name: &'static str,
        /// How often it was tried.
        times: u32,
        /// What happened to the last.
        why: String,
    },
    /// The message could not be sent or handled.
    #[error("function {name:?}: {why}")]
    Failed {
        /// Its name.
        name: &'static str,
        /// Why.
        why: String,
    },
    /// No worker is left.
    #[error("no worker of the pool is left: {0}")]
    NoWorkers(String),
}

/// A pool. Cheap to clone. Its workers end by `close`; those of a pool that was only dropped are ended in the
/// background.
#[derive(Clone)]
pub struct FunctionPool {
    shared: Arc<Shared>,
}

struct Shared {
    cluster: Cluster,
    workers: Vec<Named<FunctionActor>>,
    names: Vec<String>,
    retries_max: u32,
    waiting: Semaphore,
    places: Places,
}

/// The free places, as tokens that name a worker.
struct Places {
    back: mpsc::UnboundedSender<Place>,
    free: Mutex<mpsc::UnboundedReceiver<Place>>,
    /// Places whose worker is not given up.
    left: AtomicUsize,
}

/// What becomes of a place, or of all.
enum Place {
    Free(usize),
    /// No worker is left.
    Over(String),
}

/// A place that is taken; free again when this is dropped, unless its worker died.
struct Taken<'a> {
    worker: usize,
    places: &'a Places,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let _ = self.places.back.send(Place::Free(self.worker));
    }
}

impl Places {
    fn new(workers: usize, each: u32) -> Self {
        // As many tokens as there are places: that is its bound.
        let (back, free) = mpsc::unbounded_channel();
        let all: Vec<usize> = (0..each).flat_map(|_| 0..workers).collect();
        let left = AtomicUsize::new(all.len());
        for worker in all {
            let _ = back.send(Place::Free(worker));
        }
        Self { back, free: Mutex::new(free), left }
    }

    async fn take(&self) -> Result<Taken<'_>, CallError> {
        let next = self.free.lock().await.recv().await;
        match next {
            Some(Place::Free(worker)) => Ok(Taken { worker, places: self }),
            Some(Place::Over(why)) => {
                // The next one that waits is to hear it, too.
                let _ = self.back.send(Place::Over(why.clone()));
                Err(CallError::NoWorkers(why))
            }
            None => Err(CallError::NoWorkers("the pool was closed".to_owned())),
        }
    }

    fn give_up(&self, why: String) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            let _ = self.back.send(Place::Over(why));
        }
    }
}

impl FunctionPool {
    /// Starts the workers, from the package of this process, and waits until they are ready.
    pub async fn start(cluster: &Cluster, options: PoolOptions) -> Result<Self, PoolError> {
        if options.workers == 0 || options.calls_per_worker == 0 || options.waiting_max == 0 {
            return Err(PoolError::Empty);
        }
        let tag = format!("{:08x}", rand::random::<u32>());
        let names: Vec<String> = (0..options.workers).map(|n| format!("functions-{tag}-{n}")).collect();
        let args = to_bytes(&options.calls_per_worker).map_err(|e| ClusterError::Refused(e.to_string()))?;
        let template = ActorSpec {
            resources: options.resources,
            placement: options.placement,
            restart: options.restart,
            ..ActorSpec::new("", FUNCTIONS, args)
        };
        let spec = |name: &String| ActorSpec { name: name.clone(), ..template.clone() };
        let shared = Shared {
            workers: names.iter().map(|name| cluster.named(name)).collect(),
            places: Places::new(names.len(), options.calls_per_worker),
            retries_max: options.retries_max,
            waiting: Semaphore::new(options.waiting_max.min(Semaphore::MAX_PERMITS)),
            cluster: cluster.clone(),
            names,
        };
        let pool = Self { shared: Arc::new(shared) };
        let specs = pool.shared.names.iter().map(spec).collect();
        cluster.apply(specs).await?;
        for name in &pool.shared.names {
            cluster.ready(name, BACK_PATIENCE).await?;
        }
        Ok(pool)
    }

    /// Calls a function on a worker that is free. Waits for one where none is. Objects to which `args` have refs are kept until
    /// it has answered for good (OB-5). Dropping the future forgets the result; a
    /// function that runs goes on to its end.
    pub async fn call<F: RemoteFunction>(&self, args: F::Args) -> Result<F::Output, CallError> {
        let failed = |why: String| CallError::Failed { name: F::NAME, why };
        let objects = self.shared.cluster.system().objects();
        // The refs keep their objects for every attempt, and until those in the result are counted.
        let (bytes, _refs) = encode_args(&args).map_err(|error| failed(error.to_string()))?;
        // Never closed.
        let _waiting = self.shared.waiting.acquire().await.map_err(|error| failed(error.to_string()))?;
        let mut times = 0;
        loop {
            let place = self.shared.places.take().await?;
            let worker = place.worker;
            let message = CallFunction { name: F::NAME.to_owned(), args: bytes.clone() };
            let error = match self.shared.workers[worker].ask(message).await {
                Ok(Ok(output)) => {
                    let output = scope::received(objects, || from_bytes(&output));
                    return output.map_err(|error| failed(error.to_string()));
                }
                Ok(Err(error)) => return Err(error.into()),
                Err(error) => error,
            };
            let Some(ran) = is_lost(&error) else { return Err(failed(error.to_string())) };
            self.await_worker(place);
            times += u32::from(ran);
            if times > self.shared.retries_max {
                return Err(CallError::Lost { name: F::NAME, times, why: error.to_string() });
            }
        }
    }

    /// Calls a function for each of the arguments, as many at once as there is room, and returns the results in the order
    /// of the arguments; the first error ends it.
    pub async fn map<F: RemoteFunction>(
        &self,
        args: impl IntoIterator<Item = F::Args>,
    ) -> Result<Vec<F::Output>, CallError> {
        let ahead = self.shared.places.left.load(Ordering::Relaxed).max(1) * 2;
        let mut results = stream::iter(args).map(|args| self.call::<F>(args)).buffered(ahead);
        let mut outputs = Vec::new();
        while let Some(result) = results.next().await {
            outputs.push(result?);
        }
        Ok(outputs)
    }

    /// Names of the worker actors.
    pub fn workers(&self) -> &[String] {
        &self.shared.names
    }

    /// Ends the workers.
    pub async fn close(self) -> Result<(), ClusterError> {
        for name in &self.shared.names {
            self.shared.cluster.remove_actor(name).await?;
        }
        Ok(())
    }

    /// Gives a place back when its worker takes messages again.
    fn await_worker(&self, place: Taken<'_>) {
        let worker = place.worker;
        std::mem::forget(place);
        // The pool may end meanwhile: then nobody waits for the place.
        let (weak, cluster) = (Arc::downgrade(&self.shared), self.shared.cluster.clone());
        let name = self.shared.names[worker].clone();
        tokio::spawn(async move {
            cluster.forget(&name);
            let back = returned(&cluster, &name).await;
            let Some(shared) = weak.upgrade() else { return };
            match back {
                Ok(()) => drop(shared.places.back.send(Place::Free(worker))),
                Err(why) => shared.places.give_up(format!("{name}: {why}")),
            }
        });
    }
}

/// Waits until a worker that was lost answers, or is not started again.
async fn returned(cluster: &Cluster, name: &str) -> Result<(), String> {
    let waiting = async {
        loop {
            // Its death may not be known yet: ready is who answers.
            match cluster.ready(name, BACK_PATIENCE).await {
                Ok(()) => {}
                Err(error @ (SpawnFailed::Dead { .. } | SpawnFailed::Late { .. })) => {
                    return Err(error.to_string());
                }
                Err(SpawnFailed::Cluster(error)) => return Err(error.to_string()),
            }
            let probe = CallFunction { name: String::new(), args: Vec::new() };
            cluster.forget(name);
            let asked = cluster.named::<FunctionActor>(name).ask(probe).await;
            if asked.is_ok() {
                return Ok(());
            }
            let known = cluster.status().await.map_err(|error| error.to_string())?;
            let changed = |status: &crate::cluster::status::ClusterStatus| status.version != known.version;
            if known.actor(name).is_some_and(|actor| actor.state == ActorState::Ready) {
                cluster.wait_until(BACK_PATIENCE, changed).await;
            }
        }
    };
    match tokio::time::timeout(BACK_PATIENCE, waiting).await {
        Ok(result) => result,
        Err(_) => Err(format!("it did not come back within {} s", BACK_PATIENCE.as_secs())),
    }
}

/// Whether the worker of a call is gone: `Some(true)` if the function may have run.
fn is_lost(error: &NamedError<CallFunction>) -> Option<bool> {
    match error {
        // Between two incarnations nobody is there.
        NamedError::Cluster(ClusterError::NotReady(_)) => Some(false),
        NamedError::Cluster(_) => None,
        NamedError::Ask(AskError::Refused(refused)) => {
            crate::cluster::named::is_gone(&refused.reason).then_some(false)
        }
        NamedError::Ask(
            AskError::PeerLost(_) | AskError::Stopped | AskError::Panicked(_) | AskError::NoReply,
        ) => Some(true),
        NamedError::Ask(
            AskError::Deadline | AskError::Codec(_) | AskError::Handler(_) | AskError::Cancelled,
        ) => None,
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let (cluster, names) = (self.cluster.clone(), std::mem::take(&mut self.names));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                for name in names {
                    // Those that `close` has ended are unknown.
                    let _ = cluster.remove_actor(&name).await;
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_place_is_taken_once_and_comes_back() {
        let places = Places::new(2, 1);
        let (a, b) = (places.take().await.unwrap(), places.take().await.unwrap());
        assert_eq!((a.worker, b.worker), (0, 1));
        let third = tokio::time::timeout(Duration::from_millis(20), places.take()).await;
        assert!(third.is_err(), "all places are taken");
        drop(b);
        assert_eq!(places.take().await.unwrap().worker, 1);
    }

    #[tokio::test]
    async fn whoever_waits_hears_that_no_worker_is_left() {
        let places = Places::new(2, 1);
        for _ in 0..2 {
            std::mem::forget(places.take().await.unwrap());
            places.give_up("killed".to_owned());
        }
        for _ in 0..3 {
            assert!(matches!(places.take().await, Err(CallError::NoWorkers(why)) if why == "killed"));
        }
    }
}
