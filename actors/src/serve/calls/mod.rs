//! Calls to the replicas of a deployment of users' actors: which one gets a call, what is tried again, who waits.
//!
//! The ingress and replicas that ask other deployments are callers alike. `balance` decides, `pool` keeps the places of one
//! caller, `call` carries messages; `handle` is what users have, `attend` keeps it in line with what the controller says, and
//! `callers` is what the controller knows of them. `counts` is what metrics tell.

mod attend;
mod balance;
mod call;
pub(super) mod callers;
pub(crate) mod counts;
mod handle;
mod pool;

pub(crate) use self::call::{Begun, begin};
pub use self::call::{CallError, NoPlace};
pub use self::handle::{CallReplies, DeploymentHandle};
pub(crate) use self::pool::{Place, Pool};
