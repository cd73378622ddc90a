//! How long planning takes and what it brings: 58 layers of 256 experts, as in DeepSeek-V3.
//!
//! Loads are log-normal (sigma 1). A map that was made for them by the `deepseek` policy is stale after each expert's
//! load was multiplied by a log-normal drift. Run with `cargo bench -p heliostat-engine --bench eplb`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use heliostat_engine::eplb::deepseek::rebalance_map;
use heliostat_engine::eplb::incremental::Search;
use heliostat_engine::eplb::{ExpertMap, Gate, Layout, MapShape, Policy, map_balancedness, propose};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const LAYERS: usize = 58;

fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f32, f32) = (rng.random::<f32>().max(1e-12), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

fn log_normal(rng: &mut ChaCha8Rng, sigma: f32) -> f32 {
    (sigma * normal(rng)).exp()
}

fn mean(values: impl Iterator<Item = f32>) -> f32 {
    let all: Vec<f32> = values.collect();
    all.iter().sum::<f32>() / all.len() as f32
}

fn main() {
    println!(
        "{LAYERS} layers x 256 experts x 288 slots; balance = mean rank load / max rank load, mean over layers"
    );
    println!(
        "{:>5} {:>6} {:>7}  {:<12} {:>8} {:>9} {:>10}",
        "ranks", "drift", "stale", "policy", "balance", "receives", "plan ms"
    );
    let targets = std::env::args().filter_map(|arg| arg.parse::<f32>().ok()).collect::<Vec<_>>();
    for ranks in [32, 72] {
        for drift in [0.05, 0.2, 0.5] {
            let shape = MapShape { experts: 256, slots: 288, ranks };
            let mut rng = ChaCha8Rng::seed_from_u64(42);
            let old: Vec<Vec<f32>> =
                (0..LAYERS).map(|_| (0..256).map(|_| 1e4 * log_normal(&mut rng, 1.0)).collect()).collect();
            let maps = old.iter().map(|loads| rebalance_map(loads, shape, 1, 1).expect("the shape is fine"));
            let present = Layout::new(maps.collect::<Vec<ExpertMap>>()).expect("one shape");
            let now: Vec<Vec<f32>> = old
                .iter()
                .map(|loads| loads.iter().map(|x| x * log_normal(&mut rng, drift)).collect())
                .collect();
            let stale =
                mean(present.layers().iter().zip(&now).map(|(map, loads)| map_balancedness(map, loads)));
            let mut policies =
                vec![("deepseek".to_string(), Policy::Deepseek { num_groups: 1, num_nodes: 1 })];
            for &target in if targets.is_empty() { &[0.98][..] } else { &targets } {
                let search = Search { target, ..Search::default() };
                policies.push((format!("to {target}"), Policy::Incremental(search)));
            }
            for (name, policy) in policies {
                let start = Instant::now();
                let proposal =
                    propose(&policy, &Gate::open(), &present, &now, 1, 0).expect("the shape is fine");
                let ms = start.elapsed().as_secs_f64() * 1e3;
                let balance = mean(proposal.layers.iter().map(|layer| layer.after));
                let receives = mean(proposal.layers.iter().map(|layer| layer.receives as f32));
                println!(
                    "{ranks:>5} {drift:>6} {stale:>7.3}  {name:<12} {balance:>8.3} {receives:>9.1} {ms:>10.1}"
                );
            }
        }
    }
}
