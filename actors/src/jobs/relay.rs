//! The keeper's part in a job on another node: a driver that starts the job's [`JobRunner`] there, writes down what that says,
//! and passes on a stop.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use heliostat_runtime::cluster::{Cluster, Credentials, Driver};
use heliostat_runtime::handle::Handle;
use heliostat_runtime::spec::{ActorSpec, Placement, RestartPolicy};
use heliostat_runtime::system::Secret;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::Signal;

use super::core::End;
use super::keeper::{Order, orphaned, write};
use super::log::LogWriter;
use super::runner::{FollowJob, JobRunner, RunnerArgs, Said, StopJob};
use super::store;

/// How long the other node may take to start it.
const START_MAX: Duration = Duration::from_secs(120);
/// How long the end of a job waits until the head knows of it.
const GOODBYE_MAX: Duration = Duration::from_secs(2);
/// How much longer than the job's own grace its end may take to be heard of.
const END_MAX: Duration = Duration::from_secs(15);

/// Where a job runs that does not run here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Remote {
    /// The node.
    pub node: String,
    /// The placement group of which it has the only bundle.
    pub group: String,
    /// Where heads are.
    pub head: String,
    /// The cluster token's file on this machine.
    pub token_file: Option<PathBuf>,
    /// The file that names certificates on this machine.
    pub tls_file: Option<PathBuf>,
    /// The package of its working directory, and its SHA-256.
    pub package: Option<(PathBuf, String)>,
    /// Bytes that it may unpack to.
    pub unpacked_max: u64,
}

/// Has the job run there, to its end.
pub(super) async fn run(order: &Order, remote: &Remote, log: &mut LogWriter, terminate: &mut Signal) -> End {
    let starting = tokio::time::timeout(START_MAX, start(order, remote));
    let started = tokio::select! {
        started = starting => started.unwrap_or_else(|_| Err(format!("no answer within {} s", START_MAX.as_secs()))),
        _ = terminate.recv() => return End::Terminated,
        () = orphaned(order) => return End::Orphaned,
    };
    let (driver, runner) = match started {
        Ok(started) => started,
        Err(why) => {
            return End::NotStarted {
                why: format!("the entrypoint could not be started on node {}: {why}", remote.node),
            };
        }
    };
    let end = follow(order, remote, &runner, log, terminate).await;
    // The actor is the driver's and would end with it, but be listed as dead. The job's end does not wait for a head that is away.
    let goodbye = async {
        let _ = driver.cluster().remove_actor(&remote.group).await;
        let _ = driver.end().await;
    };
    let _ = tokio::time::timeout(GOODBYE_MAX, goodbye).await;
    end
}

async fn start(order: &Order, remote: &Remote) -> Result<(Driver, Handle<JobRunner>), String> {
    let token = remote.token_file.as_deref().map(std::fs::read_to_string).transpose();
    let token =
        token.map_err(|why| format!("the cluster token: {why}"))?.map(|text| Secret::new(text.trim()));
    let tls = remote.tls_file.as_deref().map(store::read_json).transpose();
    let tls = tls.map_err(|why| format!("the file of certificates: {why}"))?;
    let cluster = Cluster::connect_with(&remote.head, Credentials { token, tls }).await;
    let driver = cluster.map_err(text)?.driver(&remote.group).await.map_err(text)?;
    let cluster = driver.cluster();
    let package = match &remote.package {
        Some((path, sha256)) => {
            let mut file = File::open(path).map_err(text)?;
            let len = usize::try_from(file.metadata().map_err(text)?.len()).map_err(text)?;
            let mut memory = cluster.objects().create(len).await.map_err(text)?;
            file.read_exact(&mut memory).map_err(text)?;
            Some((memory.finish().await.map_err(text)?, sha256.clone()))
        }
        None => None,
    };
    let order = serde_json::to_string(&Order { remote: None, ..order.clone() }).map_err(text)?;
    let args = RunnerArgs { order, package, unpacked_max: remote.unpacked_max };
    let spec = ActorSpec {
        placement: Placement::Bundle { group: remote.group.clone(), index: Some(0) },
        restart: RestartPolicy::never(),
        ..ActorSpec::of::<JobRunner>(&remote.group, &args).map_err(text)?
    };
    // One of an earlier job of that id, whose keeper was killed.
    let _ = cluster.remove_actor(&remote.group).await;
    cluster.spawn::<JobRunner>(spec).await.map_err(text)?;
    cluster.ready(&remote.group, START_MAX).await.map_err(text)?;
    let runner = cluster.handle::<JobRunner>(&remote.group).await.map_err(text)?;
    Ok((driver, runner))
}

async fn follow(
    order: &Order,
    remote: &Remote,
    runner: &Handle<JobRunner>,
    log: &mut LogWriter,
    terminate: &mut Signal,
) -> End {
    let mut said = runner.stream(FollowJob);
    // Why it is being ended, and until when it may take.
    let mut ending: Option<(End, tokio::time::Instant)> = None;
    let lost = |why: String| End::NodeLost { node: remote.node.clone(), why };
    loop {
        let until = ending.as_ref().map(|(_, until)| *until);
        let late = async {
            match until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let why = tokio::select! {
            next = said.next() => match next {
                Some(Ok(Said::Output(bytes))) => {
                    write(log, &bytes);
                    continue;
                }
                Some(Ok(Said::Skipped(bytes))) => {
                    write(log, format!("[{bytes} bytes are left out: they came faster than they could be read]\n").as_bytes());
                    continue;
                }
                Some(Ok(Said::Ended(end))) => return ending.map_or(end, |(why, _)| why),
                Some(Err(error)) => return lost(error.to_string()),
                None => return lost("it said nothing of its end".to_owned()),
            },
            _ = terminate.recv(), if ending.is_none() => End::Terminated,
            () = orphaned(order), if ending.is_none() => End::Orphaned,
            () = late => return lost("it does not say that it has ended".to_owned()),
        };
        if let Err(refused) = runner.tell(StopJob) {
            return lost(refused.reason.to_string());
        }
        ending = Some((why, tokio::time::Instant::now() + order.stop_grace + END_MAX));
    }
}

fn text(why: impl std::fmt::Display) -> String {
    why.to_string()
}
