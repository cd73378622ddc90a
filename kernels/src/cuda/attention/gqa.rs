//! Grouped-query attention, and the kernel of any shape that latent attention falls back to.

use half::bf16;

use super::plan::{Chunks, Cut, Merge, Planner, Segment};
use super::{BatchMeta, Limits, PAGE, gqa_source, plan_source};
use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Params, Source, Stream};

const CUT: Cut = Cut { positions: 512, chunks_max: 32 };
/// Warps of a block.
const WARPS: usize = 4;
/// All that a block may have, and what a multiprocessor has with what it takes off for each block.
const SHARED_BYTES: usize = 227 << 10;
const SM_SHARED_BYTES: usize = 228 << 10;
const BLOCK_SHARED_BYTES: usize = 1 << 10;
/// Registers are there for so many blocks.
const BLOCKS_PER_SM_MAX: usize = 3;

/// Sizes of grouped-query attention: `heads / kv_heads` neighbouring heads share a key and value head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GqaDims {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Elements of a head, a multiple of 8 and at most 256.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// Arguments of [`Gqa::run`].
#[derive(Clone, Copy, Debug)]
pub struct GqaArgs<'a> {
    /// Query rows.
    pub rows: usize,
    /// `[rows][heads][head_dim]`.
    pub query: &'a Buffer<bf16>,
    /// `[blocks][64][kv_heads][head_dim]`. What lies behind a sequence's last position may be anything, NaN too.
    pub keys: &'a Buffer<bf16>,
    /// Like `keys`.
    pub values: &'a Buffer<bf16>,
    /// Where the rows belong.
    pub meta: BatchMeta<'a>,
    /// `[rows][heads][head_dim]`. Idle rows stay as they are.
    pub out: &'a Buffer<bf16>,
}

/// The kernels for one shape, with scratch for one step at a time.
#[derive(Clone, Debug)]
pub struct Gqa {
    dims: GqaDims,
    planner: Planner,
    tiled: Tiled,
}

impl GqaDims {
    fn tiled(&self) -> TiledShape {
        TiledShape {
            key_dim: self.head_dim,
            value_dim: self.head_dim,
            heads: self.heads,
            kv_heads: self.kv_heads,
            values_in_keys: false,
        }
    }
}

impl Gqa {
    /// The sources of the kernels for a shape.
    pub fn sources(dims: &GqaDims) -> Vec<Source> {
        vec![plan_source(), dims.tiled().source()]
    }

    /// Loads the kernels and makes room for steps within `limits`: at most 0.6 GB.
    ///
    /// # Errors
    /// The kernels do not compile or load, or the device is full.
    ///
    /// # Panics
    /// If the shape is impossible.
    pub fn new(device: &Device, dims: GqaDims, limits: Limits) -> Result<Self, CudaError> {
        let planner = Planner::new(device, dims.tiled().chunks(), limits)?;
        let tiled = Tiled::new(device, &planner, dims.tiled(), dims.scale)?;
        Ok(Self { dims, planner, tiled })
    }

    /// Lists the work of a step, for the runs of all layers that follow with the same `meta` and `rows`.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit, or `rows` is beyond the limits.
    pub fn plan(&self, stream: &Stream, meta: &BatchMeta<'_>, rows: usize) -> Result<(), CudaError> {
        self.planner.plan(stream, meta, rows)
    }

    /// `out = softmax(scale * query . keys) values`, causal, for the rows that were planned last.
    ///
    /// # Errors
    /// A launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn run(&self, stream: &Stream, args: &GqaArgs<'_>) -> Result<(), CudaError> {
        let GqaDims { heads, kv_heads, head_dim, .. } = self.dims;
        self.planner.check(&args.meta, args.rows);
        assert!(args.query.len() >= args.rows * heads * head_dim, "gqa: length of query");
        assert!(args.out.len() >= args.rows * heads * head_dim, "gqa: length of out");
        assert_eq!(args.keys.len(), args.values.len(), "gqa: lengths of the caches");
        Planner::pages(args.keys.len(), kv_heads * head_dim);
        for segment in self.planner.segments(args.rows) {
            let buffers = [args.query, args.keys, args.values, args.out];
            self.tiled.run(stream, (&self.planner, &segment), &args.meta, buffers)?;
        }
        Ok(())
    }
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug)]
pub(super) struct TiledShape {
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    /// The first `value_dim` elements of a key are the value.
    pub(super) values_in_keys: bool,
}

impl TiledShape {
    fn check(&self) {
        let Self { key_dim, value_dim, heads, kv_heads, .. } = *self;
        assert!(kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads), "attention: {self:?}");
        let sizes = key_dim.is_multiple_of(8) && value_dim.is_multiple_of(8) && value_dim > 0;
        assert!(sizes && value_dim <= 256 && key_dim <= 512, "attention: {self:?}");
    }

    /// How rows are cut.
    pub(super) fn chunks(&self) -> Chunks {
        Chunks { cut: CUT, floats: self.heads * self.value_dim, deal: None }
    }

    /// Bytes of a row in shared memory, as in cu/gqa.cu.
    fn pitch(width: usize) -> usize {
        width.next_multiple_of(16) * 2 + 16
    }

    /// Bytes of shared memory with `stages` of tiles.
    fn shared_bytes(&self, stages: usize) -> usize {
        let values = if self.values_in_keys { 0 } else { Self::pitch(self.value_dim) };
        let tiles = stages * PAGE * (Self::pitch(self.key_dim) + values);
        let sums = WARPS * 16 * (self.value_dim.next_multiple_of(16) + 10) * size_of::<f32>();
        16 * Self::pitch(self.key_dim) + tiles.max(sums)
    }

    fn stages(&self) -> usize {
        if self.shared_bytes(3) <= SHARED_BYTES { 3 } else { 2 }
    }

    pub(super) fn source(&self) -> Source {
        self.check();
        gqa_source()
            .define("KEY_DIM", self.key_dim)
            .define("VALUE_DIM", self.value_dim)
            .define("HEADS", self.heads)
            .define("KV_HEADS", self.kv_heads)
            .define("VALUES_IN_KEYS", u32::from(self.values_in_keys))
            .define("STAGES", self.stages())
            .define("SHARED_BYTES", self.shared_bytes(self.stages()))
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TiledParams {
    query: u64,
    keys: u64,
    values: u64,
    items: u64,
    count: u64,
    block_table: u64,
    out: u64,
    partial: u64,
    log_sums: u64,
    blocks_max: u32,
    row0: u32,
    chunks_max: u32,
    scale_log2: f32,
}

// SAFETY: the fields of `Params` in cu/gqa.cu.
unsafe impl Params for TiledParams {}

/// The kernel of any shape.
#[derive(Clone, Debug)]
pub(super) struct Tiled {
    shape: TiledShape,
    scale: f32,
    kernel: Kernel,
    merge: Merge,
    /// Blocks that run at once.
    blocks: usize,
}

impl Tiled {
    pub(super) fn new(
        device: &Device,
        planner: &Planner,
        shape: TiledShape,
        scale: f32,
    ) -> Result<Self, CudaError> {
        let kernel = device.module(&shape.source())?.kernel("gqa")?;
        let room = SM_SHARED_BYTES / (shape.shared_bytes(shape.stages()) + BLOCK_SHARED_BYTES);
        let per_sm = if shape.value_dim > 128 { 1 } else { room.clamp(1, BLOCKS_PER_SM_MAX) };
        let merge = Merge::new(device, planner, (shape.heads, shape.value_dim))?;
        Ok(Self { shape, scale, kernel, merge, blocks: device.properties().sm_count as usize * per_sm })
    }

    /// Queues one segment. `buffers`: query, keys, values and output, of checked lengths.
    pub(super) fn run(
        &self,
        stream: &Stream,
        (planner, segment): (&Planner, &Segment),
        meta: &BatchMeta<'_>,
        buffers: [&Buffer<bf16>; 4],
    ) -> Result<(), CudaError> {
        let TiledShape { heads, kv_heads, .. } = self.shape;
        let [query, keys, values, to] = buffers.map(Buffer::address);
        let params = TiledParams {
            query,
            keys,
            values,
            items: segment.items,
            count: segment.count,
            block_table: meta.block_table.address(),
            out: to,
            partial: segment.partial,
            log_sums: self.merge.log_sums(),
            blocks_max: meta.blocks_max as u32,
            row0: segment.row0 as u32,
            chunks_max: segment.chunks_max,
            scale_log2: self.scale * std::f32::consts::LOG2_E,
        };
        let groups = kv_heads * (heads / kv_heads).div_ceil(16);
        let launch = Launch {
            shared_bytes: self.shape.shared_bytes(self.shape.stages()) as u32,
            dependent: true,
            ..Launch::new((segment.items_max * groups).min(self.blocks) as u32, (WARPS * 32) as u32)
        };
        // SAFETY: the lengths were checked by the caller; positions and tables are the word of the caller's caller.
        unsafe { self.kernel.launch(stream, &launch, &params) }?;
        self.merge.run(stream, planner, meta, (segment, buffers[3]))
    }
}
