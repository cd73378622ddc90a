//! For whom a message is decoded or encoded at this moment.
//!
//! A codec has no room for a context, and a ref that arrives in a message must be counted by the process that decodes it.
//! So the wire says for the duration of one call of the codec whose it is. Nothing is kept across an await, and nothing
//! else asks.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use super::table::Table;

thread_local! {
    static RECEIVER: RefCell<Option<Arc<Table>>> = const { RefCell::new(None) };
    static TO_ONE: Cell<bool> = const { Cell::new(false) };
}

/// Refs that `decode` makes are counted in `table`.
pub(crate) fn received<R>(table: &Arc<Table>, decode: impl FnOnce() -> R) -> R {
    struct Back(Option<Arc<Table>>);
    impl Drop for Back {
        fn drop(&mut self) {
            RECEIVER.set(self.0.take());
        }
    }
    let _back = Back(RECEIVER.replace(Some(table.clone())));
    decode()
}

/// What `encode` writes is decoded by one process, at most once.
pub(crate) fn sent_to_one<R>(encode: impl FnOnce() -> R) -> R {
    struct Back(bool);
    impl Drop for Back {
        fn drop(&mut self) {
            TO_ONE.set(self.0);
        }
    }
    let _back = Back(TO_ONE.replace(true));
    encode()
}

/// Who counts a ref that is being decoded.
pub(super) fn receiver() -> Option<Arc<Table>> {
    RECEIVER.with_borrow(Clone::clone)
}

/// Whether the ref that is being encoded arrives at most once.
pub(super) fn goes_to_one() -> bool {
    TO_ONE.get()
}
