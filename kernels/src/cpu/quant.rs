//! FP8 quantisation of activations, the specification of the kernels that do it: E4M3 codes with one scale for every
//! 128 elements of a row.

use crate::dtype::e4m3_to_f32;

/// Elements that share a scale.
pub const BLOCK: usize = 128;

/// The largest magnitude of E4M3.
const MAX: f32 = 448.0;

/// Blocks whose magnitudes are all smaller are scaled as if this were the largest.
const MAGNITUDE_MIN: f32 = 1e-10;

/// Rows in FP8.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// `[rows][width]`.
    pub codes: Vec<u8>,
    /// `[width / 128, rounded up][scale_stride]`: the scales of a block of all rows stand together.
    pub scales: Vec<f32>,
    /// Rows that `scales` has room for.
    pub scale_stride: usize,
}

/// Quantises rows of `width`: scale = largest magnitude / 448, code = x * (1 / scale), rounded to the nearest, ties to even.
/// Scales of rows that are not there are 0.
///
/// # Panics
/// If `x` is not whole rows or has more than `scale_stride` of them.
pub fn quantize(x: &[f32], width: usize, scale_stride: usize) -> Quantized {
    assert!(width > 0 && x.len().is_multiple_of(width), "quantize: {} values, rows of {width}", x.len());
    assert!(x.len() / width <= scale_stride, "quantize: more rows than {scale_stride}");
    let mut scales = vec![0.0; width.div_ceil(BLOCK) * scale_stride];
    let mut codes = Vec::with_capacity(x.len());
    for (row, x) in x.chunks_exact(width).enumerate() {
        for (block, x) in x.chunks(BLOCK).enumerate() {
            let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let scale = most.max(MAGNITUDE_MIN) / MAX;
            let inverse = 1.0 / scale;
            scales[block * scale_stride + row] = scale;
            codes.extend(x.iter().map(|x| f32_to_e4m3(x * inverse)));
        }
    }
    Quantized { codes, scales, scale_stride }
}

impl Quantized {
    /// The values that the codes stand for, `[rows][width]`.
    pub fn dequantize(&self, width: usize) -> Vec<f32> {
        let value = |(at, &code): (usize, &u8)| {
            let (row, column) = (at / width, at % width);
            e4m3_to_f32(code) * self.scales[column / BLOCK * self.scale_stride + row]
        };
        self.codes.iter().enumerate().map(value).collect()
    }
}

/// Rounds to the nearest E4M3 value, ties to even; magnitudes beyond 448 become 448, NaN becomes NaN.
pub fn f32_to_e4m3(value: f32) -> u8 {
    if value.is_nan() {
        return 0x7f;
    }
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs();
    let code = if magnitude < 1.0 / 64.0 {
        // Subnormal: multiples of 2^-9. Rounding up to 8 gives the smallest normal number.
        (magnitude * 512.0).round_ties_even() as u32
    } else {
        let bits = magnitude.to_bits();
        let rounded = bits.saturating_add(0x7_ffff + (bits >> 20 & 1));
        (rounded >> 20) - (120 << 3)
    };
    sign | code.min(0x7e) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_its_own_rounding() {
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(f32_to_e4m3(e4m3_to_f32(code)), code);
        }
        assert_eq!(f32_to_e4m3(f32::NAN) & 0x7f, 0x7f);
    }

    #[test]
    fn between_two_codes_the_nearest_wins_and_ties_go_to_even() {
        for code in 0..0x7eu8 {
            let (low, high) = (e4m3_to_f32(code), e4m3_to_f32(code + 1));
            let middle = (low + high) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(f32_to_e4m3(middle), even, "{middle}");
            assert_eq!(f32_to_e4m3(middle.next_down()), code);
            assert_eq!(f32_to_e4m3(-middle.next_up()), 0x80 | (code + 1));
        }
        for large in [449.0, 1e9, f32::INFINITY] {
            assert_eq!((f32_to_e4m3(large), f32_to_e4m3(-large)), (0x7e, 0xfe));
        }
    }

    #[test]
    fn a_block_uses_the_whole_range_and_knows_no_other() {
        let width = 130;
        let x: Vec<f32> = (0..2 * width).map(|i| (i as f32 - 100.0) * 0.37).collect();
        let quantized = quantize(&x, width, 4);
        assert_eq!(quantized.scales.len(), 8);
        for (row, x) in x.chunks(width).enumerate() {
            let alone = quantize(x, width, 1);
            assert_eq!(alone.codes, quantized.codes[row * width..(row + 1) * width]);
            assert_eq!(alone.scales, [quantized.scales[row], quantized.scales[4 + row]]);
        }
        for (x, y) in x.iter().zip(quantized.dequantize(width)) {
            assert!((x - y).abs() <= x.abs() / 16.0 + 0.05, "{x} {y}");
        }
        let zeros = quantize(&[0.0; 3], 3, 1);
        assert_eq!((zeros.codes, zeros.scales), (vec![0; 3], vec![1e-10 / 448.0]));
    }
}
