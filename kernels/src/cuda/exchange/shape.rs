//! Sizes of an exchange, and where things lie in its heap.

/// How rows travel to the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// E4M3 codes with one f32 scale per 128 of them.
    Fp8,
    /// bf16.
    Bf16,
}

/// How ranks reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// There is one rank.
    Local,
    /// Kernels read and write the memory of the peers: NVLink, or one device.
    Peer,
    /// NCCL carries rows to mirrors and results back.
    Nccl,
}

/// What one rank does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roles {
    /// It has tokens: a DP rank.
    pub tokens: bool,
    /// It has experts: an EP rank.
    pub experts: bool,
}

/// Sizes that all ranks of a group share, except `rows_max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExchangeShape {
    /// Rows that one DP rank brings at most; a multiple of 4.
    pub tokens_max: usize,
    /// Choices of a token.
    pub top_k: usize,
    /// Width of a row; a multiple of 16.
    pub hidden: usize,
    /// How rows travel.
    pub format: RowFormat,
    /// DP ranks at most.
    pub dp_max: usize,
    /// EP ranks at most.
    pub ep_max: usize,
    /// Slots of one EP rank at most, per layer.
    pub slots_max: usize,
    /// Capacity of this rank's permuted rows, a multiple of 128: see [`ExchangeShape::rows_worst`].
    pub rows_max: usize,
}

/// Ranks that a group can have.
pub const RANKS_MAX: usize = 64;
/// Slots that an EP rank can have per layer.
pub const SLOTS_MAX: usize = 512;
/// Rows of a segment begin at a multiple of this.
pub const SEGMENT_ALIGN: usize = 128;
/// Flags and header at the front of each heap.
const FRONT_BYTES: usize = 8192;
/// The header, as in `exchange.cuh`.
pub(super) const HEADER_AT: usize = 4096;

/// Places of a heap in bytes; the first fields of most kernels' params.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) slots_at: u64,
    pub(super) rows_at: u64,
    pub(super) scales_at: u64,
    pub(super) combined_at: u64,
    pub(super) combined_stride: u64,
    pub(super) tokens_max: u32,
    pub(super) top_k: u32,
    pub(super) hidden: u32,
    pub(super) row_bytes: u32,
    pub(super) scale_blocks: u32,
    pub(super) rows_max: u32,
}

impl ExchangeShape {
    /// Permuted rows of one EP rank with `slots` slots if `dp` ranks bring `tokens` rows each, `top_k` choices a row,
    /// and all of them land here in the worst way. A multiple of 128.
    pub fn rows_worst(dp: usize, tokens: usize, top_k: usize, slots: usize) -> usize {
        let entries = dp * tokens * top_k;
        // Each slot in use wastes less than one alignment; a slot in use has an entry.
        (entries + slots.min(entries) * (SEGMENT_ALIGN - 1)).next_multiple_of(SEGMENT_ALIGN)
    }

    /// # Panics
    /// If the sizes are none that the kernels take.
    pub(super) fn assert_valid(&self) {
        let Self { tokens_max, top_k, hidden, dp_max, ep_max, slots_max, rows_max, .. } = *self;
        assert!(tokens_max > 0 && tokens_max.is_multiple_of(4), "tokens_max {tokens_max}");
        assert!(hidden > 0 && hidden.is_multiple_of(16), "hidden {hidden}");
        assert!((1..=SLOTS_MAX).contains(&slots_max), "slots_max {slots_max}");
        assert!(
            (1..=RANKS_MAX).contains(&dp_max) && (1..=RANKS_MAX).contains(&ep_max),
            "{dp_max} DP, {ep_max} EP"
        );
        assert!(rows_max.is_multiple_of(SEGMENT_ALIGN), "rows_max {rows_max}");
        assert!(top_k > 0 && dp_max * tokens_max * top_k <= i32::MAX as usize, "top_k {top_k}");
        assert!(rows_max <= i32::MAX as usize, "rows_max {rows_max}");
    }

    /// Bytes of one row on its way.
    pub(super) fn row_bytes(&self) -> usize {
        match self.format {
            RowFormat::Fp8 => self.hidden,
            RowFormat::Bf16 => self.hidden * 2,
        }
    }

    /// Scales of one row.
    pub(super) fn scale_blocks(&self) -> usize {
        match self.format {
            RowFormat::Fp8 => self.hidden.div_ceil(128),
            RowFormat::Bf16 => 0,
        }
    }

    /// Bytes of one region of combined rows.
    pub(super) fn combined_bytes(&self) -> usize {
        self.tokens_max * self.top_k * self.hidden * 2
    }

    /// Bytes of a DP rank's heap as NCCL mirrors it on an EP rank.
    pub(super) fn mirror_bytes(&self) -> usize {
        self.geometry(Transport::Nccl).combined_at as usize + self.combined_bytes().next_multiple_of(256)
    }

    pub(super) fn geometry(&self, transport: Transport) -> Geometry {
        let aligned = |bytes: usize| bytes.next_multiple_of(256) as u64;
        let slots_at = FRONT_BYTES as u64;
        let rows_at = slots_at + aligned(self.tokens_max * self.top_k * 4);
        let scales_at = rows_at + aligned(self.tokens_max * self.row_bytes());
        let combined_at = scales_at + aligned(self.tokens_max * self.scale_blocks() * 4);
        let combined_stride = match transport {
            Transport::Local | Transport::Peer => 0,
            Transport::Nccl => self.combined_bytes() as u64,
        };
        Geometry {
            slots_at,
            rows_at,
            scales_at,
            combined_at,
            combined_stride,
            tokens_max: self.tokens_max as u32,
            top_k: self.top_k as u32,
            hidden: self.hidden as u32,
            row_bytes: self.row_bytes() as u32,
            scale_blocks: self.scale_blocks() as u32,
            rows_max: self.rows_max as u32,
        }
    }

    /// Bytes of a rank's heap: flags only, if it has no tokens.
    pub fn heap_bytes(&self, transport: Transport, tokens: bool) -> usize {
        let regions = match transport {
            Transport::Local | Transport::Peer => 1,
            Transport::Nccl => self.ep_max,
        };
        match tokens {
            true => self.geometry(transport).combined_at as usize + regions * self.combined_bytes(),
            false => FRONT_BYTES,
        }
    }
}
