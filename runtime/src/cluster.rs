//! A client's view of the cluster.
