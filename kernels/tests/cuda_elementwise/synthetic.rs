//! Synthetic weights.

use half::bf16;
use heliostat_kernels::cpu::quant::f32_to_e4m3;
use heliostat_kernels::cuda::synthetic::{Distribution, Synthetic, value};
use heliostat_kernels::dtype::e4m3_to_f32;

use crate::Gpu;

fn moments(values: &[f32]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

#[test]
fn buffers_are_what_the_seed_says() {
    let Some(gpu) = Gpu::open() else { return };
    let fill = Synthetic::new(&gpu.device).unwrap();
    let len = 1_000_003;
    let what = Distribution { seed: 7, mean: 1.0, deviation: 0.25 };
    let want: Vec<f32> = (0..len as u64).map(|index| value(what, index)).collect();
    let (mean, deviation) = moments(&want);
    assert!((mean - 1.0).abs() < 1e-3 && (deviation - 0.25).abs() < 1e-3, "{mean} {deviation}");

    let floats = gpu.device.alloc::<f32>(len).unwrap();
    fill.f32(&gpu.stream, &floats, what).unwrap();
    assert!(gpu.down(&floats) == want);
    let halves = gpu.device.alloc::<bf16>(len).unwrap();
    fill.bf16(&gpu.stream, &halves, what).unwrap();
    assert!(gpu.down(&halves).iter().zip(&want).all(|(got, &want)| *got == bf16::from_f32(want)));

    let (codes, scales) = (gpu.device.alloc::<u8>(len).unwrap(), gpu.device.alloc::<f32>(77).unwrap());
    fill.e4m3(&gpu.stream, (&codes, &scales), (8, 0.02)).unwrap();
    let scales = gpu.down(&scales);
    assert!(scales.iter().all(|&scale| scale == scales[0]));
    let codes = gpu.down(&codes);
    let plain = Distribution { seed: 8, mean: 0.0, deviation: 112.0 };
    assert!(codes.iter().zip(0..).all(|(&code, index)| code == f32_to_e4m3(value(plain, index))));
    let values: Vec<f32> = codes.iter().map(|&code| e4m3_to_f32(code) * scales[0]).collect();
    let (mean, deviation) = moments(&values);
    assert!(mean.abs() < 1e-4 && (deviation / 0.02 - 1.0).abs() < 5e-3, "{mean} {deviation}");
    // Neighbours and other seeds are strangers.
    let other: Vec<f32> = (0..len as u64).map(|i| value(Distribution { seed: 9, ..plain }, i)).collect();
    for shifted in [&values[1..], &other[1..]] {
        let dot: f64 = values.iter().zip(shifted).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
        let (x, y) = (moments(&values).1, moments(shifted).1);
        assert!((dot / (len as f64 * x * y)).abs() < 5e-3);
    }
}
