//! Follows changes by reading the log of transactions: a slow watch costs nothing and misses nothing.

use std::sync::Arc;

use redb::{ReadableDatabase, ReadableTable};
use tokio::sync::watch;

use super::super::{Event, Revision, StateError};
use super::{Inner, LOG};
use crate::wire::from_bytes;

/// Reads the log from where it is.
pub(in super::super) struct EmbeddedWatch {
    inner: Arc<Inner>,
    prefix: String,
    next: u64,
    /// Events of transactions before `next`, in reverse.
    ready: Vec<Event>,
    committed: watch::Receiver<u64>,
}

impl EmbeddedWatch {
    pub(super) fn new(inner: Arc<Inner>, prefix: &str, from: Revision) -> Self {
        let committed = inner.committed.subscribe();
        Self { inner, prefix: prefix.to_owned(), next: from.0.max(1), ready: Vec::new(), committed }
    }

    pub(in super::super) async fn next(&mut self) -> Result<Event, StateError> {
        loop {
            if let Some(event) = self.ready.pop() {
                return Ok(event);
            }
            let last = *self.committed.borrow_and_update();
            if self.next <= last {
                self.read()?;
            } else if self.committed.changed().await.is_err() {
                return Err(StateError::Unavailable("the store was closed".into()));
            }
        }
    }

    /// Reads the next transaction that has events of this watch.
    fn read(&mut self) -> Result<(), StateError> {
        let inner = &self.inner;
        let read = inner.database.begin_read().map_err(|e| inner.failed(e))?;
        let log = read.open_table(LOG).map_err(|e| inner.failed(e))?;
        if let Some((oldest, _)) = log.first().map_err(|e| inner.failed(e))?
            && oldest.value() > self.next
        {
            return Err(StateError::Compacted { oldest: Revision(oldest.value()) });
        }
        for item in log.range(self.next..).map_err(|e| inner.failed(e))? {
            let (revision, events) = item.map_err(|e| inner.failed(e))?;
            self.next = revision.value() + 1;
            let events: Vec<Event> = from_bytes(events.value()).map_err(|e| StateError::Damaged {
                file: inner.file.display().to_string(),
                why: e.to_string(),
            })?;
            self.ready.extend(events.into_iter().rev().filter(|event| event.key.starts_with(&self.prefix)));
            if !self.ready.is_empty() {
                break;
            }
        }
        Ok(())
    }
}
