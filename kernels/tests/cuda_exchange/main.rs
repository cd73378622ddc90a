//! Dispatch and combine on CUDA devices against a host reference, to the last bit.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failed setup is a failed test; the bench prints"
)]

#[path = "../cuda_support/mod.rs"]
mod cuda_support;
mod nccl;
mod processes;
mod protocol;
mod reference;
mod world;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cuda_support::{assert_compiles, device, time_us};
use heliostat_kernels::cuda::exchange::{ExchangeShape, OwnResults, RowFormat, source};
use heliostat_kernels::cuda::{Device, Graph, Stream};
use reference::{Input, Scenario};
use world::{Path, Rank, World};

/// One test at a time: ranks on streams wait for each other, and streams of other tests would share their queues.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

const PATIENT: Duration = Duration::from_secs(10);

#[test]
fn compiles() {
    assert_compiles([source()]);
}

#[test]
fn the_worst_case_holds_every_routing() {
    // One token with all its choices on different slots, and more slots than choices.
    assert_eq!(ExchangeShape::rows_worst(1, 1, 8, 18), 8 * 128);
    // 300 entries over 3 slots: 127 of padding each at most.
    assert_eq!(ExchangeShape::rows_worst(1, 100, 3, 3), (300 + 3 * 127_usize).next_multiple_of(128));
    assert_eq!(ExchangeShape::rows_worst(0, 256, 8, 9), 0);
}

/// hidden, top_k, slots, format, tokens_max.
type Sizes = (usize, usize, usize, RowFormat, usize);

fn check_one_rank(shapes: &[Sizes]) {
    let _alone = alone();
    let Some(device) = device() else { return };
    for &(hidden, top_k, slots, format, tokens_max) in shapes {
        let scenario = Scenario::one(tokens_max, top_k, hidden, slots, format);
        let mut world = World::new(&device, &scenario, PATIENT);
        for (seed, tokens) in [(1, tokens_max), (2, tokens_max / 3), (3, 0), (4, 1)] {
            let path = Path::ALL[seed as usize % 3];
            world.ranks[0].path = path;
            world.ranks[0].poison();
            let inputs = [Input::random(&scenario, seed, tokens)];
            world.round(&inputs, &format!("{hidden} {top_k} {slots} {format:?} {tokens} {path:?}"));
        }
    }
}

#[test]
fn one_rank_matches_the_reference() {
    check_one_rank(&[
        (64, 2, 3, RowFormat::Bf16, 12),
        (160, 3, 9, RowFormat::Fp8, 40),
        (160, 3, 9, RowFormat::Bf16, 100),
        (256, 8, 18, RowFormat::Fp8, 300),
        (256, 2, 40, RowFormat::Bf16, 64),
    ]);
}

#[test]
fn one_rank_with_many_rows_matches_the_reference() {
    check_one_rank(&[
        (7168, 8, 18, RowFormat::Fp8, 68),
        (7168, 8, 288, RowFormat::Fp8, 8),
        (64, 8, 18, RowFormat::Fp8, 8192),
        (128, 8, 512, RowFormat::Bf16, 1000),
    ]);
}

/// Microseconds of each kernel of a round on one rank.
#[test]
#[ignore = "measures"]
fn bench() {
    let _alone = alone();
    let Some(device) = device() else { return };
    println!("{}: us per kernel, hidden 7168, top 8 of 18 slots, FP8 rows", device.properties().name);
    println!("   T   signal   layout   gather  combine     push   reduce  reduce from pushed    round");
    for tokens in [8, 64, 128, 256] {
        let scenario = Scenario::one(tokens, 8, 7168, 18, RowFormat::Fp8);
        let mut world = World::new(&device, &scenario, PATIENT);
        let inputs = [Input::random(&scenario, 7, tokens)];
        world.round(&inputs, "bench");
        let rank = &mut world.ranks[0];
        let stream = rank.stream.clone();
        let signal = time_us(&stream, (9, 20), |s, _| rank.signal(s));
        // DP and EP rounds went apart: signals without a layout.
        rank.exchange.reset(&stream, 2).unwrap();
        let both = time_us(&stream, (9, 20), |s, _| rank.signal(s).and_then(|()| rank.exchange.layout(s)));
        // From here each kernel repeats the round that happened last.
        let gather = time_us(&stream, (9, 20), |s, _| rank.exchange.gather(s));
        rank.exchange.finish(&stream).unwrap();
        let combine = |own| time_us(&stream, (9, 20), |s, _| rank.exchange.combine(s, &rank.results, own));
        let (stay, push) = (combine(OwnResults::InPlace), combine(OwnResults::Pushed));
        let reduce = time_us(&stream, (9, 20), |s, _| rank.reduce(s));
        rank.path = Path::Pushed;
        let pushed = time_us(&stream, (9, 20), |s, _| rank.reduce(s));
        rank.path = Path::InPlace;
        let round = time_us(&stream, (9, 20), |s, _| rank.round_without_experts(s));
        stream.synchronize().unwrap();
        rank.exchange.status().unwrap();
        println!(
            "{tokens:4} {signal:8.2} {:8.2} {gather:8.2} {stay:8.2} {push:8.2} {reduce:8.2} {pushed:19.2} {round:8.2}",
            both - signal
        );
    }
    println!("two ranks of 9 slots each, on one device: us per round");
    for tokens in [8, 64, 128] {
        println!("{tokens:4} {:8.2}", two_ranks_us(&device, tokens));
    }
}

/// Microseconds of a round without experts of two ranks that share the device.
fn two_ranks_us(device: &Device, tokens: usize) -> f64 {
    const ROUNDS: usize = 20;
    let scenario = Scenario::new((&[0, 1], &[0, 1]), (tokens, 8), 7168, 9, RowFormat::Fp8);
    let world = World::new(device, &scenario, PATIENT);
    let inputs = [7, 8].map(|seed| Input::random(&scenario, seed, tokens));
    world.round(&inputs, "bench");
    let record = |rank: &Rank| {
        let rounds = |s: &Stream| (0..ROUNDS).try_for_each(|_| rank.round_without_experts(s));
        rank.stream.capture(rounds).unwrap()
    };
    let graphs: Vec<Graph> = world.ranks.iter().map(record).collect();
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let before = world.ranks[0].stream.record().unwrap();
            world.ranks.iter().zip(&graphs).for_each(|(rank, graph)| graph.launch(&rank.stream).unwrap());
            let after = world.ranks[0].stream.record().unwrap();
            after.synchronize().unwrap();
            world.synchronize();
            f64::from(after.elapsed_ms(&before).unwrap()) * 1e3 / ROUNDS as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    world.ranks.iter().for_each(|rank| rank.exchange.status().unwrap());
    times[times.len() / 2]
}
