//! Weights: constructors, views, bytes.

use heliostat_kernels::dtype::{DType, e4m3_to_f32};
use heliostat_kernels::weight::{Block, Weight, WeightError};

use crate::bits;
use crate::matmul::weights;

#[test]
fn block_scales_apply_to_their_block_at_ragged_edges() {
    let block = Block { rows: 2, cols: 16 };
    let codes: Vec<u8> = (0..3 * 20).collect();
    let scales = vec![1.0, 2.0, 3.0, 4.0];
    let w = Weight::from_f8(3, 20, codes.clone(), scales.clone(), block).unwrap();
    for (index, value) in w.dequantized().into_iter().enumerate() {
        let (row, col) = (index / 20, index % 20);
        assert_eq!(value, e4m3_to_f32(codes[index]) * scales[row / 2 * 2 + col / 16], "[{row}, {col}]");
    }
}

#[test]
fn views_and_stacks_keep_their_rows() {
    for w in weights(1, 300, 40, Block { rows: 128, cols: 16 }) {
        let all = w.dequantized();
        for range in [0..300, 0..1, 100..140, 128..256, 250..300, 7..7] {
            let view = w.row_slice(range.clone());
            let want = bits(&all[range.start * 40..range.end * 40]);
            assert_eq!(bits(&view.dequantized()), want);
            let moved = Weight::from_bytes(&view.to_bytes()).unwrap();
            assert_eq!(bits(&moved.dequantized()), want);
            assert_eq!(moved.dtype(), w.dtype());
            assert_eq!(moved.checksum(), view.checksum());
        }
        let stacked =
            Weight::concat(&[&w.row_slice(100..128), &w.row_slice(128..256), &w.row_slice(256..290)])
                .unwrap();
        assert_eq!(bits(&stacked.dequantized()), bits(&all[100 * 40..290 * 40]));
    }
}

#[test]
fn a_checksum_sees_every_part() {
    let w = |cols: usize, code: u8, scale: f32| {
        Weight::from_f8(32 / cols, cols, vec![code; 32], vec![scale; 1], Block::DEEPSEEK).unwrap().checksum()
    };
    let all = [w(16, 1, 1.0), w(32, 1, 1.0), w(16, 2, 1.0), w(16, 1, 2.0)];
    assert!((0..4).all(|i| (0..i).all(|j| all[i] != all[j])), "{all:?}");
}

#[test]
fn little_endian_bytes_are_read_as_they_stand_in_a_checkpoint() {
    let w = Weight::from_le_bytes(DType::Bf16, 1, 2, &[0x80, 0x3f, 0x00, 0xc0]).unwrap();
    assert_eq!(w.dequantized(), [1.0, -2.0]);
    let w = Weight::from_le_bytes(DType::F32, 1, 1, &1.5f32.to_le_bytes()).unwrap();
    assert_eq!(w.dequantized(), [1.5]);
    assert_eq!(serde_json::to_string(&DType::F8E4M3).unwrap(), "\"F8_E4M3\"");
}

#[test]
fn what_is_no_weight_is_refused() {
    let block = Block::DEEPSEEK;
    let f8 = |codes: Vec<u8>, scales: Vec<f32>| {
        Weight::from_f8(2, 16, codes, scales, block).map(|_| ()).unwrap_err()
    };
    assert!(matches!(f8(vec![0; 31], vec![1.0]), WeightError::Length { what: "codes", .. }));
    assert!(matches!(f8(vec![0; 32], vec![]), WeightError::Length { what: "scales", .. }));
    assert!(matches!(f8(vec![0xff; 32], vec![1.0]), WeightError::NotANumber { index: 0 }));
    assert!(matches!(f8(vec![0; 32], vec![f32::NAN]), WeightError::Scale { index: 0, .. }));
    assert!(Weight::from_le_bytes(DType::F8E4M3, 1, 1, &[0]).is_err());
    assert!(Weight::from_f32(usize::MAX, 2, vec![]).is_err());

    let [wide, half, eighth] = weights(1, 4, 16, block);
    assert!(Weight::concat(&[&wide, &half]).is_err() && Weight::concat(&[]).is_err());
    // Two blocks of scales for 100 + 100 rows, as for 200 rows, but not the same rows.
    let [_, _, hundred] = weights(2, 100, 16, block);
    let ends_within = Weight::concat(&[&hundred, &hundred]).map(|_| ());
    assert!(matches!(ends_within, Err(WeightError::Concat(_))), "an inner FP8 matrix ends within a block");
    let bytes = eighth.to_bytes();
    for len in 0..bytes.len() {
        assert!(Weight::from_bytes(&bytes[..len]).is_err(), "cut to {len}");
    }
    let mut huge = bytes.clone();
    huge[8..16].copy_from_slice(&1u64.to_le_bytes());
    huge[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(Weight::from_bytes(&huge).is_err(), "scales and codes together overflow");
    for (at, byte) in (0..48).flat_map(|at| [0, 1, 0x7f, 0xff].map(|byte| (at, byte))) {
        let mut hostile = bytes.clone();
        hostile[at] = byte;
        // No panic and no allocation beyond what was sent, whatever the header says.
        let _ = Weight::from_bytes(&hostile);
    }
}
