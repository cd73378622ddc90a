//! The jobs actor: opens the directory and serves REST.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use actix::{Actor, Context, Handler, Message};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn, WireMessage};
use serde_json::Value as Json;
use tokio::task::JoinHandle;

use super::core::Limits;
use super::http;
use super::reserve::Pool;
use super::service::{Jobs, JobsConfig};
use crate::dashboard::{self, Dashboard, DashboardArgs, DashboardServer};
use crate::http::HttpDoor;
use crate::ingress::server::ServeError;
use crate::monitor::{self, Watcher};
use crate::{serve, state};

/// Arguments of the jobs actor.
#[derive(Clone, Debug, Encode, Decode)]
pub struct JobsArgs {
    /// Where records, logs and packages are kept.
    pub dir: PathBuf,
    /// Where REST is served.
    pub bind: SocketAddr,
    /// Who may come in.
    pub door: HttpDoor,
    /// File that holds the cluster token, for drivers that jobs run.
    pub token_file: Option<PathBuf>,
    /// File that names certificates for them.
    pub tls_file: Option<PathBuf>,
    /// Jobs that run at once.
    pub running_max: u32,
    /// Jobs that wait.
    pub queued_max: u32,
    /// Ended jobs that are remembered.
    pub kept_max: u32,
    /// Bytes of a job's log that are kept.
    pub log_bytes_max: u64,
    /// Largest package.
    pub package_bytes_max: u64,
    /// All packages together.
    pub packages_bytes_max: u64,
    /// Between SIGTERM and SIGKILL.
    pub stop_grace: Duration,
    /// How long a job lives on without this actor.
    pub orphan_grace: Duration,
}

impl JobsArgs {
    fn limits(&self) -> Limits {
        Limits {
            running_max: self.running_max as usize,
            queued_max: self.queued_max as usize,
            kept_max: self.kept_max as usize,
        }
    }
}

/// The actor.
pub struct JobsActor {
    jobs: Jobs,
    /// Looks at the cluster for as long as the actor lives.
    watching: Option<JoinHandle<()>>,
    /// Serves for as long as the actor lives.
    _server: DashboardServer,
}

impl Actor for JobsActor {
    type Context = Context<Self>;

    /// Its jobs go on: the next one adopts them. They end with the cluster, by whoever ends that.
    fn stopped(&mut self, _: &mut Self::Context) {
        self.watching.iter().for_each(JoinHandle::abort);
    }
}

impl RemoteActor for JobsActor {
    const TYPE: &'static str = "jobs";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<ListJobs>();
    }
}

/// All jobs as the JSON of Ray's Jobs API, oldest first.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "String")]
pub struct ListJobs;

impl WireMessage for ListJobs {
    const NAME: &'static str = "jobs.list";
}

impl Handler<ListJobs> for JobsActor {
    type Result = String;

    fn handle(&mut self, _: ListJobs, _: &mut Self::Context) -> String {
        let jobs = self.jobs.list();
        Json::Array(jobs.iter().map(|job| http::to_json(&self.jobs, job)).collect()).to_string()
    }
}

impl Spawn for JobsActor {
    type Args = JobsArgs;

    async fn create(args: JobsArgs, cx: ActorCx) -> Result<Self, CreateError> {
        let head = cx.cluster().map(|cluster| cluster.head().to_owned()).unwrap_or_default();
        let node = node_of(&cx)
            .await
            .unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
        // The binary that this worker runs, even where its file was replaced since.
        let keeper = vec!["/proc/self/exe".to_owned(), "entrypoint".to_owned()];
        let config = JobsConfig {
            dir: args.dir.clone(),
            limits: args.limits(),
            keeper,
            head,
            node,
            url: dashboard::url(args.bind, args.door.tls.is_some()),
            program: std::env::current_exe().map_err(CreateError::failed)?,
            token_file: args.token_file.clone(),
            tls_file: args.tls_file.clone(),
            log_bytes_max: args.log_bytes_max,
            package_bytes_max: args.package_bytes_max,
            packages_bytes_max: args.packages_bytes_max,
            stop_grace: args.stop_grace,
            orphan_grace: args.orphan_grace,
        };
        // The port first: a busy one must not cost the jobs that an earlier actor left anything.
        let http = DashboardArgs { bind: args.bind, door: args.door };
        let url = dashboard::url(http.bind, http.door.tls.is_some());
        let listener = http.listen().map_err(failed)?;
        let pool = cx.cluster().map(|cluster| Pool::new(cluster.clone()));
        let jobs = Jobs::open(config, pool).await.map_err(|why| CreateError::Failed(why.to_string()))?;
        let watcher = Watcher::default();
        let token = args.token_file.as_deref().map(orders_token);
        let dashboard = Dashboard::new(http)
            .with(http::routes(jobs.clone()))
            .with(state::http::routes(cx.cluster().cloned(), jobs.clone()))
            .with(state::call::routes(cx.cluster().cloned()))
            .with(monitor::http::routes(
                cx.cluster().cloned(),
                watcher.clone(),
                token.as_deref().map(str::trim),
            ))
            .with(serve::http::routes(cx.cluster().cloned()));
        let server = dashboard.start(listener).map_err(failed)?;
        let watching = cx.cluster().cloned().map(|cluster| watcher.start(cluster));
        tracing::info!("the dashboard is at {url}, jobs are taken there");
        Ok(Self { jobs, watching, _server: server })
    }
}

/// The node that this actor is on, as the head knows it.
async fn node_of(cx: &ActorCx) -> Option<String> {
    let status = cx.cluster()?.status().await.ok()?;
    status.actor(cx.name())?.node.clone()
}

/// What whoever changes the cluster over the dashboard must know. Where the token is not on this machine, nobody can.
fn orders_token(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_else(|why| {
        tracing::warn!("the dashboard's page cannot rebalance or drain: {}: {why}", file.display());
        format!("{:032x}", rand::random::<u128>())
    })
}

fn failed(error: ServeError) -> CreateError {
    CreateError::Failed(match error {
        ServeError::OpenWithoutKey(bind) => {
            format!(
                "the dashboard would listen on {bind}, which others can reach: set `api_key_file` in [dashboard]"
            )
        }
        ServeError::Bind { bind, cause } if cause.kind() == std::io::ErrorKind::AddrInUse => format!(
            "the dashboard cannot listen on {bind}: something listens there; change `port` in [dashboard]"
        ),
        ServeError::Bind { .. } | ServeError::Tls(_) => format!("the dashboard: {error}"),
    })
}
