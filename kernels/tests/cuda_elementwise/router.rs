//! The choice of experts and slots.

use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cpu::router::{GroupScore, Groups, Router, Scoring};
use heliostat_kernels::cuda::router::{Routing, RoutingArgs, RoutingRule, slot_table};

use crate::cuda_support::{assert_close, normal};
use crate::{Gpu, NONE};

const QWEN3: RoutingRule = RoutingRule {
    experts: 128,
    scoring: Scoring::Softmax,
    groups: None,
    top_k: 8,
    normalize: true,
    scale: 1.0,
};

fn groups(count: usize, top: usize, score: GroupScore) -> Option<Groups> {
    Some(Groups { count, top, score })
}

fn rules() -> Vec<(&'static str, RoutingRule)> {
    use GroupScore::{Best, TopTwo};
    let v3 = RoutingRule {
        experts: 256,
        scoring: Scoring::Sigmoid,
        groups: groups(8, 4, TopTwo),
        scale: 2.5,
        ..QWEN3
    };
    let v2 = RoutingRule {
        experts: 160,
        groups: groups(8, 3, Best),
        top_k: 6,
        normalize: false,
        scale: 16.0,
        ..QWEN3
    };
    vec![
        ("v3", v3),
        ("v2", v2),
        ("qwen3", QWEN3),
        ("tiny v3", RoutingRule { experts: 8, groups: groups(4, 2, TopTwo), top_k: 2, ..v3 }),
        ("tiny", RoutingRule { experts: 32, groups: groups(4, 2, TopTwo), top_k: 4, ..v3 }),
        ("odd", RoutingRule { experts: 45, groups: groups(15, 7, TopTwo), top_k: 5, ..v3 }),
        ("single", RoutingRule { experts: 12, groups: groups(12, 7, TopTwo), top_k: 5, ..v3 }),
        ("many groups", RoutingRule { experts: 320, groups: groups(32, 7, Best), ..v3 }),
        ("kimi", RoutingRule { experts: 384, groups: None, ..v3 }),
        ("most", RoutingRule { experts: 512, groups: None, top_k: 32, ..v3 }),
        ("all", RoutingRule { experts: 3, top_k: 3, ..QWEN3 }),
    ]
}

fn spec(rule: &RoutingRule, bias: Option<&[f32]>, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
    let RoutingRule { scoring, groups, top_k, normalize, scale, .. } = *rule;
    let router = Router { scoring, bias, groups, top_k, normalize, scale };
    let len = logits.len() / rule.experts * top_k;
    let (mut ids, mut weights) = (vec![0; len], vec![0.0; len]);
    Cpu::single_threaded().route(&router, logits, &mut ids, &mut weights);
    (ids, weights)
}

/// Ids, slots, weights and loads of rows at `positions`.
type Choice = (Vec<u32>, Vec<u32>, Vec<f32>, Vec<u32>);

struct Case<'a> {
    rule: RoutingRule,
    bias: Option<&'a [f32]>,
    physical_to_logical: &'a [u32],
    salt: u64,
}

fn choose(gpu: &Gpu, routing: &Routing, case: &Case<'_>, logits: &[f32], positions: &[u32]) -> Choice {
    let (rows, rule) = (positions.len(), case.rule);
    let bias = case.bias.map(|bias| gpu.up(bias));
    let table = gpu.up(&slot_table(rule.experts, case.physical_to_logical));
    let (ids, slots) = (gpu.up(&vec![77; rows * rule.top_k]), gpu.up(&vec![77; rows * rule.top_k]));
    let (weights, loads) = (gpu.up(&vec![f32::NAN; rows * rule.top_k]), gpu.up(&vec![5; rule.experts]));
    let args = RoutingArgs {
        rows,
        rule,
        logits: &gpu.up(logits),
        positions: &gpu.up(positions),
        bias: bias.as_ref(),
        slot_table: Some(&table),
        salt: case.salt,
        ids: &ids,
        slots: &slots,
        weights: &weights,
        loads: Some(&loads),
    };
    routing.run(&gpu.stream, &args).unwrap();
    (gpu.down(&ids), gpu.down(&slots), gpu.down(&weights), gpu.down(&loads))
}

/// The expert map's rule, again.
fn slot_for(physical_to_logical: &[u32], expert: u32, key: u64) -> u32 {
    let slots: Vec<u32> =
        (0u32..).zip(physical_to_logical).filter(|(_, of)| **of == expert).map(|(slot, _)| slot).collect();
    let mut x = key ^ (u64::from(expert) << 40) ^ 0x9e37_79b9_7f4a_7c15;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    slots[((u128::from(x) * slots.len() as u128) >> 64) as usize]
}

#[test]
fn every_rule_chooses_as_the_cpu_does() {
    let Some(gpu) = Gpu::open() else { return };
    let routing = Routing::new(&gpu.device).unwrap();
    let rows = 131;
    for (name, rule) in rules() {
        let experts = rule.experts;
        let logits: Vec<f32> = normal(1, rows * experts).iter().map(|x| x * 2.0).collect();
        let bias: Vec<f32> = normal(2, experts).iter().map(|x| x * 0.1).collect();
        let bias = (rule.scoring == Scoring::Sigmoid).then_some(&bias[..]);
        let map: Vec<u32> = (0..experts as u32 + 11).map(|slot| slot * 5 % experts as u32).collect();
        let map: Vec<u32> = (0..experts as u32).rev().chain(map.into_iter().skip(experts)).collect();
        let case = Case { rule, bias, physical_to_logical: &map, salt: 1 << 33 };
        let positions: Vec<u32> =
            (0..rows as u32).map(|row| if row % 10 == 4 { NONE } else { row }).collect();
        let (ids, slots, weights, loads) = choose(&gpu, &routing, &case, &logits, &positions);
        let (mut want_ids, mut want_weights) = spec(&rule, bias, &logits);
        let mut want_slots = Vec::new();
        let mut want_loads = vec![5; experts];
        let by_row = want_ids.chunks_mut(rule.top_k).zip(want_weights.chunks_mut(rule.top_k));
        for (row, (ids, weights)) in by_row.enumerate() {
            if positions[row] == NONE {
                ids.fill(NONE);
                weights.fill(0.0);
                want_slots.extend(ids.iter());
                continue;
            }
            ids.iter().for_each(|&id| want_loads[id as usize] += 1);
            want_slots.extend(ids.iter().map(|&id| slot_for(&map, id, case.salt + row as u64)));
        }
        assert_eq!(ids, want_ids, "{name}");
        assert_eq!(slots, want_slots, "{name}");
        assert_eq!(loads, want_loads, "{name}");
        match rule.scoring {
            Scoring::Sigmoid => assert_eq!(weights, want_weights, "{name}"),
            Scoring::Softmax => assert_close(&weights, &want_weights, 1e-12, name),
        }
        // A row alone.
        let alone = choose(&gpu, &routing, &case, &logits[130 * experts..], &[0]);
        let last = 130 * rule.top_k;
        assert_eq!((&alone.0[..], &alone.2[..]), (&ids[last..], &weights[last..]), "{name}");
    }
}

#[test]
fn ties_and_nonsense_choose_as_on_the_cpu() {
    let Some(gpu) = Gpu::open() else { return };
    let routing = Routing::new(&gpu.device).unwrap();
    let inf = f32::INFINITY;
    for (name, rule) in rules() {
        let experts = rule.experts;
        // Equal; all NaN; one NaN; saturated; two values; infinite; negative infinite.
        let logits: Vec<f32> = (0..7 * experts)
            .map(|at| match (at / experts, at % experts) {
                (0, _) => 0.25,
                (1, _) | (2, 1) => f32::NAN,
                (3, e) => 100.0 + e as f32,
                (4, e) => (e % 2) as f32,
                (5, 2) => inf,
                (6, 0) => -inf,
                (_, e) => e as f32 * 0.125 - 2.0,
            })
            .collect();
        let map: Vec<u32> = (0..experts as u32).collect();
        let case = Case { rule, bias: None, physical_to_logical: &map, salt: 0 };
        let (ids, slots, weights, _) = choose(&gpu, &routing, &case, &logits, &[0; 7]);
        let (want_ids, want_weights) = spec(&rule, None, &logits);
        for row in 0..7 {
            let at = row * rule.top_k..(row + 1) * rule.top_k;
            assert_eq!(ids[at.clone()], want_ids[at.clone()], "{name}: row {row}");
            for (got, want) in weights[at.clone()].iter().zip(&want_weights[at]) {
                let close = (got - want).abs() <= 1e-6 * want.abs();
                assert!(close || got.is_nan() && want.is_nan(), "{name}: row {row}: {got} {want}");
            }
        }
        assert_eq!(slots, ids, "{name}");
    }
}
