//! `helio head`: registry and supervisor of the cluster. It deploys what its cluster.toml says, and goes on with what an
//! earlier head has kept.

use super::up::family::end_with_supervisor;
use crate::args;
use crate::cluster::{Access, run_dir};
use crate::config::{Config, State, Token};
use crate::deploy;
use crate::failure::{FAILED, Failure};
use anyhow::{Context, Result};
use heliostat_runtime::cluster::ClusterError;
use heliostat_runtime::head::{self, HeadConfig, Patience};
use heliostat_runtime::spec::ActorSpec;
use heliostat_runtime::state::StateConfig;
use heliostat_runtime::system::Secret;
use std::time::Duration;

/// Attempts to apply the deployment to the head of this very process.
const APPLY_ATTEMPTS: u32 = 5;

/// Runs until SIGTERM, SIGINT or a shutdown of the cluster ends it.
pub(crate) async fn run(args: &args::Head) -> Result<()> {
    if let Some(supervisor) = args.supervised.supervised_by {
        end_with_supervisor(supervisor)?;
    }
    let config = match args.supervised.supervised_by {
        Some(_) => Config::load_counted(args.file.as_deref())?,
        None => Config::load(args.file.as_deref())?,
    };
    let run = match &args.run_dir {
        Some(dir) => run_dir(Some(dir), None)?,
        None => run_dir(Some(&config.run_dir), None)?,
    };
    run.create()?;
    let specs = deploy::specs(&config)?;
    let head = head::run(head_config(&config)).await?;
    run.set_address(&Access::of(&config).address)?;
    run.set_token(config.token.as_ref())?;
    apply(&config, specs).await?;
    Ok(head.serve().await?)
}

fn head_config(config: &Config) -> HeadConfig {
    let s = &config.supervision;
    let state = match &config.state {
        State::Embedded { dir } => StateConfig::Embedded { dir: dir.clone() },
        State::Etcd { endpoints, prefix } => {
            StateConfig::Etcd { endpoints: endpoints.clone(), prefix: prefix.clone() }
        }
    };
    let mut head = HeadConfig::new(config.bind, state);
    head.advertise.clone_from(&config.advertise);
    head.token = config.token.as_ref().map(|Token(text)| Secret::new(text));
    head.patience = Patience {
        // Silence is noticed at three missed reports, and never later than the node would be given up.
        heartbeat_timeout: Duration::from_millis(u64::from(s.heartbeat_ms) * 3),
        node_grace: Duration::from_secs_f64(s.node_grace_s),
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
