//! What an actor is to the cluster: its messages, its table, how it is created.
