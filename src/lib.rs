//! Heliostat: a distributed actor runtime that serves mixture-of-experts models with wide expert parallelism.
