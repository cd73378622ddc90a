//! Every CPU operation against its plain version, and the hard rule: bits do not depend on neighbours, threads or
//! the instruction set.

mod attention;
mod elementwise;
mod matmul;
mod router;
mod weight;

use std::num::NonZeroUsize;

use heliostat_kernels::cpu::{Cpu, Isa};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// All instruction sets that this CPU has, on one thread and on three.
fn devices() -> Vec<Cpu> {
    let three = Cpu::new(NonZeroUsize::MIN.saturating_add(2)).expect("threads start");
    let isas = [Isa::Avx512, Isa::Avx2, Isa::Scalar];
    [Cpu::single_threaded(), three]
        .iter()
        .flat_map(|cpu| isas.map(|isa| cpu.with_isa(isa)))
        .flatten()
        .collect()
}

/// Values in -1..1, so that sums cancel.
fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// `1 - 2<x, y> / (|x|^2 + |y|^2)`: 0 for equal vectors.
fn calc_diff(x: &[f32], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len());
    let dot =
        |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum() };
    let norms = dot(x, x) + dot(y, y);
    if norms == 0.0 { 0.0 } else { 1.0 - 2.0 * dot(x, y) / norms }
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f32], max_abs: f32, what: &str) {
    let diff = calc_diff(got, want);
    assert!(diff.abs() < 1e-10, "{what}: calc_diff {diff:e}");
    let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
    assert!(worst <= max_abs, "{what}: max abs {worst:e}");
}
