//! How rows are cut into chunks, the list of all chunks of a step, and the merge.

use half::bf16;

use super::{BatchMeta, Limits, PAGE, plan_source};
use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Params, Stream};

/// Most bytes of unfinished chunks. Steps that need more run in several launches.
const PARTIAL_BYTES_MAX: usize = 576 << 20;

/// The rule by which a row is cut: `chunks_max` at most, of `positions` each; evenly, by pairs of pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// Positions of a chunk; a row of less than one and a half times as many is not cut.
    pub(super) positions: usize,
    pub(super) chunks_max: usize,
}

impl Cut {
    /// Chunks of a row of `positions`, as in cu/attention_plan.cu.
    fn chunks(self, positions: usize) -> usize {
        ((positions + self.positions / 2) / self.positions).clamp(1, self.chunks_max)
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

/// The list of chunks and room for what they yield. Rows are done in segments, one launch each.
#[derive(Clone, Debug)]
pub(super) struct Planner {
    plan: Kernel,
    merge: Kernel,
    cut: Cut,
    /// Query heads and output columns of each.
    heads: usize,
    width: usize,
    rows_max: usize,
    segment_rows: usize,
    /// Most chunks of a row within the limits.
    row_chunks: usize,
    items: Buffer<u32>,
    counts: Buffer<u32>,
    partial: Buffer<f32>,
    log_sums: Buffer<f32>,
}

/// One launch of a step.
pub(super) struct Segment {
    pub(super) row0: usize,
    /// Most chunks in it.
    pub(super) items_max: usize,
    pub(super) items: u64,
    pub(super) count: u64,
    pub(super) partial: u64,
    pub(super) log_sums: u64,
    pub(super) chunks_max: u32,
}

impl Planner {
    pub(super) fn new(
        device: &Device,
        (heads, width): (usize, usize),
        cut: Cut,
        limits: Limits,
    ) -> Result<Self, CudaError> {
        assert!(limits.rows > 0 && limits.positions > 0, "attention: {limits:?}");
        // The kernels keep tiles of a chunk in 16 bits.
        assert!(limits.positions <= 1 << 21, "attention: {} positions", limits.positions);
        let module = device.module(&plan_source())?;
        let row_chunks = cut.chunks(limits.positions);
        let row_bytes = row_chunks * heads * (width + 1) * size_of::<f32>();
        let segment_rows = match row_chunks {
            1 => limits.rows,
            _ => (PARTIAL_BYTES_MAX / row_bytes).next_multiple_of(32).min(limits.rows),
        };
        let slots = if row_chunks == 1 { 0 } else { segment_rows * row_chunks * heads };
        let segments = limits.rows.div_ceil(segment_rows);
        Ok(Self {
            plan: module.kernel("attention_plan")?,
            merge: module.kernel("attention_merge")?,
            cut,
            heads,
            width,
            rows_max: limits.rows,
            segment_rows,
            row_chunks,
            items: device.alloc(segments * segment_rows * row_chunks * ITEM_WORDS)?,
            counts: device.alloc(segments)?,
            partial: device.alloc(slots * width)?,
            log_sums: device.alloc(slots)?,
        })
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
            let items = index * self.segment_rows * self.row_chunks * ITEM_WORDS;
            Segment {
                row0,
                items_max: self.segment_rows.min(rows - row0) * self.row_chunks,
                items: self.items.address() + (items * size_of::<u32>()) as u64,
                count: self.counts.address() + (index * size_of::<u32>()) as u64,
                partial: self.partial.address(),
                log_sums: self.log_sums.address(),
                chunks_max: self.row_chunks as u32,
            }
        })
    }

    /// Adds up the chunks of a segment's rows, if rows may have several.
    pub(super) fn merge(
        &self,
        stream: &Stream,
        meta: &BatchMeta<'_>,
        segment: &Segment,
        out: &Buffer<bf16>,
    ) -> Result<(), CudaError> {
        if self.row_chunks == 1 {
            return Ok(());
        }
        let params = MergeParams {
            positions: meta.positions.address(),
            partial: segment.partial,
            log_sums: segment.log_sums,
            out: out.address(),
            row0: segment.row0 as u32,
            heads: self.heads as u32,
            width: self.width as u32,
            chunk: self.cut.positions as u32,
            chunks_max: self.row_chunks as u32,
        };
        let rows = (segment.items_max / self.row_chunks) as u32;
        let blocks = (self.heads * self.width).div_ceil(256 * 4).min(16) as u32;
        let launch = Launch { grid: [rows, blocks, 1], dependent: true, ..Launch::new(1, 256) };
        // SAFETY: positions and output have all rows (checked by the caller), the scratch all chunks of a segment.
        unsafe { self.merge.launch(stream, &launch, &params) }
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

#[cfg(test)]
mod tests {
    use super::Cut;

    #[test]
    fn a_row_is_cut_by_its_length() {
        let cut = Cut { positions: 2048, chunks_max: 16 };
        let chunks = [1, 3071, 3072, 5119, 5120, 1 << 20].map(|positions| cut.chunks(positions));
        assert_eq!(chunks, [1, 1, 2, 2, 3, 16]);
    }
}
