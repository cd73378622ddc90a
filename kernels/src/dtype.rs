//! Storage types of weights and their conversion to f32.
//!
//! Every conversion here is exact: bf16 and E4M3 values are all f32 values. Narrowing (`f32_to_bf16`) rounds to
//! the nearest, ties to even.

use half::bf16;
use serde::{Deserialize, Serialize};

/// How the elements of a weight are stored. The names are those of the safetensors format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DType {
    /// IEEE binary32.
    #[serde(rename = "F32")]
    F32,
    /// The upper half of a binary32.
    #[serde(rename = "BF16")]
    Bf16,
    /// FP8 E4M3 "fn": 1 sign, 4 exponent (bias 7) and 3 mantissa bits; no infinity, NaN is 0x7f and 0xff.
    #[serde(rename = "F8_E4M3")]
    F8E4M3,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
            DType::F8E4M3 => 1,
        }
    }

    /// The name used by safetensors.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::Bf16 => "BF16",
            DType::F8E4M3 => "F8_E4M3",
        }
    }
}

/// Widens the bits of a bf16.
#[inline(always)]
pub const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// Rounds to the nearest bf16, ties to even, and returns its bits.
pub fn f32_to_bf16(value: f32) -> u16 {
    bf16::from_f32(value).to_bits()
}

/// Widens an E4M3 code.
///
/// The seven magnitude bits, moved under the exponent of an f32, are the value times 2^-120, for subnormals too;
/// the product with 2^120 is exact.
#[inline(always)]
pub const fn e4m3_to_f32(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    let bits = ((code as u32 & 0x80) << 24) | ((code as u32 & 0x7f) << 20);
    f32::from_bits(bits) * TWO_POW_120
}

const TWO_POW_120: f32 = f32::from_bits((120 + 127) << 23);

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition of the format, in f64 and without bit tricks.
    fn e4m3_by_definition(code: u8) -> f64 {
        let sign = if code >= 128 { -1.0 } else { 1.0 };
        let (exponent, mantissa) = ((code / 8) % 16, f64::from(code % 8));
        match (exponent, code % 8) {
            (15, 7) => f64::NAN,
            (0, _) => sign * mantissa / 8.0 * 2f64.powi(-6),
            _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(i32::from(exponent) - 7),
        }
    }

    #[test]
    fn all_e4m3_codes_widen_exactly() {
        for code in 0..=255u8 {
            let (got, want) = (e4m3_to_f32(code), e4m3_by_definition(code));
            assert!(f64::from(got) == want || got.is_nan() && want.is_nan(), "code {code:#x}: {got} {want}");
            assert_eq!(
                got.is_sign_negative() || got.is_nan(),
                code >= 128 || code == 127,
                "sign of {code:#x}"
            );
        }
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
    }

    #[test]
    fn bf16_round_trips_and_rounds_to_even() {
        for bits in (0..=u16::MAX).filter(|&b| !half::bf16::from_bits(b).is_nan()) {
            assert_eq!(f32_to_bf16(bf16_to_f32(bits)), bits);
        }
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
    }
}
