//! What is served: applications and their deployments, from Ray Serve's documents and from cluster.toml alike.
//!
//! `document` reads, `core` decides, `service` executes, `details` tells, each pure but for `service`. A replica of a
//! deployment is a whole DP x EP group; the head keeps its actors alive, the ingress routes to its ranks. Neither knows
//! of deployments.

mod controller;
pub mod core;
mod details;
pub mod document;
pub mod http;
pub mod messages;
mod service;
pub mod target;

pub use controller::{ServeArgs, ServeController};
