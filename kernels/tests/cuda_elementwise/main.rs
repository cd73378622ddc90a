//! The element-wise kernels against their plain versions, and the hard rule: the bits of a row do not depend on others.

// Helpers of tests and measurements, which may fail and print as those do.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "../cuda_support/mod.rs"]
mod cuda_support;

mod activation;
mod bench;
mod checksum;
mod norm;
mod rope;
mod router;
mod sample;
mod synthetic;

use cuda_support::{assert_compiles, calc_diff, device};
use half::bf16;
use heliostat_kernels::cpu::quant::{Quantized, quantize};
use heliostat_kernels::cuda::activation::Activation;
use heliostat_kernels::cuda::checksum::Checksum;
use heliostat_kernels::cuda::fault;
use heliostat_kernels::cuda::norm::Norm;
use heliostat_kernels::cuda::rope::Rope;
use heliostat_kernels::cuda::router::Routing;
use heliostat_kernels::cuda::rows::{Fp8Rows, RowsOut};
use heliostat_kernels::cuda::sample::Sampling;
use heliostat_kernels::cuda::synthetic::Synthetic;
use heliostat_kernels::cuda::{Buffer, Device, Element, Priority, Stream};

#[test]
fn compiles() {
    assert_compiles([
        Norm::source(),
        Rope::source(),
        Activation::source(),
        Routing::source(),
        Sampling::source(),
        Synthetic::source(),
        Checksum::source(),
        fault::source(),
    ]);
}

/// A row that is not there.
const NONE: u32 = u32::MAX;

/// A bf16 that no test computes.
fn poison() -> bf16 {
    bf16::from_f32(-77.0)
}

/// A device and a stream of it.
struct Gpu {
    device: Device,
    stream: Stream,
}

impl Gpu {
    fn open() -> Option<Self> {
        let device = device()?;
        let stream = device.stream(Priority::High).expect("a stream");
        Some(Self { device, stream })
    }

    fn up<T: Element>(&self, values: &[T]) -> Buffer<T> {
        self.device.upload(values).expect("upload")
    }

    fn down<T: Element>(&self, buffer: &Buffer<T>) -> Vec<T> {
        buffer.download(&self.stream).expect("download")
    }

    fn down_f32(&self, buffer: &Buffer<bf16>) -> Vec<f32> {
        self.down(buffer).iter().map(|x| x.to_f32()).collect()
    }
}

/// Outputs of rows, poisoned.
struct Out {
    bf16: Buffer<bf16>,
    codes: Buffer<u8>,
    scales: Buffer<f32>,
    rows: usize,
    width: usize,
    scale_stride: usize,
}

impl Out {
    fn new(gpu: &Gpu, rows: usize, width: usize) -> Self {
        let scale_stride = rows.next_multiple_of(4) + 4;
        Self {
            bf16: gpu.up(&vec![poison(); rows * width]),
            codes: gpu.up(&vec![0x7f; rows * width]),
            scales: gpu.up(&vec![-1.0; width.div_ceil(128) * scale_stride]),
            rows,
            width,
            scale_stride,
        }
    }

    fn fp8(&self) -> Option<Fp8Rows<'_>> {
        Some(Fp8Rows { codes: &self.codes, scales: &self.scales, scale_stride: self.scale_stride })
    }

    fn both(&self) -> RowsOut<'_> {
        RowsOut { bf16: Some(&self.bf16), fp8: self.fp8() }
    }

    /// What was written, as bits: bf16 and codes by row, scales by block and row.
    fn bits(&self, gpu: &Gpu) -> (Vec<u16>, Vec<u8>, Vec<u32>) {
        let bf16 = gpu.down(&self.bf16).iter().map(|x| x.to_bits()).collect();
        let scales = gpu.down(&self.scales).iter().map(|x| x.to_bits()).collect();
        (bf16, gpu.down(&self.codes), scales)
    }

    /// Both outputs against exact values; only `written` rows may have changed.
    #[track_caller]
    fn check(&self, gpu: &Gpu, want: &[f32], written: impl Fn(usize) -> bool, what: &str) {
        let kept = |row: usize| row < self.rows && written(row);
        let rows = |values: &[f32]| -> Vec<f32> {
            let chosen = values.chunks(self.width).enumerate().filter(|(row, _)| kept(*row));
            chosen.flat_map(|(_, row)| row.to_vec()).collect()
        };
        let got = gpu.down_f32(&self.bf16);
        let diff = calc_diff(&rows(&got), &rows(want));
        assert!(diff.abs() < 5e-6, "{what}: bf16 differs by {diff:e}");
        let untouched =
            |row: usize| got[row * self.width..(row + 1) * self.width].iter().all(|&x| x == -77.0);
        assert!((0..self.rows).all(|row| kept(row) || untouched(row)), "{what}: wrote other rows");

        let spec = quantize(want, self.width, self.scale_stride);
        let (codes, scales) = (gpu.down(&self.codes), gpu.down(&self.scales));
        for (at, (&got, &want)) in scales.iter().zip(&spec.scales).enumerate() {
            let want = if kept(at % self.scale_stride) { want } else { -1.0 };
            assert!((got - want).abs() <= want.abs() * 1e-5, "{what}: scale {at} is {got:e}, not {want:e}");
        }
        let got = Quantized { codes: codes.clone(), scales, scale_stride: self.scale_stride };
        let off = codes.iter().zip(&spec.codes).enumerate();
        // Both zeros are zero.
        let differ = |got: u8, want: u8| got != want && (got | want) & 0x7f != 0;
        let off = off.filter(|(at, (got, want))| kept(at / self.width) && differ(**got, **want)).count();
        assert!(off * 200 <= codes.len() + 200, "{what}: {off} of {} codes differ", codes.len());
        let diff = calc_diff(&rows(&got.dequantize(self.width)), &rows(&spec.dequantize(self.width)));
        assert!(diff.abs() < 1e-5, "{what}: FP8 differs by {diff:e}");
        assert!(diff.is_finite(), "{what}: NaN");
    }
}

/// Row `row` of what [`Out::bits`] returns.
fn row_of(bits: &(Vec<u16>, Vec<u8>, Vec<u32>), row: usize, width: usize) -> (Vec<u16>, Vec<u8>, Vec<u32>) {
    let at = row * width..(row + 1) * width;
    let stride = bits.2.len() / width.div_ceil(128);
    let scales = bits.2.chunks(stride).map(|column| column[row]).collect();
    (bits.0[at.clone()].to_vec(), bits.1[at].to_vec(), scales)
}
