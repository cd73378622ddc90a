//! The head's core with 1,000 nodes and 100,000 actors: what it holds in memory, what a heartbeat costs, and how long the
//! loss of a node takes to plan.
//!
//! `cargo bench -p heliostat-runtime --bench scale`; nodes and workers are simulated, the head's decisions are real.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark")]

use std::time::{Duration, Instant};

use heliostat_runtime::handle::{ActorAddr, ActorId, Incarnation, ProcessId};
use heliostat_runtime::head::Patience;
use heliostat_runtime::head::core::{Command, Event, HeadState};
use heliostat_runtime::head::messages::{
    Apply, NodeReport, NodeStage, ProcessStatus, WorkerPhase, WorkerProcess, WorkerReport,
};
use heliostat_runtime::spec::{
    ActorSpec, Capacity, Labels, PlacementGroupSpec, Quantity, Resources, Strategy,
};

const NODES: usize = 1000;
const ACTORS: usize = 100_000;
/// Actors that are applied together.
const BATCH: usize = 1000;
/// Ticks of 10 ms that follow a loss.
const TICKS: usize = 20;

struct World {
    head: HeadState,
    now: Duration,
    /// Workers of each node.
    nodes: Vec<Vec<WorkerProcess>>,
    seqs: Vec<u64>,
}

fn name(node: usize) -> String {
    format!("node-{node:04}")
}

fn addr(actor: ActorId, incarnation: Incarnation, process: u64) -> ActorAddr {
    ActorAddr { actor, incarnation, process: ProcessId(process), endpoint: "10.0.0.1:7000".into() }
}

impl World {
    fn report(&mut self, node: usize, registering: bool) -> Vec<Command> {
        self.seqs[node] += 1;
        let report = NodeReport {
            name: name(node),
            boot: node as u64 + 1,
            seq: self.seqs[node],
            registering,
            addr: addr(ActorId::NODE, Incarnation(0), node as u64 + 1),
            pid: 1,
            devices: Vec::new(),
            capacity: Capacity { cpus: 64, memory: 1 << 38, ..Capacity::default() },
            labels: Labels::from([("rack".into(), format!("r{}", node / 20))]),
            packages: Vec::new(),
            stage: NodeStage::Serving,
            workers: self.nodes[node].clone(),
            term: 0,
        };
        self.head.handle(self.now, Event::NodeReport(report))
    }

    /// Does what the head orders: workers start, report, create their actors. Returns how many were started.
    fn carry_out(&mut self, commands: Vec<Command>) -> usize {
        let mut started = 0;
        for command in commands {
            let Command::StartWorker { node, order } = command else { continue };
            started += 1;
            let index: usize = node["node-".len()..].parse().unwrap();
            self.nodes[index].push(WorkerProcess {
                actor: order.actor.clone(),
                incarnation: order.incarnation,
                device: None,
                pid: 100,
                status: ProcessStatus::Running,
            });
            for (seq, phase) in [
                (1, WorkerPhase::Waiting),
                (
                    2,
                    WorkerPhase::Ready(addr(
                        ActorId::named(&order.actor),
                        order.incarnation,
                        order.incarnation.0,
                    )),
                ),
            ] {
                let report = WorkerReport {
                    actor: order.actor.clone(),
                    incarnation: order.incarnation,
                    seq,
                    registering: seq == 1,
                    addr: addr(ActorId::WORKER, Incarnation(0), order.incarnation.0),
                    pid: 100,
                    node: node.clone(),
                    device: None,
                    phase,
                    announced: None,
                    views: Vec::new(),
                    held: Vec::new(),
                    term: 0,
                };
                self.head.handle(self.now, Event::WorkerReport(report));
            }
        }
        started
    }
}

fn spec(n: usize) -> ActorSpec {
    let resources = Resources::cpus(Quantity::milli(500));
    ActorSpec { resources, ..ActorSpec::new(format!("actor-{n:06}"), "worker", vec![0; 64]) }
}

/// Resident memory of this process, MiB.
fn rss() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// Nodes are lost one after the other.
fn losses(world: &mut World) {
    let mut worst = Duration::ZERO;
    for lost in 0..20 {
        let commands =
            world.head.handle(world.now, Event::NodeDisconnected { node: name(lost), boot: lost as u64 + 1 });
        assert!(commands.is_empty());
        let on_it = world.nodes[lost].len();
        // The others are heard of in the meantime, so that it is the only one.
        world.now += Patience::default().agent_grace / 2;
        for other in lost + 1..NODES {
            assert!(world.report(other, false).is_empty());
        }
        world.now += Patience::default().agent_grace / 2;
        // The loss, and what follows when the back-off of its actors has passed.
        let (mut planned, mut started) = (Duration::ZERO, 0);
        for _ in 0..TICKS {
            let start = Instant::now();
            let commands = world.head.handle(world.now, Event::Tick);
            planned += start.elapsed();
            started += world.carry_out(commands);
            world.now += Duration::from_millis(10);
        }
        worst = worst.max(planned);
        // Those that came from a node that was lost before wait longer, as every second death does.
        assert!(started >= ACTORS / NODES, "{started} of {on_it} are started elsewhere");
    }
    println!(
        "the loss of a node with {} actors is planned within {:.1} ms (worst of 20)",
        ACTORS / NODES,
        worst.as_secs_f64() * 1e3
    );
}

fn main() {
    let before = rss();
    let mut world = World {
        head: HeadState::new(Patience::default()),
        now: Duration::from_secs(1),
        nodes: vec![Vec::new(); NODES],
        seqs: vec![0; NODES],
    };
    for node in 0..NODES {
        world.report(node, true);
    }
    let start = Instant::now();
    for batch in 0..ACTORS / BATCH {
        let specs = (batch * BATCH..(batch + 1) * BATCH).map(spec).collect();
        let (_, commands) = world.head.apply(world.now, Apply::merge(specs)).unwrap();
        assert_eq!(world.carry_out(commands), BATCH);
    }
    let took = start.elapsed();
    for node in 0..NODES {
        world.report(node, false);
    }
    let processes: usize = world.nodes.iter().map(Vec::len).sum();
    println!(
        "{NODES} nodes, {processes} actors, registered and ready in {:.1} s ({:.0} us each)",
        took.as_secs_f64(),
        took.as_micros() as f64 / ACTORS as f64
    );
    println!("memory of the head's core (with what simulates nodes): {:.0} MiB", rss() - before);

    let start = Instant::now();
    for node in 0..NODES {
        world.now += Duration::from_micros(500);
        let commands = world.report(node, false);
        assert!(commands.is_empty());
    }
    println!(
        "a heartbeat of a node with {} workers: {:.0} us",
        ACTORS / NODES,
        start.elapsed().as_micros() as f64 / NODES as f64
    );

    losses(&mut world);

    let gang = PlacementGroupSpec::new("gang", 128, Resources::cpus(2)).strategy(Strategy::StrictSpread);
    let gang = PlacementGroupSpec { topology: None, ..gang };
    let start = Instant::now();
    let commands = world.head.apply_placement_group(world.now, gang).unwrap();
    let asked = commands.iter().filter(|command| matches!(command, Command::PrepareBundles { .. })).count();
    assert_eq!(asked, 128);
    println!(
        "128 bundles, each on a node of its own, are planned in {:.1} ms",
        start.elapsed().as_secs_f64() * 1e3
    );
}
