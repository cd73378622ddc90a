//! Expert-parallel load balancing: policies and expert maps.
