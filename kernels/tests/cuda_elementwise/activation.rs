//! Gated activation and quantisation.

use heliostat_kernels::cpu::plain;
use heliostat_kernels::cuda::activation::{Activation, ActivationArgs, RowSet};
use heliostat_kernels::cuda::rows::{Bf16Rows, RowsOut};

use crate::cuda_support::{normal, rounded};
use crate::{Gpu, Out, row_of};

const WIDTHS: [usize; 9] = [3, 32, 48, 100, 128, 1001, 2048, 4104, 18432];

fn silu_mul(x: &[f32], stride: usize, width: usize) -> Vec<f32> {
    let gated = |row: &[f32]| {
        let mut gate = row[..width].to_vec();
        plain::silu_mul(&mut gate, &row[width..2 * width]);
        gate
    };
    x.chunks(stride).flat_map(gated).collect()
}

#[test]
fn gate_times_up_over_all_rows() {
    let Some(gpu) = Gpu::open() else { return };
    let activation = Activation::new(&gpu.device).unwrap();
    for width in WIDTHS {
        let (rows, stride, what) = (6, 2 * width + width % 3, format!("width {width}"));
        let (bits, mut x) = rounded(&normal(1, rows * stride).iter().map(|x| x * 3.0).collect::<Vec<_>>());
        let mut bits = bits;
        // The ends of the exponential.
        for (at, value) in [(0, -200.0), (1, 200.0), (2, -88.5)] {
            (x[at], bits[at]) = (value, half::bf16::from_f32(value));
        }
        let x = silu_mul(&x, stride, width);
        let data = gpu.up(&bits);
        let run = |row: usize, rows: usize, out: RowsOut<'_>| {
            let data = data.slice(row * stride..(row + rows) * stride);
            let x = Bf16Rows { data: &data, stride };
            let args = ActivationArgs { rows: RowSet::First(rows), width, x, out };
            activation.silu_mul(&gpu.stream, &args).unwrap();
        };
        let out = Out::new(&gpu, rows, width);
        run(0, rows, out.both());
        out.check(&gpu, &x, |_| true, &what);
        let all = out.bits(&gpu);
        for row in 0..rows {
            let alone = Out::new(&gpu, 1, width);
            run(row, 1, RowsOut { bf16: Some(&alone.bf16), fp8: None });
            run(row, 1, RowsOut { bf16: None, fp8: alone.fp8() });
            assert!(
                row_of(&alone.bits(&gpu), 0, width) == row_of(&all, row, width),
                "{what}: row {row} alone"
            );
        }
    }
}

#[test]
fn only_real_rows_of_segments_are_computed() {
    let Some(gpu) = Gpu::open() else { return };
    let activation = Activation::new(&gpu.device).unwrap();
    let cases: [&[u32]; 4] = [&[3, 0, 128, 5, 0], &[0, 0], &[200], &[0, 7, 0, 0, 129, 1]];
    for (counts, width) in cases.into_iter().zip([128, 32, 100, 2048]) {
        let mut starts = vec![0];
        for count in counts {
            starts.push(starts[starts.len() - 1] + count.next_multiple_of(128));
        }
        let capacity = *starts.last().unwrap() as usize + 128;
        let (bits, x) = rounded(&normal(2, capacity * 2 * width));
        let real = |row: usize| {
            (0..counts.len()).any(|s| (starts[s]..starts[s] + counts[s]).contains(&(row as u32)))
        };
        let (start, rows) = (gpu.up(&starts), gpu.up(counts));
        let set = RowSet::Segments { start: &start, rows: &rows, capacity };
        let data = gpu.up(&bits);
        let out = Out::new(&gpu, capacity, width);
        let x_rows = Bf16Rows { data: &data, stride: 2 * width };
        let args = ActivationArgs { rows: set, width, x: x_rows, out: out.both() };
        activation.silu_mul(&gpu.stream, &args).unwrap();
        let what = format!("segments {counts:?}");
        out.check(&gpu, &silu_mul(&x, 2 * width, width), real, &what);
    }
}

#[test]
fn rows_are_quantised() {
    let Some(gpu) = Gpu::open() else { return };
    let activation = Activation::new(&gpu.device).unwrap();
    for width in WIDTHS {
        let (rows, stride) = (4, width + 8);
        let (bits, mut x) = rounded(&normal(3, rows * stride));
        let mut bits = bits;
        // A block of zeros.
        x[..width.min(128)].fill(0.0);
        bits[..width.min(128)].fill(half::bf16::ZERO);
        let want: Vec<f32> = x.chunks(stride).flat_map(|row| row[..width].to_vec()).collect();
        let data = gpu.up(&bits);
        let out = Out::new(&gpu, rows, width);
        let x = Bf16Rows { data: &data, stride };
        let args = ActivationArgs { rows: RowSet::First(rows), width, x, out: out.both() };
        activation.quantize(&gpu.stream, &args).unwrap();
        out.check(&gpu, &want, |_| true, &format!("width {width}"));
        // From the same bf16 the codes are those of the specification, bit by bit.
        let spec = heliostat_kernels::cpu::quant::quantize(&want, width, out.scale_stride);
        assert!(gpu.down(&out.codes) == spec.codes, "width {width}");
    }
}
