//! One rank's model step: sequences, batch scheduler, KV cache, model, sampler, expert map and the EPLB policies.
//!
//! Pure: nothing here knows tokio, an actor, a clock or a socket. The rank actor drives it.

pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod cuda;
pub mod ep;
pub mod eplb;
pub mod grammar;
pub mod model;
pub mod request;
pub mod sampler;
pub mod scheduler;
