//! HTTP in front of the ranks: OpenAI's API, the router, metrics.

pub mod dispatch;
pub mod engine;
pub mod router;
pub mod text;
