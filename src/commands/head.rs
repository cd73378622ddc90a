//! `helio head`: registry and supervisor of the cluster. It deploys what its cluster.toml says, and goes on with what an
//! earlier head has kept.

use super::up::family::end_with_supervisor;
use crate::args;
use crate::cluster::Access;
use crate::config::{Config, HeadAt, State, Token};
use crate::deploy;
use crate::failure::{FAILED, Failure};
use crate::rundir::RunDir;
use anyhow::{Context, Result};
use heliostat_runtime::cluster::ClusterError;
use heliostat_runtime::head::{self, Ending, HeadConfig, PackagesConfig, Patience, Role};
use heliostat_runtime::spec::ActorSpec;
use heliostat_runtime::state::StateConfig;
use heliostat_runtime::system::Secret;
use std::os::unix::process::CommandExt;
use std::time::Duration;

/// Told to the process that takes the place of one that led.
const STOOD_DOWN: &str = "--stood-down";
/// Attempts to apply the deployment to the head of this very process.
const APPLY_ATTEMPTS: u32 = 5;

/// Runs until SIGTERM, SIGINT or a shutdown of the cluster ends it.
pub(crate) async fn run(args: &args::Head) -> Result<()> {
    if let Some(supervisor) = args.supervised.supervised_by {
        end_with_supervisor(supervisor)?;
    }
    let given = args.run_dir.as_deref().map(RunDir::new).transpose()?;
    let config = match args.supervised.supervised_by {
        Some(_) => Config::load_counted(args.file.as_deref())?,
        None => {
            let run_dir = given.as_ref().map(|run| run.path().to_path_buf());
            let at = HeadAt { bind: args.bind, advertise: args.advertise.clone(), run_dir };
            Config::load_for_head(args.file.as_deref(), at)?
        }
    };
    let run = given.map_or_else(|| RunDir::new(&config.run_dir), Ok)?;
    run.create()?;
    let specs = deploy::plan(&config)?.kept;
    let head = head::run(head_config(&config, args.stood_down)).await?;
    run.set_address(&Access::of(&config).address)?;
    run.set_token(config.token.as_ref())?;
    run.set_tls(config.security.as_ref())?;
    run.set_dashboard(config.dashboard_url().as_deref(), config.dashboard_key.as_ref())?;
    let mut role = head.role();
    let deployed = async {
        match role.wait_for(|role| matches!(role, Role::Leads { .. } | Role::Over(_))).await.as_deref() {
            Ok(Role::Leads { succeeds: false, .. }) => apply(&config, specs).await?,
            Ok(Role::Leads { .. }) => tracing::info!("took over; goes on with what is deployed"),
            Ok(_) | Err(_) => {}
        }
        // From here on only its end is awaited.
        std::future::pending::<Result<()>>().await
    };
    let ending = tokio::select! {
        ending = head.serve() => ending?,
        failed = deployed => return failed,
    };
    match ending {
        Ending::Signal | Ending::Closed => Ok(()),
        Ending::Failed(why) => Err(Failure::error(FAILED, why)),
        Ending::Deposed(why) => {
            tracing::warn!(why, "leads no more; starts over and stands by");
            Err(start_over())
        }
    }
}

/// Becomes a fresh process, which knows nothing of what this one believed. Returns only if that fails.
fn start_over() -> anyhow::Error {
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    if !args.iter().any(|arg| arg == STOOD_DOWN) {
        args.push(STOOD_DOWN.into());
    }
    let error = std::process::Command::new("/proc/self/exe").arg0("helio").args(args).exec();
    anyhow::Error::new(error).context("cannot start over")
}

fn head_config(config: &Config, stood_down: bool) -> HeadConfig {
    let s = &config.supervision;
    let state = match &config.state {
        State::Embedded { dir } => StateConfig::Embedded { dir: dir.clone() },
        State::Etcd { endpoints, prefix, tls } => {
            StateConfig::Etcd { endpoints: endpoints.clone(), prefix: prefix.clone(), tls: tls.clone() }
        }
    };
    let mut head = HeadConfig::new(config.bind, state);
    head.advertise.clone_from(&config.advertise);
    head.tls.clone_from(&config.security);
    head.token = config.token.as_ref().map(|Token(text)| Secret::new(text));
    head.peers.clone_from(&config.peers);
    head.lease = Duration::from_secs(u64::from(config.lease_s));
    head.await_store = stood_down;
    head.packages = Some(PackagesConfig {
        bytes_max: config.packages.max_bytes.0,
        package_bytes_max: config.packages.max_package_bytes.0,
        ..PackagesConfig::new(config.run_dir.join("packages"))
    });
    head.patience = Patience {
        // Silence is noticed at three missed reports, and never later than the node would be given up.
        heartbeat_timeout: Duration::from_millis(u64::from(s.heartbeat_ms) * 3),
        agent_grace: Duration::from_secs_f64(s.agent_grace_s),
        node_grace: Duration::from_secs_f64(s.node_grace_s),
        gpu_grace: Duration::from_secs_f64(s.worker_grace_s),
        ..Patience::default()
    };
    head
}

/// Has the head keep exactly these actors. The same specs again, after a restart of the head, change nothing.
async fn apply(config: &Config, specs: Vec<ActorSpec>) -> Result<()> {
    let cluster = Access::of(config).connect().await?;
    for attempt in 1.. {
        match cluster.apply_exactly(specs.clone()).await {
            Ok(applied) => {
                tracing::info!(?applied, "deployment applied");
                return Ok(());
            }
            Err(ClusterError::Spec(invalid)) => return Err(Failure::error(FAILED, invalid.to_string())),
            Err(e) if attempt == APPLY_ATTEMPTS => return Err(e).context("cannot deploy"),
            Err(e) => tracing::warn!("cannot deploy yet: {e}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}
