//! An output that several threads fill, each its own elements.

use std::marker::PhantomData;

/// A mutable slice shared by the jobs of one operation.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    start: *mut f32,
    len: usize,
    slice: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`, which may move to other threads; `write` leaves it to its callers that no
// two of them write the same element.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub(super) fn new(slice: &'a mut [f32]) -> Output<'a> {
        Output { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Copies `values` to `at`.
    ///
    /// # Panics
    /// If they do not fit.
    ///
    /// # Safety
    /// Nobody else writes or reads these elements at the same time.
    #[inline(always)]
    pub(super) unsafe fn write(self, at: usize, values: &[f32]) {
        assert!(at <= self.len && values.len() <= self.len - at, "output: {at} of {}", self.len);
        // SAFETY: the range lies within the slice, as just asserted, and the caller has it for itself.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(at), values.len()) }
    }
}
