//! The head: registry, placement and supervision.

pub mod core;
pub mod messages;
pub mod placement;
pub mod supervise;
