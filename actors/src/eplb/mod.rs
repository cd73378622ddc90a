//! The EPLB actor.
