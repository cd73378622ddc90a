//! One process's part of the cluster: its listener, its connections and the actors it hosts.
