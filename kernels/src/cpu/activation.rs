//! Element-wise operations and softmax.

use super::Cpu;
use super::simd::math::{exp_row, padded, sigmoid};
use super::simd::{Kernel, Simd};

impl Cpu {
    /// `gate = silu(gate) * up`, element by element.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "silu_mul: lengths");
        self.level.run(SiluMul { gate, up });
    }

    /// `acc += x`, element by element.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(&self, acc: &mut [f32], x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "add: lengths");
        acc.iter_mut().zip(x).for_each(|(acc, x)| *acc += x);
    }

    /// `acc = scale.mul_add(x, acc)`, element by element: one term of a combine.
    ///
    /// `f32::mul_add` itself has the same bits, but is a call of the C library outside this crate's kernels.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn scaled_add(&self, acc: &mut [f32], scale: f32, x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "scaled_add: lengths");
        self.level.run(ScaledAdd { acc, scale, x });
    }

    /// Softmax of every row of `width`, in place.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn softmax(&self, x: &mut [f32], width: usize) {
        assert!(width > 0 && x.len().is_multiple_of(width), "softmax: {} values, rows of {width}", x.len());
        self.level.run(Softmax { x, width });
    }

    /// `1 / (1 + e^-x)` of every element, in place.
    pub fn sigmoid(&self, x: &mut [f32]) {
        self.level.run(Sigmoid { x });
    }
}

struct SiluMul<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (gate_steps, gate_tail) = self.gate.as_chunks_mut::<16>();
        let (up_steps, up_tail) = self.up.as_chunks::<16>();
        for (gate, up) in gate_steps.iter_mut().zip(up_steps) {
            silu_mul(simd, gate, up);
        }
        let mut gate = padded(gate_tail, 0.0);
        silu_mul(simd, &mut gate, &padded(up_tail, 0.0));
        gate_tail.copy_from_slice(&gate[..gate_tail.len()]);
    }
}

#[inline(always)]
fn silu_mul<S: Simd>(simd: S, gate: &mut [f32; 16], up: &[f32; 16]) {
    let g = simd.load(gate);
    let silu = simd.mul(g, sigmoid(simd, g));
    simd.store(simd.mul(silu, simd.load(up)), gate);
}

struct ScaledAdd<'a> {
    acc: &'a mut [f32],
    scale: f32,
    x: &'a [f32],
}

impl Kernel for ScaledAdd<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let scale = simd.splat(self.scale);
        let (acc_steps, acc_tail) = self.acc.as_chunks_mut::<16>();
        let (x_steps, x_tail) = self.x.as_chunks::<16>();
        for (acc, x) in acc_steps.iter_mut().zip(x_steps) {
            simd.store(simd.fma(scale, simd.load(x), simd.load(acc)), acc);
        }
        let mut acc = padded(acc_tail, 0.0);
        simd.store(simd.fma(scale, simd.load(&padded(x_tail, 0.0)), simd.load(&acc)), &mut acc);
        acc_tail.copy_from_slice(&acc[..acc_tail.len()]);
    }
}

struct Softmax<'a> {
    x: &'a mut [f32],
    width: usize,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for row in self.x.chunks_exact_mut(self.width) {
            let factor = 1.0 / exp_row(simd, row, 1.0);
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

struct Sigmoid<'a> {
    x: &'a mut [f32],
}

impl Kernel for Sigmoid<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (steps, tail) = self.x.as_chunks_mut::<16>();
        for step in steps {
            simd.store(sigmoid(simd, simd.load(step)), step);
        }
        let mut last = padded(tail, 0.0);
        simd.store(sigmoid(simd, simd.load(&last)), &mut last);
        tail.copy_from_slice(&last[..tail.len()]);
    }
}
