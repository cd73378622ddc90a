//! `helio`.
fn main() {}
