//! Buffers that outlive a call, so that no operation pays for fresh pages.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use super::simd::Line;

/// Buffers not in use. At most as many as were ever in use at once.
#[derive(Debug, Default)]
pub(super) struct Scratch(Mutex<Vec<Vec<Line>>>);

/// A buffer, given back when dropped. Its content is whatever the last user left.
pub(super) struct Lines<'a> {
    pool: &'a Scratch,
    lines: Vec<Line>,
    len: usize,
}

impl Scratch {
    /// A buffer of `len` lines.
    pub(super) fn lines(&self, len: usize) -> Lines<'_> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        if lines.len() < len {
            lines.resize(len, Line::ZERO);
        }
        Lines { pool: self, lines, len }
    }
}

impl Deref for Lines<'_> {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        &self.lines[..self.len]
    }
}

impl DerefMut for Lines<'_> {
    fn deref_mut(&mut self) -> &mut [Line] {
        &mut self.lines[..self.len]
    }
}

impl Drop for Lines<'_> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).push(lines);
    }
}
