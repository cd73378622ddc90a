//! Functions of sixteen lanes, and loops over slices in steps of sixteen.

use super::Simd;

/// `e^x` within 2 units in the last place for x in -87.3..=88; 0 below, e^88 above, NaN for NaN.
///
/// Range reduction by ln 2 in two parts and the polynomial of Cephes' `expf`.
#[inline(always)]
pub(in crate::cpu) fn exp<S: Simd>(simd: S, x: S::V) -> S::V {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to whole numbers.
    const SMALLEST: f32 = -87.3;
    let clamped = simd.min(simd.splat(88.0), simd.max(simd.splat(SMALLEST), x));
    let shifted = simd.fma(clamped, simd.splat(std::f32::consts::LOG2_E), simd.splat(ROUND));
    let n = simd.sub(shifted, simd.splat(ROUND));
    let r = simd.fma(n, simd.splat(-0.693_359_4), clamped);
    let r = simd.fma(n, simd.splat(2.121_944_4e-4), r);
    let mut p = simd.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = simd.fma(p, r, simd.splat(c));
    }
    let e = simd.add(simd.fma(p, simd.mul(r, r), r), simd.splat(1.0));
    simd.zero_where_lt(simd.mul(e, simd.pow2(shifted)), x, simd.splat(SMALLEST))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(in crate::cpu) fn sigmoid<S: Simd>(simd: S, x: S::V) -> S::V {
    let one = simd.splat(1.0);
    simd.div(one, simd.add(one, exp(simd, simd.sub(simd.zero(), x))))
}

/// A short slice as a full step, `fill` behind its end.
#[inline(always)]
pub(in crate::cpu) fn padded<T: Copy>(tail: &[T], fill: T) -> [T; 16] {
    let mut full = [fill; 16];
    full[..tail.len()].copy_from_slice(tail);
    full
}

/// The sum of squares of a row.
#[inline(always)]
pub(in crate::cpu) fn sum_of_squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (steps, tail) = x.as_chunks::<16>();
    let mut acc = simd.zero();
    for step in steps {
        let v = simd.load(step);
        acc = simd.fma(v, v, acc);
    }
    let v = simd.load(&padded(tail, 0.0));
    simd.sum(simd.fma(v, v, acc))
}

/// Replaces `x` by `e^(scale * x - max)` and returns the sum of these; max is over the scaled row.
#[inline(always)]
pub(in crate::cpu) fn exp_row<S: Simd>(simd: S, x: &mut [f32], scale: f32) -> f32 {
    let (steps, tail) = x.as_chunks_mut::<16>();
    let scale = simd.splat(scale);
    let mut last = padded(tail, f32::NEG_INFINITY);
    let mut max = simd.splat(f32::NEG_INFINITY);
    for step in steps.iter_mut() {
        let v = simd.mul(scale, simd.load(step));
        simd.store(v, step);
        max = simd.max(max, v);
    }
    let v = simd.mul(scale, simd.load(&last));
    simd.store(v, &mut last);
    last[tail.len()..].fill(f32::NEG_INFINITY);
    max = simd.max(max, simd.load(&last));
    let mut lanes = [0.0; 16];
    simd.store(max, &mut lanes);
    let max = simd.splat(lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let mut sum = simd.zero();
    for step in steps.iter_mut().chain([&mut last]) {
        let e = exp(simd, simd.sub(simd.load(step), max));
        simd.store(e, step);
        sum = simd.add(sum, e);
    }
    tail.copy_from_slice(&last[..tail.len()]);
    simd.sum(sum)
}
