//! Model shape, read from a checkpoint's config.json.
