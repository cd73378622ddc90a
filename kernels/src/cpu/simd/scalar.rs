//! Sixteen lanes in an array: the meaning of the others, and the fallback.

use std::array::from_fn;

use super::Simd;
use crate::dtype::{bf16_to_f32, e4m3_to_f32};

/// Any CPU will do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    type V = [f32; 16];
    const TILE_ROWS: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> [f32; 16] {
        *x
    }

    #[inline(always)]
    fn store(self, v: [f32; 16], out: &mut [f32; 16]) {
        *out = v;
    }

    #[inline(always)]
    fn load_bf16(self, x: &[u16; 16]) -> [f32; 16] {
        x.map(bf16_to_f32)
    }

    #[inline(always)]
    fn load_e4m3_div_256(self, x: &[u8; 16]) -> [f32; 16] {
        x.map(|code| e4m3_to_f32(code) / 256.0)
    }

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn zero_where_lt(self, v: [f32; 16], a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| if a[i] < b[i] { 0.0 } else { v[i] })
    }

    #[inline(always)]
    fn pow2(self, shifted: [f32; 16]) -> [f32; 16] {
        shifted.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(127 << 23)))
    }

    #[inline(always)]
    fn sum4(self, v: [[f32; 16]; 4]) -> [f32; 4] {
        v.map(|v| {
            let v8: [f32; 8] = from_fn(|i| v[i] + v[i + 8]);
            let v4: [f32; 4] = from_fn(|i| v8[i] + v8[i + 4]);
            (v4[0] + v4[2]) + (v4[1] + v4[3])
        })
    }
}
