//! The choice of experts, of a physical slot for each, and the count of both.
//!
//! Specification: [`crate::cpu::plain::route`] with the scores of [`crate::cpu::Cpu::route`], whose exponential the kernel
//! repeats bit by bit. The choice of a token depends on its logits only; which of an expert's slots serves it, also on its
//! row.

use super::rows::address;
use super::{Buffer, CudaError, Device, Kernel, Launch, Params, Source, Stream};
use crate::cpu::router::{GroupScore, Groups, Scoring};

/// Most experts: sixteen for each lane.
const EXPERTS_MAX: usize = 512;

/// Most words of a slot table: blocks keep it in shared memory.
const TABLE_WORDS_MAX: usize = 32 << 10;

/// Tokens of a block: a warp each.
const ROWS_PER_BLOCK: u32 = 2;

const SOFTMAX: u32 = 1;
const TOP_TWO: u32 = 2;
const NORMALIZE: u32 = 4;

/// The kernels.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Of 1, 2, 4, 8 and 16 experts per lane.
    kernels: [Kernel; 5],
}

/// A router's rule; see [`crate::cpu::router::Router`].
#[derive(Clone, Copy, Debug)]
pub struct RoutingRule {
    /// Logical experts, at most 512.
    pub experts: usize,
    /// How logits become scores.
    pub scoring: Scoring,
    /// Limits the choice to some of at most 32 groups.
    pub groups: Option<Groups>,
    /// Experts per token, at most 32.
    pub top_k: usize,
    /// Divide the weights by their sum + 1e-20.
    pub normalize: bool,
    /// Factor of the weights, applied last.
    pub scale: f32,
}

/// Arguments of [`Routing::run`].
#[derive(Clone, Copy, Debug)]
pub struct RoutingArgs<'a> {
    /// Tokens.
    pub rows: usize,
    /// The rule.
    pub rule: RoutingRule,
    /// `[rows][experts]`.
    pub logits: &'a Buffer<f32>,
    /// `[rows]`; idle rows (`u32::MAX`) choose nothing.
    pub positions: &'a Buffer<u32>,
    /// Added to the scores for the choice only, `[experts]`.
    pub bias: Option<&'a Buffer<f32>>,
    /// Made by [`slot_table`]; none: the slot is the expert.
    pub slot_table: Option<&'a Buffer<u32>>,
    /// A token's key for the choice among slots is this plus its row.
    pub salt: u64,
    /// Chosen experts, best first, `[rows][top_k]`; `u32::MAX` for idle rows.
    pub ids: &'a Buffer<u32>,
    /// Their slots, likewise.
    pub slots: &'a Buffer<u32>,
    /// Their weights, `[rows][top_k]`; 0 for idle rows.
    pub weights: &'a Buffer<f32>,
    /// Added to: tokens that chose each expert, `[experts]`.
    pub loads: Option<&'a Buffer<u32>>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RouterParams {
    logits: u64,
    positions: u64,
    bias: u64,
    slot_table: u64,
    ids: u64,
    slots: u64,
    weights: u64,
    loads: u64,
    salt: u64,
    rows: u32,
    experts: u32,
    top_k: u32,
    groups: u32,
    top_groups: u32,
    flags: u32,
    scale: f32,
    table_words: u32,
}

// SAFETY: the fields of `RouterParams` in cu/router.cu.
unsafe impl Params for RouterParams {}

/// The table by which the kernel finds slots, from the expert of each slot: `experts + 1` starts, then the slots grouped
/// by expert, ascending within one.
///
/// # Panics
/// If a slot names no expert.
pub fn slot_table(experts: usize, physical_to_logical: &[u32]) -> Vec<u32> {
    let mut slots: Vec<u32> = (0..physical_to_logical.len() as u32).collect();
    slots.sort_by_key(|&slot| physical_to_logical[slot as usize]);
    let mut starts = vec![0; experts + 1];
    for &expert in physical_to_logical {
        starts[expert as usize + 1] += 1;
    }
    (0..experts).for_each(|expert| starts[expert + 1] += starts[expert]);
    starts.extend(slots);
    starts
}

impl RoutingRule {
    fn check(&self) {
        let Self { experts, groups, top_k, .. } = *self;
        assert!((1..=EXPERTS_MAX).contains(&experts), "routing: {experts} experts");
        let candidates = groups.map_or(experts, |Groups { count, top, .. }| {
            assert!((1..=32).contains(&count) && experts.is_multiple_of(count), "routing: {count} groups");
            assert!((1..=count).contains(&top), "routing: {top} of {count} groups");
            experts / count * top
        });
        assert!((1..=32.min(candidates)).contains(&top_k), "routing: top {top_k} of {candidates} experts");
    }

    fn flags(&self) -> u32 {
        let softmax = match self.scoring {
            Scoring::Sigmoid => 0,
            Scoring::Softmax => SOFTMAX,
        };
        let top_two = match self.groups.map(|groups| groups.score) {
            Some(GroupScore::TopTwo) => TOP_TWO,
            Some(GroupScore::Best) | None => 0,
        };
        softmax | top_two | if self.normalize { NORMALIZE } else { 0 }
    }
}

impl Routing {
    /// The source of the kernels.
    pub fn source() -> Source {
        Source::new("router", include_str!("cu/router.cu"))
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// They do not compile or load.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let module = device.module(&Self::source())?;
        let kernel = |per_lane| module.kernel(&format!("route_{per_lane}"));
        Ok(Self { kernels: [kernel(1)?, kernel(2)?, kernel(4)?, kernel(8)?, kernel(16)?] })
    }

    /// Chooses.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit or the rule is impossible.
    pub fn run(&self, stream: &Stream, args: &RoutingArgs<'_>) -> Result<(), CudaError> {
        let RoutingArgs { rows, rule, .. } = *args;
        rule.check();
        let chosen = rows * rule.top_k;
        assert!(args.logits.len() >= rows * rule.experts, "routing: {} logits", args.logits.len());
        assert!(args.positions.len() >= rows, "routing: {} positions", args.positions.len());
        assert!(args.bias.is_none_or(|bias| bias.len() == rule.experts), "routing: length of the bias");
        assert!(args.loads.is_none_or(|loads| loads.len() == rule.experts), "routing: length of the loads");
        let table = args.slot_table.map_or(2 * rule.experts + 1, Buffer::len);
        assert!(
            (2 * rule.experts + 1..=TABLE_WORDS_MAX).contains(&table),
            "routing: a slot table of {table}"
        );
        assert!(args.ids.len() >= chosen && args.slots.len() >= chosen, "routing: room for ids and slots");
        assert!(args.weights.len() >= chosen, "routing: room for weights");
        let params = RouterParams {
            logits: args.logits.address(),
            positions: args.positions.address(),
            bias: address(args.bias),
            slot_table: address(args.slot_table),
            ids: args.ids.address(),
            slots: args.slots.address(),
            weights: args.weights.address(),
            loads: address(args.loads),
            salt: args.salt,
            rows: rows as u32,
            experts: rule.experts as u32,
            top_k: rule.top_k as u32,
            groups: rule.groups.map_or(0, |groups| groups.count as u32),
            top_groups: rule.groups.map_or(0, |groups| groups.top as u32),
            flags: rule.flags(),
            scale: rule.scale,
            table_words: args.slot_table.map_or(0, Buffer::len) as u32,
        };
        let per_lane = rule.experts.div_ceil(32).next_power_of_two();
        let grid = (rows as u32).div_ceil(ROWS_PER_BLOCK);
        let shared_bytes = params.table_words * size_of::<u32>() as u32;
        let launch = Launch { shared_bytes, dependent: true, ..Launch::new(grid, 32 * ROWS_PER_BLOCK) };
        // SAFETY: the lengths were checked above; the slot table's content is the word of whoever wrote it.
        unsafe { self.kernels[per_lane.ilog2() as usize].launch(stream, &launch, &params) }
    }
}
