//! The bounded queue between senders and an actor. Not a channel: what is pushed after the end must be dropped at once,
//! so that its asker hears it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Lifetime;
use super::envelope::Deliver;
use super::lanes::{Lanes, Limit};
use crate::actor::RemoteActor;
use crate::handle::Refusal;

/// Refusals that pass before a full mailbox is searched for cancelled messages again.
const SWEEP_PAUSE: usize = 64;

pub(super) struct Mailbox<A> {
    lanes: Mutex<Lanes<Box<dyn Deliver<A>>>>,
    /// Messages that wait at most, in each concurrency group.
    capacity: usize,
    /// Refusals before the next sweep. Changed under the lock of the queue.
    sweep_in: AtomicUsize,
    lifetime: Arc<Lifetime>,
}

/// A place in a concurrency group; given back when it drops.
pub(super) struct Slot {
    mailbox: Arc<dyn Release>,
    lane: usize,
}

trait Release: Send + Sync {
    fn release(&self, lane: usize);
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.mailbox.release(self.lane);
    }
}

impl<A: RemoteActor> Release for Mailbox<A> {
    fn release(&self, lane: usize) {
        self.lock().release(lane);
        self.lifetime.pump.wake();
    }
}

impl<A: RemoteActor> Mailbox<A> {
    pub(super) fn new(limits: &[Limit], capacity: usize, lifetime: Arc<Lifetime>) -> Self {
        Self {
            lanes: Mutex::new(Lanes::new(limits)),
            capacity: capacity.max(1),
            sweep_in: AtomicUsize::new(0),
            lifetime,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Lanes<Box<dyn Deliver<A>>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why one more message would be refused. A full lane is searched for messages that nobody waits for.
    pub(super) fn refuses(&self, lane: usize) -> Option<Refusal> {
        // Dropped after the lock.
        let swept;
        let refused = {
            let mut lanes = self.lock();
            swept = self.sweep(&mut lanes, lane);
            self.refused(&lanes, lane)
        };
        drop(swept);
        refused
    }

    fn refused(&self, lanes: &Lanes<Box<dyn Deliver<A>>>, lane: usize) -> Option<Refusal> {
        if self.lifetime.ended.load(Ordering::Acquire) || self.lifetime.finishing.load(Ordering::Acquire) {
            Some(Refusal::NoSuchActor)
        } else if lanes.waiting(lane) >= self.capacity {
            Some(Refusal::MailboxFull)
        } else {
            None
        }
    }

    /// Takes messages that nobody waits for out of a lane that is full. It looks at all of them, so after it found none
    /// it pauses for some refusals. What it returns is to be dropped after the lock.
    fn sweep(&self, lanes: &mut Lanes<Box<dyn Deliver<A>>>, lane: usize) -> Vec<Box<dyn Deliver<A>>> {
        if lanes.waiting(lane) < self.capacity {
            return Vec::new();
        }
        let paused = self.sweep_in.load(Ordering::Relaxed);
        if paused > 0 {
            self.sweep_in.store(paused - 1, Ordering::Relaxed);
            return Vec::new();
        }
        let swept = lanes.sweep(lane, |delivery| !delivery.is_cancelled());
        if swept.is_empty() {
            self.sweep_in.store(self.capacity.min(SWEEP_PAUSE), Ordering::Relaxed);
        }
        swept
    }

    /// Queues a delivery, or gives it back.
    pub(super) fn push<D>(&self, lane: usize, delivery: Box<D>) -> Result<(), (Box<D>, Refusal)>
    where
        D: Deliver<A> + 'static,
    {
        let swept;
        let was_empty = {
            let mut lanes = self.lock();
            swept = self.sweep(&mut lanes, lane);
            match self.refused(&lanes, lane) {
                Some(reason) => Err((delivery, reason)),
                None => Ok(lanes.push(lane, delivery)),
            }
        };
        drop(swept);
        if was_empty? {
            self.lifetime.pump.wake();
        }
        Ok(())
    }

    /// The next message that may be delivered, with its place in its group.
    pub(super) fn pop(self: &Arc<Self>) -> Option<(Box<dyn Deliver<A>>, Option<Slot>)> {
        let (delivery, lane) = self.lock().pop()?;
        Some((delivery, lane.map(|lane| Slot { mailbox: self.clone(), lane })))
    }

    /// Takes everything out.
    pub(super) fn drain(&self) -> Vec<Box<dyn Deliver<A>>> {
        self.lock().drain()
    }
}
