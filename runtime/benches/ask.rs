//! What a message costs: an ask and its answer, and calls per second with many under way, in one process and between
//! two, beside plain actix and a raw TCP ping-pong in the same run.
//!
//! `cargo bench -p heliostat-runtime --bench ask`. It starts itself as the other process.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, Arbiter, Context, Handler, Message};
use bincode::{Decode, Encode};
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use heliostat_runtime::actor::{Accepts, RemoteActor, WireMessage};
use heliostat_runtime::handle::{ActorId, Handle, Incarnation};
use heliostat_runtime::system::{SpawnOptions, System, SystemConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

type AnyError = Box<dyn std::error::Error + Send + Sync>;

const ACTOR: ActorId = ActorId::named("bench");
/// Asks one after the other.
const ROUNDS: usize = 20_000;
/// Calls of a throughput run, and how many of them are under way at once.
const CALLS: usize = 400_000;
const UNDER_WAY: usize = 1024;
const MAILBOX: usize = 2 * UNDER_WAY;
/// Turns of what is measured in turns.
const TURNS: usize = 8;
/// Actors that one process spawns for itself.
const SPAWNED: u64 = 100_000;

/// Says what it is told, plus one.
struct Echo;

impl Actor for Echo {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(MAILBOX);
    }
}

#[derive(Message, Encode, Decode)]
#[rtype(result = "u64")]
struct Ping(u64);

impl WireMessage for Ping {
    const NAME: &'static str = "ping";
}

impl Handler<Ping> for Echo {
    type Result = u64;
    fn handle(&mut self, ping: Ping, _: &mut Context<Self>) -> u64 {
        ping.0 + 1
    }
}

/// Measures from inside an arbiter, as an actor that asks another one of its thread does.
#[derive(Message, Encode, Decode)]
#[rtype(result = "Vec<u64>")]
struct Measure;

impl WireMessage for Measure {
    const NAME: &'static str = "measure";
}

struct Inside(System);

impl Actor for Inside {
    type Context = Context<Self>;
}

impl RemoteActor for Inside {
    const TYPE: &'static str = "inside";
    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Measure>();
    }
}

impl Handler<Measure> for Inside {
    type Result = actix::ResponseFuture<Vec<u64>>;
    fn handle(&mut self, _: Measure, _: &mut Context<Self>) -> Self::Result {
        let echo = self.0.handle_at::<Echo>(self.0.endpoint(), ACTOR);
        Box::pin(async move { rounds(asks(&echo)).await.nanos() })
    }
}

impl RemoteActor for Echo {
    const TYPE: &'static str = "echo";
    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Ping>();
    }
}

/// Round-trip times, sorted.
struct Times(Vec<Duration>);

impl Times {
    fn micros(&self, percentile: usize) -> f64 {
        self.0[(self.0.len() - 1) * percentile / 100].as_nanos() as f64 / 1000.0
    }

    fn nanos(&self) -> Vec<u64> {
        self.0.iter().map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)).collect()
    }
}

/// Asks one after the other; `ask` says whether it got its answer.
async fn rounds<F: Future<Output = bool>>(ask: impl Fn(u64) -> F) -> Times {
    let mut times = Vec::with_capacity(ROUNDS);
    for i in 0..(ROUNDS + ROUNDS / 10) as u64 {
        let start = Instant::now();
        assert!(ask(i).await, "an ask failed");
        times.push(start.elapsed());
    }
    times.drain(..ROUNDS / 10);
    times.sort_unstable();
    Times(times)
}

/// Calls per second with many under way.
async fn throughput<F: Future<Output = bool>>(ask: impl Fn(u64) -> F) -> f64 {
    let start = Instant::now();
    let mut under_way = FuturesUnordered::new();
    let mut sent = 0;
    let mut answered = 0;
    while answered < CALLS {
        while sent < CALLS && under_way.len() < UNDER_WAY {
            under_way.push(ask(sent as u64));
            sent += 1;
        }
        assert!(under_way.next().await == Some(true), "an ask failed");
        answered += 1;
    }
    CALLS as f64 / start.elapsed().as_secs_f64()
}

fn row(name: &str, times: &Times, rate: Option<f64>) {
    let rate = rate.map_or("-".to_owned(), |rate| format!("{:.0}", rate / 1000.0));
    let (p50, p99) = (times.micros(50), times.micros(99));
    #[allow(clippy::print_stdout, reason = "the table is the purpose of the program")]
    {
        println!("{name:<44} {p50:>9.2} {p99:>9.2} {rate:>12}");
    }
}

/// An ask of a handle, by number. It owns its handle, as a task would.
fn asks(handle: &Handle<Echo>) -> impl Fn(u64) -> BoxFuture<'static, bool> + use<> {
    let handle = handle.clone();
    move |i| {
        let handle = handle.clone();
        Box::pin(async move { handle.ask(Ping(i)).await.is_ok() })
    }
}

async fn handle_rows(name: &str, handle: Handle<Echo>) {
    let times = rounds(asks(&handle)).await;
    let rate = throughput(asks(&handle)).await;
    row(name, &times, Some(rate));
}

async fn plain_actix() -> Result<(), AnyError> {
    // A thread of its own on each side, as a System's actors have.
    let (started, start) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runner = actix::System::new();
        let arbiter = Arbiter::new();
        let addr = Echo::start_in_arbiter(&arbiter.handle(), |_| Echo);
        let same_thread = runner.block_on(async {
            let echo = Echo.start();
            rounds(|i| echo.send(Ping(i)).map(|answer| answer.is_ok())).await
        });
        let _ = started.send((addr, same_thread));
        let _ = runner.run();
    });
    let (addr, same_thread) = tokio::task::spawn_blocking(move || start.recv()).await??;
    row("plain actix, one thread", &same_thread, None);
    let times = rounds(|i| addr.send(Ping(i)).map(|answer| answer.is_ok())).await;
    let rate = throughput(|i| addr.send(Ping(i)).map(|answer| answer.is_ok())).await;
    row("plain actix, two threads", &times, Some(rate));
    Ok(())
}

async fn local() -> Result<(), AnyError> {
    // One arbiter, so that both actors share its thread.
    let system = System::start(SystemConfig { arbiters: 1, ..SystemConfig::loopback() }).await?;
    let options = SpawnOptions { id: ACTOR, incarnation: Incarnation(1), mailbox_capacity: MAILBOX };
    let addr = system.spawn(options, || Echo)?;
    let inside = SpawnOptions { id: ActorId::named("inside"), ..options };
    let of_inside = system.clone();
    let inside = system.spawn(inside, move || Inside(of_inside))?;
    let nanos = system.handle::<Inside>(inside).ask(Measure).await?;
    row("Handle in process, one thread", &Times(nanos.into_iter().map(Duration::from_nanos).collect()), None);
    handle_rows("Handle in process, two threads", system.handle(addr)).await;
    system.shutdown().await;
    Ok(())
}

/// Actors per second that one process spawns for itself and hears of, each once.
async fn spawned() -> Result<(), AnyError> {
    let system = System::start(SystemConfig::loopback()).await?;
    let began = Instant::now();
    let spawned = futures_util::stream::iter(0..SPAWNED).map(|n| {
        let options = SpawnOptions { id: ActorId(n), incarnation: Incarnation(1), mailbox_capacity: 16 };
        let handle = system.spawn(options, || Echo).map(|addr| system.handle::<Echo>(addr));
        async move { handle?.ask(Ping(n)).await.map_err(AnyError::from) }
    });
    let answers =
        spawned.buffer_unordered(UNDER_WAY).try_fold(0, async |sum, answer| Ok(sum + answer)).await?;
    assert_eq!(answers, SPAWNED * (SPAWNED + 1) / 2);
    let rate = SPAWNED as f64 / began.elapsed().as_secs_f64() / 1000.0;
    #[allow(clippy::print_stdout, reason = "the table is the purpose of the program")]
    {
        println!(
            "{:<44} {:>9} {:>9} {rate:>12.0}",
            "actors spawned inside a process, each asked once", "-", "-"
        );
    }
    system.shutdown().await;
    Ok(())
}

/// The other process, killed when dropped.
struct Other {
    child: Child,
    actor: String,
    raw: String,
}

impl Other {
    fn start() -> Result<Self, AnyError> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--other-process")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().ok_or("no stdout")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut line = || lines.next().unwrap_or_else(|| Err(std::io::ErrorKind::UnexpectedEof.into()));
        let (actor, raw) = (line()?, line()?);
        Ok(Self { child, actor, raw })
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(clippy::print_stdout, reason = "the parent reads it")]
async fn other_process() -> Result<(), AnyError> {
    let system = System::start(SystemConfig::loopback()).await?;
    // On a thread of its own, as an actor of the cluster has in its process.
    let options = SpawnOptions { id: ACTOR, incarnation: Incarnation(1), mailbox_capacity: MAILBOX };
    let echo = system.spawn_async(options, || async { Ok(Echo) }).await?;
    system.read_at(&echo);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}\n{}", system.endpoint(), listener.local_addr()?);
    let pong = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let mut frame = [0; 64];
        loop {
            stream.read_exact(&mut frame).await?;
            stream.write_all(&frame).await?;
        }
        #[allow(unreachable_code, reason = "names the error type")]
        Ok::<(), std::io::Error>(())
    });
    // Until the parent is gone.
    tokio::task::spawn_blocking(|| std::io::read_to_string(std::io::stdin())).await??;
    pong.abort();
    Ok(())
}

/// The raw ping-pong and the handle in turns, and of each its best turn: how long a sleeping core takes to wake changes from
/// second to second on a shared machine, by ten times.
async fn two_processes() -> Result<(), AnyError> {
    let other = Other::start()?;
    let stream = TcpStream::connect(&other.raw).await?;
    stream.set_nodelay(true)?;
    let stream = Arc::new(tokio::sync::Mutex::new(stream));
    let ping = |_| {
        let stream = stream.clone();
        async move {
            let mut stream = stream.lock().await;
            let mut frame = [0; 64];
            stream.write_all(&frame).await.is_ok() && stream.read_exact(&mut frame).await.is_ok()
        }
    };
    let system = System::start(SystemConfig::loopback()).await?;
    let handle = system.handle_at(&other.actor, ACTOR);
    let (mut raw, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        raw.push(rounds(ping).await);
        ours.push(rounds(asks(&handle)).await);
    }
    let best = |mut turns: Vec<Times>| {
        turns.sort_by(|a, b| a.micros(50).total_cmp(&b.micros(50)));
        turns.swap_remove(0)
    };
    row("raw TCP ping-pong of 64 bytes, two processes", &best(raw), None);
    row("Handle, two processes", &best(ours), Some(throughput(asks(&handle)).await));
    Ok(())
}

async fn table() -> Result<(), AnyError> {
    #[allow(clippy::print_stdout, reason = "the table is the purpose of the program")]
    {
        println!("{:<44} {:>9} {:>9} {:>12}", "", "p50 us", "p99 us", "k calls/s");
    }
    plain_actix().await?;
    local().await?;
    spawned().await?;
    two_processes().await
}

fn main() -> Result<(), AnyError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match std::env::args().any(|argument| argument == "--other-process") {
        true => runtime.block_on(async { tokio::spawn(other_process()).await? }),
        // Spawned, because the thread that blocks on a future is not one of the workers.
        false => runtime.block_on(async { tokio::spawn(table()).await? }),
    }
}
