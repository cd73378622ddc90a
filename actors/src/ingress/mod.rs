//! HTTP in front of the ranks: OpenAI's API, the router, metrics.
//!
//! [`Ingress`] is fed by the actor that hears the ranks and is driven by HTTP handlers; [`server::serve`] puts the
//! server before it, [`apps::Apps`] finds the model of a request; [`engine::EngineLink`] is its line to the ranks. It never looks at an expert or a weight.
//! Requests of applications that are actors of users go through `forward`.

pub mod apps;
pub mod dispatch;
pub mod engine;
pub mod error;
pub(crate) mod forward;
mod handle;
pub mod metrics;
pub mod model;
mod openai;
pub mod presence;
mod proxy;
pub mod router;
pub mod server;
mod spans;
pub mod text;

pub use handle::{Arrival, Event, Generation, Ingress};
pub(crate) use spans::Hex;
pub use spans::RequestTrace;
