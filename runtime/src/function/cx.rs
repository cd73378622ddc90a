//! What a function has of the cluster while it runs.

use bincode::{Decode, Encode};
use tokio::runtime::Handle;

use crate::cluster::Cluster;
use crate::objects::{ObjectBytes, ObjectError, ObjectRef, Objects};

/// The objects of the cluster, for a function that blocks its thread while it waits for them.
///
/// Objects that a function puts are owned by its worker: they are there until their last ref is gone, or the worker.
pub struct FunctionCx {
    objects: Objects,
    runtime: Handle,
}

impl FunctionCx {
    /// Inside the runtime that serves the cluster's connections.
    pub(super) fn new(cluster: &Cluster) -> Self {
        Self { objects: cluster.objects(), runtime: Handle::current() }
    }

    /// The bytes of an object, as [`Objects::get`].
    ///
    /// # Errors
    /// The object is gone, with its owner, its node or its last ref.
    pub fn get(&self, object: &ObjectRef) -> Result<ObjectBytes, ObjectError> {
        self.block_on(self.objects.get(object))
    }

    /// The value of an object that `put_value` put.
    ///
    /// # Errors
    /// As `get`, or it is no such value.
    pub fn get_value<T: Decode<()>>(&self, object: &ObjectRef) -> Result<T, ObjectError> {
        self.block_on(self.objects.get_value(object))
    }

    /// Puts an object, as [`Objects::put`].
    ///
    /// # Errors
    /// There is no room in the store of the node, nor on its disk, or the store is away.
    pub fn put(&self, bytes: &[u8]) -> Result<ObjectRef, ObjectError> {
        self.block_on(self.objects.put(bytes))
    }

    /// Puts a value, as messages encode it.
    ///
    /// # Errors
    /// As `put`, or it cannot be encoded.
    pub fn put_value<T: Encode>(&self, value: &T) -> Result<ObjectRef, ObjectError> {
        self.block_on(self.objects.put_value(value))
    }

    /// What else objects can do, by `block_on`.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Waits for it on this thread.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }
}
