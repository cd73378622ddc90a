//! For whom a message is decoded or encoded at this moment.
//!
//! A codec has no room for a context, and a ref that arrives in a message must be counted by the process that decodes it.
//! So the wire says for the duration of one call of the codec whose it is. Nothing is kept across an await, and nothing
//! else asks.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread::LocalKey;

use super::table::Table;
use super::{ObjectId, ObjectRef};

/// Who counts the refs that are decoded, and the object that they are read from, if it is no message.
type Receiver = (Arc<Table>, Option<ObjectId>);

thread_local! {
    static RECEIVER: RefCell<Option<Receiver>> = const { RefCell::new(None) };
    static PUT: RefCell<Option<Vec<ObjectRef>>> = const { RefCell::new(None) };
    static TO_ONE: RefCell<bool> = const { RefCell::new(false) };
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
    during(&RECEIVER, Some(receiver), decode)
}

/// What `encode` writes becomes an object, or arguments: the refs in it, which are not on their way to anybody.
pub(super) fn put<R>(encode: impl FnOnce() -> R) -> (R, Vec<ObjectRef>) {
    during(&PUT, Some(Vec::new()), || (encode(), PUT.take().unwrap_or_default()))
}

/// Notes a ref that is being encoded if it becomes part of those.
pub(super) fn is_put(object: &ObjectRef) -> bool {
    PUT.with_borrow_mut(|refs| refs.as_mut().map(|refs| refs.push(object.clone()))).is_some()
}

/// What `encode` writes is decoded by one process, at most once.
pub(crate) fn sent_to_one<R>(encode: impl FnOnce() -> R) -> R {
    during(&TO_ONE, true, encode)
}

/// Has `cell` be `value` while `work` is done, and what it was before when that returns or panics.
fn during<T: 'static, R>(cell: &'static LocalKey<RefCell<T>>, value: T, work: impl FnOnce() -> R) -> R {
    struct Back<T: 'static>(&'static LocalKey<RefCell<T>>, Option<T>);
    impl<T> Drop for Back<T> {
        fn drop(&mut self) {
            self.1.take().into_iter().for_each(|before| self.0.set(before));
        }
    }
    let _back = Back(cell, Some(cell.replace(value)));
    work()
}

/// Who counts a ref that is being decoded.
pub(super) fn receiver() -> Option<Receiver> {
    RECEIVER.with_borrow(Clone::clone)
}

/// Whether the ref that is being encoded arrives at most once.
pub(super) fn goes_to_one() -> bool {
    TO_ONE.with_borrow(|to_one| *to_one)
}
