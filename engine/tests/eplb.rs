//! What holds for every policy, whatever the loads and sizes.

#![allow(clippy::unwrap_used)]

use heliostat_engine::eplb::deepseek::{Cluster, rebalance_experts, rebalance_map};
use heliostat_engine::eplb::incremental::{Search, improve};
use heliostat_engine::eplb::{ExpertMap, LayerPlan, MapShape, map_balancedness, rank_loads};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn shape() -> impl Strategy<Value = MapShape> {
    (1u32..9, 1u32..6).prop_flat_map(|(ranks, per_rank)| {
        let slots = ranks * per_rank;
        (1..=slots).prop_map(move |experts| MapShape { experts, slots, ranks })
    })
}

/// A shape, a valid map of it and loads, some of them zero.
fn layer() -> impl Strategy<Value = (ExpertMap, Vec<f32>)> {
    shape().prop_flat_map(|shape| {
        let experts = shape.experts as usize;
        let rest = proptest::collection::vec(0..shape.experts, shape.slots as usize - experts);
        let slots = rest.prop_flat_map(move |rest| {
            Just((0..shape.experts).chain(rest).collect::<Vec<u32>>()).prop_shuffle()
        });
        let load = prop_oneof![1 => Just(0u32), 4 => 1u32..100, 1 => 1000u32..100_000];
        (slots, proptest::collection::vec(load, experts)).prop_map(move |(slots, loads)| {
            let loads = loads.into_iter().map(|load| load as f32).collect();
            (ExpertMap::new(shape, slots).unwrap(), loads)
        })
    })
}

/// Slots that hold an expert that an earlier slot of their rank holds already.
fn wasted(map: &ExpertMap) -> usize {
    let repeats =
        |experts: &[u32]| (1..experts.len()).filter(|&i| experts[..i].contains(&experts[i])).count();
    (0..map.shape().ranks).map(|rank| repeats(map.experts_of_rank(rank))).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn deepseek_gives_every_expert_a_slot_and_consistent_indices((map, loads) in layer()) {
        let shape = map.shape();
        let cluster = Cluster {
            num_replicas: shape.slots as usize,
            num_groups: 1,
            num_nodes: 1,
            num_gpus: shape.ranks as usize,
        };
        let layer = rebalance_experts(std::slice::from_ref(&loads), cluster).unwrap().remove(0);
        // `ExpertMap::new` checks that every expert has a slot.
        let new = ExpertMap::new(shape, layer.physical_to_logical.clone()).unwrap();
        prop_assert_eq!(&layer.replica_counts, &new.replica_counts());
        for (expert, slots) in (0u32..).zip(&layer.logical_to_physical) {
            let mut slots = slots.clone();
            slots.sort_unstable();
            prop_assert_eq!(&slots[..], new.slots_of(expert));
        }
        prop_assert_eq!(new, rebalance_map(&loads, shape, 1, 1).unwrap());
    }

    #[test]
    fn deepseek_keeps_groups_within_nodes(
        (nodes, gpus_per_node, groups_per_node, group_size, more) in (1usize..4, 1usize..4, 1usize..4, 1usize..4, 0usize..3),
        seed in proptest::collection::vec(0u32..1000, 27),
    ) {
        let groups = nodes * groups_per_node;
        let experts = groups * group_size;
        let gpus = nodes * gpus_per_node;
        let slots = (experts / nodes).div_ceil(gpus_per_node) * gpus + more * gpus;
        let loads: Vec<f32> = (0..experts).map(|e| seed[e % 27] as f32).collect();
        let cluster = Cluster { num_replicas: slots, num_groups: groups, num_nodes: nodes, num_gpus: gpus };
        let layer = rebalance_experts(&[loads], cluster).unwrap().remove(0);
        for group in 0..groups {
            let members = group * group_size..(group + 1) * group_size;
            let slots_per_node = slots / nodes;
            let mut homes: Vec<usize> =
                members.flat_map(|e| layer.logical_to_physical[e].clone()).map(|s| s as usize / slots_per_node).collect();
            homes.dedup();
            prop_assert_eq!(homes.len(), 1);
        }
    }

    #[test]
    fn incremental_never_makes_it_worse_and_wastes_no_slot((map, loads) in layer()) {
        let search = Search::default();
        let improved = improve(&map, &loads, &search);
        let (before, after) = (map_balancedness(&map, &loads), map_balancedness(&improved.map, &loads));
        prop_assert!(after >= before.min(search.target) - 1e-4, "{before} -> {after}");
        prop_assert!(wasted(&improved.map) <= wasted(&map));
        prop_assert_eq!(&improved, &improve(&map, &loads, &search), "the same input gives the same plan");
        if improved.moves.is_empty() {
            prop_assert_eq!(&improved.map, &map);
        }
        let receives = LayerPlan::between(0, &map, &improved.map).num_receives();
        prop_assert!(receives <= 2 * improved.moves.len());
        // What it reports is what a rank sees.
        let total: f32 = rank_loads(&improved.map, &improved.map.slot_loads(&loads)).iter().sum();
        prop_assert!((total - loads.iter().sum::<f32>()).abs() <= 1e-3 * total.max(1.0));
    }
}

/// 32 ranks, 256 experts, 32 redundant slots; each load drifts by about 20%.
#[test]
fn incremental_restores_balance_with_a_tenth_of_the_moves() {
    let shape = MapShape { experts: 256, slots: 288, ranks: 32 };
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..3 {
        let normal = |rng: &mut ChaCha8Rng| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
        let before: Vec<f32> = (0..256).map(|_| normal(&mut rng).exp()).collect();
        let now: Vec<f32> = before.iter().map(|load| load * (0.2 * normal(&mut rng)).exp()).collect();
        let stale = rebalance_map(&before, shape, 1, 1).unwrap();
        let receives = |map: &ExpertMap| LayerPlan::between(0, &stale, map).num_receives();
        let few = improve(&stale, &now, &Search::default()).map;
        assert!(map_balancedness(&stale, &now) < 0.9 && map_balancedness(&few, &now) >= 0.979);
        assert!(receives(&few) < 40, "{}", receives(&few));
        assert!(receives(&rebalance_map(&now, shape, 1, 1).unwrap()) > 250);
        assert!(wasted(&few) <= wasted(&stale));
    }
}
