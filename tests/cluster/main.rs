//! The real binary as users run it: real processes, real sockets, real kills.
#![allow(clippy::unwrap_used, missing_docs, reason = "a failed setup is a failed test")]

mod apps;
mod browser;
mod collector;
mod composed;
mod cuda;
mod disaggregated;
mod failover;
mod faults;
mod hosts;
mod ingresses;
mod jobs;
mod jobs_elsewhere;
mod lifecycle;
mod logs;
mod page;
mod programs;
mod rig;
mod security;
mod serve;
mod serving;
mod state;
mod traces;
