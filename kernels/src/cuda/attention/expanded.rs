//! Latent attention of prompts on expanded keys and values.
//!
//! Absorbed attention reads what is cached as it is, at 3.4 times the operations (with DeepSeek's sizes). A prompt has
//! many rows that read the same positions, so it is cheaper to expand these first: per head a key and a value, by two
//! products of rows gathered from the cache. What a chunk's prompt has before it is expanded again for every chunk.

use std::ops::Range;

use half::bf16;

use super::prompts::{Chunk, Pass, PromptLimits, PromptPlan, Room, TILE};
use super::{PAGE, expanded_source};
use crate::cuda::gemm::{Gemm, Matrix, Operand, Output};
use crate::cuda::{
    Buffer, CudaError, Device, Kernel, Launch, Params, Source, Stream, Swizzle, TensorMap, TiledLayout,
    TmaElement,
};

/// Bytes of keys and values that are expanded at a time, unless one sequence needs more for one head.
const KEYS_BYTES: usize = 512 << 20;
/// Positions that are gathered at a time, unless one sequence has more.
const POSITIONS: usize = 16 << 10;
/// Columns of a block of shared memory, and stages of keys and values, as in cu/expanded.cu.
const COLUMNS: usize = 64;
const STAGES: usize = 2;
const THREADS: u32 = 384;

/// Sizes of latent attention, expanded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpandedDims {
    /// Query heads, each with its own keys and values.
    pub heads: usize,
    /// Elements of a latent, a multiple of 8.
    pub kv_lora: usize,
    /// Elements of a key without position, a multiple of 8.
    pub nope: usize,
    /// Rotated elements, shared by all heads; a multiple of 8. With `nope` no more than three blocks of 64.
    pub rope: usize,
    /// Elements of a value, a multiple of 8 and at most 128.
    pub v: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// Arguments of [`Expanded::run`].
#[derive(Clone, Copy, Debug)]
pub struct ExpandedArgs<'a> {
    /// Rows of the step.
    pub rows: usize,
    /// `[rows][heads][nope + rope]`, of which the first part counts.
    pub query: &'a Buffer<bf16>,
    /// `[rows][heads][kv_lora + rope]`, of which the rotated part counts.
    pub absorbed: &'a Buffer<bf16>,
    /// `[blocks][64][kv_lora + rope]`, with the rows' own positions.
    pub cache: &'a Buffer<bf16>,
    /// `[heads * nope][kv_lora]`, BF16.
    pub key_up: &'a Matrix,
    /// `[heads * v][kv_lora]`, BF16.
    pub value_up: &'a Matrix,
    /// By [`Expanded::plan`].
    pub plan: &'a PromptPlan,
    /// The plan's words, on the device.
    pub words: &'a Buffer<u32>,
    /// `[rows][heads][v]`. Rows of no chunk stay as they are.
    pub out: &'a Buffer<bf16>,
}

/// The kernels for one shape, with scratch for one layer at a time.
#[derive(Clone, Debug)]
pub struct Expanded {
    dims: ExpandedDims,
    limits: PromptLimits,
    room: Room,
    gather: Kernel,
    attend: Kernel,
    /// `[positions][kv_lora + rope]`.
    latents: Buffer<bf16>,
    /// `[positions][heads of a group][nope]`.
    keys: Buffer<bf16>,
    /// `[positions][heads of a group][v]`.
    values: Buffer<bf16>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AttendParams {
    query: TensorMap,
    rotated: TensorMap,
    keys: TensorMap,
    rotated_keys: TensorMap,
    values: TensorMap,
    items: u64,
    first: u64,
    units: u64,
    out: u64,
    heads: u32,
    head0: u32,
    scale_log2: f32,
}

// SAFETY: the fields of `Params` in cu/expanded.cu.
unsafe impl Params for AttendParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct GatherParams {
    cache: u64,
    pages: u64,
    out: u64,
    width: u32,
}

// SAFETY: the fields of `GatherParams` in cu/expanded.cu.
unsafe impl Params for GatherParams {}

impl ExpandedDims {
    /// What is wrong with these sizes, if the kernel cannot do them.
    pub fn unsupported(&self) -> Option<String> {
        let Self { heads, kv_lora, nope, rope, v, .. } = *self;
        let eights = [kv_lora, nope, rope, v].iter().all(|size| *size > 0 && size.is_multiple_of(8));
        let blocks = nope.div_ceil(COLUMNS) + rope.div_ceil(COLUMNS);
        let fits = heads > 0 && eights && blocks <= 3 && v <= 128;
        (!fits).then(|| {
            format!(
                "expanded attention takes sizes that are multiples of 8, keys of up to three blocks of 64 (such as 128 \
                 + 64) and values of up to 128, not keys of {nope} + {rope} and values of {v} from latents of {kv_lora}"
            )
        })
    }

    fn shared_bytes(&self) -> usize {
        let blocks = |size: usize| size.div_ceil(COLUMNS);
        let keys = blocks(self.nope) + blocks(self.rope);
        let block = COLUMNS * size_of::<bf16>();
        let query = keys * TILE * block;
        query + STAGES * (keys + blocks(self.v)) * TILE * block + (2 + 4 * STAGES) * 8
    }

    fn source(&self) -> Source {
        expanded_source()
            .define("NOPE", self.nope)
            .define("ROPE", self.rope)
            .define("VALUE", self.v)
            .define("SHARED_BYTES", self.shared_bytes())
    }
}

impl Expanded {
    /// The sources of the kernels for a shape.
    pub fn sources(dims: &ExpandedDims) -> Vec<Source> {
        vec![dims.source()]
    }

    /// Loads the kernels and makes room for steps within `limits`: about 0.5 GB with DeepSeek's sizes.
    ///
    /// # Errors
    /// The kernels do not compile or load, or the device is full.
    ///
    /// # Panics
    /// If the sizes are unsupported, or a limit is 0.
    pub fn new(device: &Device, dims: ExpandedDims, limits: PromptLimits) -> Result<Self, CudaError> {
        let positions = POSITIONS.min(limits.positions.next_multiple_of(TILE) * limits.chunks);
        let keys = KEYS_BYTES / ((dims.nope + dims.v) * size_of::<bf16>());
        Self::bounded(device, dims, limits, (positions, keys))
    }

    /// The same with room to gather so many positions at a time, and to expand so many, one head of a position counting
    /// as one. Room for one head of one sequence is made always. Changes no bit.
    ///
    /// # Errors
    /// See [`Expanded::new`].
    ///
    /// # Panics
    /// See [`Expanded::new`].
    pub fn bounded(
        device: &Device,
        dims: ExpandedDims,
        limits: PromptLimits,
        (positions, keys): (usize, usize),
    ) -> Result<Self, CudaError> {
        assert!(dims.unsupported().is_none(), "attention: {dims:?}");
        assert!(limits.rows > 0 && limits.chunks > 0 && limits.positions > 0, "attention: {limits:?}");
        let positions = positions.max(limits.positions).next_multiple_of(TILE);
        let keys = keys.min(positions * dims.heads).max(positions);
        let blocks = device.properties().sm_count as usize;
        let room = Room { heads: dims.heads, positions, keys, blocks };
        let module = device.module(&dims.source())?;
        Ok(Self {
            dims,
            limits,
            room,
            gather: module.kernel("expanded_gather")?,
            attend: module.kernel("expanded")?,
            latents: device.alloc(positions * (dims.kv_lora + dims.rope))?,
            keys: device.alloc(keys * dims.nope)?,
            values: device.alloc(keys * dims.v)?,
        })
    }

    /// Words of a plan, at most.
    pub fn words_max(&self) -> usize {
        self.limits.words(self.room.heads, self.room.blocks)
    }

    /// The plan of a step with these chunks, for all its layers.
    ///
    /// # Panics
    /// If the chunks are beyond the limits, or a block table is too short.
    pub fn plan(&self, chunks: &[Chunk<'_>]) -> PromptPlan {
        let rows: usize = chunks.iter().map(|chunk| chunk.rows).sum();
        let PromptLimits { rows: rows_max, chunks: chunks_max, .. } = self.limits;
        assert!(
            rows <= rows_max && chunks.len() <= chunks_max,
            "attention: {rows} rows of {} chunks",
            chunks.len()
        );
        PromptPlan::new(chunks, &self.room)
    }

    /// `out = softmax(scale * (query . key + rotated . rotated key)) values`, causal, for the rows of the plan.
    ///
    /// # Errors
    /// A launch failed.
    ///
    /// # Panics
    /// If lengths or shapes do not fit.
    pub fn run(&self, stream: &Stream, gemm: &Gemm, args: &ExpandedArgs<'_>) -> Result<(), CudaError> {
        self.check(args);
        for pass in args.plan.passes() {
            stream.label("gather latents");
            self.gather(stream, args, pass)?;
            for head0 in (0..self.dims.heads).step_by(pass.heads) {
                stream.label("expand keys and values");
                self.expand(stream, gemm, args, (pass, head0))?;
                stream.label("MLA of prompts");
                let params = self.params(args, pass, head0)?;
                let launch = Launch {
                    shared_bytes: self.dims.shared_bytes() as u32,
                    dependent: true,
                    ..Launch::new(self.room.blocks as u32, THREADS)
                };
                // SAFETY: lengths were checked above; the plan's rows are within the step and its places within the scratch.
                unsafe { self.attend.launch(stream, &launch, &params) }?;
            }
        }
        Ok(())
    }

    fn check(&self, args: &ExpandedArgs<'_>) {
        let ExpandedDims { heads, kv_lora, nope, rope, v, .. } = self.dims;
        let rows = args.rows;
        assert!(args.query.len() >= rows * heads * (nope + rope), "expanded: length of query");
        assert!(args.absorbed.len() >= rows * heads * (kv_lora + rope), "expanded: length of absorbed");
        assert!(args.out.len() >= rows * heads * v, "expanded: length of out");
        assert!(args.words.len() >= args.plan.words().len(), "expanded: words of the plan");
        assert!(args.cache.len().is_multiple_of(PAGE * (kv_lora + rope)), "expanded: length of cache");
        assert_eq!((args.key_up.n(), args.key_up.k()), (heads * nope, kv_lora), "expanded: W_UK");
        assert_eq!((args.value_up.n(), args.value_up.k()), (heads * v, kv_lora), "expanded: W_UV");
    }

    fn word(args: &ExpandedArgs<'_>, range: &Range<usize>) -> u64 {
        args.words.address() + (range.start * size_of::<u32>()) as u64
    }

    fn gather(&self, stream: &Stream, args: &ExpandedArgs<'_>, pass: &Pass) -> Result<(), CudaError> {
        let width = self.dims.kv_lora + self.dims.rope;
        let params = GatherParams {
            cache: args.cache.address(),
            pages: Self::word(args, &pass.pages),
            out: self.latents.address(),
            width: width as u32,
        };
        let grid = [(pass.pages.len() / 2) as u32, (PAGE * width / 8).div_ceil(256) as u32, 1];
        let launch = Launch { grid, dependent: true, ..Launch::new(1, 256) };
        // SAFETY: the plan lists at most as many pages as `latents` has room for; page numbers are the caller's word.
        unsafe { self.gather.launch(stream, &launch, &params) }
    }

    /// Keys and values of the pass's positions, for its heads from `head0` on.
    fn expand(
        &self,
        stream: &Stream,
        gemm: &Gemm,
        args: &ExpandedArgs<'_>,
        (pass, head0): (&Pass, usize),
    ) -> Result<(), CudaError> {
        let ExpandedDims { kv_lora, rope, nope, v, .. } = self.dims;
        for (up, width, out) in [(args.key_up, nope, &self.keys), (args.value_up, v, &self.values)] {
            let columns = pass.heads * width;
            let part = up.part(head0 * width..head0 * width + columns)?;
            let x = Operand::Bf16 { data: &self.latents, stride: kv_lora + rope };
            gemm.dense(stream, &part, x, pass.positions(), Output::Bf16 { data: out, stride: columns })?;
        }
        Ok(())
    }

    fn params(&self, args: &ExpandedArgs<'_>, pass: &Pass, head0: usize) -> Result<AttendParams, CudaError> {
        let ExpandedDims { heads, kv_lora, nope, rope, v, scale } = self.dims;
        let positions = pass.positions();
        // `width` of every `stride` elements, of `heads` heads in each of `rows` rows.
        let map = |address: u64, [width, stride, heads, rows]: [usize; 4], tile: usize| {
            let bytes = |elements: usize| (elements * size_of::<bf16>()) as u64;
            TensorMap::tiled(TiledLayout {
                element: TmaElement::Bf16,
                address,
                dims: &[width as u64, heads as u64, rows as u64],
                strides_bytes: &[bytes(stride), bytes(stride * heads)],
                tile: &[COLUMNS as u32, 1, tile as u32],
                swizzle: Swizzle::B128,
            })
        };
        let behind_latent = |address: u64| address + (kv_lora * size_of::<bf16>()) as u64;
        let (rotated, latents) =
            (behind_latent(args.absorbed.address()), behind_latent(self.latents.address()));
        Ok(AttendParams {
            query: map(args.query.address(), [nope, nope + rope, heads, args.rows], TILE / 2)?,
            rotated: map(rotated, [rope, kv_lora + rope, heads, args.rows], TILE / 2)?,
            keys: map(self.keys.address(), [nope, nope, pass.heads, positions], TILE)?,
            rotated_keys: map(latents, [rope, kv_lora + rope, 1, positions], TILE)?,
            values: map(self.values.address(), [v, v, pass.heads, positions], TILE)?,
            items: Self::word(args, &pass.items),
            first: Self::word(args, &pass.first),
            units: Self::word(args, &pass.units),
            out: args.out.address(),
            heads: heads as u32,
            head0: head0 as u32,
            scale_log2: scale * std::f32::consts::LOG2_E,
        })
    }
}
