//! The command line: what may be written after `helio`, with its help.

mod bench;
pub(crate) mod cert;
mod drain;
mod job;
mod program;
mod serve;
mod state;
mod watch;

pub(crate) use bench::{Bench, BenchExchange, BenchGpu, BenchOps, BenchRanks, BenchSlice, PrefillArg};
pub(crate) use cert::{CERT_DIR, Cert, CertCa, CertMade, Tls};
pub(crate) use drain::{Drain, Undrain};
pub(crate) use job::{Entrypoint, Job, JobArgs, Submit};
pub(crate) use program::{Package, PackageArgs, SubmitProgram};
pub(crate) use serve::{Serve, ServeArgs};
pub(crate) use state::{Get, Kind, List, Summary};
pub(crate) use watch::{Timeline, Top};

use clap::{Args, Parser, Subcommand};
use heliostat_runtime::spec::Quantity;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// Shown under `helio --help`.
const EXAMPLES: &str = "\
Examples:
  helio up                         start the cluster of ./cluster.toml, or the default one
  helio up cluster.toml --detach   the same in the background; returns when it serves
  helio status                     nodes, devices, actors
  helio top                        load, latencies and experts, once a second
  helio eplb show                  load of the experts and where they lie
  helio list actors -f state=dead  what is there, by filters
  helio logs rank-0 -f             follow the log of an actor
  helio submit target/release/app  ship a program of your own and run its driver on the cluster
  helio serve deploy serve.yaml    serve other models, or several
  helio job submit -- python x.py  run a command as a job and print its log
  helio down                       stop everything

Exit codes:
  0  done
  1  failed
  2  wrong arguments or configuration
  3  no cluster runs there
  4  the cluster did not start";

/// Starts, watches and stops a Heliostat cluster.
#[derive(Debug, Parser)]
#[command(name = "helio", version, after_help = EXAMPLES, arg_required_else_help = true, max_term_width = 110)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Every command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a cluster on this machine: head, node agent and workers.
    Up(Up),
    /// Stop the cluster and wait until nothing of it is left.
    Down(Down),
    /// Run a head by hand; nodes join it with `helio node --join`.
    Head(Head),
    /// Run this machine's node agent and join a head.
    Node(Node),
    /// Run a worker process (started by a node agent).
    #[command(hide = true)]
    Worker(Worker),
    /// Show the state of the cluster.
    Status(Show),
    /// Watch the cluster: load, latencies, experts, ranks; once a second.
    Top(Top),
    /// Record the steps of all ranks for a while, as a trace for Perfetto.
    Timeline(Timeline),
    /// List nodes, workers, actors, groups, jobs or objects.
    List(List),
    /// Show one of them.
    Get(Get),
    /// Count them by their states.
    Summary(Summary),
    /// Print what an actor wrote to its log.
    Logs(Logs),
    /// Empty a node: its actors go elsewhere, and nothing new comes.
    Drain(Drain),
    /// Have a drained node take actors again.
    Undrain(Undrain),
    /// Ship a program of your own to the cluster and run its driver there.
    Submit(SubmitProgram),
    /// The programs that were shipped: list, push, remove.
    Package(PackageArgs),
    /// Run commands as jobs: submit, status, logs, stop, list, delete.
    Job(JobArgs),
    /// Say what is served: deploy, run, status, config, shutdown, build.
    Serve(ServeArgs),
    /// Keep one job (started by the jobs actor).
    #[command(hide = true)]
    Entrypoint(Entrypoint),
    /// Show or rebalance the map of experts.
    #[command(subcommand)]
    Eplb(Eplb),
    /// Measure a GPU: single operations, or one rank's steps.
    #[command(subcommand)]
    Bench(Bench),
    /// Make a certificate authority for the cluster, and certificates for nodes and clients.
    #[command(subcommand)]
    Cert(Cert),
    /// Check a cluster.toml and the files of its model without starting anything.
    Check(Check),
    /// Print the reference page of cluster.toml.
    #[command(hide = true)]
    Reference,
}

/// `helio up`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio up
  helio up cluster.toml --detach && curl http://127.0.0.1:8000/v1/models

Without a file: ./cluster.toml, or the default cluster where there is none (the bundled model, where
./models/sundial-20m is there: a rank on each GPU, or four on CPU devices where there is no GPU).
A file without [model] starts a cluster for actors and jobs, and for what helio serve deploys.
Head and node agent are restarted when they die. Ctrl-C, SIGTERM or `helio down` stop everything.")]
pub(crate) struct Up {
    /// The cluster to start.
    pub(crate) file: Option<PathBuf>,
    /// Return when the cluster serves and leave it running in the background.
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Run as the background part of --detach.
    #[arg(long, hide = true)]
    pub(crate) daemon: bool,
}

/// `helio down`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio down                         the cluster of ./cluster.toml, or of ./run
  helio down --run-dir /srv/helio    the cluster that runs in this directory
  helio down --address 10.0.0.1      any cluster, with its nodes on all machines")]
pub(crate) struct Down {
    /// The cluster.toml that it was started with.
    #[arg(conflicts_with_all = ["run_dir", "address"])]
    pub(crate) file: Option<PathBuf>,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
    /// Seconds to wait before what is left is killed.
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    pub(crate) timeout: u64,
}

/// Options of a process that `helio up` starts.
#[derive(Debug, Clone, Args)]
pub(crate) struct Supervised {
    /// Process id of the supervisor: end when it ends.
    #[arg(long, value_name = "PID", hide = true)]
    pub(crate) supervised_by: Option<u32>,
}

/// `helio head`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio head cluster.toml
  helio node --join 10.0.0.1:6379 --token-file token      on every machine
  helio head cluster.toml --bind 0.0.0.0:6379 --advertise \"$(hostname -f)\"     where the address is only known now

With store = \"etcd\" several heads may run, one on each of several machines, with `peers` in [head]: the first leads, the
others stand by. One takes over within 2 to 3 s (`lease_s`) when the leader dies, hangs or is cut off from etcd.")]
pub(crate) struct Head {
    /// The cluster to deploy.
    pub(crate) file: Option<PathBuf>,
    /// Run directory, instead of `run_dir` in `[cluster]`.
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Where to listen, instead of `bind` in `[head]`.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) bind: Option<SocketAddr>,
    /// Host name or address by which others reach it, instead of `advertise` in `[head]`.
    #[arg(long, value_name = "HOST")]
    pub(crate) advertise: Option<String>,
    /// Wait for an etcd that does not answer: this process led before.
    #[arg(long, hide = true)]
    pub(crate) stood_down: bool,
    /// How it was started.
    #[command(flatten)]
    pub(crate) supervised: Supervised,
}

/// `helio node`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio node --join 127.0.0.1:6379
  helio node --join 10.0.0.1:6379 --devices cpu=8 --name b --token-file /etc/helio/token
  helio node --join 10.0.0.1,10.0.0.2                   two heads: the one that leads is found, also later
  helio node --join 10.0.0.1:6379 --devices cuda=4-7    GPUs 4 to 7 of those that CUDA_VISIBLE_DEVICES shows")]
pub(crate) struct Node {
    /// Address of the head; several, with commas between, are tried in turn. The leader names the others. A head that
    /// is not there yet is waited for, and so is a name that cannot be resolved yet.
    #[arg(long, value_name = "HOST:PORT[,...]")]
    pub(crate) join: String,
    /// Devices to offer: cpu=COUNT, cuda=COUNT, cuda=FIRST-LAST, cuda (all GPUs), or auto (all GPUs, or cpu=4 without any).
    #[arg(long, default_value = "auto", value_parser = parse_devices)]
    pub(crate) devices: Offer,
    /// Threads of each CPU device. Without it: the cores, divided evenly.
    #[arg(long)]
    pub(crate) threads: Option<u32>,
    /// Devices to make of each GPU; more than one is for tests.
    #[arg(long, value_name = "COUNT", default_value_t = 1, hide = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) ranks_per_gpu: u32,
    /// Logical CPUs that actors can reserve. Without it: all there are.
    #[arg(long, value_name = "COUNT")]
    pub(crate) cpus: Option<u32>,
    /// Memory that actors can reserve, in bytes. Without it: all there is.
    #[arg(long, value_name = "BYTES")]
    pub(crate) memory: Option<u64>,
    /// Shared memory for objects, in bytes. Without it: 30 % of all there is.
    #[arg(long, value_name = "BYTES")]
    pub(crate) objects: Option<u64>,
    /// Size of objects, in bytes, for which memory is kept ready; may be repeated.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) objects_ready: Vec<u64>,
    /// Where objects go that have no room there: the node makes a directory of its own in it. Without it: in the run
    /// directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) spill_dir: Option<PathBuf>,
    /// Bytes of objects that may lie there; 0 for none.
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 30)]
    pub(crate) spill: u64,
    /// Anything else that actors can reserve; may be repeated.
    #[arg(long = "resource", value_name = "NAME=AMOUNT", value_parser = parse_resource)]
    pub(crate) resources: Vec<(String, Quantity)>,
    /// A label that actors and placement groups can ask for; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    pub(crate) labels: Vec<(String, String)>,
    /// Name of this node. Without it: the host's name.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Address at which this node's processes listen. Without it: the one from which the head is reached.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) bind: Option<std::net::IpAddr>,
    /// Host name or address by which others reach them, where that is another one.
    #[arg(long, value_name = "HOST")]
    pub(crate) advertise: Option<String>,
    /// Directory for logs and sockets.
    #[arg(long, value_name = "DIR", default_value = "run")]
    pub(crate) run_dir: PathBuf,
    /// File that holds the cluster token.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Certificates.
    #[command(flatten)]
    pub(crate) tls: Tls,
    /// How long workers live on without this process.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub(crate) worker_grace: f64,
    /// How often to report to the head.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 500)]
    pub(crate) heartbeat: u64,
    /// How it was started.
    #[command(flatten)]
    pub(crate) supervised: Supervised,
}

/// `helio worker`: written by the node agent, read by the runtime.
#[derive(Debug, Args)]
pub(crate) struct Worker {
    /// As the node agent writes them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

/// Which cluster a command talks to.
#[derive(Debug, Clone, Args)]
pub(crate) struct Target {
    /// Address of the head; of several, with commas between, the leader is found. Without it: the one in the run
    /// directory, else 127.0.0.1:6379.
    #[arg(long, value_name = "HOST:PORT[,...]", global = true)]
    pub(crate) address: Option<String>,
    /// Run directory of the cluster. Without it: that of ./cluster.toml, else ./run.
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) run_dir: Option<PathBuf>,
    /// File that holds the cluster token. Without it: the one in the run directory.
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) token_file: Option<PathBuf>,
    /// Certificates. Without them: those in the run directory.
    #[command(flatten)]
    pub(crate) tls: Tls,
}

/// `helio status`.
#[derive(Debug, Args)]
pub(crate) struct Show {
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `helio logs`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio logs rank-0
  helio logs ingress -f
  helio logs head            head, node-0 and up are read from the run directory")]
pub(crate) struct Logs {
    /// Name of the actor (helio list actors), or head, node-0, up.
    pub(crate) actor: String,
    /// Go on printing what is added.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
}

/// `helio eplb`.
#[derive(Debug, Subcommand)]
pub(crate) enum Eplb {
    /// Show load, map, balancedness and history.
    Show(EplbOf),
    /// Plan a new map from the present load and move to it.
    Rebalance(EplbOf),
}

/// Whose map of experts.
#[derive(Debug, Args)]
pub(crate) struct EplbOf {
    /// The group of the replica's ranks, see `helio list groups`.
    #[arg(long, value_name = "NAME", default_value = "ep")]
    pub(crate) group: String,
    /// Which cluster, and how to show it.
    #[command(flatten)]
    pub(crate) show: Show,
}

/// `helio check`.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// The file to check.
    pub(crate) file: Option<PathBuf>,
}

/// What a node offers to ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Offer {
    /// All GPUs, or CPU devices where there is none.
    Auto,
    /// So many shares of the cores.
    Cpu(u32),
    /// All GPUs.
    AllGpus,
    /// GPUs with these ordinals, at least one.
    Gpus(RangeInclusive<u32>),
}

/// Reads `cpu=4`, `cuda=2`, `cuda=4-7`, `cuda` or `auto`.
fn parse_devices(text: &str) -> Result<Offer, String> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("`{text}` is no number"));
    let at_least_one = |count: u32| match count {
        0 => Err("a node needs at least one device".to_string()),
        count => Ok(count),
    };
    match text.split_once('=') {
        None if text == "auto" => Ok(Offer::Auto),
        None if text == "cuda" => Ok(Offer::AllGpus),
        None => Ok(Offer::Cpu(at_least_one(number(text)?)?)),
        Some(("cpu", count)) => Ok(Offer::Cpu(at_least_one(number(count)?)?)),
        Some(("cuda", "auto")) => Ok(Offer::AllGpus),
        Some(("cuda", which)) => match which.split_once('-') {
            None => Ok(Offer::Gpus(0..=at_least_one(number(which)?)? - 1)),
            Some((first, last)) => match (number(first)?, number(last)?) {
                (first, last) if first <= last => Ok(Offer::Gpus(first..=last)),
                (first, last) => Err(format!("{first} is above {last}: write cuda={last}-{first}")),
            },
        },
        Some((other, _)) => Err(format!("unknown kind of device `{other}`: write cpu=COUNT or cuda=COUNT")),
    }
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("`{text}`: write KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

fn parse_resource(text: &str) -> Result<(String, Quantity), String> {
    let (name, amount) = text.split_once('=').ok_or_else(|| format!("`{text}`: write NAME=AMOUNT"))?;
    let amount: f64 = amount.parse().map_err(|_| format!("`{amount}` is no number"))?;
    Ok((name.to_owned(), Quantity::from_f64(amount).map_err(|error| error.to_string())?))
}

/// Port of a head, as Ray's.
pub(crate) const DEFAULT_PORT: u16 = 6379;

/// Reads addresses with commas between, any of which may lack the port.
pub(crate) fn with_ports(addresses: &str, port: u16) -> String {
    let all: Vec<String> =
        addresses.split(',').map(str::trim).filter(|a| !a.is_empty()).map(|a| with_port(a, port)).collect();
    all.join(",")
}

/// Reads an address that may lack the port.
pub(crate) fn with_port(address: &str, port: u16) -> String {
    let has_port = address.parse::<SocketAddr>().is_ok()
        || (!address.starts_with('[') && address.matches(':').count() == 1);
    if has_port {
        return address.to_string();
    }
    let bare_v6 = address.matches(':').count() > 1 && !address.starts_with('[');
    if bare_v6 { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn devices_are_kind_and_count() {
        assert_eq!(parse_devices("cpu=8"), Ok(Offer::Cpu(8)));
        assert_eq!(parse_devices("2"), Ok(Offer::Cpu(2)));
        assert_eq!(parse_devices("auto"), Ok(Offer::Auto));
        assert_eq!(parse_devices("cuda"), Ok(Offer::AllGpus));
        assert_eq!(parse_devices("cuda=2"), Ok(Offer::Gpus(0..=1)));
        assert_eq!(parse_devices("cuda=4-7"), Ok(Offer::Gpus(4..=7)));
        for bad in ["cpu=0", "cpu=x", "cuda=0", "cuda=", "cuda=3-1", "tpu=1", "gpu"] {
            assert!(parse_devices(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_missing_port_is_filled_in() {
        assert_eq!(with_port("10.0.0.1", 6379), "10.0.0.1:6379");
        assert_eq!(with_port("10.0.0.1:1", 6379), "10.0.0.1:1");
        assert_eq!(with_port("::1", 6379), "[::1]:6379");
        assert_eq!(with_port("[::1]:5", 6379), "[::1]:5");
        assert_eq!(with_port("head", 6379), "head:6379");
        assert_eq!(with_ports("a, b:1,", 6379), "a:6379,b:1");
    }
}
