//! Passes group views on to the worker's actor: the latest of each group, never an older one after a newer one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::actor::WireMessage;
use crate::group::GroupView;
use crate::handle::{ActorId, Incarnation, Refusal};
use crate::system::System;
use crate::wire::to_bytes;

/// Pause before a full mailbox is tried again.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// Views on their way to the actor.
#[derive(Clone)]
pub(super) struct Views {
    shared: Arc<Shared>,
}

struct Shared {
    system: System,
    actor: ActorId,
    incarnation: Incarnation,
    runtime: tokio::runtime::Handle,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    /// The actor takes messages.
    open: bool,
    /// A task tries again because the mailbox was full.
    retrying: bool,
    views: BTreeMap<String, Slot>,
}

struct Slot {
    view: GroupView,
    delivered: bool,
}

impl Views {
    pub(super) fn new(system: System, actor: ActorId, incarnation: Incarnation) -> Self {
        let runtime = tokio::runtime::Handle::current();
        Self { shared: Arc::new(Shared { system, actor, incarnation, runtime, held: Mutex::default() }) }
    }

    /// The actor takes messages from now on.
    pub(super) fn open(&self) {
        self.change(|held| held.open = true);
    }

    /// Passes a view on, unless a newer one came before it.
    pub(super) fn deliver(&self, view: GroupView) {
        self.change(|held| {
            let newer = held.views.get(&view.group).is_none_or(|slot| slot.view.epoch < view.epoch);
            if newer {
                self.shared.system.meshes().take(&view);
                held.views.insert(view.group.clone(), Slot { view, delivered: false });
            }
        });
    }

    /// Highest epoch of each group.
    pub(super) fn epochs(&self) -> Vec<(String, u64)> {
        let held = self.shared.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.views.iter().map(|(group, slot)| (group.clone(), slot.view.epoch)).collect()
    }

    /// The latest view of each group.
    pub(super) fn held(&self) -> Vec<GroupView> {
        let held = self.shared.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.views.values().map(|slot| slot.view.clone()).collect()
    }

    fn change(&self, change: impl FnOnce(&mut Held)) {
        let mut held = self.shared.held.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut held);
        if held.open && !held.retrying && !self.shared.flush(&mut held) {
            held.retrying = true;
            self.shared.runtime.spawn(self.clone().retry());
        }
    }

    async fn retry(self) {
        loop {
            tokio::time::sleep(FULL_PAUSE).await;
            let mut held = self.shared.held.lock().unwrap_or_else(PoisonError::into_inner);
            if self.shared.flush(&mut held) {
                held.retrying = false;
                return;
            }
        }
    }
}

impl Shared {
    /// Delivers what waits, under the lock, so that order is kept. False if the mailbox is full.
    fn flush(&self, held: &mut Held) -> bool {
        for slot in held.views.values_mut().filter(|slot| !slot.delivered) {
            match self.offer(&slot.view) {
                Ok(()) => slot.delivered = true,
                Err(Refusal::MailboxFull) => return false,
                // A rank may leave it to its mesh to know who is there.
                Err(Refusal::UnknownMessage) => slot.delivered = true,
                Err(reason) => {
                    tracing::warn!(group = slot.view.group, epoch = slot.view.epoch, %reason, "view not delivered");
                    slot.delivered = true;
                }
            }
        }
        true
    }

    fn offer(&self, view: &GroupView) -> Result<(), Refusal> {
        let entry = self.system.registry().find(self.actor, self.incarnation)?;
        let bytes = to_bytes(view).map_err(|error| Refusal::Unsendable(error.to_string()))?;
        entry.offer_encoded(GroupView::NAME, &bytes)
    }
}
