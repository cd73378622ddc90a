//! The models: one rank's forward pass.
