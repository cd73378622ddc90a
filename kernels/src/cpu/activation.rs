//! Element-wise operations and softmax.

use super::{Cpu, plain};

impl Cpu {
    /// `gate = silu(gate) * up`, element by element.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        plain::silu_mul(gate, up);
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
    /// # Panics
    /// If the lengths differ.
    pub fn scaled_add(&self, acc: &mut [f32], scale: f32, x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "scaled_add: lengths");
        acc.iter_mut().zip(x).for_each(|(acc, &x)| *acc = scale.mul_add(x, *acc));
    }

    /// Softmax of every row of `width`, in place.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn softmax(&self, x: &mut [f32], width: usize) {
        plain::softmax(x, width);
    }
}
