//! The ingress over real HTTP, with real engines in threads behind it: the bundled model, its tokenizer, its template.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

mod chat;
mod clients;
mod completions;
mod door;
mod errors;
mod failover;
mod fuzz;
mod responses;
mod rig;
mod structured;
mod tools;
