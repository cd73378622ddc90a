//! How long the owner of a fabric was blocked in waiting for frames: sums by kind, and every single wait while somebody
//! wants to know.
//!
//! It reads the clock only for calls that had to block, and never decides anything.

use std::time::{Duration, Instant};

use super::frame::{Kind, Tag};

/// Waits that are kept one by one between two looks; what is over is counted in the sums only.
const SINGLE_MAX: usize = 4096;

/// Time spent waiting, by what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// For headers.
    pub header: Duration,
    /// For rows on their way to the experts.
    pub dispatch: Duration,
    /// For rows on their way back.
    pub combine: Duration,
}

/// One wait for one frame.
#[derive(Clone, Copy, Debug)]
pub struct Wait {
    /// The frame.
    pub tag: Tag,
    /// Who sent it.
    pub from: usize,
    /// When the wait began.
    pub began: Instant,
    /// How long it took.
    pub took: Duration,
}

/// All waits since they were last asked for.
#[derive(Debug, Default)]
pub(super) struct Waits {
    sums: Waited,
    single: Option<Vec<Wait>>,
}

impl Waits {
    /// A call waited for `tag` of `from` since `began`.
    pub(super) fn note(&mut self, tag: Tag, from: usize, began: Instant) {
        let took = began.elapsed();
        match tag.kind {
            Kind::Header => self.sums.header += took,
            Kind::Dispatch => self.sums.dispatch += took,
            Kind::Combine => self.sums.combine += took,
        }
        if let Some(single) = self.single.as_mut().filter(|single| single.len() < SINGLE_MAX) {
            single.push(Wait { tag, from, began, took });
        }
    }

    /// Hands out the sums and begins anew.
    pub(super) fn take(&mut self) -> Waited {
        std::mem::take(&mut self.sums)
    }

    /// Keeps single waits from now on, or no more.
    pub(super) fn keep_single(&mut self, keep: bool) {
        if keep != self.single.is_some() {
            self.single = keep.then(Vec::new);
        }
    }

    /// Hands out the single waits.
    pub(super) fn take_single(&mut self) -> Vec<Wait> {
        self.single.as_mut().map(std::mem::take).unwrap_or_default()
    }
}
