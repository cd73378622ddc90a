//! Absorbed multi-head latent attention.

use half::bf16;

use super::gqa::{Tiled, TiledShape};
use super::plan::{Chunks, Cut, Deal, Planner, Segment};
use super::{BatchMeta, Limits, PAGE, mla_source, plan_source};
use crate::cuda::{
    Buffer, CudaError, Device, Kernel, Launch, Params, Source, Stream, Swizzle, TensorMap, TiledLayout,
    TmaElement,
};

/// The shape that the wgmma kernel is made for.
const LATENT: usize = 512;
const ROPE: usize = 64;
/// Heads of a block.
const BLOCK_HEADS: usize = 64;
/// All that a block may have.
const SHARED_BYTES: u32 = 227 << 10;
/// Chunks cost traffic, so that full batches of 2 or 4 thousand positions want few; few rows want many.
const CUT: Cut = Cut { positions: 3072, chunks_max: 16 };
/// Floats that a block keeps of a chunk: per thread of two warpgroups 128 outputs, two maxima, two sums.
const BLOCK_FLOATS: usize = 2 * 128 * (128 + 4);

/// Sizes of absorbed latent attention: all heads read the same cached row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlaDims {
    /// Query heads.
    pub heads: usize,
    /// Elements of a latent, a multiple of 8.
    pub kv_lora: usize,
    /// Rotated elements, behind the latent in a cache row; a multiple of 8.
    pub rope: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// Arguments of [`Mla::run`].
#[derive(Clone, Copy, Debug)]
pub struct MlaArgs<'a> {
    /// Query rows.
    pub rows: usize,
    /// `[rows][heads][kv_lora + rope]`, the latent part through `W_UK`.
    pub query: &'a Buffer<bf16>,
    /// `[blocks][64][kv_lora + rope]`. What lies behind a sequence's last position may be anything, NaN too.
    pub cache: &'a Buffer<bf16>,
    /// Where the rows belong.
    pub meta: BatchMeta<'a>,
    /// `[rows][heads][kv_lora]`. Idle rows stay as they are.
    pub out: &'a Buffer<bf16>,
}

/// The kernels for one shape, with scratch for one step at a time.
#[derive(Clone, Debug)]
pub struct Mla {
    dims: MlaDims,
    planner: Planner,
    version: Version,
}

#[derive(Clone, Debug)]
enum Version {
    /// wgmma; blocks of a cluster share the cache rows of neighbouring groups of heads.
    Wide {
        kernel: Kernel,
        cluster: usize,
        /// Clusters that run at once.
        clusters: usize,
        /// Flags of chunks that wait for their neighbours; zeros between launches.
        arrived: Buffer<u32>,
    },
    /// Any shape.
    Narrow(Tiled),
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MlaParams {
    query: TensorMap,
    cache: TensorMap,
    items: u64,
    first: u64,
    next: u64,
    block_table: u64,
    out: u64,
    partial: u64,
    arrived: u64,
    blocks_max: u32,
    heads: u32,
    row0: u32,
    chunks_max: u32,
    scale_log2: f32,
}

// SAFETY: the fields of `Params` in cu/mla.cu.
unsafe impl Params for MlaParams {}

impl MlaDims {
    fn is_wide(&self) -> bool {
        (self.kv_lora, self.rope) == (LATENT, ROPE)
    }

    fn cluster(&self) -> usize {
        if self.heads.div_ceil(BLOCK_HEADS).is_multiple_of(2) { 2 } else { 1 }
    }

    fn tiled(&self) -> TiledShape {
        TiledShape {
            key_dim: self.kv_lora + self.rope,
            value_dim: self.kv_lora,
            heads: self.heads,
            kv_heads: 1,
            values_in_keys: true,
        }
    }

    fn source(&self) -> Source {
        if self.is_wide() {
            mla_source().define("CLUSTER", self.cluster()).define("SHARED_BYTES", SHARED_BYTES)
        } else {
            self.tiled().source()
        }
    }
}

impl Mla {
    /// The sources of the kernels for a shape.
    pub fn sources(dims: &MlaDims) -> Vec<Source> {
        vec![plan_source(), dims.source()]
    }

    /// Loads the kernels and makes room for steps within `limits`: at most 0.6 GB.
    ///
    /// # Errors
    /// The kernels do not compile or load, or the device is full.
    ///
    /// # Panics
    /// If the shape is impossible: sizes that are no multiple of 8, or latents of more than 256 that are not 512 + 64.
    pub fn new(device: &Device, dims: MlaDims, limits: Limits) -> Result<Self, CudaError> {
        assert!(dims.heads > 0 && dims.kv_lora > 0, "mla: {dims:?}");
        if !dims.is_wide() {
            let planner = Planner::new(device, dims.tiled().chunks(), limits)?;
            let tiled = Tiled::new(device, &planner, dims.tiled(), dims.scale)?;
            return Ok(Self { dims, planner, version: Version::Narrow(tiled) });
        }
        let blocks = dims.heads.div_ceil(BLOCK_HEADS);
        let cluster = dims.cluster();
        let clusters = device.properties().sm_count as usize / cluster;
        let deal = Deal { bins: clusters, sets: blocks / cluster };
        let chunks = Chunks { cut: CUT, floats: blocks * BLOCK_FLOATS, deal: Some(deal) };
        let planner = Planner::new(device, chunks, limits)?;
        let version = Version::Wide {
            kernel: device.module(&dims.source())?.kernel("mla")?,
            cluster,
            clusters,
            arrived: device.alloc(planner.chunks() * blocks * 2)?,
        };
        Ok(Self { dims, planner, version })
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

    /// `out = softmax(scale * query . cache) cache`, causal, for the rows that were planned last.
    ///
    /// # Errors
    /// A launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn run(&self, stream: &Stream, args: &MlaArgs<'_>) -> Result<(), CudaError> {
        let MlaDims { heads, kv_lora, rope, .. } = self.dims;
        let width = kv_lora + rope;
        self.planner.check(&args.meta, args.rows);
        assert!(args.query.len() >= args.rows * heads * width, "mla: length of query");
        assert!(args.out.len() >= args.rows * heads * kv_lora, "mla: length of out");
        let pages = Planner::pages(args.cache.len(), width);
        for segment in self.planner.segments(args.rows) {
            match &self.version {
                Version::Wide { kernel, cluster, clusters, arrived } => {
                    let params =
                        MlaParams { arrived: arrived.address(), ..self.params(args, &segment, pages)? };
                    let sets = heads.div_ceil(BLOCK_HEADS * cluster);
                    let clusters = (segment.items_max * sets).min(*clusters);
                    let launch = Launch {
                        shared_bytes: SHARED_BYTES,
                        cluster: *cluster as u32,
                        dependent: true,
                        ..Launch::new((clusters * cluster) as u32, 384)
                    };
                    // SAFETY: the lengths were checked above; positions and tables are the caller's word.
                    unsafe { kernel.launch(stream, &launch, &params) }?;
                }
                Version::Narrow(tiled) => {
                    let buffers = [args.query, args.cache, args.cache, args.out];
                    tiled.run(stream, (&self.planner, &segment), &args.meta, buffers)?;
                }
            }
        }
        Ok(())
    }

    fn params(&self, args: &MlaArgs<'_>, segment: &Segment, pages: usize) -> Result<MlaParams, CudaError> {
        let heads = self.dims.heads;
        let map = |address: u64, rows: usize| {
            TensorMap::tiled(TiledLayout {
                element: TmaElement::Bf16,
                address,
                dims: &[(LATENT + ROPE) as u64, rows as u64],
                strides_bytes: &[((LATENT + ROPE) * size_of::<bf16>()) as u64],
                tile: &[64, 64],
                swizzle: Swizzle::B128,
            })
        };
        Ok(MlaParams {
            query: map(args.query.address(), args.rows * heads)?,
            cache: map(args.cache.address(), pages * PAGE)?,
            items: segment.items,
            first: segment.first,
            next: segment.next,
            block_table: args.meta.block_table.address(),
            out: args.out.address(),
            partial: segment.partial,
            arrived: 0,
            blocks_max: args.meta.blocks_max as u32,
            heads: heads as u32,
            row0: segment.row0 as u32,
            chunks_max: segment.chunks_max,
            scale_log2: self.dims.scale * std::f32::consts::LOG2_E,
        })
    }
}
