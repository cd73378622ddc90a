//! Several ranks on streams of one device: rounds, recordings, failures, epochs.

use std::time::{Duration, Instant};

use heliostat_kernels::cuda::exchange::{ExchangeFailure, Member, Phase, RowFormat};
use heliostat_kernels::cuda::{CudaError, Graph};

use super::cuda_support::device;
use super::reference::{Input, Scenario};
use super::world::{Path, Rank, World};
use super::{PATIENT, alone};

/// Inputs of all DP ranks for one round: each with another number of tokens, sometimes none.
pub(crate) fn inputs(scenario: &Scenario, round: u64) -> Vec<Input> {
    let most = scenario.shape.tokens_max;
    let tokens = |dp: u64| [most, 0, most / 2, 1, most - 1][(dp * 2 + round) as usize % 5];
    (0..scenario.dp.len() as u64).map(|dp| Input::random(scenario, 1000 * round + dp, tokens(dp))).collect()
}

/// Two of both roles; DP and EP ranks apart; more of one than of the other.
fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new((&[0, 1], &[0, 1]), (24, 8), 256, 9, RowFormat::Fp8),
        Scenario::new((&[0, 1], &[2, 3]), (24, 3), 160, 9, RowFormat::Bf16),
        Scenario::new((&[0], &[0, 1, 2]), (40, 2), 64, 3, RowFormat::Fp8),
        Scenario::new((&[5, 2, 7], &[2]), (12, 8), 160, 18, RowFormat::Fp8),
    ]
}

#[test]
fn ranks_on_streams_match_the_reference() {
    let _alone = alone();
    let Some(device) = device() else { return };
    for scenario in scenarios() {
        let mut world = World::new(&device, &scenario, PATIENT);
        for round in 0..6 {
            for rank in &mut world.ranks {
                rank.path = Path::ALL[round as usize / 2];
                rank.poison();
            }
            world.round(&inputs(&scenario, round), &format!("{scenario:?} round {round}"));
        }
    }
}

#[test]
fn recorded_rounds_follow_changing_routings() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let scenario = &scenarios()[0];
    let mut world = World::new(&device, scenario, PATIENT);
    let record = |rank: &Rank| rank.stream.capture(|stream| rank.round(stream)).unwrap();
    let graphs: Vec<Graph> = world.ranks.iter().map(record).collect();
    let replay = |world: &World, round: u64| {
        let inputs = inputs(scenario, round);
        for (rank, graph) in world.ranks.iter().zip(&graphs) {
            rank.load(&inputs);
            graph.launch(&rank.stream).unwrap();
        }
        world.synchronize();
        world.ranks.iter().for_each(|rank| rank.verify(&inputs, &format!("replay {round}")));
    };
    (0..50).for_each(|round| replay(&world, round));
    // A new epoch under the same recordings.
    world.ranks.iter_mut().for_each(|rank| rank.exchange.reset(&rank.stream, 9).unwrap());
    (50..54).for_each(|round| replay(&world, round));
    // Many rounds in flight without the host in between: the same input, so the same result.
    let last = inputs(scenario, 54);
    world.ranks.iter().for_each(|rank| rank.load(&last));
    for _ in 0..20 {
        world.ranks.iter().zip(&graphs).for_each(|(rank, graph)| graph.launch(&rank.stream).unwrap());
    }
    world.synchronize();
    world.ranks.iter().for_each(|rank| rank.verify(&last, "in flight"));
}

#[test]
fn a_silent_rank_is_named_in_time_and_the_next_epoch_works() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let scenario = Scenario::new((&[0, 4, 9], &[0, 4, 9]), (8, 3), 64, 3, RowFormat::Fp8);
    let timeout = Duration::from_millis(200);
    let mut world = World::new(&device, &scenario, timeout);
    world.round(&inputs(&scenario, 0), "before");
    // Rank 9 stays away; the others queue three rounds.
    let next = inputs(&scenario, 1);
    world.ranks.iter().for_each(|rank| rank.load(&next));
    let began = Instant::now();
    let queue = |rank: &Rank| -> Result<(), CudaError> { (0..3).try_for_each(|_| rank.round(&rank.stream)) };
    world.ranks[..2].iter().for_each(|rank| queue(rank).unwrap());
    world.synchronize();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    for rank in &world.ranks[..2] {
        let want = ExchangeFailure::Silent { ranks: 1 << 9, phase: Phase::Dispatch };
        assert_eq!(rank.exchange.status(), Err(want), "rank {}", rank.id);
        let rows = rank.exchange.permuted().segment_rows.download(&rank.stream).unwrap();
        assert_eq!(rows, [0; 3], "after a failure there are no rows");
        let out = rank.out.download(&rank.stream).unwrap();
        assert!(out.iter().all(|value| value.to_bits() == 0), "and zeros");
    }
    world.ranks.iter_mut().for_each(|rank| rank.exchange.reset(&rank.stream, 2).unwrap());
    (2..5).for_each(|round| world.round(&inputs(&scenario, round), "after"));
    // Flags of an old epoch count for nothing: rank 0 is alone in epoch 3.
    let stream = world.ranks[0].stream.clone();
    world.ranks[0].exchange.reset(&stream, 3).unwrap();
    queue(&world.ranks[0]).unwrap();
    world.synchronize();
    let want = ExchangeFailure::Silent { ranks: 1 << 4 | 1 << 9, phase: Phase::Dispatch };
    assert_eq!(world.ranks[0].exchange.status(), Err(want));
}

#[test]
fn an_abort_ends_the_wait() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let scenario = Scenario::new((&[0, 1], &[0, 1]), (8, 3), 64, 3, RowFormat::Bf16);
    let mut world = World::new(&device, &scenario, Duration::from_secs(60));
    world.ranks[0].load(&inputs(&scenario, 0));
    world.ranks[0].round(&world.ranks[0].stream).unwrap();
    let abort = world.ranks[0].exchange.abort_handle();
    let began = Instant::now();
    let aborter = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        abort.abort(0);
        std::thread::sleep(Duration::from_millis(30));
        abort.abort(1);
    });
    world.synchronize();
    let took = began.elapsed();
    aborter.join().unwrap();
    assert_eq!(world.ranks[0].exchange.status(), Err(ExchangeFailure::Aborted));
    assert!((Duration::from_millis(55)..Duration::from_secs(5)).contains(&took), "{took:?}");
    // Later epochs are not aborted, and the members may change under the way.
    let members: Vec<Member> = world.ranks.iter().map(Rank::member).collect();
    world.ranks.iter_mut().for_each(|rank| rank.connect(&members, 2, PATIENT));
    (1..4).for_each(|round| world.round(&inputs(&scenario, round), "after the abort"));
}

#[test]
fn too_many_rows_are_refused() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let mut scenario = Scenario::one(64, 8, 64, 9, RowFormat::Fp8);
    scenario.shape.rows_max = 9 * 128;
    let mut world = World::new(&device, &scenario, PATIENT);
    let mut input = Input::random(&scenario, 1, 64);
    input.slots = (0..64 * 8).map(|entry| entry % 9).collect();
    world.round(&[input.clone()], "fits");
    input.slots = (0..64 * 8).map(|entry| entry % 2).collect();
    input.slots[..7].copy_from_slice(&[2, 3, 4, 5, 6, 7, 8]);
    let rank = &world.ranks[0];
    rank.load(&[input.clone()]);
    rank.round(&rank.stream).unwrap();
    rank.stream.synchronize().unwrap();
    assert_eq!(rank.exchange.status(), Err(ExchangeFailure::Overflow));
    world.ranks.iter_mut().for_each(|rank| rank.exchange.reset(&rank.stream, 2).unwrap());
    input.slots = (0..64 * 8).map(|entry| entry % 9).collect();
    world.round(&[input], "fits again");
}
