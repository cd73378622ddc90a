//! A weight matrix as it lies in memory.
