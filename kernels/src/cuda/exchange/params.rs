//! The kernels of the exchange and what each takes.

use super::shape::Geometry;
use crate::cuda::{CudaError, Device, Kernel, Params, Source};

/// All kernels are one source.
const TEXT: &str = concat!(include_str!("../cu/exchange_layout.cu"), include_str!("../cu/exchange_rows.cu"));

/// Threads of the kernels; as in the sources.
pub(super) const SIGNAL_THREADS: u32 = 64;
pub(super) const LAYOUT_THREADS: u32 = 512;
pub(super) const LAYOUT_CTAS: u32 = 8;
pub(super) const ROW_THREADS: u32 = 256;
pub(super) const REDUCE_THREADS: u32 = 64;
/// Values of a row that one block of reduce sums: two chunks of 8 a thread.
pub(super) const REDUCE_WIDTH: usize = 2 * 8 * REDUCE_THREADS as usize;

/// The source of the exchange's kernels.
pub fn source() -> Source {
    Source::new("exchange", TEXT)
}

/// Shared memory of the layout kernel: its tables.
pub(super) fn layout_shared_bytes(slots: usize) -> u32 {
    ((LAYOUT_THREADS / 32 + 4) * slots as u32 + 2) * 4
}

#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) signal: Kernel,
    pub(super) layout: Kernel,
    pub(super) gather: Kernel,
    pub(super) combine: Kernel,
    pub(super) finish: Kernel,
    pub(super) reduce: Kernel,
}

impl Kernels {
    pub(super) fn load(device: &Device) -> Result<Self, CudaError> {
        let module = device.module(&source())?;
        Ok(Self {
            signal: module.kernel("exchange_signal")?,
            layout: module.kernel("exchange_layout")?,
            gather: module.kernel("exchange_gather")?,
            combine: module.kernel("exchange_combine")?,
            finish: module.kernel("exchange_finish")?,
            reduce: module.kernel("exchange_reduce")?,
        })
    }
}

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub(super) struct $name { $(pub(super) $field: $type),* }
        // SAFETY: the same fields in the same order as the struct of this name in the sources.
        unsafe impl Params for $name {}
    )* };
}

params! {
    SignalParams { context: u64, state: u64, own: u64, tokens: u64, tokens_max: u32 }
    LayoutParams {
        g: Geometry,
        context: u64,
        state: u64,
        plan: u64,
        place: u64,
        segment_start: u64,
        segment_rows: u64,
        source: u64,
        destination: u64,
        push: u64,
        own_place: u64,
        slots_max: u32,
    }
    GatherParams {
        g: Geometry,
        context: u64,
        plan: u64,
        place: u64,
        rows: u64,
        scales: u64,
        rows_stride: u32,
    }
    CombineParams { g: Geometry, context: u64, state: u64, plan: u64, push: u64, rows: u64, in_place: u32 }
    FinishParams { context: u64, state: u64 }
    ReduceParams {
        g: Geometry,
        context: u64,
        state: u64,
        own: u64,
        weights: u64,
        own_place: u64,
        local: u64,
        shared: u64,
        out: u64,
        parts: u32,
    }
}
