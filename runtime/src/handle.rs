//! Typed remote handles: ask and tell.
