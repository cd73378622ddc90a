//! The packages of a node: fetched when a worker needs one, verified before it runs, removed when room is needed.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::package::{Digest, PackageOrder, PackageStore, fetch};
use crate::system::System;

/// The packages of this node.
pub(super) struct NodePackages {
    store: Arc<PackageStore>,
    bytes_max: u64,
    /// Packages that are being fetched: whoever needs one that is waits for it.
    fetching: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
}

impl NodePackages {
    pub(super) fn open(dir: &Path, bytes_max: u64) -> std::io::Result<Self> {
        let store = Arc::new(PackageStore::open(dir, bytes_max)?);
        Ok(Self { store, bytes_max, fetching: Mutex::default() })
    }

    pub(super) fn store(&self) -> Arc<PackageStore> {
        self.store.clone()
    }

    /// Those that are here.
    pub(super) fn here(&self) -> Vec<Digest> {
        let here = self.store.list().unwrap_or_default();
        here.into_iter().map(|(sha256, _)| sha256).collect()
    }

    /// Has the package here, whole and verified, and returns its path. `in_use` are those that workers run.
    pub(super) async fn ensure(
        &self,
        system: &System,
        order: &PackageOrder,
        head: String,
        in_use: BTreeSet<Digest>,
    ) -> Result<PathBuf, String> {
        let sha256 = order.id.sha256;
        let turn = self.turn(sha256);
        let held = turn.lock().await;
        if self.store.size(sha256).is_none() {
            let mut sources = order.sources.clone();
            sources.extend(head.split(',').map(str::to_owned));
            sources.retain(|source| source != system.endpoint());
            fetch(system, &self.store, sha256, &sources).await.map_err(|error| error.to_string())?;
            tracing::info!(package = %order.id, "fetched a package");
        }
        let (store, bytes_max) = (self.store.clone(), self.bytes_max);
        let verified = tokio::task::spawn_blocking(move || {
            let path = store.verified(sha256);
            if path.is_err() {
                // Fetched anew the next time.
                let _ = store.remove(sha256);
            }
            store.touch(sha256);
            make_room(&store, bytes_max, &in_use, sha256);
            path
        });
        let path = verified.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string());
        drop(held);
        self.forget_turn(sha256, &turn);
        path
    }

    fn turn(&self, sha256: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        fetching.entry(sha256).or_default().clone()
    }

    /// Keeps the table as small as what is under way: this turn and the table's own reference are the last two.
    fn forget_turn(&self, sha256: Digest, turn: &Arc<tokio::sync::Mutex<()>>) {
        let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::strong_count(turn) <= 2 {
            fetching.remove(&sha256);
        }
    }
}

/// Removes what was used longest ago and runs nowhere here, until the rest fits.
fn make_room(store: &PackageStore, bytes_max: u64, in_use: &BTreeSet<Digest>, but: Digest) {
    let here = store.list().unwrap_or_default();
    let mut total: u64 = here.iter().map(|(_, bytes)| bytes).sum();
    for (sha256, bytes) in here {
        if total <= bytes_max {
            return;
        }
        if sha256 != but && !in_use.contains(&sha256) {
            match store.remove(sha256) {
                Ok(()) => total -= bytes,
                Err(error) => tracing::warn!(%sha256, %error, "cannot remove a package"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::package::sha256_of;

    #[test]
    fn the_package_used_longest_ago_makes_room_but_none_that_runs() {
        let dir = tempfile::tempdir().unwrap();
        let store = PackageStore::open(dir.path(), 100).unwrap();
        let put = |bytes: &[u8]| {
            let sha256 = sha256_of(bytes).unwrap();
            let mut receiving = store.receive(sha256, bytes.len() as u64).unwrap();
            receiving.write(0, bytes).unwrap();
            store.keep(receiving).unwrap();
            sha256
        };
        let [a, b, c] = [b"aaaa", b"bbbb", b"cccc"].map(|bytes| put(bytes));
        store.touch(b);
        store.touch(c);
        store.touch(a);
        make_room(&store, 9, &BTreeSet::from([b]), a);
        assert_eq!([a, b, c].map(|sha256| store.size(sha256).is_some()), [true, true, false]);
    }
}
