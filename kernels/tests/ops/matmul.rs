//! Products: parity, batch invariance, storage types.

use heliostat_kernels::cpu::{Cpu, plain};
use heliostat_kernels::dtype::f32_to_bf16;
use heliostat_kernels::weight::{Block, Weight};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::{assert_close, bits, devices, random};

/// One weight of each storage type.
pub(crate) fn weights(seed: u64, rows: usize, cols: usize, block: Block) -> [Weight; 3] {
    let values = random(seed, rows * cols);
    let bf16 = values.iter().map(|&v| f32_to_bf16(v)).collect();
    let mut rng = StdRng::seed_from_u64(seed);
    let codes =
        (0..rows * cols).map(|_| rng.random_range(0..0x7f) | (rng.random_range(0..2u8) << 7)).collect();
    let scales =
        (0..rows.div_ceil(block.rows) * cols.div_ceil(block.cols)).map(|_| rng.random_range(1e-4..1e-2));
    [
        Weight::from_f32(rows, cols, values).expect("lengths fit"),
        Weight::from_bf16(rows, cols, bf16).expect("lengths fit"),
        Weight::from_f8(rows, cols, codes, scales.collect(), block).expect("lengths fit"),
    ]
}

fn product(cpu: &Cpu, x: &[f32], w: &Weight) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / w.cols() * w.rows()];
    cpu.matmul(x, w, &mut y);
    y
}

/// Rows, columns, and a block that makes ragged edges of them.
const SHAPES: [(usize, usize, usize, usize); 9] = [
    (1, 1, 128, 128),
    (3, 15, 2, 16),
    (4, 16, 128, 128),
    (5, 17, 4, 16),
    (33, 100, 16, 48),
    (80, 256, 128, 128),
    (130, 300, 128, 128),
    (128, 129, 128, 128),
    (257, 704, 128, 128),
];

#[test]
fn matmul_agrees_with_plain() {
    let cpu = Cpu::single_threaded();
    for (seed, (n, k, block_rows, block_cols)) in SHAPES.into_iter().enumerate() {
        for w in weights(seed as u64, n, k, Block { rows: block_rows, cols: block_cols }) {
            for m in [0, 1, 2, 5, 6, 7, 13, 32] {
                let x = random(m as u64, m * k);
                let mut want = vec![0.0; m * n];
                plain::matmul(&x, &w, &mut want);
                let what = format!("{m} x {n} x {k} {:?}", w.dtype());
                assert_close(&product(&cpu, &x, &w), &want, 1e-5 * k as f32, &what);
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_thread_count_and_instruction_set() {
    for (seed, (n, k, block_rows, block_cols)) in SHAPES.into_iter().enumerate() {
        for w in weights(seed as u64, n, k, Block { rows: block_rows, cols: block_cols }) {
            let m = 23;
            let x = random(7, m * k);
            let alone: Vec<u32> =
                x.chunks_exact(k).flat_map(|row| bits(&product(&Cpu::single_threaded(), row, &w))).collect();
            for cpu in devices() {
                for batch in [1, 2, 3, 4, 5, 6, 7, 12, 23] {
                    let got: Vec<u32> =
                        x.chunks(batch * k).flat_map(|rows| bits(&product(&cpu, rows, &w))).collect();
                    assert!(got == alone, "{n} x {k} {:?}, batches of {batch}, {cpu:?}", w.dtype());
                }
            }
        }
    }
}

#[test]
fn threads_share_a_product_that_is_large_enough() {
    let [_, _, w] = weights(1, 515, 512, Block::DEEPSEEK);
    let x = random(2, 9 * 512);
    let want = bits(&product(&Cpu::single_threaded(), &x, &w));
    for cpu in devices() {
        assert!(bits(&product(&cpu, &x, &w)) == want, "{cpu:?}");
    }
}

#[test]
fn storage_types_have_the_bits_of_their_dequantised_weight() {
    for (seed, (n, k, block_rows, block_cols)) in SHAPES.into_iter().enumerate() {
        for w in weights(seed as u64, n, k, Block { rows: block_rows, cols: block_cols }) {
            let wide = Weight::from_f32(n, k, w.dequantized()).unwrap();
            for (cpu, m) in devices().iter().flat_map(|cpu| [1, 4, 9].map(|m| (cpu, m))) {
                let x = random(3, m * k);
                let (got, want) = (product(cpu, &x, &w), product(cpu, &x, &wide));
                assert!(bits(&got) == bits(&want), "{m} x {n} x {k} {:?} {cpu:?}", w.dtype());
            }
        }
    }
}

/// Subnormal codes, and scales from the smallest f32 to the largest allowed, round once.
#[test]
fn extreme_scales_round_as_one_product() {
    let codes: Vec<u8> = (0..=255u8).filter(|c| c & 0x7f != 0x7f).chain([0, 0]).collect();
    for scale in [f32::from_bits(1), 1.0e-42, 1.2e-38, 0.3, 7.7e29, 1.0e30] {
        let w = Weight::from_f8(16, 16, codes.clone(), vec![scale], Block::DEEPSEEK).unwrap();
        for cpu in devices() {
            for m in [1, 7] {
                let mut x = vec![0.0; m * 16];
                for column in 0..16 {
                    x.fill(0.0);
                    x[column] = 1.0;
                    let y = product(&cpu, &x, &w);
                    let want: Vec<f32> = w.dequantized().chunks(16).map(|row| row[column] + 0.0).collect();
                    assert_eq!(bits(&y[..16]), bits(&want), "scale {scale:e}, column {column}, {cpu:?}");
                }
            }
        }
    }
}

#[test]
fn heads_are_products_of_their_own() {
    let (heads, n, k) = (3, 20, 24);
    let [w, ..] = weights(5, heads * n, k, Block::DEEPSEEK);
    for m in [1, 4, 9] {
        let x = random(6, m * heads * k);
        let mut want = vec![0.0; m * heads * n];
        for (row, head) in (0..m).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let x = &x[(row * heads + head) * k..][..k];
            let y = product(&Cpu::single_threaded(), x, &w.row_slice(head * n..(head + 1) * n));
            want[(row * heads + head) * n..][..n].copy_from_slice(&y);
        }
        for cpu in devices() {
            let mut got = vec![0.0; m * heads * n];
            cpu.matmul_heads(&x, heads, &w, &mut got);
            assert!(bits(&got) == bits(&want), "{m} rows, {cpu:?}");
        }
    }
}

#[test]
fn gather_reads_rows() {
    for w in weights(8, 40, 50, Block { rows: 16, cols: 32 }) {
        let mut out = vec![0.0; 3 * 50];
        Cpu::single_threaded().gather(&w, &[39, 0, 17], &mut out);
        let all = w.dequantized();
        assert_eq!(out, [&all[39 * 50..], &all[..50], &all[17 * 50..18 * 50]].concat());
    }
}
