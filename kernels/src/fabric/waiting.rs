//! How a call on the fabric blocks: look at everything, sleep on one bell, look again.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::bell::{Interest, Sleep};
use super::error::FabricError;
use super::frame::Tag;
use super::links::{Fabric, LinkKind};
use super::peer::State;

/// What a blocked call waits for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Want {
    /// A frame of a rank.
    Frame { from: usize, tag: Tag },
    /// A frame of any rank.
    AnyFrame,
    /// A frame of any rank, or the waker.
    News,
    /// Room for so many bytes to a rank.
    Room { to: usize, tag: Tag, bytes: usize },
}

/// When a blocked call gives up. Reads the clock only once the call has to block.
#[derive(Debug)]
pub(super) struct Clock {
    limit: Option<Duration>,
    start: Option<Instant>,
}

impl Clock {
    pub(super) fn new(limit: Option<Duration>) -> Self {
        Self { limit, start: None }
    }

    /// Since when the call blocks, if it has to.
    pub(super) fn started(&self) -> Option<Instant> {
        self.start
    }

    /// Time left, or `Err` with the time that the call has waited.
    fn left(&mut self) -> Result<Duration, Duration> {
        let waited = self.start.get_or_insert_with(Instant::now).elapsed();
        let Some(limit) = self.limit else { return Ok(Duration::from_secs(3600)) };
        limit.checked_sub(waited).filter(|left| !left.is_zero()).ok_or(waited)
    }
}

impl Fabric {
    /// Returns after something may have changed; fails when what is wanted cannot come any more.
    pub(super) fn block(&mut self, want: Want, clock: &mut Clock) -> Result<(), FabricError> {
        let left = clock.left().map_err(|waited| match want {
            Want::Frame { from, tag } => FabricError::Timeout { rank: Some(from), tag: Some(tag), waited },
            Want::Room { to, tag, .. } => FabricError::Timeout { rank: Some(to), tag: Some(tag), waited },
            Want::AnyFrame | Want::News => FabricError::Timeout { rank: None, tag: None, waited },
        })?;
        if self.spin(want)? {
            return Ok(());
        }
        let interest = match want {
            Want::Frame { from, .. } => Interest::Rank(from),
            Want::AnyFrame | Want::News | Want::Room { .. } => Interest::Anyone,
        };
        if let Want::Room { to, bytes, .. } = want
            && let Some(peer) = &mut self.peers[to]
        {
            peer.want_room(bytes);
        }
        let count = self.bell.announce(interest, self.sleep);
        let result = self.look_then_sleep(want, count, left);
        self.bell.retract();
        if let Want::Room { to, .. } = want
            && let Some(peer) = &mut self.peers[to]
        {
            peer.want_no_room();
        }
        result
    }

    /// Looks for a while before the thread goes to sleep. Returns whether something changed.
    fn spin(&mut self, want: Want) -> Result<bool, FabricError> {
        if self.limits.spin.is_zero() {
            return Ok(false);
        }
        let start = Instant::now();
        while start.elapsed() < self.limits.spin {
            if self.look(want)? {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        Ok(false)
    }

    /// Takes in what has arrived through shared memory. Returns whether something changed.
    fn look(&mut self, want: Want) -> Result<bool, FabricError> {
        self.check_abort()?;
        let mut moved = 0;
        for rank in 0..self.peers.len() {
            if self.link(rank) == LinkKind::SharedMemory {
                moved += self.pull(rank)?;
            }
        }
        if let Want::Room { to, bytes, .. } = want
            && let Some(peer) = &mut self.peers[to]
            && peer.has_room(bytes)
        {
            return Ok(true);
        }
        Ok(moved > 0 || (matches!(want, Want::News) && self.bell.is_woken()))
    }

    /// Takes note of the ranks whose connection the watcher saw ending.
    pub(super) fn note_losses(&mut self) {
        if let Some(watch) = &self.watch {
            watch.each(|rank, state| {
                if let Some(peer) = &mut self.peers[rank] {
                    peer.set_state(state);
                }
            });
        }
    }

    fn look_then_sleep(&mut self, want: Want, count: u32, left: Duration) -> Result<(), FabricError> {
        // Losses before frames: what a rank sent before it ended is taken in first.
        self.note_losses();
        if self.look(want)? {
            return Ok(());
        }
        self.check_alive(want)?;
        match self.sleep {
            Sleep::Futex => self.bell.sleep(count, left),
            Sleep::Poll => self.poll(want, left)?,
        }
        Ok(())
    }

    /// Fails when a rank is lost, or when one that is wanted has left.
    fn check_alive(&self, want: Want) -> Result<(), FabricError> {
        for (rank, peer) in self.peers.iter().enumerate() {
            let Some(peer) = peer else { continue };
            let concerned = match want {
                Want::Frame { from: wanted, .. } | Want::Room { to: wanted, .. } => wanted == rank,
                Want::AnyFrame | Want::News => true,
            };
            match peer.state() {
                State::Linked => {}
                State::Left if !concerned => {}
                State::Left | State::Lost | State::Broken(_) => return Err(peer.failure()),
            }
        }
        Ok(())
    }

    /// Sleeps on the bell and all connections, then takes in what has arrived through them.
    fn poll(&mut self, want: Want, left: Duration) -> Result<(), FabricError> {
        let room = if let Want::Room { to, .. } = want { Some(to) } else { None };
        let mut ranks = Vec::with_capacity(self.peers.len());
        let mut fds = Vec::with_capacity(self.peers.len() + 1);
        let bell = self.bell.clone();
        let streams: Vec<_> = self.peers.iter().map(|peer| Some(peer.as_ref()?.stream().clone())).collect();
        fds.push(PollFd::from_borrowed_fd(bell.event(), PollFlags::IN));
        for (rank, (peer, stream)) in self.peers.iter().zip(&streams).enumerate() {
            let (Some(peer), Some(stream)) = (peer, stream) else { continue };
            if *peer.state() != State::Linked {
                continue;
            }
            let out =
                if room == Some(rank) && !peer.is_memory() { PollFlags::OUT } else { PollFlags::empty() };
            fds.push(PollFd::new(&**stream, PollFlags::IN | out));
            ranks.push(rank);
        }
        let timeout = Timespec::try_from(left).ok();
        // An interruption finds nothing ready; the caller looks again.
        let _ = poll(&mut fds, timeout.as_ref());
        if !fds[0].revents().is_empty() {
            bell.drain_event();
        }
        for (fd, &rank) in fds[1..].iter().zip(&ranks) {
            if fd.revents().difference(PollFlags::OUT).is_empty() {
                continue;
            }
            if let Some(peer) = &mut self.peers[rank]
                && peer.is_memory()
            {
                peer.check_liveness();
            } else {
                self.pull(rank)?;
            }
        }
        Ok(())
    }
}
