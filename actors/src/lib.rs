//! The product: DP and EP ranks, EPLB, router and ingress. The only room where runtime and engine meet.

pub mod eplb;
pub mod ingress;
pub mod messages;
pub mod rank;
