//! Expert-parallel load balancing: policies and expert maps.
//!
//! Pure: loads in, maps and plans out. Who gathers the loads, moves the weights and agrees on the step at which a map
//! takes effect is the business of the actors.

pub mod deepseek;
pub mod incremental;
pub mod load;
pub mod map;
pub mod plan;
pub mod policy;
mod sglang;

pub use load::{LoadWindow, balancedness, drift, map_balancedness, rank_loads};
pub use map::{ExpertMap, Layout, MapError, MapShape, PlacementStrategy};
pub use plan::{LayerPlan, Plan, Receive};
pub use policy::{Gate, LayerOutlook, Policy, Proposal, Verdict, propose};
pub use sglang::ModelLayers;
