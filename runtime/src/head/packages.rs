//! The head's directory of packages, and what clients ask of the registry. What is decided stands in `core::packages`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use actix::{Context, Handler, MessageResult, ResponseFuture};

use super::actor::HeadActor;
use crate::package::{
    Digest, ListPackages, PACKAGES_BYTES_MAX, PackageStore, RegisterPackage, RegistryError, RemovePackage,
    fetch,
};
use crate::system::System;

/// Where a head keeps packages, and how many.
#[derive(Debug, Clone)]
pub struct PackagesConfig {
    /// The directory.
    pub dir: PathBuf,
    /// All together; those that no actor runs make room. Default 4 GiB.
    pub bytes_max: u64,
    /// The largest. Default 1 GiB.
    pub package_bytes_max: u64,
}

impl PackagesConfig {
    /// Defaults.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), bytes_max: PACKAGES_BYTES_MAX, package_bytes_max: 1 << 30 }
    }
}

/// The packages of a head.
pub(super) struct HeadPackages {
    store: Arc<PackageStore>,
    bytes_max: u64,
    /// Registered, but not here: another head had them. Fetched from nodes that report them.
    missing: Arc<Mutex<BTreeSet<Digest>>>,
}

impl HeadPackages {
    /// Removes from the directory what is not registered: nobody is uploading when a head begins to lead.
    pub(super) fn new(store: Arc<PackageStore>, bytes_max: u64, known: BTreeSet<Digest>) -> Self {
        let here: Vec<Digest> =
            store.list().unwrap_or_default().into_iter().map(|(sha256, _)| sha256).collect();
        for sha256 in here.iter().filter(|sha256| !known.contains(sha256)) {
            let _ = store.remove(*sha256);
        }
        let missing = known.into_iter().filter(|sha256| !here.contains(sha256)).collect();
        Self { store, bytes_max, missing: Arc::new(Mutex::new(missing)) }
    }

    /// A package is in use no more.
    pub(super) fn drop_package(&self, sha256: Digest) {
        if let Err(error) = self.store.remove(sha256) {
            tracing::warn!(%sha256, %error, "cannot remove a package");
        }
    }

    /// A node has these: what is missing here is fetched from it.
    pub(super) fn offered(&self, packages: &[Digest], system: &System, node: &str) {
        let mut missing = lock(&self.missing);
        for sha256 in packages.iter().copied().filter(|sha256| missing.remove(sha256)).collect::<Vec<_>>() {
            let (system, store, node) = (system.clone(), self.store.clone(), node.to_owned());
            let missing = self.missing.clone();
            actix::spawn(async move {
                if let Err(error) = fetch(&system, &store, sha256, &[node]).await {
                    tracing::warn!(%error, "a package of the head before this one could not be fetched");
                    lock(&missing).insert(sha256);
                }
            });
        }
    }
}

fn lock(missing: &Mutex<BTreeSet<Digest>>) -> MutexGuard<'_, BTreeSet<Digest>> {
    missing.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Handler<ListPackages> for HeadActor {
    type Result = MessageResult<ListPackages>;

    fn handle(&mut self, _: ListPackages, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.core.package_status())
    }
}

impl Handler<RegisterPackage> for HeadActor {
    type Result = ResponseFuture<Result<(), RegistryError>>;

    fn handle(
        &mut self,
        RegisterPackage { id, mode }: RegisterPackage,
        ctx: &mut Context<Self>,
    ) -> Self::Result {
        let Some(packages) = &self.packages else {
            return Box::pin(async { Err(RegistryError::Off) });
        };
        if let Err(refused) = self.core.may_register(&id, mode) {
            return Box::pin(async { Err(refused) });
        }
        let Some(bytes) = packages.store.size(id.sha256) else {
            return Box::pin(async { Err(RegistryError::NotThere(id)) });
        };
        let registered = self.core.register_package(id, bytes, packages.bytes_max, mode);
        self.registry_answer(registered, ctx)
    }
}

impl Handler<RemovePackage> for HeadActor {
    type Result = ResponseFuture<Result<(), RegistryError>>;

    fn handle(&mut self, remove: RemovePackage, ctx: &mut Context<Self>) -> Self::Result {
        let removed = self.core.remove_package(&remove.name, &remove.version);
        self.registry_answer(removed, ctx)
    }
}

impl HeadActor {
    fn registry_answer(
        &mut self,
        outcome: Result<Vec<super::core::Command>, RegistryError>,
        ctx: &mut Context<Self>,
    ) -> ResponseFuture<Result<(), RegistryError>> {
        match outcome {
            Ok(commands) => self.carry_out(commands, ctx),
            Err(error) => return Box::pin(async { Err(error) }),
        }
        let durable = self.durably(());
        Box::pin(async move { durable.await.map_err(RegistryError::NotDurable) })
    }
}
