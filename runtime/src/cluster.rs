//! A client's view of the cluster.

pub mod status;
