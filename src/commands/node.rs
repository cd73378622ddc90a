//! `helio node`: this machine's node agent.

use super::up::family::end_with_supervisor;
use crate::args::{self, with_port};
use crate::config::Token;
use crate::rundir::read_token;
use anyhow::{Context, Result};
use heliostat_runtime::node::{self, NodeConfig};
use heliostat_runtime::spec::Device;
use heliostat_runtime::system::Secret;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

/// Port of a head that was named without one.
const DEFAULT_PORT: u16 = 6379;

/// Runs until SIGTERM, SIGINT or the head ends it.
pub(crate) async fn run(args: &args::Node) -> Result<()> {
    if let Some(supervisor) = args.supervised.supervised_by {
        end_with_supervisor(supervisor)?;
    }
    let config = config(args)?;
    let (name, head) = (config.name.clone(), config.head.clone());
    let node = node::run(config).await?;
    tracing::info!(node = name, head, endpoint = node.endpoint(), "node agent runs");
    Ok(node.serve().await?)
}

fn config(args: &args::Node) -> Result<NodeConfig> {
    let head = with_port(&args.join, DEFAULT_PORT);
    let name = args.name.clone().map_or_else(host_name, Ok)?;
    let ip = args.bind.map_or_else(|| local_address_towards(&head), Ok)?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let threads = args.threads.unwrap_or((cores / args.devices).max(1));
    let mut config = NodeConfig::new(name, head, &args.run_dir);
    config.bind = SocketAddr::new(ip, 0);
    config.worker_bind = ip;
    config.advertise.clone_from(&args.advertise);
    config.devices = (0..args.devices).map(|index| Device::cpu(index, threads)).collect();
    config.worker_command = vec![program()?.display().to_string(), "worker".into()];
    let token = args.token_file.as_deref().map(read_token).transpose()?;
    config.token = token.map(|Token(text)| Secret::new(text));
    config.timing.agent_grace = Duration::try_from_secs_f64(args.worker_grace).context("--worker-grace")?;
    config.timing.heartbeat = Duration::from_millis(args.heartbeat);
    Ok(config)
}

/// The path of this program; one that was replaced since it started is still reachable through /proc.
fn program() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot tell the path of this program")?;
    Ok(if exe.exists() { exe } else { PathBuf::from(format!("/proc/{}/exe", std::process::id())) })
}

/// The address that packets to the head leave from. Sends nothing.
fn local_address_towards(head: &str) -> Result<IpAddr> {
    let resolved = head.to_socket_addrs().with_context(|| format!("cannot resolve {head}"))?.next();
    let head = resolved.with_context(|| format!("{head} has no address"))?;
    let any: IpAddr =
        if head.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let towards = || -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(head)?;
        Ok(socket.local_addr()?.ip())
    };
    towards().with_context(|| format!("no route to {head}; name this machine's address with --bind"))
}

/// The first part of the host's name.
fn host_name() -> Result<String> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let short = name.split('.').next().unwrap_or_default().to_string();
    anyhow::ensure!(!short.is_empty(), "this host has no name; give the node one with --name");
    Ok(short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_head_is_reached_from_loopback() {
        assert_eq!(
            local_address_towards("127.0.0.1:6379").expect("an address"),
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        );
        assert!(local_address_towards("no.such.host.invalid:1").is_err());
    }
}
