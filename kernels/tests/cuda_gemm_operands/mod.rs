//! Random matrices and rows, on host and device, whose products are known in f64.

use half::bf16;
use heliostat_kernels::cuda::gemm::Operand;
use heliostat_kernels::cuda::{Buffer, Device, StoredAs, Stream, WeightStack};
use heliostat_kernels::dtype::e4m3_to_f32;
use rayon::prelude::*;

use crate::cuda_support;

/// Element `index` of an endless array of normally distributed numbers.
pub(crate) struct Noise {
    table: Vec<f32>,
    seed: u64,
}

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self { table: cuda_support::normal(seed, 1 << 16), seed }
    }

    pub(crate) fn at(&self, index: usize) -> f32 {
        let hash = (index as u64 ^ self.seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.table[(hash >> 48) as usize]
    }

    pub(crate) fn bf16(&self, len: usize, scale: f32) -> Vec<bf16> {
        (0..len).into_par_iter().map(|i| bf16::from_f32(self.at(i) * scale)).collect()
    }

    /// Codes of normal numbers of standard deviation 30, the largest of which are E4M3's largest.
    pub(crate) fn codes(&self, len: usize) -> Vec<u8> {
        let code = |value: f32| {
            let magnitude = (0..0x7f).min_by(|&a, &b| {
                let distance = |code| (e4m3_to_f32(code) - (value * 30.0).abs()).abs();
                distance(a).total_cmp(&distance(b))
            });
            magnitude.unwrap() | if value < 0.0 { 0x80 } else { 0 }
        };
        let table: Vec<u8> = self.table.par_iter().map(|&value| code(value)).collect();
        let hash = |i: usize| (i as u64 ^ self.seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        (0..len).into_par_iter().map(|i| table[hash(i) as usize]).collect()
    }

    /// Scales of either sign of magnitude.
    pub(crate) fn scales(&self, len: usize) -> Vec<f32> {
        (0..len).map(|i| 0.01 * (1.0 + 0.5 * self.at(i).clamp(-1.5, 1.5))).collect()
    }
}

/// A matrix, or many, on host and device.
pub(crate) enum Stored {
    Bf16(Vec<bf16>),
    Fp8 { codes: Vec<u8>, scales: Vec<f32> },
}

pub(crate) struct Host {
    pub(crate) count: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) values: Stored,
}

impl Host {
    pub(crate) fn random(stored: StoredAs, (count, n, k): (usize, usize, usize), seed: u64) -> Self {
        let noise = Noise::new(seed);
        let len = count * n * k;
        let values = match stored {
            StoredAs::Bf16 => Stored::Bf16(noise.bf16(len, 0.05)),
            StoredAs::Fp8 => Stored::Fp8 {
                codes: noise.codes(len),
                scales: noise.scales(count * n.div_ceil(128) * k.div_ceil(128)),
            },
        };
        Self { count, n, k, values }
    }

    pub(crate) fn stored(&self) -> StoredAs {
        match self.values {
            Stored::Bf16(_) => StoredAs::Bf16,
            Stored::Fp8 { .. } => StoredAs::Fp8,
        }
    }

    pub(crate) fn upload(&self, device: &Device, stream: &Stream) -> WeightStack {
        let stack = WeightStack::new(device, self.stored(), self.count, (self.n, self.k)).unwrap();
        match &self.values {
            Stored::Bf16(values) => stack.data().cast().write(stream, values).unwrap(),
            Stored::Fp8 { codes, scales } => {
                stack.data().write(stream, codes).unwrap();
                stack.scales().unwrap().write(stream, scales).unwrap();
            }
        }
        stack
    }

    pub(crate) fn at(&self, matrix: usize, row: usize, col: usize) -> f64 {
        let at = (matrix * self.n + row) * self.k + col;
        match &self.values {
            Stored::Bf16(values) => values[at].to_f64(),
            Stored::Fp8 { codes, scales } => {
                let blocks = self.k.div_ceil(128);
                let block = (matrix * self.n.div_ceil(128) + row / 128) * blocks + col / 128;
                f64::from(e4m3_to_f32(codes[at])) * f64::from(scales[block])
            }
        }
    }
}

/// Rows of x on host and device. FP8 scales are `[blocks][rows]` with some rows to spare.
pub(crate) struct Rows {
    pub(crate) host: Host,
    pub(crate) bf16: Buffer<bf16>,
    codes: Buffer<u8>,
    scales: Buffer<f32>,
    rows_stride: usize,
}

impl Rows {
    /// Row i of the result is row `order(i)` of the random rows.
    pub(crate) fn random(
        device: &Device,
        stored: StoredAs,
        (rows, k): (usize, usize),
        order: impl Fn(usize) -> usize,
    ) -> Self {
        let noise = Noise::new(77);
        let rows_stride = (rows + 8).next_multiple_of(4);
        let (mut bf16, mut codes, mut scales) = (vec![], vec![], vec![0.0; k.div_ceil(128) * rows_stride]);
        let all = (0..rows).map(&order).max().unwrap() + 1;
        let host = match stored {
            StoredAs::Bf16 => {
                let values = noise.bf16(all * k, 1.0);
                bf16 = (0..rows).flat_map(|row| values[order(row) * k..][..k].to_vec()).collect();
                Stored::Bf16(bf16.clone())
            }
            StoredAs::Fp8 => {
                let values = noise.codes(all * k);
                codes = (0..rows).flat_map(|row| values[order(row) * k..][..k].to_vec()).collect();
                for (at, scale) in scales.iter_mut().enumerate() {
                    let (block, row) = (at / rows_stride, at % rows_stride);
                    if row < rows {
                        *scale = 0.01 * (1.0 + 0.1 * noise.at(order(row) * 1000 + block).abs());
                    }
                }
                Stored::Fp8 { codes: codes.clone(), scales: scales.clone() }
            }
        };
        Self {
            host: Host { count: 1, n: rows, k, values: host },
            bf16: device.upload(&bf16).unwrap(),
            codes: device.upload(&codes).unwrap(),
            scales: device.upload(&scales).unwrap(),
            rows_stride,
        }
    }

    pub(crate) fn operand(&self) -> Operand<'_> {
        match self.host.values {
            Stored::Bf16(_) => Operand::Bf16 { data: &self.bf16, stride: self.host.k },
            Stored::Fp8 { .. } => {
                Operand::Fp8 { codes: &self.codes, scales: &self.scales, rows_stride: self.rows_stride }
            }
        }
    }

    pub(crate) fn at(&self, row: usize, col: usize) -> f64 {
        match &self.host.values {
            Stored::Bf16(values) => values[row * self.host.k + col].to_f64(),
            Stored::Fp8 { codes, scales } => {
                let code = f64::from(e4m3_to_f32(codes[row * self.host.k + col]));
                code * f64::from(scales[col / 128 * self.rows_stride + row])
            }
        }
    }

    pub(crate) fn dot(&self, row: usize, w: &Host, matrix: usize, column: usize) -> f32 {
        (0..w.k).map(|i| self.at(row, i) * w.at(matrix, column, i)).sum::<f64>() as f32
    }
}
