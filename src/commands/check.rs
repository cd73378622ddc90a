//! `helio check`: reads the configuration and the model's files, and starts nothing.

use super::print;
use crate::args::Check;
use crate::config::Config;
use crate::deploy;
use crate::failure::{self, Failure, USAGE};
use anyhow::Result;
use std::net::SocketAddr;

/// Checks everything that can be checked on this machine.
pub(crate) fn run(args: &Check) -> Result<()> {
    let config = Config::load(args.file.as_deref())?;
    let specs = deploy::specs(&config)
        .map_err(|e| Failure::error(USAGE, format!("the model cannot be served: {}", failure::text(&e))))?;
    let p = config.parallel;
    let devices: u32 = config.nodes.iter().map(|n| n.devices).sum();
    let layout = if p.colocate { "on the same devices" } else { "on devices of their own" };
    print(&format!(
        "cluster {} is fine\n  model    {} ({})\n  ranks    dp = {}, ep = {} {layout}; {} nodes, {devices} devices\n  \
         experts  {} redundant slots per layer\n  actors   {}\n  serves   http://{}\n",
        config.name,
        config.model.name,
        config.model.path.display(),
        p.dp,
        p.ep,
        config.nodes.len(),
        config.redundant_experts,
        specs.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", "),
        SocketAddr::new(config.serve.host, config.serve.port),
    ))
}
