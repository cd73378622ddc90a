//! Sixteen lanes in two AVX2 registers.

use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Proof that this CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Avx2> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Avx2(()))
    }

    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_features<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: a value of `Avx2` exists only where `detect` found these features.
        unsafe { with_features(self, kernel) }
    }
}

/// A method that is one intrinsic on each half.
macro_rules! intrinsic {
    ($name:ident($($arg:ident),+) $intrinsic:ident) => {
        #[inline(always)]
        fn $name(self, $($arg: [__m256; 2]),+) -> [__m256; 2] {
            // SAFETY: a value of `Avx2` proves that the CPU has the instruction.
            unsafe { [$intrinsic($($arg[0]),+), $intrinsic($($arg[1]),+)] }
        }
    };
}

impl Simd for Avx2 {
    type V = [__m256; 2];
    const TILE_ROWS: usize = 1;

    intrinsic!(add(a, b) _mm256_add_ps);
    intrinsic!(sub(a, b) _mm256_sub_ps);
    intrinsic!(mul(a, b) _mm256_mul_ps);
    intrinsic!(div(a, b) _mm256_div_ps);
    intrinsic!(max(a, b) _mm256_max_ps);
    intrinsic!(min(a, b) _mm256_min_ps);
    intrinsic!(fma(a, b, c) _mm256_fmadd_ps);

    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        // SAFETY: a value of `Avx2` proves that the CPU has the instruction.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: as above; eight f32 are readable from both pointers, which lie within the array.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store(self, v: [__m256; 2], out: &mut [f32; 16]) {
        // SAFETY: as above; eight f32 are writable from both pointers, which lie within the array.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[u16; 16]) -> [__m256; 2] {
        // SAFETY: as above; sixteen bytes are readable from both pointers, which lie within the array.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().add(8).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }

    #[inline(always)]
    fn load_e4m3_div_256(self, x: &[u8; 16]) -> [__m256; 2] {
        // SAFETY: a value of `Avx2` proves that the CPU has the instructions.
        unsafe {
            let f16 = widen_e4m3_to_f16(x);
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(f16)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(f16)),
            ]
        }
    }

    #[inline(always)]
    fn zero_where_lt(self, v: [__m256; 2], a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(a[0], b[0]), v[0]),
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(a[1], b[1]), v[1]),
            ]
        }
    }

    #[inline(always)]
    fn pow2(self, shifted: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe {
            let one = _mm256_set1_epi32(127 << 23);
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted[0]));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted[1]));
            [
                _mm256_castsi256_ps(_mm256_add_epi32(low, one)),
                _mm256_castsi256_ps(_mm256_add_epi32(high, one)),
            ]
        }
    }

    #[inline(always)]
    fn sum4(self, v: [[__m256; 2]; 4]) -> [f32; 4] {
        // SAFETY: as above.
        unsafe {
            sum4_halves([
                _mm256_add_ps(v[0][0], v[0][1]),
                _mm256_add_ps(v[1][0], v[1][1]),
                _mm256_add_ps(v[2][0], v[2][1]),
                _mm256_add_ps(v[3][0], v[3][1]),
            ])
        }
    }
}

/// Sixteen E4M3 codes as the f16 with the same bits, moved under its wider exponent: the value divided by 256, for
/// subnormals too.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn widen_e4m3_to_f16(x: &[u8; 16]) -> __m256i {
    // SAFETY: the caller vouches for AVX2; sixteen bytes are readable behind the reference.
    unsafe {
        // Sign extension puts the sign into bits 7..16; shifted, only bit 14 has to be cleared.
        let codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(x.as_ptr().cast()));
        _mm256_and_si256(_mm256_slli_epi16::<7>(codes), _mm256_set1_epi16(0xbfff_u16 as i16))
    }
}

/// Sums of four vectors of eight lanes, by the tree i + (i + 4), i + (i + 2), i + (i + 1).
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
pub(super) unsafe fn sum4_halves([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
    // SAFETY: the caller vouches for AVX; the store writes the sixteen bytes of `sums`.
    unsafe {
        let ab = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
        let cd = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(c, d), _mm256_permute2f128_ps::<0x31>(c, d));
        let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
        let high = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
        // Two lanes left of each: a a c c | b b d d.
        let acbd = _mm256_add_ps(low, high);
        let (ac, bd) = (_mm256_castps256_ps128(acbd), _mm256_extractf128_ps::<1>(acbd));
        let sums_acbd =
            _mm_add_ps(_mm_shuffle_ps::<0b10_00_10_00>(ac, bd), _mm_shuffle_ps::<0b11_01_11_01>(ac, bd));
        let mut sums = [0.0; 4];
        _mm_storeu_ps(sums.as_mut_ptr(), _mm_shuffle_ps::<0b11_01_10_00>(sums_acbd, sums_acbd));
        sums
    }
}
