//! Rotary embedding, with the norms and the cache writes around it.
//!
//! Specification: [`crate::cpu::plain::rope`] and [`crate::cpu::plain::rms_norm`]. A row's bits depend on that row only.
//! Idle rows (position `u32::MAX`) are not written, neither to their outputs nor to a cache.

use half::bf16;

use super::rows::{Bf16Rows, is_wide};
use super::{Buffer, CudaError, Device, Kernel, Launch, Params, Source, Stream};
use crate::cpu::rope::RopeStyle;

/// Positions of a block of the cache.
const BLOCK_SIZE: usize = 64;

/// Threads of a block, and rows or heads of it: a warp each.
const THREADS: u32 = 256;
const WARPS: u32 = THREADS / 32;

/// Most elements of a head with a norm: eight pairs for each lane.
const HEAD_DIM_MAX: usize = 512;

/// Cosines and sines of all positions, on the device.
#[derive(Clone, Debug)]
pub struct Angles {
    style: RopeStyle,
    /// `[positions][half]`.
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    half: usize,
    positions: usize,
}

/// Where the rows of a batch stand in their sequences and in the cache.
#[derive(Clone, Copy, Debug)]
pub struct PagedRows<'a> {
    /// Rows.
    pub rows: usize,
    /// Position of each row in its sequence, `[rows]`.
    pub positions: &'a Buffer<u32>,
    /// Sequence of each row, `[rows]`.
    pub seq_of_row: &'a Buffer<u32>,
    /// Blocks of each sequence, `[seqs][blocks_max]`.
    pub block_table: &'a Buffer<u32>,
    /// Columns of the table.
    pub blocks_max: usize,
}

/// The query part of [`Rope::mla`]: rotates the last elements of every head into their place behind the absorbed ones.
#[derive(Clone, Copy, Debug)]
pub struct MlaQuery<'a> {
    /// Query heads.
    pub heads: usize,
    /// Elements of a head that are not rotated.
    pub nope: usize,
    /// `[rows][heads][nope + rope]`.
    pub query: &'a Buffer<bf16>,
    /// `[rows][heads][kv_lora + rope]`, of which the last `rope` are written.
    pub absorbed: &'a Buffer<bf16>,
}

/// The cache part of [`Rope::mla`]: norm of the latent, rotation of the key, both into the cache.
#[derive(Clone, Copy, Debug)]
pub struct MlaAppend<'a> {
    /// `kv_lora + rope` elements of each row.
    pub fresh: Bf16Rows<'a>,
    /// `[kv_lora]`.
    pub gamma: &'a Buffer<f32>,
    /// Added to the mean square.
    pub eps: f32,
    /// `[blocks][64][kv_lora + rope]`.
    pub cache: &'a Buffer<bf16>,
}

/// Arguments of [`Rope::mla`]: either part or both, in one launch.
#[derive(Clone, Copy, Debug)]
pub struct MlaRopeArgs<'a> {
    /// The rows.
    pub rows: PagedRows<'a>,
    /// Angles.
    pub angles: &'a Angles,
    /// Elements of a latent.
    pub kv_lora: usize,
    /// Queries.
    pub query: Option<MlaQuery<'a>>,
    /// Latents and keys.
    pub append: Option<MlaAppend<'a>>,
}

/// Arguments of [`Rope::gqa`].
#[derive(Clone, Copy, Debug)]
pub struct GqaRopeArgs<'a> {
    /// The rows.
    pub rows: PagedRows<'a>,
    /// Angles.
    pub angles: &'a Angles,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and of values.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// `heads` heads of each row.
    pub query: Bf16Rows<'a>,
    /// `kv_heads` heads of each row.
    pub key: Bf16Rows<'a>,
    /// `kv_heads` heads of each row.
    pub value: Bf16Rows<'a>,
    /// `[head_dim]`.
    pub query_gamma: &'a Buffer<f32>,
    /// `[head_dim]`.
    pub key_gamma: &'a Buffer<f32>,
    /// Added to the mean square of a head.
    pub eps: f32,
    /// Normed and rotated queries; may be `query` itself.
    pub query_out: Bf16Rows<'a>,
    /// `[blocks][64][kv_heads * head_dim]`.
    pub keys: &'a Buffer<bf16>,
    /// Likewise.
    pub values: &'a Buffer<bf16>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AngleParams {
    cos: u64,
    sin: u64,
    half: u32,
    positions: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PageParams {
    block_table: u64,
    seq_of_row: u64,
    blocks_max: u32,
    width: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MlaParams {
    angles: AngleParams,
    pages: PageParams,
    positions: u64,
    query: u64,
    absorbed: u64,
    fresh: u64,
    gamma: u64,
    cache: u64,
    fresh_stride: u64,
    rows: u32,
    heads: u32,
    nope: u32,
    latent: u32,
    query_blocks: u32,
    eps: f32,
}

// SAFETY: the fields of `MlaParams` in cu/rope.cu.
unsafe impl Params for MlaParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct GqaParams {
    angles: AngleParams,
    pages: PageParams,
    positions: u64,
    query: u64,
    key: u64,
    value: u64,
    query_gamma: u64,
    key_gamma: u64,
    query_out: u64,
    keys: u64,
    values: u64,
    query_stride: u64,
    key_stride: u64,
    value_stride: u64,
    query_out_stride: u64,
    rows: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    eps: f32,
}

// SAFETY: the fields of `GqaParams` in cu/rope.cu.
unsafe impl Params for GqaParams {}

impl Angles {
    /// Computes the angles of `positions` positions: cosines and sines of `position * inv_freq`, times `factor`. The angle is
    /// rounded to f32, as transformers does.
    ///
    /// # Errors
    /// The device is full.
    pub fn new(
        device: &Device,
        style: RopeStyle,
        inv_freq: &[f32],
        factor: f32,
        positions: usize,
    ) -> Result<Self, CudaError> {
        assert!(positions > 0 && !inv_freq.is_empty(), "angles: {positions} positions");
        let (cos, sin): (Vec<f32>, Vec<f32>) = (0..positions)
            .flat_map(|position| inv_freq.iter().map(move |inv_freq| position as f32 * inv_freq))
            .map(|angle| f64::from(angle).sin_cos())
            .map(|(sin, cos)| (cos as f32 * factor, sin as f32 * factor))
            .unzip();
        let (cos, sin) = (device.upload(&cos)?, device.upload(&sin)?);
        Ok(Self { style, cos, sin, half: inv_freq.len(), positions })
    }

    /// Elements that are rotated: twice the angles of a position.
    pub fn rope(&self) -> usize {
        2 * self.half
    }

    fn params(&self) -> AngleParams {
        AngleParams {
            cos: self.cos.address(),
            sin: self.sin.address(),
            half: self.half as u32,
            positions: self.positions as u32,
        }
    }
}

impl PagedRows<'_> {
    fn params(&self, width: usize) -> PageParams {
        let Self { rows, positions, seq_of_row, block_table, blocks_max } = *self;
        assert!(positions.len() >= rows && seq_of_row.len() >= rows, "rope: {rows} rows");
        assert!(blocks_max > 0 && block_table.len().is_multiple_of(blocks_max), "rope: the block table");
        PageParams {
            block_table: block_table.address(),
            seq_of_row: seq_of_row.address(),
            blocks_max: blocks_max as u32,
            width: width as u32,
        }
    }
}

/// The kernels. Those of a style: interleaved, then halves.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Wide, then narrow.
    mla: [[Kernel; 2]; 2],
    /// Heads of at most 128 elements, then all others.
    gqa: [[Kernel; 2]; 2],
}

impl Rope {
    /// The source of the kernels.
    pub fn source() -> Source {
        Source::new("rope", include_str!("cu/rope.cu"))
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// They do not compile or load.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let module = device.module(&Self::source())?;
        let pair = |stem: &str, ends: [&str; 2]| -> Result<[Kernel; 2], CudaError> {
            Ok([
                module.kernel(&format!("{stem}_{}", ends[0]))?,
                module.kernel(&format!("{stem}_{}", ends[1]))?,
            ])
        };
        let mla = |style| pair(style, ["wide", "narrow"]);
        let gqa = |style| pair(style, ["2", "8"]);
        Ok(Self {
            mla: [mla("mla_interleaved")?, mla("mla_halves")?],
            gqa: [gqa("gqa_interleaved")?, gqa("gqa_halves")?],
        })
    }

    /// Rotates queries into the absorbed ones and appends latents and keys to the cache.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn mla(&self, stream: &Stream, args: &MlaRopeArgs<'_>) -> Result<(), CudaError> {
        let MlaRopeArgs { rows: PagedRows { rows, positions, .. }, angles, kv_lora, query, append } = *args;
        let (half, width) = (angles.half, kv_lora + angles.rope());
        let pages = args.rows.params(width);
        let mut params = MlaParams {
            angles: angles.params(),
            pages,
            positions: positions.address(),
            query: 0,
            absorbed: 0,
            fresh: 0,
            gamma: 0,
            cache: 0,
            fresh_stride: 0,
            rows: rows as u32,
            heads: 0,
            nope: 0,
            latent: kv_lora as u32,
            query_blocks: 0,
            eps: 0.0,
        };
        let (mut strides, mut grid) = (vec![kv_lora], 0);
        if let Some(MlaQuery { heads, nope, query, absorbed }) = query {
            let row = heads * (nope + angles.rope());
            assert!(query.len() >= rows * row, "rope: length of the query");
            assert!(absorbed.len() >= rows * heads * width, "rope: length of the absorbed query");
            (params.query, params.absorbed) = (query.address(), absorbed.address());
            (params.heads, params.nope) = (heads as u32, nope as u32);
            strides.push(nope);
        }
        if let Some(MlaAppend { fresh, gamma, eps, cache }) = append {
            fresh.check(rows, width);
            assert_eq!(gamma.len(), kv_lora, "rope: length of gamma");
            assert!(cache.len().is_multiple_of(BLOCK_SIZE * width), "rope: a cache of {}", cache.len());
            (params.fresh, params.fresh_stride) = (fresh.data.address(), fresh.stride as u64);
            (params.gamma, params.cache, params.eps) = (gamma.address(), cache.address(), eps);
            strides.push(fresh.stride);
            grid += params.rows.div_ceil(WARPS);
        }
        // Pieces of eight elements: four pairs of neighbours, or one half of eight pairs.
        let (style, pairs) = match angles.style {
            RopeStyle::Interleaved => (0, 4),
            RopeStyle::HalfSplit => (1, 8),
        };
        strides.push(8 / pairs * half);
        let addresses = [params.query, params.absorbed, params.fresh, params.gamma, params.cache];
        let wide = half.is_multiple_of(pairs) && is_wide(&strides, &addresses);
        let items = params.heads as usize * if wide { half / pairs } else { half };
        params.query_blocks = (items as u32).div_ceil(THREADS);
        grid += params.rows * params.query_blocks;
        let launch = Launch { dependent: true, ..Launch::new(grid, THREADS) };
        // SAFETY: the lengths were checked above; blocks of the cache are the block table's word.
        unsafe { self.mla[style][usize::from(!wide)].launch(stream, &launch, &params) }
    }

    /// Norms and rotates query and key heads, and appends keys and values to the cache.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit, or a head has an odd number of elements or more than 512.
    pub fn gqa(&self, stream: &Stream, args: &GqaRopeArgs<'_>) -> Result<(), CudaError> {
        let GqaRopeArgs { rows: PagedRows { rows, positions, .. }, angles, head_dim, .. } = *args;
        assert!(head_dim <= HEAD_DIM_MAX && head_dim.is_multiple_of(2), "rope: heads of {head_dim}");
        assert!(angles.rope() <= head_dim, "rope: {} of {head_dim} elements", angles.rope());
        let (queries, keys) = (args.heads * head_dim, args.kv_heads * head_dim);
        args.query.check(rows, queries);
        args.query_out.check(rows, queries);
        args.key.check(rows, keys);
        args.value.check(rows, keys);
        assert!(args.query_gamma.len() == head_dim && args.key_gamma.len() == head_dim, "rope: gamma");
        for cache in [args.keys, args.values] {
            assert!(cache.len().is_multiple_of(BLOCK_SIZE * keys), "rope: a cache of {}", cache.len());
        }
        let params = GqaParams {
            angles: angles.params(),
            pages: args.rows.params(keys),
            positions: positions.address(),
            query: args.query.data.address(),
            key: args.key.data.address(),
            value: args.value.data.address(),
            query_gamma: args.query_gamma.address(),
            key_gamma: args.key_gamma.address(),
            query_out: args.query_out.data.address(),
            keys: args.keys.address(),
            values: args.values.address(),
            query_stride: args.query.stride as u64,
            key_stride: args.key.stride as u64,
            value_stride: args.value.stride as u64,
            query_out_stride: args.query_out.stride as u64,
            rows: rows as u32,
            heads: args.heads as u32,
            kv_heads: args.kv_heads as u32,
            head_dim: head_dim as u32,
            eps: args.eps,
        };
        let style = match angles.style {
            RopeStyle::Interleaved => 0,
            RopeStyle::HalfSplit => 1,
        };
        let warps = rows * (args.heads + 2 * args.kv_heads);
        let launch = Launch { dependent: true, ..Launch::new((warps as u32).div_ceil(WARPS), THREADS) };
        // SAFETY: the lengths were checked above; blocks of the cache are the block table's word.
        unsafe { self.gqa[style][usize::from(head_dim > 128)].launch(stream, &launch, &params) }
    }
}
