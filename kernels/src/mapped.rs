//! Read-only memory-mapped files.
