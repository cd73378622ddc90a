//! One object of a store: where it is and who needs it there.

use std::collections::{BTreeMap, BTreeSet};

use super::core::Client;

/// One object.
#[derive(Debug)]
pub(super) struct Stored {
    /// Who put it; `None` for a copy of an object of another node.
    pub(super) owner: Option<Client>,
    pub(super) bytes: u64,
    pub(super) memory: Option<Memory>,
    pub(super) on_disk: bool,
    /// Who has it mapped, and how often; beside its owner.
    pub(super) readers: BTreeMap<Client, u32>,
    /// Who has opened it and not said that it has no ref any more.
    pub(super) holders: BTreeSet<Client>,
    /// Pieces that are being read for other nodes.
    pub(super) reads: u32,
    pub(super) busy: Busy,
    /// Calls of `Open` that wait until it is in memory.
    pub(super) waiting: Vec<(Client, u64)>,
    pub(super) freed: bool,
    pub(super) used_at: u64,
    /// The request for room that it was asked to make way for in vain.
    pub(super) stays_for: u64,
    /// Its owner has been asked to unmap it for longer than a tick.
    pub(super) overdue: bool,
}

/// Memory of an object.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) capacity: u64,
    /// It is a segment that its owner has mapped and may use again.
    pub(super) with_owner: bool,
}

/// What is being done with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Busy {
    /// Nothing.
    No,
    /// Its owner is asked to unmap it.
    Evicting,
    /// It is written to disk.
    Spilling,
    /// It waits for room.
    Queued,
    /// It is brought into memory.
    Loading,
}

impl Stored {
    pub(super) fn new(owner: Option<Client>, bytes: u64, used_at: u64) -> Self {
        Self {
            owner,
            bytes,
            memory: None,
            on_disk: false,
            readers: BTreeMap::new(),
            holders: BTreeSet::new(),
            reads: 0,
            busy: Busy::No,
            waiting: Vec::new(),
            freed: false,
            used_at,
            stays_for: 0,
            overdue: false,
        }
    }

    /// In memory, and nobody reads it but maybe its owner.
    pub(super) fn is_idle(&self) -> bool {
        self.memory.is_some()
            && self.readers.is_empty()
            && self.reads == 0
            && self.busy == Busy::No
            && !self.freed
    }
}
