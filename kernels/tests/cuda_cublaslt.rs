//! cuBLASLt, which ours are measured against, multiplies the same operands: its results are near ours.
#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

mod cuda_support;

use cuda_support::assert_close;
use half::bf16;
use heliostat_kernels::cuda::cublaslt::CublasLt;
use heliostat_kernels::cuda::gemm::{Gemm, HeadsView, Kind, Matrix, Operand, Output};
use heliostat_kernels::cuda::synthetic::{Distribution, Synthetic};
use heliostat_kernels::cuda::{Buffer, CudaError, Device, Priority, StoredAs, Stream, WeightStack};

struct Gpu {
    device: Device,
    stream: Stream,
    fill: Synthetic,
    library: CublasLt,
}

impl Gpu {
    fn open() -> Option<Self> {
        let device = cuda_support::device()?;
        let library = match CublasLt::new(&device, &[]) {
            Ok(library) => library,
            Err(why @ CudaError::NoLibrary { .. }) => {
                eprintln!("skipped: {why}");
                return None;
            }
            Err(why) => panic!("{why}"),
        };
        let stream = device.stream(Priority::High).unwrap();
        Some(Self { fill: Synthetic::new(&device).unwrap(), stream, library, device })
    }

    fn bf16(&self, len: usize, seed: u64) -> Buffer<bf16> {
        let buffer = self.device.alloc(len).unwrap();
        let what = Distribution { seed, mean: 0.0, deviation: 1.0 };
        self.fill.bf16(&self.stream, &buffer, what).unwrap();
        buffer
    }

    /// Codes, and scales that all differ.
    fn fp8(&self, (codes, scales): (&Buffer<u8>, &Buffer<f32>), seed: u64) {
        self.fill.e4m3(&self.stream, (codes, scales), (seed, 1.0)).unwrap();
        let values: Vec<f32> =
            (0..scales.len()).map(|i| 0.01 * (1.0 + (i * 37 % 101) as f32 / 50.0)).collect();
        scales.write(&self.stream, &values).unwrap();
    }

    fn weights(&self, stored: StoredAs, shape: (usize, usize)) -> WeightStack {
        let stack = WeightStack::new(&self.device, stored, 1, shape).unwrap();
        match stack.scales() {
            Some(scales) => self.fp8((stack.data(), scales), 1),
            None => stack.data().cast().copy_from(&self.stream, &self.bf16(shape.0 * shape.1, 1)).unwrap(),
        }
        stack
    }
}

fn f32s(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

#[test]
fn dense() {
    let Some(gpu) = Gpu::open() else { return };
    let gemm = Gemm::new(&gpu.device);
    for (n, k) in [(2112, 7168), (7168, 2048), (256, 7168)] {
        for (stored, rows) in [(StoredAs::Bf16, 100), (StoredAs::Fp8, 8), (StoredAs::Fp8, 128)] {
            let stack = gpu.weights(stored, (n, k));
            let matrix = Matrix::new(&gpu.device, stack.clone(), Kind::Dense).unwrap();
            let x = gpu.bf16(rows * k, 2);
            let (codes, scales) =
                (gpu.device.alloc(rows * k).unwrap(), gpu.device.alloc(k.div_ceil(128) * rows).unwrap());
            gpu.fp8((&codes, &scales), 3);
            let x = match stored {
                StoredAs::Bf16 => Operand::Bf16 { data: &x, stride: k },
                StoredAs::Fp8 => Operand::Fp8 { codes: &codes, scales: &scales, rows_stride: rows },
            };
            let what = format!("{stored:?} {rows} x {n} x {k}");
            let y = gpu.device.alloc(rows * n).unwrap();
            let out = Output::Bf16 { data: &y, stride: n };
            gemm.dense(&gpu.stream, &matrix, x, rows, out).unwrap();
            let want = f32s(&y.download(&gpu.stream).unwrap());
            y.fill(&gpu.stream, 0xff).unwrap();
            let Some(product) = gpu.library.product((&stack, Kind::Dense), x, rows, out).unwrap() else {
                println!("{what}: the library has no kernel");
                continue;
            };
            product.run(&gpu.stream).unwrap();
            assert_close(&f32s(&y.download(&gpu.stream).unwrap()), &want, 1e-5, &what);
            println!("{what}: the same");
        }
    }
}

#[test]
fn heads() {
    let Some(gpu) = Gpu::open() else { return };
    let (heads, rows) = (128, 64);
    for (n, k) in [(512, 128), (128, 512)] {
        let stack = gpu.weights(StoredAs::Bf16, (heads * n, k));
        let matrix = Matrix::new(&gpu.device, stack.clone(), Kind::Heads(heads)).unwrap();
        let (x, y) = (gpu.bf16(rows * heads * k, 2), gpu.device.alloc(rows * heads * n).unwrap());
        let view = |data, width| HeadsView { data, row_stride: heads * width, head_stride: width };
        Gemm::new(&gpu.device).heads(&gpu.stream, &matrix, view(&x, k), rows, view(&y, n)).unwrap();
        let want = f32s(&y.download(&gpu.stream).unwrap());
        y.fill(&gpu.stream, 0xff).unwrap();
        let (input, out) =
            (Operand::Bf16 { data: &x, stride: heads * k }, Output::Bf16 { data: &y, stride: heads * n });
        let product = gpu.library.product((&stack, Kind::Heads(heads)), input, rows, out).unwrap();
        product.expect("a kernel").run(&gpu.stream).unwrap();
        assert_close(&f32s(&y.download(&gpu.stream).unwrap()), &want, 1e-5, &format!("{n} x {k}"));
    }
}
