//! The thread of the actor that a process is for, as the place where its connections are read.
//!
//! A message that is read where its actor lives wakes one thread and not two. A handler may hold that thread for long,
//! though: then the process's runtime looks after the connections, every `LOOK`, so that answers, cancellations, credit and
//! messages for others get through. Nothing is looked at while the thread rests.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use actix::ArbiterHandle;
use tokio::sync::{Notify, oneshot};

use crate::wire::reader::Reader;

/// How long what has arrived may wait for a thread that is held.
const LOOK: Duration = Duration::from_millis(20);

/// Whether a thread works or rests, as the hooks of its runtime tell.
pub(crate) struct Pulse {
    /// Odd while the thread works; each rest and each waking adds one.
    turn: AtomicU64,
    /// Nobody need be told that the thread works: somebody looks, or there is nothing to look after.
    watched: AtomicBool,
    woke: Notify,
}

impl Pulse {
    /// Of a thread that has not rested yet, with nothing to look after.
    pub(super) fn new() -> Self {
        Self { turn: AtomicU64::new(1), watched: AtomicBool::new(true), woke: Notify::new() }
    }

    pub(super) fn rests(&self) {
        self.turn.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn works(&self) {
        self.turn.fetch_add(1, Ordering::SeqCst);
        if !self.watched.swap(true, Ordering::SeqCst) {
            self.woke.notify_one();
        }
    }

    fn turn(&self) -> u64 {
        self.turn.load(Ordering::SeqCst)
    }

    fn is_rest(turn: u64) -> bool {
        turn.is_multiple_of(2)
    }

    /// Returns when the thread works.
    async fn working(&self) {
        loop {
            self.watched.store(false, Ordering::SeqCst);
            // It may have begun before it could know that somebody wants to be told.
            if !Self::is_rest(self.turn()) {
                self.watched.store(true, Ordering::SeqCst);
                return;
            }
            self.woke.notified().await;
        }
    }
}

/// The thread, and the connections that are read on it.
pub(crate) struct Home {
    thread: ArbiterHandle,
    pulse: Arc<Pulse>,
    readers: Mutex<Vec<Weak<Reader>>>,
}

impl Home {
    pub(super) fn new(thread: ArbiterHandle, pulse: Arc<Pulse>) -> Arc<Self> {
        Arc::new(Self { thread, pulse, readers: Mutex::default() })
    }

    /// Reads a connection on the thread until it ends, and says why it did; `None` if the thread ended first.
    pub(crate) async fn read(&self, reader: &Arc<Reader>) -> Option<String> {
        {
            let mut readers = self.lock();
            readers.retain(|reader| reader.strong_count() > 0);
            readers.push(Arc::downgrade(reader));
        }
        let (tell, told) = oneshot::channel();
        let reader = reader.clone();
        self.thread.spawn(async move {
            // Nobody listens once the process stops.
            let _ = tell.send(reader.read_here().await);
        });
        told.await.ok()
    }

    /// Looks after the connections while the thread is held.
    pub(super) async fn watch(self: Arc<Self>) {
        loop {
            self.pulse.working().await;
            let mut before = self.pulse.turn();
            loop {
                tokio::time::sleep(LOOK).await;
                let turn = self.pulse.turn();
                if turn == before && Pulse::is_rest(turn) {
                    break;
                }
                // At the same work as before, or always at work: in both cases it may have no time to read.
                if turn == before {
                    let readers: Vec<_> = self.lock().iter().filter_map(Weak::upgrade).collect();
                    readers.iter().for_each(|reader| reader.look());
                }
                before = turn;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Reader>>> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
