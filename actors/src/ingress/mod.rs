//! The OpenAI-compatible HTTP ingress and its router.
