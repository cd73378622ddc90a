//! Times of the products at the shapes of DeepSeek-R1 on one rank of 32, beside the least that the chip allows.

use half::bf16;
use heliostat_kernels::cuda::gemm::{Gemm, HeadsView, Kind, Matrix, Operand, Output, Plan, Segments};
use heliostat_kernels::cuda::{Buffer, CudaError, Device, StoredAs, Stream, WeightStack};

use crate::cuda_gemm_operands::Noise;
use crate::cuda_support::time_us;

/// Bytes per second of device memory, as measured.
const MEMORY: f64 = 4.3e12;
/// Distinct weights that a measurement walks over, so that none are in the second-level cache.
const WALK_BYTES: usize = 400 << 20;
/// Experts of a rank.
const SLOTS: usize = 9;

/// A product to be timed.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) stored: StoredAs,
    pub(crate) kind: Kind,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Logits are f32.
    pub(crate) logits: bool,
}

/// The products of a step.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name, stored, kind, n, k| Case { name, stored, kind, n, k, logits: false };
    let fp8 = |name, n, k| case(name, StoredAs::Fp8, Kind::Dense, n, k);
    vec![
        fp8("qkv_a", 2112, 7168),
        fp8("q_b", 24576, 1536),
        fp8("o", 7168, 16384),
        fp8("shared gate_up", 4096, 7168),
        fp8("shared down", 7168, 2048),
        fp8("dense gate_up", 36864, 7168),
        fp8("dense down", 7168, 18432),
        Case { logits: true, ..case("router", StoredAs::Bf16, Kind::Dense, 256, 7168) },
        Case { logits: true, ..case("lm_head", StoredAs::Bf16, Kind::Dense, 129_280, 7168) },
        case("W_UK", StoredAs::Bf16, Kind::Heads(128), 512, 128),
        case("W_UV", StoredAs::Bf16, Kind::Heads(128), 128, 512),
        case("experts gate_up", StoredAs::Fp8, Kind::Pool, 4096, 7168),
        case("experts down", StoredAs::Fp8, Kind::Pool, 7168, 2048),
    ]
}

impl Case {
    fn matrices(&self) -> usize {
        match self.kind {
            Kind::Dense => 1,
            Kind::Heads(heads) => heads,
            Kind::Pool => SLOTS,
        }
    }

    /// Rows of all matrices together: an expert gets 8/9 of a batch's rows on average.
    fn rows_of_all(&self, rows: usize) -> usize {
        match self.kind {
            Kind::Dense => rows,
            Kind::Heads(heads) => rows * heads,
            Kind::Pool => SLOTS * rows_of_expert(rows),
        }
    }

    /// Bytes that must move and operations that must be done.
    fn costs(&self, rows: usize) -> (f64, f64) {
        let x_bytes = if self.stored == StoredAs::Fp8 { 1 } else { 2 };
        let y_bytes = if self.logits { 4 } else { 2 };
        let weights = self.matrices() * self.n * self.k * x_bytes;
        let all = self.rows_of_all(rows);
        let bytes = weights + all * (self.k * x_bytes + self.n * y_bytes);
        (bytes as f64, 2.0 * all as f64 * (self.n * self.k) as f64)
    }

    /// Microseconds that the chip needs at least.
    pub(crate) fn floor_us(&self, rows: usize) -> f64 {
        let (bytes, operations) = self.costs(rows);
        let rate = if self.stored == StoredAs::Fp8 { 1.58e15 } else { 0.79e15 };
        (bytes / MEMORY).max(operations / rate) * 1e6
    }
}

fn rows_of_expert(rows: usize) -> usize {
    (rows * 8).div_ceil(9)
}

/// What a case works on: as many copies of its weights as it takes to outrun the cache.
pub(crate) struct Bench {
    case: Case,
    stacks: Vec<WeightStack>,
    x: Buffer<u8>,
    scales: Buffer<f32>,
    y: Buffer<u8>,
    rows_max: usize,
    starts: Buffer<u32>,
    slots: Vec<Buffer<u32>>,
}

impl Bench {
    pub(crate) fn new(device: &Device, stream: &Stream, case: Case, rows_max: usize) -> Self {
        let (shape, per_copy) = match case.kind {
            Kind::Dense => ((case.n, case.k), 1),
            Kind::Heads(heads) => ((heads * case.n, case.k), 1),
            Kind::Pool => ((case.n, case.k), SLOTS),
        };
        let bytes = WeightStack::bytes_per_matrix(case.stored, shape) * per_copy;
        let copies = WALK_BYTES.div_ceil(bytes).clamp(2, 40);
        let (stack_count, per_stack) =
            if case.kind == Kind::Pool { (1, copies * SLOTS) } else { (copies, 1) };
        let stacks: Vec<WeightStack> = (0..stack_count)
            .map(|_| WeightStack::new(device, case.stored, per_stack, shape).unwrap())
            .collect();
        let noise = random_bytes(device, case.stored);
        for stack in &stacks {
            spread(stream, &noise, stack.data());
            if let Some(scales) = stack.scales() {
                scales.write(stream, &Noise::new(3).scales(scales.len())).unwrap();
            }
        }
        let padded = rows_of_expert(rows_max).next_multiple_of(128);
        let rows_all = if case.kind == Kind::Pool { SLOTS * padded } else { rows_max };
        let heads = if let Kind::Heads(heads) = case.kind { heads } else { 1 };
        let x = device.alloc(rows_all * heads * case.k * 2).unwrap();
        spread(stream, &noise, &x);
        let scales = Noise::new(4).scales(case.k.div_ceil(128) * rows_all);
        let table =
            |copy: usize| (copy * SLOTS..(copy + 1) * SLOTS).map(|slot| slot as u32).collect::<Vec<_>>();
        Self {
            case,
            stacks,
            x,
            scales: device.upload(&scales).unwrap(),
            y: device.alloc(rows_all * heads * case.n * 4).unwrap(),
            rows_max: rows_all,
            starts: device.alloc(SLOTS + 1).unwrap(),
            slots: (0..copies).map(|copy| device.upload(&table(copy)).unwrap()).collect(),
        }
    }

    /// Matrices by `plan`, or by their own.
    pub(crate) fn matrices(&self, device: &Device, plan: Option<Plan>) -> Vec<Matrix> {
        let make = |stack: &WeightStack| match plan {
            Some(plan) => Matrix::with_plan(device, stack.clone(), self.case.kind, plan),
            None => Matrix::new(device, stack.clone(), self.case.kind),
        };
        self.stacks.iter().map(|stack| make(stack).unwrap()).collect()
    }

    /// Microseconds of one product of `rows` rows.
    pub(crate) fn time_us(&self, gemm: &Gemm, stream: &Stream, matrices: &[Matrix], rows: usize) -> f64 {
        let expert = rows_of_expert(rows);
        let starts: Vec<u32> = (0..=SLOTS).map(|slot| (slot * expert.next_multiple_of(128)) as u32).collect();
        self.starts.write(stream, &starts).unwrap();
        let counts = stream.device().upload(&[expert as u32; SLOTS]).unwrap();
        let per_round = self.slots.len().max(6);
        time_us(stream, (7, per_round), |stream, call| {
            let matrix = &matrices[call % matrices.len()];
            let slots = &self.slots[call % self.slots.len()];
            self.call(gemm, stream, matrix, rows, (&counts, slots))
        })
    }

    fn call(
        &self,
        gemm: &Gemm,
        stream: &Stream,
        matrix: &Matrix,
        rows: usize,
        (counts, slots): (&Buffer<u32>, &Buffer<u32>),
    ) -> Result<(), CudaError> {
        let Case { n, k, .. } = self.case;
        let x_bf16: Buffer<bf16> = self.x.cast();
        let x = match self.case.stored {
            StoredAs::Bf16 => Operand::Bf16 { data: &x_bf16, stride: k },
            StoredAs::Fp8 => {
                Operand::Fp8 { codes: &self.x, scales: &self.scales, rows_stride: self.rows_max }
            }
        };
        let (y_bf16, y_f32) = (self.y.cast(), self.y.cast());
        let y = match self.case.logits {
            true => Output::F32 { data: &y_f32, stride: n },
            false => Output::Bf16 { data: &y_bf16, stride: n },
        };
        match self.case.kind {
            Kind::Dense => gemm.dense(stream, matrix, x, rows, y),
            Kind::Heads(heads) => {
                let view = |data, width| HeadsView { data, row_stride: heads * width, head_stride: width };
                gemm.heads(stream, matrix, view(&x_bf16, k), rows, view(&y_bf16, n))
            }
            Kind::Pool => {
                let segments = Segments {
                    start: &self.starts,
                    rows: counts,
                    pool_of_slot: slots,
                    rows_max: self.rows_max,
                    rows_typical: rows_of_expert(rows),
                };
                gemm.grouped(stream, matrix, x, segments, y)
            }
        }
    }

    /// One line: time, rates, and how near to the floor.
    pub(crate) fn line(&self, rows: usize, us: f64) -> String {
        let (bytes, operations) = self.case.costs(rows);
        let floor = self.case.floor_us(rows);
        format!(
            "{:16} {rows:5} {us:8.1} us {:5.2} TB/s {:6.0} TFLOP/s {:4.0}% of {floor:.1}",
            self.case.name,
            bytes / us / 1e6,
            operations / us / 1e6,
            floor / us * 100.0
        )
    }
}

/// 16 MiB of random elements.
fn random_bytes(device: &Device, stored: StoredAs) -> Buffer<u8> {
    let noise = Noise::new(21);
    match stored {
        StoredAs::Bf16 => device.upload(&noise.bf16(8 << 20, 1.0)).unwrap().cast(),
        StoredAs::Fp8 => device.upload(&noise.codes(16 << 20)).unwrap(),
    }
}

fn spread(stream: &Stream, noise: &Buffer<u8>, to: &Buffer<u8>) {
    for start in (0..to.len()).step_by(noise.len()) {
        let len = noise.len().min(to.len() - start);
        to.slice(start..start + len).copy_from(stream, &noise.slice(0..len)).unwrap();
    }
    stream.synchronize().unwrap();
}
