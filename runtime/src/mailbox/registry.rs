//! The registered actors of this process, one incarnation of each.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::{Entry, Lifetime, Table};
use crate::handle::{ActorId, Incarnation, Refusal};

/// The registered actors of this process.
#[derive(Default)]
pub(crate) struct Registry {
    entries: RwLock<HashMap<ActorId, Arc<Entry>>>,
    /// Where actors are that this process stands by for.
    elsewhere: RwLock<HashMap<ActorId, String>>,
    /// What each type of actor accepts, so that it is made once.
    tables: RwLock<HashMap<TypeId, Arc<Table>>>,
}

impl Registry {
    /// Registers an actor. A later incarnation replaces an earlier one, which is told to stop; the reverse is refused
    /// with the incarnation that is there.
    pub(crate) fn insert(&self, entry: Arc<Entry>) -> Result<(), Incarnation> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(present) = entries.get(&entry.id).filter(|present| !present.has_ended()) {
            if present.incarnation >= entry.incarnation {
                return Err(present.incarnation);
            }
            present.stop();
        }
        entries.insert(entry.id, entry);
        Ok(())
    }

    /// The table of an actor type; made when the type is new.
    pub(super) fn table(&self, of: TypeId, make: impl FnOnce() -> Table) -> Arc<Table> {
        if let Some(table) = self.tables.read().unwrap_or_else(PoisonError::into_inner).get(&of) {
            return table.clone();
        }
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        tables.entry(of).or_insert_with(|| Arc::new(make())).clone()
    }

    /// The actor, if it is there in that incarnation.
    pub(crate) fn find(&self, id: ActorId, incarnation: Incarnation) -> Result<Arc<Entry>, Refusal> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        match entries.get(&id) {
            None => Err(self.absent(id)),
            Some(entry) if incarnation == Incarnation::ANY || entry.incarnation == incarnation => {
                Ok(entry.clone())
            }
            Some(_) => Err(Refusal::WrongIncarnation),
        }
    }

    /// Whoever asks for an actor that is not here is sent to that endpoint; empty while it is not known.
    pub(crate) fn redirect(&self, id: ActorId, endpoint: String) {
        self.elsewhere.write().unwrap_or_else(PoisonError::into_inner).insert(id, endpoint);
    }

    fn absent(&self, id: ActorId) -> Refusal {
        let elsewhere = self.elsewhere.read().unwrap_or_else(PoisonError::into_inner);
        elsewhere.get(&id).cloned().map_or(Refusal::NoSuchActor, Refusal::Elsewhere)
    }

    /// All actors.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Forgets the actor of that lifetime: not one that was there before it and kept its place.
    pub(super) fn remove(&self, id: ActorId, lifetime: &Arc<Lifetime>) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if entries.get(&id).is_some_and(|entry| Arc::ptr_eq(&entry.lifetime, lifetime)) {
            entries.remove(&id);
        }
    }
}
