//! Several ingresses: one on each node, each a whole door to all replicas.
