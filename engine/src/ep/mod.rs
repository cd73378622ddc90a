//! The expert-parallel group as one rank sees it: step headers, expert slots, dispatch and combine.
//!
//! The rank's thread owns all of it and calls in; nothing here decides when a step runs or reads a clock.

mod exchange;
mod header;
mod slots;
mod topology;

pub use exchange::{EpGroup, EpParts};
pub use header::{Decision, PlanProgress, StepHeader, decide};
pub use slots::{ExpertStore, ExpertWeights, SharedSlots, Slot, SlotError, Slots};
pub use topology::{Role, Topology, TopologyError};
