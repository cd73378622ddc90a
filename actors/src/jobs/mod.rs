//! Jobs: commands that users submit, as Ray's Jobs API has them.
//!
//! `core` decides, `service` executes, `reserve` asks the head for what jobs need, `http` speaks REST, `keeper` is the process that runs one entrypoint, `store` is
//! what stays on disk. A job whose bundle is on another node has a keeper there, too: `runner` is the actor that starts it, `relay` what
//! the keeper here does instead of running it. [`JobsActor`] is the cluster's one jobs actor: no token ever passes it, and it never touches a rank.

mod actor;
pub mod core;
#[cfg(test)]
mod core_tests;
pub mod http;
pub mod keeper;
pub mod log;
pub mod package;
pub mod process;
pub mod relay;
pub mod request;
mod reserve;
pub mod runner;
pub mod service;
pub mod store;

pub use actor::{JobsActor, JobsArgs, ListJobs};
