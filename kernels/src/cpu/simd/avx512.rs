//! Sixteen lanes in one AVX-512 register.

use std::arch::x86_64::*;

use super::avx2::{sum4_halves, widen_e4m3_to_f16};
use super::{Kernel, Simd};

/// Proof that this CPU has AVX-512 F, BW, DQ and VL, and what AVX2 code needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(super) fn detect() -> Option<Avx512> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Avx512(()))
    }

    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn with_features<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: a value of `Avx512` exists only where `detect` found these features.
        unsafe { with_features(self, kernel) }
    }
}

/// A method that is one intrinsic.
macro_rules! intrinsic {
    ($name:ident($($arg:ident),+) $intrinsic:ident) => {
        #[inline(always)]
        fn $name(self, $($arg: __m512),+) -> __m512 {
            // SAFETY: a value of `Avx512` proves that the CPU has the instruction.
            unsafe { $intrinsic($($arg),+) }
        }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    const TILE_ROWS: usize = 6;

    intrinsic!(add(a, b) _mm512_add_ps);
    intrinsic!(sub(a, b) _mm512_sub_ps);
    intrinsic!(mul(a, b) _mm512_mul_ps);
    intrinsic!(div(a, b) _mm512_div_ps);
    intrinsic!(max(a, b) _mm512_max_ps);
    intrinsic!(min(a, b) _mm512_min_ps);
    intrinsic!(fma(a, b, c) _mm512_fmadd_ps);

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: a value of `Avx512` proves that the CPU has the instruction.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> __m512 {
        // SAFETY: as above; sixteen f32 are readable behind the reference.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; 16]) {
        // SAFETY: as above; sixteen f32 are writable behind the reference.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[u16; 16]) -> __m512 {
        // SAFETY: as above; 32 bytes are readable behind the reference.
        unsafe {
            let bits = _mm256_loadu_si256(x.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }
    }

    #[inline(always)]
    fn load_e4m3_div_256(self, x: &[u8; 16]) -> __m512 {
        // SAFETY: as above, and AVX2 is part of the proof.
        unsafe { _mm512_cvtph_ps(widen_e4m3_to_f16(x)) }
    }

    #[inline(always)]
    fn zero_where_lt(self, v: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: a value of `Avx512` proves that the CPU has the instructions.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a, b), v) }
    }

    #[inline(always)]
    fn pow2(self, shifted: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
            _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(127 << 23)))
        }
    }

    #[inline(always)]
    fn sum4(self, v: [__m512; 4]) -> [f32; 4] {
        // SAFETY: as above, and AVX is part of the proof.
        unsafe {
            sum4_halves([
                _mm256_add_ps(_mm512_castps512_ps256(v[0]), _mm512_extractf32x8_ps::<1>(v[0])),
                _mm256_add_ps(_mm512_castps512_ps256(v[1]), _mm512_extractf32x8_ps::<1>(v[1])),
                _mm256_add_ps(_mm512_castps512_ps256(v[2]), _mm512_extractf32x8_ps::<1>(v[2])),
                _mm256_add_ps(_mm512_castps512_ps256(v[3]), _mm512_extractf32x8_ps::<1>(v[3])),
            ])
        }
    }

    /// Half the instructions of two `sum4`: the vectors stay full until the last steps.
    #[inline(always)]
    fn sum8(self, a: [__m512; 4], b: [__m512; 4]) -> [[f32; 4]; 2] {
        // SAFETY: as above; the store writes the 32 bytes of `sums`.
        unsafe {
            // Quarters of each: a0 a1 a2 a3 and b0 b1 b2 b3.
            let (a, b) = (sum_quarters(a), sum_quarters(b));
            let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            let high = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            // Two lanes left of each: a0 a0 b0 b0 | a1 a1 b1 b1 | ...
            let pairs = _mm512_add_ps(low, high);
            let twice = _mm512_add_ps(pairs, _mm512_movehdup_ps(pairs));
            let order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
            let mut sums = [[0.0; 4]; 2];
            let packed = _mm512_castps512_ps256(_mm512_permutexvar_ps(order, twice));
            _mm256_storeu_ps(sums.as_mut_ptr().cast(), packed);
            sums
        }
    }
}

/// Lanes i + (i + 8), and of those i + (i + 4), of four vectors: four lanes each, one vector after the other.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn sum_quarters([a, b, c, d]: [__m512; 4]) -> __m512 {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
        let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd))
    }
}
