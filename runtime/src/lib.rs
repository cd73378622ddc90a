//! The cluster: actors, nodes, supervision, placement, state store and wire.
//!
//! It knows no tensor, no model and no HTTP route: the product in `actors` stands on the same API as users do.

pub mod actor;
pub mod backoff;
pub mod cluster;
pub mod function;
pub mod group;
pub mod handle;
pub mod head;
mod mailbox;
pub mod mesh;
pub mod node;
pub mod objects;
pub mod package;
mod panics;
pub mod process;
pub mod spec;
pub mod state;
pub mod supervisor;
pub mod system;
pub mod wire;
pub mod worker;
