//! What processes and stores say to each other of objects: over the wire, and over the socket of a node.

use bincode::{Decode, Encode};
use serde::Serialize;

use super::args::Life;
use super::{ObjectAddr, ObjectError, ObjectId};
use crate::actor::wire;
use crate::handle::ProcessId;

/// Counts the sender as a borrower. Answered by whether the object is there.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct BorrowObject {
    pub(super) object: ObjectId,
    pub(super) by: ProcessId,
    /// The store of its node.
    pub(super) store: Option<String>,
}

/// The sender borrows the object no more.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct ReturnObject {
    pub(super) object: ObjectId,
    pub(super) by: ProcessId,
}

/// A ref that was sent has arrived.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct RefArrived {
    pub(super) object: ObjectId,
    pub(super) number: u64,
}

/// Has the owner keep objects that are in the arguments of an actor for as long as it may be started with them.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct KeepForActor {
    pub(super) life: Life,
    pub(super) objects: Vec<ObjectId>,
}

/// Reads a piece of an object, from its owner or from a store.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct ReadObject {
    pub(super) object: ObjectId,
    pub(super) offset: u64,
    pub(super) max: u32,
}

/// Asks a store whether a process of its node lives.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct FateOf {
    pub(super) process: ProcessId,
}

/// What a store knows of a process of its node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum Fate {
    /// It is connected.
    Lives,
    /// It has ended.
    Ended(String),
    /// The store does not know it: it was started after the process ended, or just before.
    Unknown,
}

/// Asks a store for its objects.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct ListObjects;

/// Asks a store for its socket.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct FindStore;

/// Where the bytes of an object are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectPlace {
    /// In the shared memory of its owner's node.
    Memory,
    /// In the shared memory of another node, as a copy.
    Copy,
    /// On the disk of its owner's node.
    Disk,
    /// It was freed, and somebody still reads it.
    Freed,
}

/// An object in the store of a node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct ObjectStatus {
    /// `owner-number`, as in the error messages.
    pub object: String,
    /// Name of the node.
    pub node: String,
    /// Where it is on that node.
    pub state: ObjectPlace,
    /// Its size.
    pub bytes: u64,
    /// Process id of its owner; `None` for a copy of an object of another node.
    pub owner_pid: Option<u32>,
    /// Process ids of those that have it mapped.
    pub readers: Vec<u32>,
}

/// The store of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct StoreStatus {
    /// What it may hold in memory.
    pub capacity: u64,
    /// What it holds, with memory that processes keep for their next objects.
    pub used: u64,
    /// What lies on disk.
    pub spilled: u64,
    /// Its objects.
    pub objects: Vec<ObjectStatus>,
}

wire! {
    // To the owner of an object, or the sender of a ref.
    BorrowObject = "object.borrow" -> bool;
    ReturnObject = "object.return" -> ();
    RefArrived = "object.arrived" -> ();
    KeepForActor = "object.keep" -> ();
    // To an owner or a store.
    ReadObject = "object.read" -> Result<Vec<u8>, ObjectError>;
    // To a store.
    FateOf = "object.fate" -> Fate;
    ListObjects = "object.list" -> StoreStatus;
    FindStore = "object.find_store" -> String;
}

/// What a process says to the store of its node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum ToStore {
    /// The first word.
    Hello { process: ProcessId },
    /// Asks for memory to put objects into.
    Reserve { call: u64, bytes: u64 },
    /// Gives memory back that it had reserved.
    Unreserve { bytes: u64 },
    /// A segment with an object in it, whose descriptor comes along. Of its reserved memory it takes `capacity`.
    Publish { call: u64, object: ObjectId, bytes: u64, capacity: u64 },
    /// An object that an earlier store wrote to disk.
    Spilled { object: ObjectId, bytes: u64 },
    /// Nobody has a ref to an object of the sender any more.
    Free { object: ObjectId },
    /// Asks for the descriptor of an object, wherever it is.
    Open { call: u64, object: ObjectAddr },
    /// It has the object mapped no more.
    Close { object: ObjectId },
    /// It has no ref any more to an object of another process.
    Forget { object: ObjectId },
    /// It has given back what it can, as it was asked.
    Trimmed,
    /// It has unmapped its segment with the object, as it was asked, or still reads it itself.
    Evicted { object: ObjectId, done: bool },
}

/// What the store of a node says to a process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum ToProcess {
    /// The answer to `Hello`: where the node's agent listens.
    Welcome { endpoint: String },
    /// The answer to `Reserve` and `Publish`.
    Done { call: u64, result: Result<(), ObjectError> },
    /// The answer to `Open`; the descriptor comes along.
    Opened { call: u64, result: Result<(), ObjectError> },
    /// The segment of an object that was freed is read by nobody; it is reserved memory again.
    Recycled { object: ObjectId },
    /// Memory is short: give back what is reserved and not in use.
    Trim,
    /// Memory is short: unmap this object if it is not read.
    Evict { object: ObjectId },
    /// The answer to `Reserve` where the store has such memory ready; its descriptor comes along.
    Ready { call: u64 },
}
