//! The head: registry, placement and supervision.
//!
//! It is never on the path of a token: nodes, workers and their actors go on without it.

mod actor;
pub mod core;
mod keeper;
pub mod messages;
pub mod placement;
mod service;
pub mod supervise;

pub(crate) use self::actor::HeadActor;
pub use self::core::Patience;
pub use self::keeper::LoadError;
pub use self::service::{HeadConfig, HeadError, HeadHandle, run};
