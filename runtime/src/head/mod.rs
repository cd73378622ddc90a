//! The head: registry, placement and supervision.
