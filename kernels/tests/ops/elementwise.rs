//! Norms, activations, softmax and rope.

use heliostat_kernels::cpu::rope::{RopeLayout, RopeStyle, RopeTable};
use heliostat_kernels::cpu::{Cpu, plain};

use crate::{assert_close, bits, devices, random};

const WIDTHS: [usize; 8] = [1, 2, 15, 16, 17, 64, 100, 256];

/// Runs `op` on all devices: close to `want`, the same bits everywhere and with each row of `width` on its own.
fn check(x: &[f32], width: usize, want: &[f32], max_abs: f32, op: impl Fn(&Cpu, &mut [f32])) {
    let mut alone = x.to_vec();
    alone.chunks_exact_mut(width).for_each(|row| op(&Cpu::single_threaded(), row));
    assert_close(&alone, want, max_abs, &format!("width {width}"));
    for cpu in devices() {
        let mut got = x.to_vec();
        op(&cpu, &mut got);
        assert!(bits(&got) == bits(&alone), "width {width} on {cpu:?}");
    }
}

#[test]
fn rms_norm_agrees() {
    for width in WIDTHS {
        let (x, gamma, residual) = (random(1, 5 * width), random(2, width), random(3, 5 * width));
        let mut want = vec![0.0; x.len()];
        plain::rms_norm(&x, &gamma, 1e-6, &mut want);
        check(&x, width, &want, 1e-5, |cpu, x| cpu.rms_norm_in_place(x, &gamma, 1e-6));

        let sum: Vec<f32> = residual.iter().zip(&x).map(|(r, x)| r + x).collect();
        plain::rms_norm(&sum, &gamma, 1e-6, &mut want);
        let (mut got_sum, mut got) = (residual.clone(), vec![0.0; x.len()]);
        Cpu::single_threaded().add_rms_norm(&mut got_sum, &x, &gamma, 1e-6, &mut got);
        assert_eq!(got_sum, sum);
        assert_close(&got, &want, 1e-5, "add_rms_norm");
    }
}

#[test]
fn silu_mul_agrees_over_the_whole_range() {
    for width in WIDTHS {
        let gate: Vec<f32> = random(4, width).iter().map(|x| x * 100.0).collect();
        let up = random(5, width);
        let mut want = gate.clone();
        plain::silu_mul(&mut want, &up);
        check(&gate, width, &want, 1e-5, |cpu, gate| cpu.silu_mul(gate, &up));
    }
}

/// The exponential itself, through the sigmoid, in relative terms; and its ends.
#[test]
fn sigmoid_is_accurate_and_keeps_nan() {
    for cpu in devices() {
        let x: Vec<f32> = (-8700..=8700).map(|i| i as f32 * 0.01).collect();
        let mut got = x.clone();
        cpu.sigmoid(&mut got);
        for (&x, &got) in x.iter().zip(&got) {
            let want = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(got) / want - 1.0).abs() < 3e-7, "sigmoid({x}) = {got:e}, not {want:e}");
        }
        let mut ends = [f32::NEG_INFINITY, -1000.0, 1000.0, f32::INFINITY, f32::NAN];
        cpu.sigmoid(&mut ends);
        assert!(ends[0] < 1e-37 && ends[1] < 1e-37 && ends[2] == 1.0 && ends[3] == 1.0 && ends[4].is_nan());
    }
}

#[test]
fn softmax_agrees() {
    for width in WIDTHS {
        let mut x: Vec<f32> = random(6, 3 * width).iter().map(|x| x * 20.0).collect();
        x[0] = f32::NEG_INFINITY;
        if width == 1 {
            x[0] = 3.0;
        }
        let mut want = x.clone();
        plain::softmax(&mut want, width);
        check(&x, width, &want, 1e-6, |cpu, x| cpu.softmax(x, width));
    }
}

#[test]
fn scaled_add_is_a_fused_multiply_add() {
    for width in WIDTHS {
        let (acc, x) = (random(7, width), random(8, width));
        let want: Vec<f32> = acc.iter().zip(&x).map(|(acc, x)| 0.3f32.mul_add(*x, *acc)).collect();
        for cpu in devices() {
            let mut got = acc.clone();
            cpu.scaled_add(&mut got, 0.3, &x);
            assert_eq!(bits(&got), bits(&want));
        }
    }
}

#[test]
fn rope_rotates_its_part_of_every_head() {
    let half = 5;
    let angles: Vec<f32> = (0..20 * half).map(|i| (i / half) as f32 * (i % half + 1) as f32 * 0.37).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    let table = RopeTable { cos: &cos, sin: &sin, half };
    let layout = RopeLayout { heads: 3, head_dim: 14, offset: 2 };
    let positions = [0, 19, 7, 7];
    let x = random(9, 4 * 3 * 14);
    for style in [RopeStyle::Interleaved, RopeStyle::HalfSplit] {
        let mut want = x.clone();
        plain::rope(style, &mut want, layout, &positions, table);
        let mut got = x.clone();
        Cpu::single_threaded().rope(style, &mut got, layout, &positions, table);
        assert_close(&got, &want, 1e-6, "rope");
        assert_eq!(got[..42], x[..42], "position 0 is not rotated");
        let pair = |v: &[f32]| match style {
            RopeStyle::Interleaved => (v[42 + 2], v[42 + 3]),
            RopeStyle::HalfSplit => (v[42 + 2], v[42 + 2 + half]),
        };
        let ((a, b), (got_a, got_b)) = (pair(&x), pair(&got));
        let (c, s) = (cos[19 * half], sin[19 * half]);
        assert!((got_a - (a * c - b * s)).abs() < 1e-6 && (got_b - (a * s + b * c)).abs() < 1e-6);
    }
}
