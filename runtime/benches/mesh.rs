//! What a round over 64 ranks costs, beside a caller that asks all of them itself: in one process, and in 64.
//!
//! `cargo bench -p heliostat-runtime --bench mesh`. It starts itself as the other processes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, MessageResult};
use bincode::{Decode, Encode};
use futures_util::future::join_all;
use heliostat_runtime::actor::{Accepts, RemoteActor, WireMessage};
use heliostat_runtime::group::{GroupView, Member, MemberState};
use heliostat_runtime::handle::{ActorAddr, ActorId, Handle, Incarnation};
use heliostat_runtime::mesh::{Dims, Mesh, Reduce};
use heliostat_runtime::system::{SpawnOptions, System, SystemConfig};
use heliostat_runtime::wire::{from_bytes, to_bytes};

type AnyError = Box<dyn std::error::Error + Send + Sync>;

const RANKS: u32 = 64;
const MESH: &str = "bench";
/// How long each figure is measured.
const TIME: Duration = Duration::from_secs(2);
/// Bytes of the large message.
const LARGE: usize = 64 << 10;

struct Rank(u64);

impl Actor for Rank {
    type Context = Context<Self>;
}

/// Bytes that nobody looks at; the answer is one number.
#[derive(Clone, Encode, Decode)]
struct Ask(Vec<u8>);

impl actix::Message for Ask {
    type Result = u64;
}

impl WireMessage for Ask {
    const NAME: &'static str = "ask";
}

impl Reduce for Ask {
    fn reduce(earlier: u64, later: u64) -> u64 {
        earlier + later
    }
}

impl Handler<Ask> for Rank {
    type Result = MessageResult<Ask>;
    fn handle(&mut self, _: Ask, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.0)
    }
}

impl RemoteActor for Rank {
    const TYPE: &'static str = "rank";
    fn messages(m: &mut Accepts<Self>) {
        m.accept_reduced::<Ask>();
    }
}

fn spawn(system: &System, rank: u32) -> Result<ActorAddr, AnyError> {
    let id = ActorId::named(&format!("{MESH}-{rank}"));
    let options = SpawnOptions { id, incarnation: Incarnation(1), mailbox_capacity: 1024 };
    Ok(system.spawn(options, move || Rank(rank.into()))?)
}

fn view(addrs: &[ActorAddr]) -> GroupView {
    let member = |(rank, addr): (u32, &ActorAddr)| Member {
        rank,
        addr: Some(addr.clone()),
        join_info: Vec::new(),
        state: MemberState::Ready,
    };
    GroupView { group: MESH.into(), epoch: 1, members: (0..).zip(addrs).map(member).collect() }
}

/// Median and 99th percentile of what `round` takes, microseconds.
async fn measure<F: Future<Output = bool>>(round: impl Fn() -> F) -> Result<(f64, f64), AnyError> {
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < TIME || times.len() < 20 {
        let round_start = Instant::now();
        if !round().await {
            return Err("a round failed".into());
        }
        times.push(round_start.elapsed());
    }
    // The first tenth warms connections and caches.
    times.drain(..times.len() / 10);
    times.sort_unstable();
    let micros = |percentile: usize| times[(times.len() - 1) * percentile / 100].as_secs_f64() * 1e6;
    Ok((micros(50), micros(99)))
}

#[allow(clippy::print_stdout, reason = "the table is the purpose of the program")]
fn row(name: &str, small: (f64, f64), large: (f64, f64)) {
    println!("{name:<52} {:>9.0} {:>9.0} {:>11.0} {:>9.0}", small.0, small.1, large.0, large.1);
}

async fn rows(mesh: &Mesh<Rank>, handles: &[Handle<Rank>], fan_outs: &[u32]) -> Result<(), AnyError> {
    let (small, large) = (Ask(Vec::new()), Ask(vec![7; LARGE]));
    let one_by_one = |message: &Ask| {
        let message = message.clone();
        measure(move || {
            let message = message.clone();
            async move {
                for handle in handles {
                    if handle.ask(message.clone()).await.is_err() {
                        return false;
                    }
                }
                true
            }
        })
    };
    row("  flat, one ask after the other", one_by_one(&small).await?, one_by_one(&large).await?);
    let at_once = |message: &Ask| {
        let message = message.clone();
        measure(move || {
            let asks = join_all(handles.iter().map(|handle| handle.ask(message.clone())));
            async move { asks.await.iter().all(Result::is_ok) }
        })
    };
    row("  flat, all asks at once", at_once(&small).await?, at_once(&large).await?);
    for fan_out in fan_outs {
        let mesh = mesh.with_fan_out(*fan_out);
        let round = |message: &Ask| {
            measure({
                let (mesh, message) = (mesh.clone(), message.clone());
                move || {
                    let (mesh, message) = (mesh.clone(), message.clone());
                    async move { mesh.cast(message).await.is_ok() }
                }
            })
        };
        row(&format!("  mesh, fan-out {fan_out}: cast"), round(&small).await?, round(&large).await?);
        let round = |message: &Ask| {
            measure({
                let (mesh, message) = (mesh.clone(), message.clone());
                move || {
                    let (mesh, message) = (mesh.clone(), message.clone());
                    async move { mesh.gather(message).await.is_ok_and(|all| all.len() == RANKS as usize) }
                }
            })
        };
        row(&format!("  mesh, fan-out {fan_out}: gather"), round(&small).await?, round(&large).await?);
        let round = |message: &Ask| {
            measure({
                let (mesh, message) = (mesh.clone(), message.clone());
                move || {
                    let (mesh, message) = (mesh.clone(), message.clone());
                    async move { mesh.reduce(message).await.is_ok_and(|sum| sum == 2016) }
                }
            })
        };
        row(&format!("  mesh, fan-out {fan_out}: reduce"), round(&small).await?, round(&large).await?);
    }
    Ok(())
}

/// A rank in a process of its own, killed when dropped.
struct Other {
    child: Child,
    addr: ActorAddr,
}

impl Other {
    fn start(rank: u32) -> Result<Self, AnyError> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--rank", &rank.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no stdout")?).read_line(&mut line)?;
        Ok(Self { child, addr: from_bytes(&unhex(&line)?)? })
    }

    fn tell(&mut self, view: &GroupView) -> Result<(), AnyError> {
        let stdin = self.child.stdin.as_mut().ok_or("no stdin")?;
        Ok(writeln!(stdin, "{}", hex(&to_bytes(view)?))?)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(line: &str) -> Result<Vec<u8>, AnyError> {
    let line = line.trim();
    let byte = |at: usize| Ok(u8::from_str_radix(&line[at..at + 2], 16)?);
    (0..line.len()).step_by(2).map(byte).collect()
}

/// The other process: until its standard input ends.
#[allow(clippy::print_stdout, reason = "the parent reads it")]
async fn other(rank: u32) -> Result<(), AnyError> {
    let system = System::start(SystemConfig { arbiters: 1, ..SystemConfig::loopback() }).await?;
    println!("{}", hex(&to_bytes(&spawn(&system, rank)?)?));
    tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lines() {
            system.join_mesh(from_bytes(&unhex(&line?)?)?)?;
        }
        Ok::<(), AnyError>(())
    })
    .await?
}

#[allow(clippy::print_stdout, reason = "the table is the purpose of the program")]
async fn table() -> Result<(), AnyError> {
    let dims = Dims::new([("ranks", RANKS)])?;
    println!(
        "{:<52} {:>9} {:>9} {:>11} {:>9}",
        format!("{RANKS} ranks, one round, us"),
        "p50",
        "p99",
        "64 KiB p50",
        "p99"
    );
    println!("in one process (two actor threads)");
    let system = System::start(SystemConfig::loopback()).await?;
    let addrs: Vec<ActorAddr> = (0..RANKS).map(|rank| spawn(&system, rank)).collect::<Result<_, _>>()?;
    system.join_mesh(view(&addrs))?;
    let handles: Vec<Handle<Rank>> = addrs.iter().map(|addr| system.handle(addr.clone())).collect();
    // One stop: the fan-out does not matter.
    rows(&system.mesh(MESH, dims.clone()), &handles, &[4]).await?;
    system.shutdown().await;
    println!("in {RANKS} processes");
    let mut others: Vec<Other> = (0..RANKS).map(Other::start).collect::<Result<_, _>>()?;
    let addrs: Vec<ActorAddr> = others.iter().map(|other| other.addr.clone()).collect();
    let view = view(&addrs);
    others.iter_mut().try_for_each(|other| other.tell(&view))?;
    // The caller is in none of them.
    let system = System::start(SystemConfig::loopback()).await?;
    system.join_mesh(view)?;
    let handles: Vec<Handle<Rank>> = addrs.iter().map(|addr| system.handle(addr.clone())).collect();
    rows(&system.mesh(MESH, dims), &handles, &[2, 4, 8, 64]).await
}

fn main() -> Result<(), AnyError> {
    let args: Vec<String> = std::env::args().collect();
    let rank = args.iter().position(|arg| arg == "--rank").and_then(|at| args.get(at + 1)?.parse().ok());
    let threads = if rank.is_some() { 1 } else { 2 };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    match rank {
        Some(rank) => runtime.block_on(async { tokio::spawn(other(rank)).await? }),
        None => runtime.block_on(async { tokio::spawn(table()).await? }),
    }
}
