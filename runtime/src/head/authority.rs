//! The tenure of this process: shared by all that act in its name, and kept alive in the store.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::tenure::Tenure;
use crate::state::{LeaseId, StateError, StateStore};

/// Pause before a renewal that failed is tried again.
const RENEWAL_PAUSE: Duration = Duration::from_millis(100);
/// Shortest limit of a renewal: a slow disk of etcd is no reason to give up.
const RENEWAL_PATIENCE: Duration = Duration::from_millis(500);

/// Whether this process leads, and in which term.
pub(super) struct Authority {
    tenure: Mutex<Tenure>,
    /// The moment that the tenure's time counts from.
    started: Instant,
    over: watch::Sender<bool>,
}

impl Authority {
    pub(super) fn new(tenure: Tenure, started: Instant) -> Arc<Self> {
        Arc::new(Self { tenure: Mutex::new(tenure), started, over: watch::Sender::new(false) })
    }

    fn lock(&self) -> MutexGuard<'_, Tenure> {
        self.tenure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Tenure)) -> bool {
        let mut tenure = self.lock();
        change(&mut tenure);
        let leads = tenure.may_act(self.started.elapsed());
        if !leads && !self.over.send_replace(true) {
            tracing::info!(term = tenure.term(), why = tenure.over(), "leads no more");
        }
        leads
    }

    /// HA-1: asked before every order.
    pub(super) fn may_act(&self) -> bool {
        self.change(|_| ())
    }

    /// Somebody knows of a head of that term; whether this one still leads.
    pub(super) fn heard(&self, term: u64) -> bool {
        self.change(|tenure| tenure.heard(term))
    }

    pub(super) fn end(&self, why: &str) {
        self.change(|tenure| tenure.end(why));
    }

    /// Waits until this process leads no more, and says why.
    pub(super) async fn over(&self) -> String {
        let _ = self.over.subscribe().wait_for(|over| *over).await;
        self.lock().over().unwrap_or_default().to_owned()
    }

    /// Renews the lease for as long as this process leads.
    pub(super) async fn renew(self: Arc<Self>, store: StateStore, lease: LeaseId) {
        loop {
            let Some(due) = self.lock().renew_at() else { return };
            tokio::time::sleep(due.saturating_sub(self.started.elapsed())).await;
            if !self.may_act() {
                return;
            }
            let sent = self.started.elapsed();
            let patience = RENEWAL_PATIENCE.max((due.saturating_sub(sent)) / 2);
            match tokio::time::timeout(patience, store.keep_alive(lease)).await {
                Ok(Ok(())) => drop(self.change(|tenure| tenure.renewed(sent))),
                Ok(Err(StateError::LeaseExpired)) => self.end("its lease ran out"),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "cannot renew the lease");
                    tokio::time::sleep(RENEWAL_PAUSE).await;
                }
                Err(_) => tracing::debug!("the lease's renewal has no answer"),
            }
        }
    }
}
