//! How a store makes room, and lets go of what nobody needs.
//!
//! Requests are served in order: a large one is not passed by small ones for ever.

use super::super::stored::{Busy, Stored};
use super::{Command, StoreCore, Waiting, Wanted};
use crate::objects::{ObjectError, ObjectId};

impl StoreCore {
    pub(super) fn enqueue(&mut self, bytes: u64, what: Wanted) {
        self.queue.push_back(Waiting { number: self.next_waiting, bytes, what });
        self.next_waiting += 1;
        self.pump();
    }

    /// Serves who waits, in order, as far as there is room or some can be made.
    pub(super) fn pump(&mut self) {
        while let Some(first) = self.queue.front() {
            let (number, bytes) = (first.number, first.bytes);
            let free = self.limits.memory_bytes_max.saturating_sub(self.used);
            let short = bytes.saturating_sub(free);
            if short > 0 && self.make_room(number, short) {
                return;
            }
            let fits = self.used + bytes <= self.limits.memory_bytes_max;
            let Some(Waiting { what, .. }) = self.queue.pop_front() else { return };
            self.serve(what, bytes, fits);
        }
    }

    fn serve(&mut self, what: Wanted, bytes: u64, fits: bool) {
        if fits {
            self.used += bytes;
        }
        let full = ObjectError::StoreFull {
            asked: bytes,
            used: self.used,
            capacity: self.limits.memory_bytes_max,
            disk: self.disk_error.clone().unwrap_or_else(|| match self.limits.disk_bytes_max {
                0 => "spilling is off".to_owned(),
                max => format!("{} of {max} bytes are on disk", self.spilled),
            }),
        };
        match what {
            Wanted::Reserve(client, call) if fits => {
                match self.clients.get_mut(&client) {
                    Some(connected) => connected.reserved += bytes,
                    None => self.used -= bytes,
                }
                self.commands.push(Command::Done(client, call, Ok(())));
            }
            Wanted::Reserve(client, call) => self.commands.push(Command::Done(client, call, Err(full))),
            Wanted::Load(id, from) if fits => {
                let Some(object) = self.objects.get_mut(&id) else {
                    self.used -= bytes;
                    return;
                };
                object.busy = Busy::Loading;
                self.commands.push(Command::Load(id, from));
            }
            // `loaded` gives back what was never taken.
            Wanted::Load(id, _) => {
                self.used += bytes;
                self.loaded(id, Err(full));
            }
        }
    }

    /// Makes room, or begins to. True if there is something to wait for.
    fn make_room(&mut self, number: u64, short: u64) -> bool {
        let mut short = short;
        while short > 0
            && let Some(size) = self.ready.pop()
        {
            self.used -= size;
            short = short.saturating_sub(size);
            self.commands.push(Command::Unready(size));
        }
        let mut idle: Vec<(u64, ObjectId)> =
            self.objects.iter().filter(|(_, o)| o.is_idle()).map(|(id, o)| (o.used_at, *id)).collect();
        idle.sort_unstable();
        for (_, id) in &idle {
            let object = self.objects.get_mut(id).expect("it was there just now");
            if short == 0 || !(object.on_disk || object.owner.is_none()) {
                continue;
            }
            if let Some(memory) = object.memory.take() {
                self.used -= memory.capacity;
                short = short.saturating_sub(memory.capacity);
                self.commands.push(Command::Close(*id));
                if object.owner.is_none() {
                    self.objects.remove(id);
                }
            }
        }
        if short == 0 {
            return false;
        }
        for (client, connected) in &mut self.clients {
            if connected.reserved > 0 && !connected.trimming && connected.asked_for != number {
                connected.trimming = true;
                connected.asked_for = number;
                self.commands.push(Command::Trim(*client));
            }
        }
        if self.clients.values().any(|connected| connected.trimming) {
            return true;
        }
        self.spill_some(number, short, &idle)
    }

    /// Begins to spill as much as is missing. True if anything is on its way to disk.
    fn spill_some(&mut self, number: u64, short: u64, idle: &[(u64, ObjectId)]) -> bool {
        let on_their_way = |o: &Stored| matches!(o.busy, Busy::Evicting | Busy::Spilling);
        let (mut coming, mut to_disk) = (0, self.spilled);
        for object in self.objects.values().filter(|o| on_their_way(o)) {
            coming += object.memory.as_ref().map_or(0, |memory| memory.capacity);
            to_disk += object.bytes;
        }
        for (_, id) in idle {
            let Some(object) = self.objects.get_mut(id) else { continue };
            let (Some(memory), Some(owner)) = (&object.memory, object.owner) else { continue };
            if coming >= short {
                break;
            }
            if object.stays_for == number || to_disk + object.bytes > self.limits.disk_bytes_max {
                continue;
            }
            to_disk += object.bytes;
            coming += memory.capacity;
            let (busy, command) = match memory.with_owner {
                true => (Busy::Evicting, Command::Evict(owner, *id)),
                false => (Busy::Spilling, Command::Spill(*id)),
            };
            (object.busy, object.overdue) = (busy, false);
            self.commands.push(command);
        }
        coming > 0
    }

    /// Lets go of what nobody needs any more of an object.
    pub(super) fn settle(&mut self, id: ObjectId) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        let abandoned = object.owner.is_none() && object.holders.is_empty() && object.waiting.is_empty();
        if !(object.freed || abandoned) || !object.readers.is_empty() || object.reads > 0 {
            return;
        }
        match object.busy {
            Busy::No => {}
            Busy::Queued => {
                self.queue.retain(|waiting| !matches!(&waiting.what, Wanted::Load(of, _) if *of == id))
            }
            Busy::Evicting | Busy::Spilling | Busy::Loading => return,
        }
        let Some(object) = self.objects.remove(&id) else { return };
        for (client, call) in object.waiting {
            self.commands.push(Command::Opened(client, call, id, Err(ObjectError::Freed { object: id })));
        }
        if let Some(memory) = object.memory {
            self.commands.push(Command::Close(id));
            match object.owner.and_then(|owner| Some((owner, self.clients.get_mut(&owner)?))) {
                Some((owner, connected)) if memory.with_owner => {
                    connected.reserved += memory.capacity;
                    self.commands.push(Command::Recycled(owner, id));
                }
                Some(_) | None => self.used -= memory.capacity,
            }
        }
        if object.on_disk {
            self.spilled -= object.bytes;
            self.commands.push(Command::Unlink(id));
        }
    }
}
