//! `helio node`: this machine's node agent.

use super::up::family::end_with_supervisor;
use crate::args::{self, DEFAULT_PORT, Offer, with_ports};
use crate::config::Token;
use crate::gpus;
use crate::rundir::read_token;
use anyhow::{Context, Result};
use heliostat_runtime::backoff::Backoff;
use heliostat_runtime::node::{self, NodeConfig};
use heliostat_runtime::spec::Device;
use heliostat_runtime::system::Secret;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// CPU devices of a node that is told nothing and has no GPU.
const CPU_DEVICES: u32 = 4;
/// Pauses between two questions for a head's name.
const RESOLVE_PAUSE_MIN: Duration = Duration::from_millis(200);
const RESOLVE_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Runs until SIGTERM, SIGINT or the head ends it.
pub(crate) async fn run(args: &args::Node) -> Result<()> {
    if let Some(supervisor) = args.supervised.supervised_by {
        end_with_supervisor(supervisor)?;
    }
    let config = config(args).await?;
    let (name, head) = (config.name.clone(), config.head.clone());
    let node = node::run(config).await?;
    tracing::info!(node = name, head, endpoint = node.endpoint(), "node agent runs");
    Ok(node.serve().await?)
}

async fn config(args: &args::Node) -> Result<NodeConfig> {
    let head = with_ports(&args.join, DEFAULT_PORT);
    let name = args.name.clone().map_or_else(host_name, Ok)?;
    let ip = match args.bind {
        Some(ip) => ip,
        None => local_address_towards(&resolved(&head).await?, &head)?,
    };
    let mut config = NodeConfig::new(name, head, &args.run_dir);
    config.bind = SocketAddr::new(ip, 0);
    config.worker_bind = ip;
    config.advertise.clone_from(&args.advertise);
    config.devices = devices(args)?;
    config.capacity.cpus = args.cpus.unwrap_or(config.capacity.cpus);
    config.capacity.memory = args.memory.unwrap_or(config.capacity.memory);
    config.objects_bytes_max = args.objects.unwrap_or(config.objects_bytes_max);
    config.spill_dir.clone_from(&args.spill_dir);
    config.spill_bytes_max = args.spill;
    let ready = args.objects_ready.iter().map(|bytes| usize::try_from(*bytes));
    config.objects_ready = ready.collect::<Result<_, _>>().context("--objects-ready")?;
    config.capacity.custom = args.resources.iter().cloned().collect();
    config.labels = args.labels.iter().cloned().collect();
    config.worker_command = vec![program()?.display().to_string(), "worker".into()];
    let token = args.token_file.as_deref().map(read_token).transpose()?;
    config.token = token.map(|Token(text)| Secret::new(text));
    config.tls = args.tls.files().context("--tls")?;
    config.timing.agent_grace = Duration::try_from_secs_f64(args.worker_grace).context("--worker-grace")?;
    config.timing.heartbeat = Duration::from_millis(args.heartbeat);
    Ok(config)
}

/// What the node offers; an error where it has not the GPUs that it is to offer.
fn devices(args: &args::Node) -> Result<Vec<Device>> {
    let (ordinals, found) = match &args.devices {
        Offer::Cpu(count) => return Ok(cpu_devices(*count, args.threads)),
        Offer::Auto => match gpus::usable() {
            Ok(found) => (0..=found - 1, found),
            Err(why) => {
                tracing::info!("offers {CPU_DEVICES} CPU devices: no GPU can be used: {why}");
                return Ok(cpu_devices(CPU_DEVICES, args.threads));
            }
        },
        Offer::AllGpus => {
            let found = gpus::count().map_err(no_gpu)?;
            (0..=found - 1, found)
        }
        Offer::Gpus(ordinals) => (ordinals.clone(), gpus::count().map_err(no_gpu)?),
    };
    anyhow::ensure!(
        *ordinals.end() < found,
        "GPU {} is to be offered, and this machine shows {found}; lower --devices, or see whether CUDA_VISIBLE_DEVICES \
         hides some",
        ordinals.end(),
    );
    Ok(cuda_devices(ordinals, args.ranks_per_gpu))
}

fn no_gpu(why: String) -> anyhow::Error {
    anyhow::anyhow!("no GPU can be offered: {why}; write --devices cpu=COUNT to do without")
}

fn cpu_devices(count: u32, threads: Option<u32>) -> Vec<Device> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let threads = threads.unwrap_or((cores / count).max(1));
    (0..count).map(|index| Device::cpu(index, threads)).collect()
}

/// Every GPU once, then every GPU a second time: ranks share one only where there are more ranks than GPUs.
fn cuda_devices(ordinals: RangeInclusive<u32>, ranks_per_gpu: u32) -> Vec<Device> {
    let all = (0..ranks_per_gpu).flat_map(|_| ordinals.clone());
    (0..).zip(all).map(|(index, ordinal)| Device::cuda(index, ordinal)).collect()
}

/// The path of this program; one that was replaced since it started is still reachable through /proc.
fn program() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot tell the path of this program")?;
    Ok(if exe.exists() { exe } else { PathBuf::from(format!("/proc/{}/exe", std::process::id())) })
}

/// The address of the first of these heads that has one. Waits for it: where machines start together (Kubernetes,
/// Slurm), a head's name may come later than its nodes. Resolvers tell nobody of new names, so they are asked again.
async fn resolved(heads: &str) -> Result<SocketAddr> {
    let mut backoff = Backoff::new(RESOLVE_PAUSE_MIN, RESOLVE_PAUSE_MAX);
    loop {
        let mut failed = String::new();
        for head in heads.split(',') {
            match tokio::net::lookup_host(head).await {
                Ok(mut found) => match found.next() {
                    Some(address) => return Ok(address),
                    None => failed = format!("{head} has no address"),
                },
                // Not a matter of time: it lacks a port that is one.
                Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => {
                    return Err(e).with_context(|| format!("`{head}` is no HOST:PORT"));
                }
                Err(e) => failed = format!("cannot resolve {head}: {e}"),
            }
        }
        tracing::warn!("{failed}; waits for it");
        backoff.pause().await;
    }
}

/// The address that packets to `address`, that of the head `head`, leave from. Sends nothing.
fn local_address_towards(address: &SocketAddr, head: &str) -> Result<IpAddr> {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let towards = || -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(address)?;
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
    use heliostat_runtime::spec::DeviceKind;

    #[tokio::test]
    async fn a_local_head_is_reached_from_loopback() {
        let found =
            resolved("no.such.host.invalid:1,127.0.0.1:6379").await.expect("the second has an address");
        assert_eq!(local_address_towards(&found, "it").expect("a way"), IpAddr::V4(Ipv4Addr::LOCALHOST));
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_waited_for_and_nonsense_is_not() {
        let waiting = resolved("no.such.host.invalid:1");
        assert!(tokio::time::timeout(RESOLVE_PAUSE_MIN * 2, waiting).await.is_err(), "it waits");
        let why = resolved("127.0.0.1:port").await.expect_err("no port");
        assert!(format!("{why:#}").contains("no HOST:PORT"), "{why:#}");
    }

    #[test]
    fn ranks_fill_all_gpus_before_they_share_one() {
        let ordinals: Vec<DeviceKind> = cuda_devices(2..=3, 2).into_iter().map(|d| d.kind).collect();
        let cuda = |ordinal| DeviceKind::Cuda { ordinal };
        assert_eq!(ordinals, [cuda(2), cuda(3), cuda(2), cuda(3)]);
        let indices: Vec<u32> = cuda_devices(2..=3, 2).into_iter().map(|d| d.index).collect();
        assert_eq!(indices, [0, 1, 2, 3]);
    }
}
