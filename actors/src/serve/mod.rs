//! What is served: applications and their deployments, from Ray Serve's documents and from cluster.toml alike.
//!
//! `document` reads, `core` and `probes` decide, `service` executes, `details` tells, each pure but for `service`. A replica
//! of a deployment is a whole DP x EP group of a model, or an actor of a user that speaks `replica`'s messages; the head
//! keeps its actors alive, the ingress routes to them. Neither knows of deployments. `calls` is what whoever asks replicas of
//! users' actors has of them: the ingress, and replicas of other deployments.

pub mod calls;
mod controller;
pub mod core;
mod details;
pub mod document;
pub mod http;
mod ingresses;
pub mod messages;
mod probes;
pub mod replica;
mod service;
pub mod target;
pub mod workload;

pub use controller::{ServeArgs, ServeController};
