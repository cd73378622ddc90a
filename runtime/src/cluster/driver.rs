//! A driver: a program that uses the cluster and owns what it spawns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::{Cluster, ClusterError};
use crate::backoff::Backoff;
use crate::handle::ProcessId;
use crate::head::messages::{DriverBye, DriverHello, HeadSeen};
use crate::spec::{DriverId, Owner};
use crate::system::{PeerEvent, PeerEvents};

/// How often a driver says that it is there: a head that took over must hear of it.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long the goodbye of a driver that is dropped may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// This program as a driver. What it spawns through [`Driver::cluster`] and does not detach ends with it: when it says
/// [`Driver::end`], when this is dropped, or when its connection breaks and does not come back.
pub struct Driver {
    id: DriverId,
    cluster: Cluster,
    lost: watch::Receiver<Option<String>>,
    ended: Arc<AtomicBool>,
    _alive: AbortOnDropHandle<()>,
}

impl Cluster {
    /// Registers this program as a driver. `name` is what it is called in causes of death and in the status.
    ///
    /// # Errors
    /// The head does not answer.
    pub async fn driver(&self, name: &str) -> Result<Driver, ClusterError> {
        let id = DriverId(rand::random());
        let by = format!("driver {name}, {}", self.by);
        let cluster = self.owned_by(Owner::Driver(id), by);
        let hello = DriverHello { id, name: name.to_owned(), process: self.system().process(), first: true };
        // Listened to before the head is spoken to.
        let peers = self.system().peer_events();
        let seen = cluster.ask(hello.clone()).await?.map_err(ClusterError::Refused)?;
        cluster.found(&seen.heads);
        let (told, lost) = watch::channel(None);
        let alive = stay(cluster.clone(), DriverHello { first: false, ..hello }, (peers, seen.process), told);
        Ok(Driver {
            id,
            cluster,
            lost,
            ended: Arc::default(),
            _alive: AbortOnDropHandle::new(self.system().runtime().spawn(alive)),
        })
    }
}

impl Driver {
    /// Which driver this is.
    pub fn id(&self) -> DriverId {
        self.id
    }

    /// The cluster on behalf of this driver.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Waits until the cluster has taken this driver for gone, and says why. What it owned is ended then.
    pub async fn lost(&self) -> String {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await.map(|why| why.clone()) {
            Ok(Some(why)) => why,
            Ok(None) | Err(_) => "this process has left the cluster".to_owned(),
        }
    }

    /// Ends the driver, and with it what it owns. Returns when the head has heard so.
    ///
    /// # Errors
    /// The head does not answer. It will find out by the broken connection.
    pub async fn end(self) -> Result<(), ClusterError> {
        self.ended.store(true, Ordering::Relaxed);
        self.cluster.ask(DriverBye { id: self.id, why: "it ended".to_owned() }).await
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        let (cluster, id) = (self.cluster.clone(), self.id);
        let why = match std::thread::panicking() {
            true => "it panicked".to_owned(),
            false => "it was dropped".to_owned(),
        };
        // Nobody waits for this: if it does not arrive, the broken connection tells.
        self.cluster.system().runtime().spawn(async move {
            let _ = tokio::time::timeout(GOODBYE, cluster.ask(DriverBye { id, why })).await;
        });
    }
}

/// Says again and again that the driver is there, and at once when the head was lost.
async fn stay(
    cluster: Cluster,
    hello: DriverHello,
    (mut peers, mut head): (PeerEvents, ProcessId),
    told: watch::Sender<Option<String>>,
) {
    let mut backoff = Backoff::reconnect();
    loop {
        tokio::select! {
            () = tokio::time::sleep(HEARTBEAT) => {}
            () = lost(&mut peers, head) => {}
        }
        loop {
            match cluster.ask(hello.clone()).await {
                Ok(Ok(HeadSeen { process, heads, .. })) => {
                    cluster.found(&heads);
                    head = process;
                    backoff.reset();
                    break;
                }
                Ok(Err(why)) => {
                    tracing::error!(driver = hello.name, why, "the cluster has given this driver up");
                    let _ = told.send(Some(why));
                    return;
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot reach the head");
                    backoff.pause().await;
                }
            }
        }
    }
}

async fn lost(peers: &mut PeerEvents, head: ProcessId) {
    loop {
        match peers.next().await {
            Some(PeerEvent::Lost { process, .. }) if process == head => return,
            Some(PeerEvent::Missed(_)) | None => return,
            Some(PeerEvent::Lost { .. } | PeerEvent::Connected { .. }) => {}
        }
    }
}
