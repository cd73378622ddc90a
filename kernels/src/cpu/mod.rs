//! CPU operations: each a plain version, its spec, and a fast one.
