//! Who this process is connected with, and the news of it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast;

use crate::handle::ProcessId;
use crate::wire::handshake::Hello;

/// Peer events that a slow subscriber may lag behind.
const PEER_EVENTS_MAX: usize = 1024;

/// What happened to another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerEvent {
    /// The first connection with it is there.
    Connected {
        /// The process.
        process: ProcessId,
        /// Where it listens.
        endpoint: String,
    },
    /// The last connection with it is gone. It may be dead, or only cut off.
    Lost {
        /// The process.
        process: ProcessId,
        /// Where it listened.
        endpoint: String,
        /// How that was noticed.
        why: String,
    },
    /// The subscriber was too slow; that many events are gone. Ask `System::is_connected` of whom it matters.
    Missed(u64),
}

/// A subscription to peer events.
pub struct PeerEvents(broadcast::Receiver<PeerEvent>);

impl PeerEvents {
    /// The next event, or `None` once the system is gone.
    pub async fn next(&mut self) -> Option<PeerEvent> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(PeerEvent::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// The processes that there are connections with.
pub(crate) struct Peers {
    connections: Mutex<HashMap<ProcessId, usize>>,
    events: broadcast::Sender<PeerEvent>,
}

impl Peers {
    pub(super) fn new() -> Self {
        Self { connections: Mutex::default(), events: broadcast::Sender::new(PEER_EVENTS_MAX) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ProcessId, usize>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn subscribe(&self) -> PeerEvents {
        PeerEvents(self.events.subscribe())
    }

    pub(super) fn has(&self, process: ProcessId) -> bool {
        self.lock().contains_key(&process)
    }

    pub(crate) fn connected(&self, peer: &Hello) {
        let mut connections = self.lock();
        let count = connections.entry(peer.process).or_default();
        *count += 1;
        if *count == 1 {
            let (process, endpoint) = (peer.process, peer.endpoint.clone());
            // Sent under the lock, so that events of one process are in order. Nobody may listen.
            let _ = self.events.send(PeerEvent::Connected { process, endpoint });
        }
    }

    pub(crate) fn disconnected(&self, peer: &Hello, why: &str) {
        let mut connections = self.lock();
        let Some(count) = connections.get_mut(&peer.process) else { return };
        *count -= 1;
        if *count == 0 {
            connections.remove(&peer.process);
            let (process, endpoint) = (peer.process, peer.endpoint.clone());
            let _ = self.events.send(PeerEvent::Lost { process, endpoint, why: why.to_owned() });
        }
    }
}
