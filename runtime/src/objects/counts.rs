//! Who has refs to which objects: the counts of one process, of objects that it owns and of those that it borrows.
//!
//! Pure: events and the time in, commands out. The owner of an object is the process that put it. It keeps the object for
//! as long as it has refs itself, a process that borrows it has some, or one is on its way in a message.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{ObjectAddr, ObjectId};
use crate::handle::ProcessId;

/// How long whoever sends a ref keeps the object for its receiver, unless that one says sooner that it has it.
pub(super) const TRANSIT_MAX: Duration = Duration::from_secs(60);

/// What a borrower tells an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// It has refs.
    Borrow,
    /// It has none any more.
    Return,
}

/// What has to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Tell the owner; `Counts::told` hears how that went. At most one word per object is under way.
    Tell(ObjectAddr, Word),
    /// Tell the sender of a ref that it has arrived and is counted.
    Arrived(ObjectId, Ticket),
    /// Nobody has a ref to an object of this process any more.
    Free(ObjectAddr),
    /// This process has no ref any more to an object of another one.
    Forget(ObjectId),
}

/// One sending of a ref: where its sender listens, and the number that it has there.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub(super) struct Ticket {
    pub(super) sender: String,
    pub(super) number: u64,
}

/// How telling an owner went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// It has heard.
    Heard,
    /// It has no such object any more.
    Gone,
}

/// The counts.
#[derive(Debug)]
pub(super) struct Counts {
    me: ProcessId,
    objects: BTreeMap<ObjectId, Count>,
    /// Sendings by the time at which they are given up.
    sendings: BTreeSet<(Duration, u64, ObjectId)>,
    next_sending: u64,
    commands: Vec<Command>,
}

#[derive(Debug)]
struct Count {
    addr: ObjectAddr,
    /// Refs of this process.
    here: u64,
    /// Sendings that have not arrived, and when each is given up.
    sent: BTreeMap<u64, Duration>,
    /// Objects to which it has refs in its bytes.
    within: Vec<ObjectId>,
    role: Role,
}

#[derive(Debug)]
enum Role {
    /// It is of this process; those who borrow it, and the store of each.
    Owner(BTreeMap<ProcessId, Option<String>>),
    Borrower {
        state: Borrowing,
        /// Refs that came in and whose senders have not heard so.
        arrived: Vec<Ticket>,
        /// Objects in which refs were read, each with a ref of its own: they keep this one until its owner counts the reader.
        read_in: Vec<ObjectId>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Borrowing {
    /// The owner does not know of this process.
    Unknown,
    /// A word is under way.
    Telling(Word),
    /// The owner counts this process.
    Counted,
    /// The owner has it no more, or is no more.
    Lost,
}

impl Counts {
    pub(super) fn new(me: ProcessId) -> Self {
        Self {
            me,
            objects: BTreeMap::new(),
            sendings: BTreeSet::new(),
            next_sending: 1,
            commands: Vec::new(),
        }
    }

    /// What has to be done since the last call.
    pub(super) fn take_commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    /// An object was put, with refs to others in it; its first ref is there.
    pub(super) fn created(&mut self, addr: ObjectAddr, within: Vec<ObjectId>) {
        let id = addr.id;
        let role = Role::Owner(BTreeMap::new());
        for inner in &within {
            if let Some(count) = self.objects.get_mut(inner) {
                count.here += 1;
            }
        }
        let earlier = self.objects.insert(id, Count { addr, here: 1, sent: BTreeMap::new(), within, role });
        assert!(earlier.is_none(), "numbers of objects are not used twice");
    }

    /// A ref came in by a message, or was read within an object that this process has a ref to. False if it is of this
    /// process and there is no such object any more.
    pub(super) fn arrived(
        &mut self,
        addr: &ObjectAddr,
        ticket: Option<Ticket>,
        within: Option<ObjectId>,
    ) -> bool {
        let id = addr.id;
        // An object that is gone already keeps nothing.
        let within = within.filter(|outer| id.owner != self.me && self.objects.contains_key(outer));
        let count = match self.objects.entry(id) {
            Entry::Occupied(count) => count.into_mut(),
            Entry::Vacant(_) if id.owner == self.me => return false,
            Entry::Vacant(vacant) => vacant.insert(Count {
                addr: addr.clone(),
                here: 0,
                sent: BTreeMap::new(),
                within: Vec::new(),
                role: Role::Borrower { state: Borrowing::Unknown, arrived: Vec::new(), read_in: Vec::new() },
            }),
        };
        count.here += 1;
        match &mut count.role {
            Role::Owner(_) => self.commands.extend(ticket.map(|ticket| Command::Arrived(id, ticket))),
            Role::Borrower { arrived, read_in, .. } => {
                arrived.extend(ticket);
                read_in.extend(within);
            }
        }
        if let Some(outer) = within.and_then(|outer| self.objects.get_mut(&outer)) {
            outer.here += 1;
        }
        self.settle(id);
        true
    }

    /// One more ref of this process to an object of its own, if it is there.
    pub(super) fn another(&mut self, id: ObjectId) -> Option<ObjectAddr> {
        let count = self.objects.get_mut(&id).filter(|count| matches!(count.role, Role::Owner(_)))?;
        count.here += 1;
        Some(count.addr.clone())
    }

    /// A ref of this process is gone.
    pub(super) fn dropped(&mut self, id: ObjectId) {
        if let Some(count) = self.objects.get_mut(&id) {
            count.here = count.here.saturating_sub(1);
            self.settle(id);
        }
    }

    /// A ref is being sent; the number of the sending.
    pub(super) fn sent(&mut self, id: ObjectId, now: Duration) -> Option<u64> {
        let count = self.objects.get_mut(&id)?;
        let (number, until) = (self.next_sending, now + TRANSIT_MAX);
        self.next_sending += 1;
        count.sent.insert(number, until);
        self.sendings.insert((until, number, id));
        Some(number)
    }

    /// A ref that was sent is counted by its receiver.
    pub(super) fn passed(&mut self, id: ObjectId, number: u64) {
        if let Some(count) = self.objects.get_mut(&id)
            && let Some(until) = count.sent.remove(&number)
        {
            self.sendings.remove(&(until, number, id));
            self.settle(id);
        }
    }

    /// Gives up on refs that have been on their way for too long.
    pub(super) fn expire(&mut self, now: Duration) {
        while let Some(&(until, number, id)) = self.sendings.first()
            && until <= now
        {
            self.passed(id, number);
        }
    }

    /// When to call `expire`.
    pub(super) fn next_expiry(&self) -> Option<Duration> {
        self.sendings.first().map(|(until, ..)| *until)
    }

    /// A process borrows an object of this one.
    pub(super) fn borrow(&mut self, id: ObjectId, by: ProcessId, store: Option<String>) -> Told {
        match self.objects.get_mut(&id).map(|count| &mut count.role) {
            Some(Role::Owner(borrowers)) => {
                borrowers.insert(by, store);
                Told::Heard
            }
            Some(Role::Borrower { .. }) | None => Told::Gone,
        }
    }

    /// A process has no ref any more to an object of this one.
    pub(super) fn returned(&mut self, id: ObjectId, by: ProcessId) {
        if let Some(Role::Owner(borrowers)) = self.objects.get_mut(&id).map(|count| &mut count.role) {
            borrowers.remove(&by);
            self.settle(id);
        }
    }

    /// An owner was told.
    pub(super) fn told(&mut self, id: ObjectId, how: Told) {
        let Some(Role::Borrower { state, .. }) = self.objects.get_mut(&id).map(|count| &mut count.role)
        else {
            return;
        };
        *state = match (*state, how) {
            (Borrowing::Telling(Word::Borrow), Told::Heard) => Borrowing::Counted,
            (Borrowing::Telling(Word::Return), Told::Heard) => Borrowing::Unknown,
            (Borrowing::Telling(_), Told::Gone) => Borrowing::Lost,
            (other, _) => other,
        };
        self.settle(id);
    }

    /// An owner that was out of reach is there, and may have taken this process for gone: it is told all anew.
    pub(super) fn back(&mut self, owner: ProcessId) {
        for id in self.ids_of(owner) {
            if let Some(Role::Borrower { state, .. }) = self.objects.get_mut(&id).map(|count| &mut count.role)
                && *state != Borrowing::Lost
            {
                *state = Borrowing::Unknown;
                self.settle(id);
            }
        }
    }

    /// A process has ended: as a borrower it has no refs any more, as an owner no objects.
    pub(super) fn ended(&mut self, process: ProcessId) {
        for id in self.ids_of(process) {
            if let Some(Role::Borrower { state, .. }) = self.objects.get_mut(&id).map(|count| &mut count.role)
            {
                *state = Borrowing::Lost;
                self.settle(id);
            }
        }
        for id in self.ids_of(self.me) {
            self.returned(id, process);
        }
    }

    /// Where to ask whether that process lives, if it matters here: its own endpoint is not known of a borrower.
    pub(super) fn matters(&self, process: ProcessId) -> Option<Whereabouts> {
        let lost =
            |id: &ObjectId| matches!(self.objects[id].role, Role::Borrower { state: Borrowing::Lost, .. });
        let ids = self.ids_of(process);
        if let Some(addr) = ids.iter().find(|id| !lost(id)).map(|id| &self.objects[id].addr) {
            return Some(Whereabouts { store: addr.store.clone(), endpoint: Some(addr.owner.clone()) });
        }
        self.ids_of(self.me).iter().find_map(|id| match &self.objects[id].role {
            Role::Owner(borrowers) => {
                let store = borrowers.get(&process)?.clone();
                Some(Whereabouts { store, endpoint: None })
            }
            Role::Borrower { .. } => None,
        })
    }

    /// All other processes that matter here.
    pub(super) fn others(&self) -> BTreeSet<ProcessId> {
        let borrowers = self.objects.values().flat_map(|count| match &count.role {
            Role::Owner(borrowers) => borrowers.keys().copied().collect(),
            Role::Borrower { .. } => vec![count.addr.id.owner],
        });
        borrowers.collect()
    }

    /// How many objects there are here, owned and borrowed.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.objects.len()
    }

    fn ids_of(&self, owner: ProcessId) -> Vec<ObjectId> {
        let (first, last) = (ObjectId { owner, number: 0 }, ObjectId { owner, number: u64::MAX });
        self.objects.range(first..=last).map(|(id, _)| *id).collect()
    }

    /// Brings what others know in line with what is here.
    fn settle(&mut self, id: ObjectId) {
        let Some(count) = self.objects.get_mut(&id) else { return };
        let wanted = count.here > 0 || !count.sent.is_empty();
        let (state, arrived, read_in) = match &mut count.role {
            Role::Owner(borrowers) => {
                if !wanted && borrowers.is_empty() {
                    let command = Command::Free(count.addr.clone());
                    let within = std::mem::take(&mut count.within);
                    self.objects.remove(&id);
                    self.commands.push(command);
                    within.into_iter().for_each(|inner| self.dropped(inner));
                }
                return;
            }
            Role::Borrower { state, arrived, read_in } => (state, arrived, read_in),
        };
        let mut kept_by = Vec::new();
        match (*state, wanted) {
            (Borrowing::Telling(_), _) => {}
            (Borrowing::Unknown, true) => {
                *state = Borrowing::Telling(Word::Borrow);
                self.commands.push(Command::Tell(count.addr.clone(), Word::Borrow));
            }
            (Borrowing::Counted, false) => {
                *state = Borrowing::Telling(Word::Return);
                self.commands.push(Command::Tell(count.addr.clone(), Word::Return));
            }
            (Borrowing::Counted | Borrowing::Lost, true) => {
                self.commands.extend(arrived.drain(..).map(|ticket| Command::Arrived(id, ticket)));
                kept_by.append(read_in);
            }
            (Borrowing::Unknown | Borrowing::Lost, false) => {
                self.commands.extend(arrived.drain(..).map(|ticket| Command::Arrived(id, ticket)));
                kept_by.append(read_in);
                self.commands.push(Command::Forget(id));
                self.objects.remove(&id);
            }
        }
        kept_by.into_iter().for_each(|outer| self.dropped(outer));
    }
}

/// Where to ask for the fate of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Whereabouts {
    /// The store of its node.
    pub(super) store: Option<String>,
    /// Where it listens itself.
    pub(super) endpoint: Option<String>,
}
