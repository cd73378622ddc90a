//! Norms and the embedding.

use half::bf16;
use heliostat_kernels::cpu::plain;
use heliostat_kernels::cuda::norm::{EmbedArgs, Norm, NormArgs, NormInput};
use heliostat_kernels::cuda::rows::{Bf16Rows, RowsOut};

use crate::cuda_support::{normal, rounded};
use crate::{Gpu, NONE, Out, row_of};

/// Odd and even, every number of pieces per thread, and the longest.
const WIDTHS: [usize; 12] = [1, 24, 64, 100, 136, 160, 256, 1536, 5121, 7168, 12288, 16384];

const EPS: f32 = 1e-6;

fn normed(x: &[f32], gamma: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    plain::rms_norm(x, gamma, EPS, &mut out);
    out
}

fn sum(x: &[f32], y: &[f32]) -> Vec<f32> {
    x.iter().zip(y).map(|(x, y)| x + y).collect()
}

#[test]
fn residual_and_branch_are_summed_and_normed() {
    let Some(gpu) = Gpu::open() else { return };
    let norm = Norm::new(&gpu.device).unwrap();
    let rows = 5;
    for width in WIDTHS {
        let what = format!("width {width}");
        let (residual, gamma) = (normal(1, rows * width), normal(2, width));
        let (branch_bits, branch) = rounded(&normal(3, rows * width));
        let total = sum(&residual, &branch);
        let want = normed(&total, &gamma);
        let (gamma, branch) = (gpu.up(&gamma), gpu.up(&branch_bits));
        let run = |from: usize, rows: usize, out: RowsOut<'_>| {
            let residual = gpu.up(&residual[from * width..(from + rows) * width]);
            let branch = branch.slice(from * width..(from + rows) * width);
            let input = NormInput::Residual { residual: &residual, branch: Some(&branch) };
            norm.run(&gpu.stream, &NormArgs { rows, input, gamma: &gamma, eps: EPS, out }).unwrap();
            gpu.down(&residual)
        };
        let out = Out::new(&gpu, rows, width);
        assert_eq!(run(0, rows, out.both()), total, "{what}: the residual stream");
        out.check(&gpu, &want, |_| true, &what);
        let all = out.bits(&gpu);
        // One row alone, at another address, and one kind of output without the other.
        for row in 0..rows {
            let alone = Out::new(&gpu, 1, width);
            run(row, 1, RowsOut { bf16: Some(&alone.bf16), fp8: None });
            run(row, 1, RowsOut { bf16: None, fp8: alone.fp8() });
            assert!(
                row_of(&alone.bits(&gpu), 0, width) == row_of(&all, row, width),
                "{what}: row {row} alone"
            );
        }
        // Without a branch, nothing is written back.
        let first = Out::new(&gpu, rows, width);
        let residual = gpu.up(&total);
        let input = NormInput::Residual { residual: &residual, branch: None };
        let args = NormArgs { rows, input, gamma: &gamma, eps: EPS, out: first.both() };
        norm.run(&gpu.stream, &args).unwrap();
        assert!(first.bits(&gpu) == all, "{what}: without a branch");
    }
}

#[test]
fn rows_at_a_stride_and_selected_rows() {
    let Some(gpu) = Gpu::open() else { return };
    let norm = Norm::new(&gpu.device).unwrap();
    for (width, stride) in [(1536, 2112), (40, 72), (128, 153), (17, 17)] {
        let what = format!("{width} of {stride}");
        let rows = 7;
        let (bits, x) = rounded(&normal(4, rows * stride));
        let gamma = normal(5, width);
        let parts: Vec<f32> = x.chunks(stride).flat_map(|row| row[..width].to_vec()).collect();
        let (data, gamma_on) = (gpu.up(&bits), gpu.up(&gamma));
        let out = Out::new(&gpu, rows, width);
        let input = NormInput::Rows(Bf16Rows { data: &data, stride });
        let args = NormArgs { rows, input, gamma: &gamma_on, eps: EPS, out: out.both() };
        norm.run(&gpu.stream, &args).unwrap();
        out.check(&gpu, &normed(&parts, &gamma), |_| true, &what);

        let selected = [6, 0, NONE, 3];
        let residual = normal(6, rows * width);
        let (branch_bits, branch) = rounded(&normal(7, rows * width));
        let normed = normed(&sum(&residual, &branch), &gamma);
        let zeros = vec![0.0; width];
        let row = |row: u32| match row {
            NONE => &zeros[..],
            row => &normed[row as usize * width..][..width],
        };
        let want: Vec<f32> = selected.iter().flat_map(|&index| row(index).to_vec()).collect();
        let (residual_on, branch) = (gpu.up(&residual), gpu.up(&branch_bits));
        let out = Out::new(&gpu, 4, width);
        let input =
            NormInput::Selected { residual: &residual_on, branch: Some(&branch), rows: &gpu.up(&selected) };
        let args = NormArgs { rows: 4, input, gamma: &gamma_on, eps: EPS, out: out.both() };
        norm.run(&gpu.stream, &args).unwrap();
        out.check(&gpu, &want, |_| true, &what);
        assert_eq!(gpu.down(&residual_on), residual, "{what}: the residual stream stays");
    }
}

#[test]
fn embeddings_are_gathered() {
    let Some(gpu) = Gpu::open() else { return };
    let norm = Norm::new(&gpu.device).unwrap();
    for width in [64, 100, 7168] {
        let (vocab, rows) = (50, 6);
        let (bits, table) = rounded(&normal(8, vocab * width));
        let (tokens, positions) = ([3, 49, 50, 0, 7, NONE], [0, 5, 1, NONE, 9, 2]);
        let want: Vec<f32> = tokens
            .iter()
            .zip(positions)
            .flat_map(|(&token, position)| match (token as usize) < vocab && position != NONE {
                true => table[token as usize * width..][..width].to_vec(),
                false => vec![0.0; width],
            })
            .collect();
        let residual = gpu.up(&vec![f32::NAN; rows * width]);
        let args = EmbedArgs {
            rows,
            width,
            table: &gpu.up::<bf16>(&bits),
            tokens: &gpu.up(&tokens),
            positions: &gpu.up(&positions),
            residual: &residual,
        };
        norm.embed(&gpu.stream, &args).unwrap();
        assert_eq!(gpu.down(&residual), want, "width {width}");
    }
}
