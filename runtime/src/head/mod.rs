//! The head: registry, placement and supervision.
//!
//! It is never on the path of a token: nodes, workers and their actors go on without it.

mod actor;
mod authority;
mod clock;
pub mod core;
mod election;
pub(crate) mod finder;
#[cfg(test)]
mod format_tests;
mod keeper;
mod lives;
mod meshes;
pub mod messages;
mod orders;
mod packages;
pub mod placement;
mod reserve;
mod service;
pub mod supervise;
pub mod tenure;
mod values;

pub(crate) use self::actor::HeadActor;
pub use self::core::Patience;
pub use self::keeper::LoadError;
pub use self::packages::PackagesConfig;
pub use self::service::{Ending, HeadConfig, HeadError, HeadHandle, Role, run};
