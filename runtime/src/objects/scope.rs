//! For whom a message is decoded or encoded at this moment.
//!
//! A codec has no room for a context, and a ref that arrives in a message must be counted by the process that decodes it.
//! So the wire says for the duration of one call of the codec whose it is. Nothing is kept across an await, and nothing
//! else asks.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use super::ObjectId;
use super::table::Table;

/// Who counts the refs that are decoded, and the object that they are read from, if it is no message.
type Receiver = (Arc<Table>, Option<ObjectId>);

thread_local! {
    static RECEIVER: RefCell<Option<Receiver>> = const { RefCell::new(None) };
    static PUT: RefCell<Option<Vec<ObjectId>>> = const { RefCell::new(None) };
    static TO_ONE: Cell<bool> = const { Cell::new(false) };
}

/// Refs that `decode` makes are counted in `table`.
pub(crate) fn received<R>(table: &Arc<Table>, decode: impl FnOnce() -> R) -> R {
    receiving((table.clone(), None), decode)
}

/// The same of refs in the bytes of an object.
pub(super) fn read_from<R>(table: &Arc<Table>, outer: ObjectId, decode: impl FnOnce() -> R) -> R {
    receiving((table.clone(), Some(outer)), decode)
}

fn receiving<R>(receiver: Receiver, decode: impl FnOnce() -> R) -> R {
    struct Back(Option<Receiver>);
    impl Drop for Back {
        fn drop(&mut self) {
            RECEIVER.set(self.0.take());
        }
    }
    let _back = Back(RECEIVER.replace(Some(receiver)));
    decode()
}

/// What `encode` writes becomes an object: the refs in it, which are not on their way to anybody.
pub(super) fn put<R>(encode: impl FnOnce() -> R) -> (R, Vec<ObjectId>) {
    struct Back(Option<Vec<ObjectId>>);
    impl Drop for Back {
        fn drop(&mut self) {
            PUT.set(self.0.take());
        }
    }
    let _back = Back(PUT.replace(Some(Vec::new())));
    let encoded = encode();
    (encoded, PUT.take().unwrap_or_default())
}

/// Notes a ref that is being encoded if it becomes part of an object.
pub(super) fn is_put(id: ObjectId) -> bool {
    PUT.with_borrow_mut(|refs| refs.as_mut().map(|refs| refs.push(id))).is_some()
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
pub(super) fn receiver() -> Option<Receiver> {
    RECEIVER.with_borrow(Clone::clone)
}

/// Whether the ref that is being encoded arrives at most once.
pub(super) fn goes_to_one() -> bool {
    TO_ONE.get()
}
