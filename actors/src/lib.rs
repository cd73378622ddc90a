//! The product: DP and EP ranks, EPLB, router, ingress, dashboard, jobs, and the controller of what is served. The only room where runtime and engine meet.

pub mod bench;
pub mod dashboard;
pub mod deployment;
pub mod eplb;
#[cfg(test)]
mod format_tests;
pub mod http;
pub mod ingress;
pub mod ingress_actor;
pub mod jobs;
pub mod messages;
pub mod monitor;
pub mod rank;
pub mod serve;
pub mod state;
pub mod telemetry;

use heliostat_runtime::actor::ActorTypes;

/// Every actor type that a worker of this binary can create.
pub fn actor_types() -> ActorTypes {
    ActorTypes::new()
        .with::<rank::Rank>()
        .with::<eplb::Eplb>()
        .with::<ingress_actor::IngressActor>()
        .with::<jobs::JobsActor>()
        .with::<jobs::runner::JobRunner>()
        .with::<serve::ServeController>()
}
