//! The kernels of a round, queued.

use half::bf16;

use super::params::{
    CombineParams, FinishParams, GatherParams, LAYOUT_CTAS, LAYOUT_THREADS, LayoutParams, REDUCE_THREADS,
    REDUCE_WIDTH, ROW_THREADS, ReduceParams, SIGNAL_THREADS, SignalParams, layout_shared_bytes,
};
use super::{Exchange, OwnResults, Reduce, Rows};
use crate::cuda::{Buffer, CudaError, Launch, Stream};

/// Every kernel here waits by itself for the one ahead of it.
fn launch(grid: u32, block: u32) -> Launch {
    Launch { dependent: true, ..Launch::new(grid, block) }
}

impl Exchange {
    /// DP rank: tells the EP ranks that rows and routing of this round are in the heap, the first `tokens[0]` of them.
    /// What wrote them was queued on `stream` before.
    ///
    /// # Errors
    /// The launch fails.
    pub fn signal(&self, stream: &Stream, tokens: &Buffer<u32>) -> Result<(), CudaError> {
        assert!(!tokens.is_empty(), "the number of tokens has one element");
        self.outgoing();
        let params = SignalParams {
            context: self.context.address(),
            state: self.state.address(),
            own: self.heap.memory().address(),
            tokens: tokens.address(),
            tokens_max: self.geometry.tokens_max,
        };
        // SAFETY: context and state are the exchange's own, `tokens` has an element.
        unsafe { self.kernels.signal.launch(stream, &launch(1, SIGNAL_THREADS), &params) }
    }

    /// EP rank: waits for all DP ranks and lays out the rows of this round: all of [`super::Permuted`] but its rows.
    ///
    /// # Errors
    /// The launch fails.
    pub fn layout(&self, stream: &Stream) -> Result<(), CudaError> {
        let permuted = self.permuted();
        let params = LayoutParams {
            g: self.geometry,
            context: self.context.address(),
            state: self.state.address(),
            plan: permuted.plan.address(),
            place: permuted.place.address(),
            segment_start: permuted.segment_start.address(),
            segment_rows: permuted.segment_rows.address(),
            source: permuted.source.address(),
            destination: permuted.destination.address(),
            push: permuted.push.address(),
            own_place: permuted.own_place.address(),
            slots_max: self.shape.slots_max as u32,
        };
        let shared_bytes = layout_shared_bytes(self.shape.slots_max);
        let shape = Launch { shared_bytes, cluster: LAYOUT_CTAS, ..launch(LAYOUT_CTAS, LAYOUT_THREADS) };
        // SAFETY: all tables were allocated for the shape; the kernel refuses what exceeds it.
        unsafe { self.kernels.layout.launch(stream, &shape, &params) }
    }

    /// EP rank: fetches the rows that were laid out.
    ///
    /// # Errors
    /// The launch fails.
    pub fn gather(&self, stream: &Stream) -> Result<(), CudaError> {
        let permuted = self.permuted();
        let (rows, scales) = match &permuted.rows {
            Rows::Fp8 { codes, scales } => (codes.address(), scales.address()),
            Rows::Bf16(rows) => (rows.address(), 0),
        };
        let params = GatherParams {
            g: self.geometry,
            context: self.context.address(),
            plan: permuted.plan.address(),
            place: permuted.place.address(),
            rows,
            scales,
            rows_stride: self.shape.rows_max as u32,
        };
        // A CTA takes a token, or eight K blocks of 32 tokens' scales.
        let sets = self.shape.tokens_max.div_ceil(32) * self.shape.scale_blocks().div_ceil(8);
        let grid = self.grid(self.shape.dp_max * (self.shape.tokens_max + sets), 5);
        // SAFETY: as in `layout`; every row that the tables name is below `rows_max`.
        unsafe { self.kernels.gather.launch(stream, &launch(grid, ROW_THREADS), &params) }
    }

    /// EP rank: sends `results` (`[rows_max][hidden]`, row by row those of the permuted rows) to the ranks whose tokens
    /// they are. If this rank has tokens too, waits for the results of all others.
    ///
    /// # Errors
    /// The launch fails.
    ///
    /// # Panics
    /// If `results` is too short.
    pub fn combine(&self, stream: &Stream, results: &Buffer<bf16>, own: OwnResults) -> Result<(), CudaError> {
        let permuted = self.permuted();
        assert!(
            results.len() >= self.shape.rows_max * self.shape.hidden,
            "combine: {} results",
            results.len()
        );
        let params = CombineParams {
            g: self.geometry,
            context: self.context.address(),
            state: self.state.address(),
            plan: permuted.plan.address(),
            push: permuted.push.address(),
            rows: results.address(),
            in_place: u32::from(own == OwnResults::InPlace),
        };
        let grid = self.grid(self.shape.rows_max, 4);
        // SAFETY: the results have all rows that the tables name; destinations lie in heaps that are open.
        unsafe { self.kernels.combine.launch(stream, &launch(grid, ROW_THREADS), &params) }
    }

    /// In place of [`Exchange::combine`]: on an EP rank whose results were pushed by kernels queued before (to
    /// [`super::Permuted::destination`]), and on a rank without experts.
    ///
    /// # Errors
    /// The launch fails.
    pub fn finish(&self, stream: &Stream) -> Result<(), CudaError> {
        let params = FinishParams { context: self.context.address(), state: self.state.address() };
        // SAFETY: both are the exchange's own.
        unsafe { self.kernels.finish.launch(stream, &launch(1, SIGNAL_THREADS), &params) }
    }

    /// DP rank, after [`Exchange::combine`] or [`Exchange::finish`]: sums each token's results in the order of its
    /// choices, from 0, by fused multiply-adds in f32, then adds the shared row. Zeros after a failure.
    ///
    /// # Errors
    /// The launch fails.
    ///
    /// # Panics
    /// If a buffer is too short.
    pub fn reduce(&self, stream: &Stream, reduce: &Reduce<'_>) -> Result<(), CudaError> {
        let Reduce { rows, weights, in_place, shared, out } = *reduce;
        let (hidden, top_k) = (self.shape.hidden, self.shape.top_k);
        assert!(rows <= self.shape.tokens_max && self.outgoing.is_some(), "reduce: {rows} rows");
        assert!(weights.len() >= rows * top_k && out.len() >= rows * hidden, "reduce: {rows} rows");
        assert!(shared.is_none_or(|shared| shared.len() >= rows * hidden), "reduce: shared rows");
        assert!(
            in_place.is_none_or(|results| results.len() >= self.shape.rows_max * hidden),
            "reduce: results"
        );
        let own_place = in_place.map_or(0, |_| self.permuted().own_place.address());
        let parts = hidden.div_ceil(REDUCE_WIDTH);
        let params = ReduceParams {
            g: self.geometry,
            context: self.context.address(),
            state: self.state.address(),
            own: self.heap.memory().address(),
            weights: weights.address(),
            own_place,
            local: in_place.map_or(0, Buffer::address),
            shared: shared.map_or(0, Buffer::address),
            out: out.address(),
            parts: parts as u32,
        };
        let grid = (parts * rows) as u32;
        // SAFETY: all lengths were checked above.
        unsafe { self.kernels.reduce.launch(stream, &launch(grid, REDUCE_THREADS), &params) }
    }

    /// Blocks for `units` of work of which each multiprocessor holds `per_sm` at a time.
    fn grid(&self, units: usize, per_sm: u32) -> u32 {
        let full = self.device.properties().sm_count * per_sm;
        full.min(u32::try_from(units).unwrap_or(full)).max(1)
    }
}
