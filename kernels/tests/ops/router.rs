//! The choice of experts.

use heliostat_kernels::cpu::router::{GroupScore, Groups, Router, Scoring};
use heliostat_kernels::cpu::{Cpu, plain};

use crate::{assert_close, bits, devices, random};

fn route(cpu: &Cpu, router: &Router<'_>, logits: &[f32], experts: usize) -> (Vec<u32>, Vec<f32>) {
    let len = logits.len() / experts * router.top_k;
    let (mut ids, mut weights) = (vec![u32::MAX; len], vec![f32::NAN; len]);
    cpu.route(router, logits, &mut ids, &mut weights);
    (ids, weights)
}

const QWEN3: Router<'_> =
    Router { scoring: Scoring::Softmax, bias: None, groups: None, top_k: 8, normalize: true, scale: 1.0 };

#[test]
fn every_rule_agrees_with_plain() {
    let experts = 64;
    let bias: Vec<f32> = random(1, experts).iter().map(|b| b * 0.2).collect();
    let groups = |score| Some(Groups { count: 8, top: 3, score });
    let v3 = Router {
        scoring: Scoring::Sigmoid,
        bias: Some(&bias),
        groups: groups(GroupScore::TopTwo),
        scale: 2.5,
        ..QWEN3
    };
    let v2 = Router { groups: groups(GroupScore::Best), normalize: false, scale: 16.0, ..QWEN3 };
    let logits: Vec<f32> = random(2, 200 * experts).iter().map(|x| x * 4.0).collect();
    for (name, router) in
        [("v3", v3), ("v2", v2), ("greedy", Router { normalize: false, ..QWEN3 }), ("qwen3", QWEN3)]
    {
        let (mut want_ids, mut want_weights) = (vec![0; 200 * 8], vec![0.0; 200 * 8]);
        plain::route(&router, &logits, &mut want_ids, &mut want_weights);
        for cpu in devices() {
            let (ids, weights) = route(&cpu, &router, &logits, experts);
            assert_eq!(ids, want_ids, "{name}");
            assert_close(&weights, &want_weights, 1e-5, name);
            let alone: Vec<f32> = logits
                .chunks(experts)
                .flat_map(|row| route(&Cpu::single_threaded(), &router, row, experts).1)
                .collect();
            assert!(bits(&alone) == bits(&weights), "{name} on {cpu:?}");
        }
    }
}

/// A hand-made case of DeepSeek-V3's rule: groups {0,1} {2,3} {4,5}; the bias decides the choice, not the weight.
#[test]
fn bias_chooses_and_scores_weigh() {
    let logit = |p: f32| (p / (1.0 - p)).ln();
    let logits = [0.5, 0.5, 0.9, 0.1, 0.6, 0.3].map(logit);
    let bias = [0.0, 0.3, 0.0, 0.0, 0.0, 0.5];
    let router = Router {
        scoring: Scoring::Sigmoid,
        bias: Some(&bias),
        // Group scores: 0.5 + 0.8, 0.9 + 0.1, 0.6 + 0.8: the best single expert is in the group left out.
        groups: Some(Groups { count: 3, top: 2, score: GroupScore::TopTwo }),
        top_k: 3,
        normalize: true,
        scale: 2.0,
    };
    let (ids, weights) = route(&Cpu::single_threaded(), &router, &logits, 6);
    assert_eq!(ids, [1, 5, 4], "0.8 and 0.8 tie: the lower index comes first");
    let want = [0.5, 0.3, 0.6].map(|w| w / 1.4 * 2.0);
    assert_close(&weights, &want, 1e-6, "weights");
}

#[test]
fn ties_go_to_the_lowest_index_and_nan_to_different_experts() {
    let router = Router { top_k: 3, normalize: false, ..QWEN3 };
    let (ids, _) = route(&Cpu::single_threaded(), &router, &[0.0; 10], 5);
    assert_eq!(ids, [0, 1, 2, 0, 1, 2]);
    let (ids, _) = route(&Cpu::single_threaded(), &router, &[f32::NAN; 5], 5);
    assert_eq!(ids, [0, 1, 2]);
    let (ids, weights) = route(&Cpu::single_threaded(), &router, &[], 5);
    assert!(ids.is_empty() && weights.is_empty());
}
