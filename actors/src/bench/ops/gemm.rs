//! Matrix products: dense, per head, grouped by expert.

use half::bf16;
use heliostat_kernels::cuda::cublaslt::{CublasLt, Product as LibraryProduct};
use heliostat_kernels::cuda::gemm::{Gemm, HeadsView, Kind, Matrix, Operand, Output, Segments};
use heliostat_kernels::cuda::{Buffer, CudaError, StoredAs, Stream, WeightStack};

use super::{Bench, EXPERTS, HEADS, HIDDEN, LATENT, OpReport, SLOTS, TOP_K, VOCAB, WIDTH, rows_of_expert};
use crate::bench::floor::{Cost, Precision, Product};

/// Distinct weights that a measurement walks over, so that none are in the second-level cache.
const WALK_BYTES: usize = 400 << 20;
/// Copies of small weights: enough of them for the longest recording.
const COPIES_MAX: usize = 40;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    precision: Precision,
    kind: Kind,
    n: usize,
    k: usize,
    /// Results are f32.
    logits: bool,
}

/// The products of a step.
fn cases() -> Vec<Case> {
    let case = |name, precision, kind, (n, k)| Case { name, precision, kind, n, k, logits: false };
    let fp8 = |name, shape| case(name, Precision::Fp8, Kind::Dense, shape);
    let heads = |name, shape| case(name, Precision::Bf16, Kind::Heads(HEADS), shape);
    let logits = |name, n| Case { logits: true, ..case(name, Precision::Bf16, Kind::Dense, (n, HIDDEN)) };
    vec![
        fp8("qkv_a FP8", (2112, HIDDEN)),
        fp8("q_b FP8", (24_576, 1536)),
        heads("W_UK BF16", (LATENT, 128)),
        heads("W_UV BF16", (128, LATENT)),
        fp8("o_proj FP8", (HIDDEN, 16_384)),
        logits("router BF16", EXPERTS),
        fp8("shared gate_up FP8", (2 * WIDTH, HIDDEN)),
        fp8("shared down FP8", (HIDDEN, WIDTH)),
        case("experts gate_up FP8", Precision::Fp8, Kind::Pool, (2 * WIDTH, HIDDEN)),
        case("experts down FP8", Precision::Fp8, Kind::Pool, (HIDDEN, WIDTH)),
        fp8("dense gate_up FP8", (36_864, HIDDEN)),
        fp8("dense down FP8", (HIDDEN, 18_432)),
        logits("LM head BF16", VOCAB),
    ]
}

impl Case {
    fn stored(&self) -> StoredAs {
        match self.precision {
            Precision::Bf16 => StoredAs::Bf16,
            Precision::Fp8 => StoredAs::Fp8,
        }
    }

    fn heads(&self) -> usize {
        match self.kind {
            Kind::Heads(heads) => heads,
            Kind::Dense | Kind::Pool => 1,
        }
    }

    fn cost(&self, rows: usize) -> Cost {
        let (matrices, rows) = match self.kind {
            Kind::Dense => (1, rows),
            Kind::Heads(heads) => (heads, rows * heads),
            Kind::Pool => (SLOTS, rows * TOP_K),
        };
        let Self { n, k, precision, logits, .. } = *self;
        Cost::product(Product { matrices, rows, n, k, precision, y_bytes: if logits { 4 } else { 2 } })
    }
}

/// Measures every product; beside `library`, where there is one.
pub(super) fn measure(
    bench: &mut Bench<'_>,
    batch: &[usize],
    library: Option<&CublasLt>,
) -> Result<(), CudaError> {
    for case in cases() {
        let weights = Weights::new(bench, case)?;
        for &rows in batch {
            let io = Io::new(bench, case, rows)?;
            let us = io.time_us(bench, &weights)?;
            let library_us = match library {
                Some(library) => io.library_us(bench, &weights, library)?,
                None => None,
            };
            let report = OpReport::new((case.name, rows), us, Some(case.cost(rows)));
            bench.note(report.beside(library_us));
        }
    }
    Ok(())
}

/// As many copies of a case's weights as it takes to outrun the cache.
struct Weights {
    matrices: Vec<Matrix>,
    /// For a pool: where each copy's experts lie.
    places: Vec<Buffer<u32>>,
}

impl Weights {
    fn new(bench: &Bench<'_>, case: Case) -> Result<Self, CudaError> {
        let shape = (case.heads() * case.n, case.k);
        let grouped = case.kind == Kind::Pool;
        let per_copy = if grouped { SLOTS } else { 1 };
        let bytes = WeightStack::bytes_per_matrix(case.stored(), shape) * per_copy;
        let copies = WALK_BYTES.div_ceil(bytes).clamp(2, COPIES_MAX);
        let (stacks, count) = if grouped { (1, copies * SLOTS) } else { (copies, 1) };
        let matrix = |seed: usize| {
            let stack = WeightStack::new(&bench.device, case.stored(), count, shape)?;
            fill(bench, &stack, seed as u64)?;
            Matrix::new(&bench.device, stack, case.kind)
        };
        let places = |copy: usize| {
            let first = (copy * SLOTS) as u32;
            bench.device.upload(&(first..first + SLOTS as u32).collect::<Vec<_>>())
        };
        Ok(Self {
            matrices: (0..stacks).map(matrix).collect::<Result<_, _>>()?,
            places: (0..copies).map(places).collect::<Result<_, _>>()?,
        })
    }

    /// Calls in a recording: all copies, and not too few.
    fn calls(&self) -> usize {
        self.places.len().max(6)
    }
}

fn fill(bench: &Bench<'_>, stack: &WeightStack, seed: u64) -> Result<(), CudaError> {
    use heliostat_kernels::cuda::synthetic::Distribution;
    match stack.scales() {
        Some(scales) => bench.fill.e4m3(&bench.stream, (stack.data(), scales), (seed, 0.02)),
        None => {
            let what = Distribution { seed, mean: 0.0, deviation: 0.02 };
            bench.fill.bf16(&bench.stream, &stack.data().cast(), what)
        }
    }
}

/// Rows that go in and come out.
struct Io {
    case: Case,
    rows: usize,
    /// Rows that the buffers have room for.
    capacity: usize,
    x_bf16: Buffer<bf16>,
    x_codes: Buffer<u8>,
    x_scales: Buffer<f32>,
    y: Buffer<u8>,
    start: Buffer<u32>,
    counts: Buffer<u32>,
}

impl Io {
    fn new(bench: &Bench<'_>, case: Case, rows: usize) -> Result<Self, CudaError> {
        let expert = rows_of_expert(rows);
        let padded = expert.next_multiple_of(128);
        let capacity = match case.kind {
            Kind::Pool => SLOTS * padded,
            Kind::Dense | Kind::Heads(_) => rows.next_multiple_of(4),
        };
        let (elements, fp8) = (capacity * case.heads() * case.k, case.precision == Precision::Fp8);
        let (x_codes, x_scales) = match fp8 {
            true => bench.e4m3(elements, case.k.div_ceil(128) * capacity)?,
            false => (bench.device.alloc(0)?, bench.device.alloc(0)?),
        };
        // The last rows of the last experts that are left over; all experts have about as many.
        let counts: Vec<u32> =
            (0..SLOTS).map(|slot| ((rows * TOP_K + slot) / SLOTS).min(padded) as u32).collect();
        let start: Vec<u32> = (0..=SLOTS).map(|slot| (slot * padded) as u32).collect();
        Ok(Self {
            case,
            rows,
            capacity,
            x_bf16: if fp8 { bench.device.alloc(0)? } else { bench.bf16(elements)? },
            x_codes,
            x_scales,
            y: bench.device.alloc(capacity * case.heads() * case.n * if case.logits { 4 } else { 2 })?,
            start: bench.device.upload(&start)?,
            counts: bench.device.upload(&counts)?,
        })
    }

    fn x(&self) -> Operand<'_> {
        let Case { precision, k, .. } = self.case;
        match precision {
            Precision::Bf16 => Operand::Bf16 { data: &self.x_bf16, stride: self.case.heads() * k },
            Precision::Fp8 => {
                Operand::Fp8 { codes: &self.x_codes, scales: &self.x_scales, rows_stride: self.capacity }
            }
        }
    }

    /// `work` with the place of the results.
    fn with_y<T>(&self, work: impl FnOnce(Output<'_>) -> T) -> T {
        let stride = self.case.heads() * self.case.n;
        match self.case.logits {
            true => work(Output::F32 { data: &self.y.cast(), stride }),
            false => work(Output::Bf16 { data: &self.y.cast(), stride }),
        }
    }

    fn time_us(&self, bench: &Bench<'_>, weights: &Weights) -> Result<f64, CudaError> {
        let gemm = Gemm::new(&bench.device);
        bench.time_us(weights.calls(), |stream, call| self.call(&gemm, stream, weights, call))
    }

    fn call(&self, gemm: &Gemm, stream: &Stream, weights: &Weights, call: usize) -> Result<(), CudaError> {
        let Case { kind, n, k, .. } = self.case;
        let matrix = &weights.matrices[call % weights.matrices.len()];
        match kind {
            Kind::Dense => self.with_y(|y| gemm.dense(stream, matrix, self.x(), self.rows, y)),
            Kind::Heads(heads) => {
                let view = |data, width| HeadsView { data, row_stride: heads * width, head_stride: width };
                let y = self.y.cast();
                gemm.heads(stream, matrix, view(&self.x_bf16, k), self.rows, view(&y, n))
            }
            Kind::Pool => {
                let segments = Segments {
                    start: &self.start,
                    rows: &self.counts,
                    pool_of_slot: &weights.places[call % weights.places.len()],
                    rows_max: self.capacity,
                    rows_typical: rows_of_expert(self.rows),
                };
                self.with_y(|y| gemm.grouped(stream, matrix, self.x(), segments, y))
            }
        }
    }

    /// The same by the library; `None` where it has no kernel for it.
    fn library_us(
        &self,
        bench: &Bench<'_>,
        weights: &Weights,
        library: &CublasLt,
    ) -> Result<Option<f64>, CudaError> {
        let product = |matrix: &Matrix| {
            self.with_y(|y| library.product((matrix.stack(), self.case.kind), self.x(), self.rows, y))
        };
        let products: Vec<Option<LibraryProduct<'_>>> =
            weights.matrices.iter().map(product).collect::<Result<_, _>>()?;
        let Some(products) = products.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
        let run = |stream: &Stream, call: usize| products[call % products.len()].run(stream);
        bench.time_us(weights.calls(), run).map(Some)
    }
}
