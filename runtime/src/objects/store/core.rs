//! What a store holds for whom, and how it makes room: requests in, commands out.
//!
//! Pure: it knows sizes, readers and places, and neither memory nor files. Room is made in this order: copies and what is
//! on disk as well, memory that processes keep for their next objects, and then objects go to disk that nobody reads.

mod room;

use std::collections::{BTreeMap, VecDeque};

use super::super::messages::{Fate, ObjectPlace};
use super::super::{ObjectAddr, ObjectError, ObjectId};
use super::stored::{Busy, Memory, Stored};
use crate::handle::ProcessId;

/// Requests that wait for room.
const WAITING_MAX: usize = 1024;
/// Processes that ended and are remembered.
const ENDED_MAX: usize = 4096;

/// A connected process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Client(pub(super) u64);

/// What has to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Answer `Reserve` or `Publish`.
    Done(Client, u64, Result<(), ObjectError>),
    /// Answer `Open`, with the memory of the object.
    Opened(Client, u64, ObjectId, Result<(), ObjectError>),
    /// Tell the owner that it may use the segment again.
    Recycled(Client, ObjectId),
    /// Ask a process for the memory that it has reserved and does not use.
    Trim(Client),
    /// Ask the owner to unmap an object.
    Evict(Client, ObjectId),
    /// Write an object to disk; `spilled` hears how that went.
    Spill(ObjectId),
    /// Bring an object into memory: from disk, or from where the address says. `loaded` hears how that went.
    Load(ObjectId, Option<ObjectAddr>),
    /// Close the memory of an object.
    Close(ObjectId),
    /// Remove an object from disk.
    Unlink(ObjectId),
    /// Get memory of that size ready; `made` hears how that went.
    Make(u64),
    /// Answer `Reserve` with memory of that size that is ready.
    Ready(Client, u64, u64),
    /// Let go of memory of that size that is ready.
    Unready(u64),
}

/// Where a piece of an object is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadFrom {
    Memory,
    Disk,
}

/// The store.
#[derive(Debug)]
pub(super) struct StoreCore {
    limits: Limits,
    /// Reserved, held by objects, or about to be.
    used: u64,
    spilled: u64,
    clients: BTreeMap<Client, Connected>,
    objects: BTreeMap<ObjectId, Stored>,
    /// Who waits for room, first come, first served.
    queue: VecDeque<Waiting>,
    next_waiting: u64,
    /// Counts uses, so that what was used longest ago goes first.
    uses: u64,
    /// Why the disk took no object the last time.
    disk_error: Option<String>,
    ended: VecDeque<ProcessId>,
    /// Whether the processes of the node have had time to say what they have.
    settled: bool,
    /// Sizes of memory that is ready, or is being made so: cleared pages, for the first objects of processes.
    ready: Vec<u64>,
    making: Vec<u64>,
    commands: Vec<Command>,
}

/// Bounds of a store.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    pub(super) memory_bytes_max: u64,
    pub(super) disk_bytes_max: u64,
    /// Each has a descriptor.
    pub(super) objects_max: usize,
    /// Sizes of which one is kept ready each, while the store is not half full.
    pub(super) ready: Vec<u64>,
}

#[derive(Debug)]
struct Connected {
    process: ProcessId,
    reserved: u64,
    trimming: bool,
    /// It has been asked to give memory back for longer than a tick.
    overdue: bool,
    /// The request for which it was last asked to give memory back.
    asked_for: u64,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    bytes: u64,
    what: Wanted,
}

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Reserve(Client, u64),
    Load(ObjectId, Option<ObjectAddr>),
}

impl StoreCore {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            used: 0,
            spilled: 0,
            clients: BTreeMap::new(),
            objects: BTreeMap::new(),
            queue: VecDeque::new(),
            next_waiting: 1,
            uses: 0,
            disk_error: None,
            ended: VecDeque::new(),
            settled: false,
            ready: Vec::new(),
            making: Vec::new(),
            commands: Vec::new(),
        }
    }

    /// What has to be done since the last call.
    pub(super) fn take_commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    pub(super) fn connected(&mut self, client: Client, process: ProcessId) {
        let connected = Connected { process, reserved: 0, trimming: false, overdue: false, asked_for: 0 };
        self.clients.insert(client, connected);
        self.ended.retain(|ended| *ended != process);
    }

    /// The process of a client has ended.
    pub(super) fn closed(&mut self, client: Client) {
        let Some(gone) = self.clients.remove(&client) else { return };
        self.used -= gone.reserved;
        if self.ended.len() == ENDED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(gone.process);
        self.queue.retain(|waiting| !matches!(waiting.what, Wanted::Reserve(of, _) if of == client));
        let ids: Vec<ObjectId> = self.objects.keys().copied().collect();
        for id in ids {
            let object = self.objects.get_mut(&id).expect("nothing was removed but what was looked at");
            object.readers.remove(&client);
            object.holders.remove(&client);
            object.waiting.retain(|(of, _)| *of != client);
            if object.owner == Some(client) {
                object.freed = true;
                if let Some(memory) = &mut object.memory {
                    memory.with_owner = false;
                }
                if object.busy == Busy::Evicting {
                    object.busy = Busy::No;
                }
            }
            self.settle(id);
        }
        self.pump();
    }

    /// A process asks for memory.
    pub(super) fn reserve(&mut self, client: Client, call: u64, bytes: u64) {
        let capacity = self.limits.memory_bytes_max;
        let refusal = match () {
            () if bytes > capacity => Some(ObjectError::TooLarge { asked: bytes, capacity }),
            () if self.queue.len() >= WAITING_MAX => Some(ObjectError::Busy(WAITING_MAX)),
            () => None,
        };
        if let Some(error) = refusal {
            return self.commands.push(Command::Done(client, call, Err(error)));
        }
        // Who waits for room goes first.
        if self.queue.is_empty()
            && let Some(at) = self.ready.iter().position(|size| *size == bytes)
            && let Some(connected) = self.clients.get_mut(&client)
        {
            self.ready.swap_remove(at);
            connected.reserved += bytes;
            self.commands.push(Command::Ready(client, call, bytes));
            return self.restock();
        }
        self.enqueue(bytes, Wanted::Reserve(client, call));
    }

    /// Has memory made ready that is to be and is not. Where the store fills up there is none: it would be the first to go.
    pub(super) fn restock(&mut self) {
        for size in self.limits.ready.clone() {
            let there = self.ready.iter().chain(&self.making).filter(|there| **there == size).count();
            let wanted = self.limits.ready.iter().filter(|wanted| **wanted == size).count();
            if there < wanted && self.queue.is_empty() && self.used + size <= self.limits.memory_bytes_max / 2
            {
                self.used += size;
                self.making.push(size);
                self.commands.push(Command::Make(size));
            }
        }
    }

    /// Memory is ready, or the machine has none: then it is not tried again.
    pub(super) fn made(&mut self, size: u64, ok: bool) {
        let Some(at) = self.making.iter().position(|making| *making == size) else { return };
        self.making.swap_remove(at);
        match ok {
            true => self.ready.push(size),
            false => {
                self.used -= size;
                self.limits.ready.retain(|wanted| *wanted != size);
            }
        }
        self.pump();
    }

    /// A process gives memory back.
    pub(super) fn unreserve(&mut self, client: Client, bytes: u64) {
        if let Some(connected) = self.clients.get_mut(&client) {
            let bytes = bytes.min(connected.reserved);
            connected.reserved -= bytes;
            self.used -= bytes;
            self.pump();
        }
    }

    /// A process has given back what it can.
    pub(super) fn trimmed(&mut self, client: Client) {
        if let Some(connected) = self.clients.get_mut(&client) {
            connected.trimming = false;
            self.pump();
        }
    }

    /// Now and then: goes on without processes that do not answer, because they are frozen, say.
    pub(super) fn tick(&mut self) {
        let number = self.queue.front().map_or(0, |waiting| waiting.number);
        for connected in self.clients.values_mut() {
            connected.trimming &= !connected.overdue;
            connected.overdue = connected.trimming;
        }
        for object in self.objects.values_mut() {
            if object.busy == Busy::Evicting && std::mem::replace(&mut object.overdue, true) {
                object.busy = Busy::No;
                object.stays_for = number;
            }
        }
        self.pump();
        self.restock();
    }

    /// An object of `bytes` in a segment of `capacity`. A process that comes back to a new store has reserved nothing
    /// there: what it has counts all the same.
    pub(super) fn publish(
        &mut self,
        client: Client,
        id: ObjectId,
        bytes: u64,
        capacity: u64,
    ) -> Result<(), ObjectError> {
        let Some(connected) = self.clients.get_mut(&client) else { return Ok(()) };
        // It came back, and then repeated what was not answered.
        if self.objects.contains_key(&id) {
            return Ok(());
        }
        let reserved = capacity.min(connected.reserved);
        connected.reserved -= reserved;
        self.used -= reserved;
        if self.objects.len() >= self.limits.objects_max {
            let why =
                format!("the store has {} objects, and no descriptor for another", self.limits.objects_max);
            return Err(ObjectError::Io(why));
        }
        self.used += capacity;
        self.uses += 1;
        let memory = Some(Memory { capacity, with_owner: true });
        self.objects.insert(id, Stored { memory, ..Stored::new(Some(client), bytes, self.uses) });
        Ok(())
    }

    /// An object that an earlier store left on disk.
    pub(super) fn found(&mut self, client: Client, id: ObjectId, bytes: u64) {
        self.uses += 1;
        self.spilled += bytes;
        self.objects.insert(id, Stored { on_disk: true, ..Stored::new(Some(client), bytes, self.uses) });
    }

    /// Nobody has a ref to an object any more.
    pub(super) fn free(&mut self, client: Client, id: ObjectId) {
        if let Some(object) = self.objects.get_mut(&id).filter(|object| object.owner == Some(client)) {
            object.freed = true;
            self.settle(id);
            self.pump();
        }
    }

    /// A process wants to map an object.
    pub(super) fn open(&mut self, client: Client, call: u64, addr: ObjectAddr, here: &str) {
        let id = addr.id;
        self.uses += 1;
        let object = match self.objects.get_mut(&id) {
            Some(object) => object,
            None if addr.store.as_deref() == Some(here) => {
                let error = self.missing(id);
                return self.commands.push(Command::Opened(client, call, id, Err(error)));
            }
            None => {
                let refusal = match () {
                    () if addr.bytes > self.limits.memory_bytes_max => Some(ObjectError::TooLarge {
                        asked: addr.bytes,
                        capacity: self.limits.memory_bytes_max,
                    }),
                    () if self.objects.len() >= self.limits.objects_max
                        || self.queue.len() >= WAITING_MAX =>
                    {
                        Some(ObjectError::Busy(self.objects.len()))
                    }
                    () => None,
                };
                if let Some(error) = refusal {
                    return self.commands.push(Command::Opened(client, call, id, Err(error)));
                }
                self.objects.entry(id).or_insert(Stored::new(None, addr.bytes, self.uses))
            }
        };
        object.used_at = self.uses;
        if object.freed {
            return self.commands.push(Command::Opened(
                client,
                call,
                id,
                Err(ObjectError::Freed { object: id }),
            ));
        }
        object.holders.insert(client);
        if object.memory.is_some() {
            *object.readers.entry(client).or_default() += 1;
            return self.commands.push(Command::Opened(client, call, id, Ok(())));
        }
        object.waiting.push((client, call));
        if object.busy == Busy::No {
            object.busy = Busy::Queued;
            let (bytes, from) = (object.bytes, object.owner.is_none().then_some(addr));
            self.enqueue(bytes, Wanted::Load(id, from));
        }
    }

    /// A process has an object mapped no more, once.
    pub(super) fn close(&mut self, client: Client, id: ObjectId) {
        if let Some(object) = self.objects.get_mut(&id)
            && let Some(times) = object.readers.get_mut(&client)
        {
            *times -= 1;
            if *times == 0 {
                object.readers.remove(&client);
            }
            self.settle(id);
            self.pump();
        }
    }

    /// A process has no ref any more to an object of another one.
    pub(super) fn forget(&mut self, client: Client, id: ObjectId) {
        if let Some(object) = self.objects.get_mut(&id) {
            object.holders.remove(&client);
            self.settle(id);
            self.pump();
        }
    }

    /// The owner has unmapped an object, or still reads it.
    pub(super) fn evicted(&mut self, client: Client, id: ObjectId, done: bool) {
        let number = self.queue.front().map_or(0, |waiting| waiting.number);
        let Some(object) = self.objects.get_mut(&id) else { return };
        if object.owner != Some(client) {
            return;
        }
        if let Some(memory) = object.memory.as_mut().filter(|_| done) {
            memory.with_owner = false;
        }
        // A late answer changes no more than that.
        if object.busy == Busy::Evicting {
            object.busy = Busy::No;
            match done && !object.freed {
                true => {
                    object.busy = Busy::Spilling;
                    self.commands.push(Command::Spill(id));
                }
                false => object.stays_for = number,
            }
        }
        self.settle(id);
        self.pump();
    }

    /// An object was written to disk, or the disk took no more.
    pub(super) fn spilled(&mut self, id: ObjectId, result: Result<(), String>) {
        let number = self.queue.front().map_or(0, |waiting| waiting.number);
        let Some(object) = self.objects.get_mut(&id) else { return };
        object.busy = Busy::No;
        match result {
            Ok(()) => {
                object.on_disk = true;
                self.spilled += object.bytes;
                self.disk_error = None;
            }
            Err(why) => {
                object.stays_for = number;
                self.disk_error = Some(why);
            }
        }
        self.settle(id);
        self.pump();
    }

    /// An object was brought into memory, or could not be.
    pub(super) fn loaded(&mut self, id: ObjectId, result: Result<(), ObjectError>) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        object.busy = Busy::No;
        match &result {
            Ok(()) => object.memory = Some(Memory { capacity: object.bytes, with_owner: false }),
            Err(_) => self.used -= object.bytes,
        }
        for (client, call) in std::mem::take(&mut object.waiting) {
            if result.is_ok() {
                *object.readers.entry(client).or_default() += 1;
            }
            self.commands.push(Command::Opened(client, call, id, result.clone()));
        }
        if result.is_err() && object.owner.is_none() {
            self.objects.remove(&id);
        }
        self.settle(id);
        self.pump();
    }

    /// A piece of an object is going to be read for another node.
    pub(super) fn begin_read(&mut self, id: ObjectId) -> Result<ReadFrom, ObjectError> {
        let Some(object) = self.objects.get_mut(&id) else { return Err(self.missing(id)) };
        if object.freed {
            return Err(ObjectError::Freed { object: id });
        }
        let from = match (&object.memory, object.on_disk) {
            (Some(_), _) => ReadFrom::Memory,
            (None, true) => ReadFrom::Disk,
            // A copy that is still on its way.
            (None, false) => return Err(self.missing(id)),
        };
        object.reads += 1;
        Ok(from)
    }

    /// It was read.
    pub(super) fn end_read(&mut self, id: ObjectId) {
        if let Some(object) = self.objects.get_mut(&id) {
            object.reads -= 1;
            self.settle(id);
            self.pump();
        }
    }

    /// The processes of the node have had time to say what they have.
    pub(super) fn settled(&mut self) {
        self.settled = true;
    }

    /// Whether a process of this node lives.
    pub(super) fn fate(&self, process: ProcessId) -> Fate {
        if self.clients.values().any(|connected| connected.process == process) {
            Fate::Lives
        } else if self.ended.contains(&process) {
            Fate::Ended("its process has ended".to_owned())
        } else {
            Fate::Unknown
        }
    }

    /// Why there is no such object.
    fn missing(&self, object: ObjectId) -> ObjectError {
        let ended = |why: &str| ObjectError::OwnerDied { object, why: why.to_owned() };
        match self.fate(object.owner) {
            Fate::Lives => ObjectError::Freed { object },
            Fate::Ended(why) => ended(&why),
            Fate::Unknown if self.settled => ended("no process of the node owns it"),
            Fate::Unknown => ObjectError::StoreAway("it has just started".to_owned()),
        }
    }

    /// The size of an object.
    pub(super) fn bytes_of(&self, id: ObjectId) -> Option<u64> {
        self.objects.get(&id).map(|object| object.bytes)
    }

    pub(super) fn used(&self) -> (u64, u64) {
        (self.used, self.spilled)
    }

    /// All objects: size, place, owner and readers.
    pub(super) fn list(
        &self,
    ) -> impl Iterator<Item = (ObjectId, u64, ObjectPlace, Option<Client>, Vec<Client>)> {
        self.objects.iter().map(|(id, object)| {
            let place = match (object.freed, object.owner, &object.memory) {
                (true, ..) => ObjectPlace::Freed,
                (false, None, _) => ObjectPlace::Copy,
                (false, Some(_), Some(_)) => ObjectPlace::Memory,
                (false, Some(_), None) => ObjectPlace::Disk,
            };
            (*id, object.bytes, place, object.owner, object.readers.keys().copied().collect())
        })
    }

    /// The sums, for tests; what is ready or being made so.
    #[cfg(test)]
    pub(super) fn check(&self) -> u64 {
        let held: u64 = self.objects.values().filter_map(|o| o.memory.as_ref()).map(|m| m.capacity).sum();
        let loading: u64 = self.objects.values().filter(|o| o.busy == Busy::Loading).map(|o| o.bytes).sum();
        let reserved: u64 = self.clients.values().map(|c| c.reserved).sum();
        let ready: u64 = self.ready.iter().chain(&self.making).sum();
        assert_eq!(self.used, held + loading + reserved + ready, "OB-4: every byte is accounted for");
        let on_disk: u64 = self.objects.values().filter(|o| o.on_disk).map(|o| o.bytes).sum();
        assert_eq!(self.spilled, on_disk);
        ready
    }
}
