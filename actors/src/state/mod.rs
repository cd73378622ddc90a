//! The state of the cluster as tables: what `helio list` shows, and Ray's state API over the same facts.
//!
//! `query` (pure) chooses rows and columns, `ray` (pure) says what Ray's clients call our things, `http` serves them.
//! They only look. `call` is the door to named actors for whoever speaks JSON.

pub mod call;
pub mod http;
pub mod query;
mod ray;
