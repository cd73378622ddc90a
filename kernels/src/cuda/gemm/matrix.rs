//! Weights as the products take them: the stack in device memory, how its product is cut up, and the kernels for that.

use std::ops::Range;

use half::bf16;

use crate::cuda::{
    Buffer, CudaError, Device, Kernel, Launch, Source, StoredAs, Swizzle, TensorMap, TiledLayout, TmaElement,
    WeightStack,
};

/// Shared memory of a block on the chip that the kernels are written for.
const SHARED_BYTES: u32 = 227 << 10;
/// Rows of x in a tile.
pub(super) const TILE_ROWS: u32 = 128;
/// Bytes of K in a stage.
pub(super) const STEP_BYTES: u32 = 128;
/// Threads of a block of the fast kernel: two warpgroups that multiply, one that copies.
pub(super) const THREADS: u32 = 384;

/// What the matrices of a stack are to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Each row of x is multiplied by one matrix, the only one of the stack.
    Dense,
    /// Each row of x has so many heads, and each head its own matrix: the stack holds one matrix `[heads * N][K]`.
    Heads(usize),
    /// A pool of experts: a table says which matrix multiplies which rows of x.
    Pool,
}

/// How a product is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Slices of K that are summed on their own: 1, 2, 4 or 8. The only part that changes bits: it may depend on the
    /// shape of a matrix alone.
    pub splits: u32,
    /// Neighbouring tiles of columns that share their copies of x: 1, 2 or 4. `splits * pair` is at most 8.
    pub pair: u32,
    /// Columns of a tile: a multiple of 16 up to 128, or 144, 160 or 192.
    pub columns: u32,
}

impl Plan {
    /// The plan for matrices `[n][k]`, by what was measured on an H200 with DeepSeek-R1's shapes.
    pub fn of(kind: Kind, stored: StoredAs, n: usize, k: usize) -> Self {
        let (splits, pair, columns) = match kind {
            Kind::Heads(_) => (1, 1, 128),
            Kind::Dense | Kind::Pool => {
                let splits = Self::splits(kind, stored, n, k);
                let (pair, columns) = Self::tile(kind, splits, n);
                (splits, pair, columns)
            }
        };
        Self { splits, pair, columns }
    }

    /// So many slices that the multiprocessors have work, while each slice is long enough to be worth its reduction.
    fn splits(kind: Kind, stored: StoredAs, n: usize, k: usize) -> u32 {
        let steps = k.div_ceil(step_elements(stored));
        let by_rows = match n {
            _ if kind == Kind::Pool => 1,
            0..=1024 => 8,
            1025..=4224 => 4,
            4225..=8448 if steps >= 32 => 2,
            _ => 1,
        };
        // Short K is not cut.
        [8, 4, 2, 1].into_iter().find(|&splits| splits <= by_rows && steps >= 8 * splits).unwrap_or(1) as u32
    }

    /// Sharers of x, and columns of a tile such that about as many tiles as multiprocessors make a round.
    fn tile(kind: Kind, splits: u32, n: usize) -> (u32, u32) {
        match (kind, splits) {
            (Kind::Pool, _) if n <= 4096 => (2, 160),
            (Kind::Dense, 8) => (1, 64),
            (Kind::Dense, 4) if n <= 2240 => (2, 80),
            (Kind::Dense, 4) => (1, 144),
            (Kind::Dense, 1) if (16_897..=25_344).contains(&n) => (1, 192),
            (Kind::Dense, 1) if (25_345..=38_016).contains(&n) => (1, 144),
            (Kind::Dense, 1) if n <= 8448 => (1, 128),
            _ => (2, 128),
        }
    }
}

impl Plan {
    /// For many rows of a matrix of `n` columns: one CTA takes all slices, the sums of which leave registers for 128
    /// columns, and two share x, for the second-level cache is what then limits.
    fn in_registers(self, n: usize) -> Self {
        let columns = if self.splits == 8 { self.columns.min(128) } else { 128 };
        let pair = if columns == 128 && n > 128 { 2 } else { 1 };
        Self { splits: self.splits, pair, columns }
    }
}

pub(super) fn step_elements(stored: StoredAs) -> usize {
    match stored {
        StoredAs::Bf16 => 64,
        StoredAs::Fp8 => 128,
    }
}

/// One compiled form of the fast kernel.
#[derive(Clone, Debug)]
pub(super) struct Form {
    pub(super) plan: Plan,
    pub(super) map: TensorMap,
    pub(super) kernel: Kernel,
    pub(super) shared_bytes: u32,
    pub(super) cluster: u32,
    /// Clusters that the device holds at once.
    pub(super) clusters_max: u32,
}

/// The fast path of a matrix.
#[derive(Clone, Debug)]
pub(super) struct Fast {
    /// The CTAs of a cluster take the slices.
    pub(super) in_cluster: Form,
    /// One CTA takes them one after the other. The same bits.
    pub(super) in_registers: Form,
}

/// Weights of `matrices` products `[n][k]`, ready to be multiplied. Cheap to clone; the stack may be written to.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub(super) stack: WeightStack,
    pub(super) kind: Kind,
    pub(super) matrices: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// None where the copy engine cannot read the rows.
    pub(super) fast: Option<Fast>,
    pub(super) plain: Kernel,
}

impl Matrix {
    /// Compiles or finds the kernels for `stack`, so that no later call does.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// If the stack does not fit `kind`.
    pub fn new(device: &Device, stack: WeightStack, kind: Kind) -> Result<Self, CudaError> {
        let (n, k) = stack.shape();
        let n = match kind {
            Kind::Dense | Kind::Pool => n,
            Kind::Heads(heads) => n / heads,
        };
        Self::with_plan(device, stack.clone(), kind, Plan::of(kind, stack.stored(), n, k))
    }

    /// The same by a plan of the caller's, for trials.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// If the stack does not fit `kind`.
    pub fn with_plan(device: &Device, stack: WeightStack, kind: Kind, plan: Plan) -> Result<Self, CudaError> {
        let (rows, k) = stack.shape();
        let (matrices, n) = match kind {
            Kind::Dense => (1, rows),
            Kind::Heads(heads) => (heads, rows / heads),
            Kind::Pool => (stack.count(), rows),
        };
        assert!(kind == Kind::Pool || stack.count() == 1, "{kind:?} of {} matrices", stack.count());
        assert_eq!(matrices * n, stack.count() * rows, "rows of {kind:?}");
        if stack.stored() == StoredAs::Fp8 {
            assert!(matrices == stack.count() || n.is_multiple_of(128), "scales of {kind:?}");
        }
        let stored = stack.stored();
        let bytes_per_row = k * element_bytes(stored);
        let fast = if bytes_per_row.is_multiple_of(16) {
            let form = |plan: Plan, in_registers| {
                let map = weight_map(&stack, (matrices, n, k), plan.columns)?;
                Form::load(device, (stored, kind), map, plan, in_registers)
            };
            Some(Fast { in_cluster: form(plan, false)?, in_registers: form(plan.in_registers(n), true)? })
        } else {
            None
        };
        let plain = device.module(&plain_source(stored, kind))?.kernel("gemm_plain")?;
        Ok(Self { stack, kind, matrices, n, k, fast, plain })
    }

    /// A run of the rows of a dense BF16 matrix, by the same kernels: the product's columns of these numbers, to the bit.
    ///
    /// # Errors
    /// The rows cannot be described to the copy engine.
    ///
    /// # Panics
    /// If it is of another kind or has fewer rows.
    pub fn part(&self, rows: Range<usize>) -> Result<Self, CudaError> {
        assert_eq!((self.kind, self.stored()), (Kind::Dense, StoredAs::Bf16), "a part of a matrix");
        let (n, stack) = (rows.len(), self.stack.part(rows));
        let mut part = Self { stack, n, ..self.clone() };
        if let Some(fast) = &mut part.fast {
            for form in [&mut fast.in_cluster, &mut fast.in_registers] {
                form.map = weight_map(&part.stack, (1, n, self.k), form.plan.columns)?;
            }
        }
        Ok(part)
    }

    /// Columns of y, `N` (of one head).
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns of x, `K` (of one head).
    pub fn k(&self) -> usize {
        self.k
    }

    /// What it is stored as, and so what x must be.
    pub fn stored(&self) -> StoredAs {
        self.stack.stored()
    }

    /// The weights themselves; what is written there is multiplied by from then on.
    pub fn stack(&self) -> &WeightStack {
        &self.stack
    }

    /// How fast products of it are cut up; `None` where they take the slow path.
    pub fn plan(&self) -> Option<Plan> {
        self.fast.as_ref().map(|fast| fast.in_cluster.plan)
    }

    pub(super) fn scales_address(&self) -> u64 {
        self.stack.scales().map_or(0, Buffer::address)
    }
}

impl Form {
    fn load(
        device: &Device,
        (stored, kind): (StoredAs, Kind),
        map: TensorMap,
        plan: Plan,
        in_registers: bool,
    ) -> Result<Self, CudaError> {
        let kernel = device.module(&fast_source(stored, kind, plan, in_registers))?.kernel("gemm")?;
        let shared_bytes = shared_bytes(stored, plan, in_registers);
        let cluster = if in_registers { plan.pair } else { plan.pair * plan.splits };
        let clusters_max = kernel
            .clusters_max(device, &Launch { shared_bytes, cluster, ..Launch::new(cluster, THREADS) })?;
        Ok(Self { plan, map, kernel, shared_bytes, cluster, clusters_max })
    }
}

fn element_bytes(stored: StoredAs) -> usize {
    match stored {
        StoredAs::Bf16 => size_of::<bf16>(),
        StoredAs::Fp8 => 1,
    }
}

fn weight_map(
    stack: &WeightStack,
    (matrices, n, k): (usize, usize, usize),
    columns: u32,
) -> Result<TensorMap, CudaError> {
    let (element, bytes) = match stack.stored() {
        StoredAs::Bf16 => (TmaElement::Bf16, 2),
        StoredAs::Fp8 => (TmaElement::U8, 1),
    };
    TensorMap::tiled(TiledLayout {
        element,
        address: stack.data().address(),
        dims: &[k as u64, n as u64, matrices as u64],
        strides_bytes: &[(k * bytes) as u64, (n * k * bytes) as u64],
        tile: &[STEP_BYTES / bytes as u32, columns, 1],
        swizzle: Swizzle::B128,
    })
}

/// Bytes of a stage: x, weights and, where stored as FP8, scales of x; and those shared for sums of slices.
fn stage_and_reduce_bytes(stored: StoredAs, plan: Plan, in_registers: bool) -> (u32, u32) {
    let scales = match stored {
        StoredAs::Bf16 => 0,
        StoredAs::Fp8 => TILE_ROWS * 4,
    };
    let reduce = match (in_registers, plan.splits) {
        (true, _) | (false, 1) => 0,
        // Eights of columns, shared out to the CTAs of a cluster; in each 2 KiB per warpgroup.
        (false, splits) => 2 * splits * (plan.columns / 8).div_ceil(splits) * 2048,
    };
    ((TILE_ROWS + plan.columns) * STEP_BYTES + scales, reduce)
}

fn stages(stored: StoredAs, plan: Plan, in_registers: bool) -> u32 {
    let (stage, reduce) = stage_and_reduce_bytes(stored, plan, in_registers);
    // A full and an empty barrier per stage, and four more.
    (SHARED_BYTES - reduce - 32) / (stage + 16)
}

fn shared_bytes(stored: StoredAs, plan: Plan, in_registers: bool) -> u32 {
    let (stage, reduce) = stage_and_reduce_bytes(stored, plan, in_registers);
    stages(stored, plan, in_registers) * (stage + 16) + reduce + 32
}

/// The fast kernel.
pub(super) fn fast_source(stored: StoredAs, kind: Kind, plan: Plan, in_registers: bool) -> Source {
    let text = concat!(
        include_str!("../cu/gemm_tiles.cuh"),
        include_str!("../cu/gemm_scales.cuh"),
        include_str!("../cu/gemm.cu")
    );
    Source::new("gemm", text)
        .define("FP8", u32::from(stored == StoredAs::Fp8))
        .define("GROUPED", u32::from(kind == Kind::Pool))
        .define("SPLIT", plan.splits)
        .define("IN_REGISTERS", u32::from(in_registers || plan.splits == 1))
        .define("PAIR", plan.pair)
        .define("COLUMNS", plan.columns)
        .define("STAGES", stages(stored, plan, in_registers))
}

/// The kernel for any shape.
pub(super) fn plain_source(stored: StoredAs, kind: Kind) -> Source {
    Source::new("gemm_plain", include_str!("../cu/gemm_plain.cu"))
        .define("FP8", u32::from(stored == StoredAs::Fp8))
        .define("GROUPED", u32::from(kind == Kind::Pool))
}

/// What a matrix of `n` columns is compiled to by a plan.
pub fn sources_of(stored: StoredAs, kind: Kind, n: usize, plan: Plan) -> Vec<Source> {
    vec![
        fast_source(stored, kind, plan, false),
        fast_source(stored, kind, plan.in_registers(n), true),
        plain_source(stored, kind),
    ]
}

/// Every source that matrices are compiled to by their own plans.
pub fn sources() -> Vec<Source> {
    let mut sources: Vec<Source> = Vec::new();
    for stored in [StoredAs::Bf16, StoredAs::Fp8] {
        for kind in [Kind::Dense, Kind::Pool, Kind::Heads(1)] {
            for n in [64, 256, 1536, 4096, 7168, 24_576, 36_864, 129_280] {
                for k in [64, 1024, 2048, 4096, 16_384] {
                    let all = sources_of(stored, kind, n, Plan::of(kind, stored, n, k));
                    let new: Vec<Source> =
                        all.into_iter().filter(|source| !sources.contains(source)).collect();
                    sources.extend(new);
                }
            }
        }
    }
    sources
}
