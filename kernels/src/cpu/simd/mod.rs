//! Sixteen f32 lanes on three instruction sets, with identical bits.
//!
//! Every reduction of the CPU device goes through sixteen lanes that are filled in ascending order and summed by one
//! fixed tree, so AVX-512 (one register), AVX2 (two) and plain Rust (an array) agree to the last bit. The set is
//! chosen at run time: a value of a token type such as [`Avx512`] proves that the CPU has the instructions, which is
//! what makes the methods of [`Simd`] safe. Everything that calls them is `inline(always)`, down from
//! [`Level::run`], because intrinsics only inline into functions with their target features.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(super) mod math;
mod scalar;

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
use scalar::Scalar;

/// A cache line of f32: the unit in which the kernels step through columns.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [f32; 16]);

impl Line {
    pub(super) const ZERO: Line = Line([0.0; 16]);
}

/// An instruction set that the kernels are written for. All of them give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// No vector instructions asked for.
    Scalar,
}

/// Sixteen lanes. `max` and `min` are those of x86: `a > b ? a : b`.
pub(super) trait Simd: Copy + Send + Sync {
    /// Sixteen f32.
    type V: Copy;
    /// Rows of `x` in a register tile of four rows of `w`.
    const TILE_ROWS: usize;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; 16]) -> Self::V;
    fn store(self, v: Self::V, out: &mut [f32; 16]);
    /// Widens bf16 bits.
    fn load_bf16(self, x: &[u16; 16]) -> Self::V;
    /// Widens E4M3 codes, none of them NaN, and divides them by 256.
    fn load_e4m3_div_256(self, x: &[u8; 16]) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// 0 where `a < b`, otherwise `v`.
    fn zero_where_lt(self, v: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// `2^n` of `1.5 * 2^23 + n`, for whole n in -126..=127.
    fn pow2(self, shifted: Self::V) -> Self::V;
    /// The sums of four vectors: lane i + lane i + 8, of those i + (i + 4), i + (i + 2), i + (i + 1).
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];

    /// The sums of eight vectors, by the tree of [`Simd::sum4`].
    #[inline(always)]
    fn sum8(self, a: [Self::V; 4], b: [Self::V; 4]) -> [[f32; 4]; 2] {
        [self.sum4(a), self.sum4(b)]
    }

    /// The sum of one vector, by the tree of [`Simd::sum4`].
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        self.sum4([v; 4])[0]
    }

    /// The zero vector.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }
}

/// Code written once for all instruction sets. `run` must be `inline(always)`.
pub(super) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set that this CPU is known to have.
#[derive(Clone, Copy, Debug)]
pub(super) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Scalar(Scalar),
}

impl Level {
    /// The best that this CPU has.
    pub(super) fn best() -> Level {
        [Isa::Avx512, Isa::Avx2].into_iter().find_map(Level::of).unwrap_or(Level::Scalar(Scalar))
    }

    /// `isa`, if this CPU has it.
    pub(super) fn of(isa: Isa) -> Option<Level> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::detect().map(Level::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().map(Level::Avx2),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512 | Isa::Avx2 => None,
            Isa::Scalar => Some(Level::Scalar(Scalar)),
        }
    }

    /// Rows of `x` in a register tile.
    pub(super) fn tile_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => Avx512::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => Avx2::TILE_ROWS,
            Level::Scalar(_) => Scalar::TILE_ROWS,
        }
    }

    pub(super) fn isa(self) -> Isa {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => Isa::Avx512,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => Isa::Avx2,
            Level::Scalar(_) => Isa::Scalar,
        }
    }

    /// Runs a kernel with the instructions of this level.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(simd) => simd.run(kernel),
            Level::Scalar(simd) => kernel.run(simd),
        }
    }
}
