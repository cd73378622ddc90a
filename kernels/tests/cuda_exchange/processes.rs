//! Ranks as processes that share one device, their heaps opened by CUDA IPC.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use heliostat_kernels::cuda::exchange::{ExchangeFailure, Member, RowFormat, Transport};
use heliostat_kernels::cuda::heap::HeapHandle;

use super::alone;
use super::cuda_support::device;
use super::protocol::inputs;
use super::reference::Scenario;
use super::world::Rank;

const RANKS: u32 = 3;
const ROUNDS: u64 = 12;
/// The rank that leaves after the rounds.
const LEAVES: u32 = 2;

fn scenario() -> Scenario {
    Scenario::new((&[0, 1, 2], &[0, 1, 2]), (24, 8), 256, 9, RowFormat::Fp8)
}

/// Writes what others wait for, whole at once.
fn publish(dir: &Path, name: &str, bytes: &[u8]) {
    let beside = dir.join(format!("{name}.tmp"));
    std::fs::write(&beside, bytes).unwrap();
    std::fs::rename(beside, dir.join(name)).unwrap();
}

fn await_file(dir: &Path, name: &str) -> Vec<u8> {
    let began = Instant::now();
    loop {
        if let Ok(bytes) = std::fs::read(dir.join(name)) {
            return bytes;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "nobody wrote {name}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn ranks_in_processes_match_the_reference() {
    let _alone = alone();
    if device().is_none() {
        return;
    }
    let dir = std::env::temp_dir().join(format!("heliostat-exchange-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let children: Vec<_> = (0..RANKS)
        .map(|rank| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "processes::one_rank", "--ignored", "--nocapture"])
                .env("HELIOSTAT_TEST_RANK", rank.to_string())
                .env("HELIOSTAT_TEST_DIR", &dir)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut failed = false;
    for (rank, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if !output.status.success() {
            eprintln!("rank {rank}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
            failed = true;
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(!failed);
}

#[test]
#[ignore = "a part of another test"]
fn one_rank() {
    let variable = |name: &str| std::env::var(name).ok();
    let (Some(id), Some(dir)) = (variable("HELIOSTAT_TEST_RANK"), variable("HELIOSTAT_TEST_DIR")) else {
        return;
    };
    let (id, dir): (u32, &Path) = (id.parse().unwrap(), Path::new(&dir));
    let (device, scenario) = (device().unwrap(), scenario());
    let mut rank = Rank::new(&device, &scenario, id, Transport::Peer);
    publish(dir, &format!("handle-{id}"), &rank.member().heap.to_bytes());
    let member = |rank: u32| {
        let bytes = await_file(dir, &format!("handle-{rank}"));
        Member { rank, heap: HeapHandle::from_bytes(&bytes).unwrap() }
    };
    let members: Vec<Member> = (0..RANKS).map(member).collect();
    rank.connect(&members, 1, Duration::from_secs(15));
    // A rank may signal before another has connected: flags outlive a reset.
    let graph = rank.stream.capture(|stream| rank.round(stream)).unwrap();
    for round in 0..ROUNDS {
        let inputs = inputs(&scenario, round);
        rank.load(&inputs);
        graph.launch(&rank.stream).unwrap();
        rank.stream.synchronize().unwrap();
        rank.verify(&inputs, &format!("round {round}"));
    }
    publish(dir, &format!("done-{id}"), &[]);
    (0..RANKS).for_each(|rank| drop(await_file(dir, &format!("done-{rank}"))));
    if id == LEAVES {
        return;
    }
    // The one that left is named; what it mapped stays reachable until it is closed.
    rank.connect(&members, 2, Duration::from_millis(500));
    rank.load(&inputs(&scenario, 0));
    graph.launch(&rank.stream).unwrap();
    rank.stream.synchronize().unwrap();
    let Err(ExchangeFailure::Silent { ranks, .. }) = rank.exchange.status() else {
        panic!("{:?}", rank.exchange.status())
    };
    assert_eq!(ranks & 1 << LEAVES, 1 << LEAVES, "{ranks:#b}");
    publish(dir, &format!("failed-{id}"), &[]);
    (0..LEAVES).for_each(|rank| drop(await_file(dir, &format!("failed-{rank}"))));
    // The others go on without it under the same recording.
    let shape = rank.scenario.shape;
    rank.scenario = Scenario { dp: vec![0, 1], ep: vec![0, 1], ..scenario };
    assert_eq!(rank.scenario.shape, shape);
    rank.connect(&members, 3, Duration::from_secs(15));
    for round in 0..3 {
        let inputs = inputs(&rank.scenario, round);
        rank.load(&inputs);
        graph.launch(&rank.stream).unwrap();
        rank.stream.synchronize().unwrap();
        rank.verify(&inputs, &format!("round {round} of two"));
    }
    publish(dir, &format!("end-{id}"), &[]);
    (0..LEAVES).for_each(|rank| drop(await_file(dir, &format!("end-{rank}"))));
}
