//! How rows are cut into chunks, the list of all chunks of a step, and the merge.

use half::bf16;

use super::{BatchMeta, Limits, PAGE, plan_source};
use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Params, Stream};

/// Most bytes of unfinished chunks. Steps that need more run in several launches.
const PARTIAL_BYTES_MAX: usize = 576 << 20;

/// The rule by which a row is cut: evenly, by pairs of pages, into as few chunks as do not exceed `positions`, but into
/// `chunks_max` at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub(super) positions: usize,
    pub(super) chunks_max: usize,
}

impl Cut {
    /// Chunks of a row of `positions`, as in cu/attention_plan.cu.
    fn chunks(self, positions: usize) -> usize {
        positions.div_ceil(self.positions).clamp(1, self.chunks_max)
    }
}

/// A run of tiles of one row.
const ITEM_WORDS: usize = 4;

#[repr(C)]
#[derive(Clone, Copy)]
struct PlanParams {
    positions: u64,
    seq_of_row: u64,
    items: u64,
    counts: u64,
    rows: u32,
    segment_rows: u32,
    items_max: u32,
    chunk: u32,
    chunks_max: u32,
    first: u64,
    next: u64,
    bins: u32,
    sets: u32,
}

// SAFETY: the fields of `PlanParams` in cu/attention_plan.cu.
unsafe impl Params for PlanParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeParams {
    positions: u64,
    partial: u64,
    log_sums: u64,
    out: u64,
    row0: u32,
    heads: u32,
    width: u32,
    chunk: u32,
    chunks_max: u32,
}

// SAFETY: the fields of `MergeParams` in cu/attention_plan.cu.
unsafe impl Params for MergeParams {}

/// How chunks are dealt to blocks that do several.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deal {
    /// Blocks, or clusters of them; at most [`BINS_MAX`].
    pub(super) bins: usize,
    /// Sets of heads, dealt on their own.
    pub(super) sets: usize,
}

/// Bins that the kernel's one warp keeps.
const BINS_MAX: usize = 160;

/// What becomes of a row's chunks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunks {
    pub(super) cut: Cut,
    /// What is kept of a chunk of a row of several.
    pub(super) floats: usize,
    /// Dealt evenly, or in one list.
    pub(super) deal: Option<Deal>,
}

/// The list of chunks and room for what they yield. Rows are done in segments, one launch each.
#[derive(Clone, Debug)]
pub(super) struct Planner {
    plan: Kernel,
    cut: Cut,
    rows_max: usize,
    segment_rows: usize,
    /// Most chunks of a row within the limits.
    row_chunks: usize,
    items: Buffer<u32>,
    counts: Buffer<u32>,
    partial: Buffer<f32>,
    deal: Option<Deal>,
    /// `[segments][bins]`, and `[segments][items][sets]`: lists of what each bin is dealt.
    first: Buffer<u32>,
    next: Buffer<u32>,
}

/// One launch of a step.
pub(super) struct Segment {
    pub(super) row0: usize,
    /// Most chunks in it.
    pub(super) items_max: usize,
    pub(super) items: u64,
    pub(super) count: u64,
    pub(super) first: u64,
    pub(super) next: u64,
    pub(super) partial: u64,
    pub(super) chunks_max: u32,
}

impl Planner {
    pub(super) fn new(device: &Device, chunks: Chunks, limits: Limits) -> Result<Self, CudaError> {
        assert!(limits.rows > 0 && limits.positions > 0, "attention: {limits:?}");
        // The kernels keep tiles of a chunk in 16 bits.
        assert!(limits.positions <= 1 << 21, "attention: {} positions", limits.positions);
        let row_chunks = chunks.cut.chunks(limits.positions);
        let segment_rows = match row_chunks {
            1 => limits.rows,
            _ => {
                let fit = (PARTIAL_BYTES_MAX / (row_chunks * chunks.floats * size_of::<f32>())).max(1);
                // Whole waves.
                let wave = device.properties().sm_count as usize;
                (if fit < wave { fit } else { fit - fit % wave }).min(limits.rows)
            }
        };
        let segments = limits.rows.div_ceil(segment_rows);
        let items = segments * segment_rows * row_chunks;
        let Deal { bins, sets } = chunks.deal.unwrap_or(Deal { bins: 0, sets: 0 });
        assert!(bins <= BINS_MAX, "attention: {bins} bins");
        let mut planner = Self {
            plan: device.module(&plan_source())?.kernel("attention_plan")?,
            cut: chunks.cut,
            rows_max: limits.rows,
            segment_rows,
            row_chunks,
            items: device.alloc(items * ITEM_WORDS)?,
            counts: device.alloc(segments)?,
            partial: device.alloc(0)?,
            deal: chunks.deal,
            first: device.alloc(segments * bins)?,
            next: device.alloc(items * sets)?,
        };
        planner.partial = device.alloc(planner.chunks() * chunks.floats)?;
        Ok(planner)
    }

    /// Chunks of which something is kept at a time.
    pub(super) fn chunks(&self) -> usize {
        if self.row_chunks == 1 { 0 } else { self.segment_rows * self.row_chunks }
    }

    /// Lists the chunks of a step's rows.
    pub(super) fn plan(&self, stream: &Stream, meta: &BatchMeta<'_>, rows: usize) -> Result<(), CudaError> {
        self.check(meta, rows);
        let params = PlanParams {
            positions: meta.positions.address(),
            seq_of_row: meta.seq_of_row.address(),
            items: self.items.address(),
            counts: self.counts.address(),
            rows: rows as u32,
            segment_rows: self.segment_rows as u32,
            items_max: (self.segment_rows * self.row_chunks) as u32,
            chunk: self.cut.positions as u32,
            chunks_max: self.row_chunks as u32,
            first: self.deal.map_or(0, |_| self.first.address()),
            next: self.next.address(),
            bins: self.deal.map_or(0, |deal| deal.bins as u32),
            sets: self.deal.map_or(0, |deal| deal.sets as u32),
        };
        let launch = Launch { dependent: true, ..Launch::new(rows.div_ceil(self.segment_rows) as u32, 1024) };
        // SAFETY: both inputs have `rows` entries; the list has room for the chunks of all rows of all segments.
        unsafe { self.plan.launch(stream, &launch, &params) }
    }

    pub(super) fn check(&self, meta: &BatchMeta<'_>, rows: usize) {
        assert!(rows <= self.rows_max, "attention: {rows} rows of at most {}", self.rows_max);
        meta.check(rows);
    }

    /// The launches of a step of `rows`.
    pub(super) fn segments(&self, rows: usize) -> impl Iterator<Item = Segment> + '_ {
        (0..rows.div_ceil(self.segment_rows)).map(move |index| {
            let row0 = index * self.segment_rows;
            let items = index * self.segment_rows * self.row_chunks;
            let Deal { bins, sets } = self.deal.unwrap_or(Deal { bins: 0, sets: 0 });
            let at =
                |buffer: &Buffer<u32>, words: usize| buffer.address() + (words * size_of::<u32>()) as u64;
            Segment {
                row0,
                items_max: self.segment_rows.min(rows - row0) * self.row_chunks,
                items: at(&self.items, items * ITEM_WORDS),
                count: at(&self.counts, index),
                first: at(&self.first, index * bins),
                next: at(&self.next, items * sets),
                partial: self.partial.address(),
                chunks_max: self.row_chunks as u32,
            }
        })
    }

    /// Pages of a cache of `len` elements, `width` to a position.
    pub(super) fn pages(len: usize, width: usize) -> usize {
        assert!(
            len.is_multiple_of(PAGE * width) && len > 0,
            "attention: cache of {len} elements, {width} a position"
        );
        len / (PAGE * width)
    }
}

/// Adds up the chunks of rows.
#[derive(Clone, Debug)]
pub(super) struct Merge {
    kernel: Kernel,
    heads: usize,
    /// Output columns of a head.
    width: usize,
    /// `[rows of a segment][chunks][heads]`: logarithms of the sums.
    log_sums: Buffer<f32>,
}

impl Merge {
    pub(super) fn new(
        device: &Device,
        planner: &Planner,
        (heads, width): (usize, usize),
    ) -> Result<Self, CudaError> {
        let kernel = device.module(&plan_source())?.kernel("attention_merge")?;
        Ok(Self { kernel, heads, width, log_sums: device.alloc(planner.chunks() * heads)? })
    }

    /// Where the kernel before it leaves the logarithms of its sums.
    pub(super) fn log_sums(&self) -> u64 {
        self.log_sums.address()
    }

    /// Queues it for a segment, if rows may have several chunks.
    pub(super) fn run(
        &self,
        stream: &Stream,
        planner: &Planner,
        meta: &BatchMeta<'_>,
        (segment, out): (&Segment, &Buffer<bf16>),
    ) -> Result<(), CudaError> {
        if planner.row_chunks == 1 {
            return Ok(());
        }
        let params = MergeParams {
            positions: meta.positions.address(),
            partial: segment.partial,
            log_sums: self.log_sums.address(),
            out: out.address(),
            row0: segment.row0 as u32,
            heads: self.heads as u32,
            width: self.width as u32,
            chunk: planner.cut.positions as u32,
            chunks_max: planner.row_chunks as u32,
        };
        let rows = (segment.items_max / planner.row_chunks) as u32;
        let blocks = (self.heads * self.width).div_ceil(256 * 4).min(16) as u32;
        let launch = Launch { grid: [rows, blocks, 1], dependent: true, ..Launch::new(1, 256) };
        // SAFETY: positions and output have all rows (checked by the caller), the scratch all chunks of a segment.
        unsafe { self.kernel.launch(stream, &launch, &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::Cut;

    #[test]
    fn a_row_is_cut_by_its_length() {
        let cut = Cut { positions: 2048, chunks_max: 16 };
        let chunks = [1, 2048, 2049, 4096, 4097, 1 << 20].map(|positions| cut.chunks(positions));
        assert_eq!(chunks, [1, 1, 2, 2, 3, 16]);
    }
}
