//! The fabric of one epoch: the links of one rank to all ranks, driven by the thread that owns it.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use super::bell::{Abort, Bell, Sleep, Waker};
use super::error::FabricError;
use super::frame::{Frame, Kind, Pool, STREAMS, Stream, Tag};
use super::peer::{Peer, State};
use super::waiting::{Clock, Want};
use super::waits::{Wait, Waited, Waits};
use super::watch::Watch;

/// Most bytes that one look at a link takes in, so that a fast sender cannot hold the engine in one call.
const PULL_BYTES: usize = 64 << 20;

/// Why [`Fabric::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A frame of the kind's stream is there.
    Frame {
        /// Its sender.
        from: usize,
    },
    /// A [`Waker`] rang.
    Woken,
    /// The deadline passed.
    Deadline,
}

/// How a rank is linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// The rank itself: a queue.
    Own,
    /// Rings in shared memory.
    SharedMemory,
    /// A TCP connection.
    Tcp,
}

/// Bounds of a fabric; see [`super::Connect`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub timeout: Duration,
    pub spin: Duration,
    pub frame_bytes_max: usize,
    pub pending_bytes_max: usize,
}

/// What a fabric is made of.
#[derive(Debug)]
pub(super) struct FabricParts {
    pub rank: usize,
    pub epoch: u64,
    pub peers: Vec<Option<Peer>>,
    pub bell: Arc<Bell>,
    pub abort: Abort,
    pub limits: Limits,
    pub pool: Arc<Pool>,
}

/// Links to all ranks of a group for one epoch. Owned by one thread; dropping it tells the peers that this rank left.
pub struct Fabric {
    rank: usize,
    epoch: u64,
    pub(super) peers: Vec<Option<Peer>>,
    /// Arrived and not yet received, per rank and stream, oldest first.
    pending: Vec<[VecDeque<Frame>; STREAMS]>,
    pending_bytes: usize,
    arrived: VecDeque<Frame>,
    next_any: usize,
    pub(super) bell: Arc<Bell>,
    abort: Abort,
    pub(super) sleep: Sleep,
    pub(super) watch: Option<Watch>,
    pub(super) limits: Limits,
    pool: Arc<Pool>,
    waits: Waits,
    /// One thread at a time.
    _owner: PhantomData<Cell<()>>,
}

impl Fabric {
    pub(super) fn new(parts: FabricParts) -> Result<Self, FabricError> {
        let FabricParts { rank, epoch, peers, bell, abort, limits, pool } = parts;
        let polls = peers.iter().flatten().any(|peer| !peer.is_memory());
        let streams: Vec<_> = peers
            .iter()
            .enumerate()
            .filter_map(|(rank, peer)| Some((rank, peer.as_ref()?.stream().clone())))
            .collect();
        let watch = if polls || streams.is_empty() {
            None
        } else {
            Some(
                Watch::start(streams, peers.len(), bell.clone())
                    .map_err(FabricError::io("starting the watcher"))?,
            )
        };
        Ok(Self {
            rank,
            epoch,
            pending: peers.iter().map(|_| Default::default()).collect(),
            peers,
            pending_bytes: 0,
            arrived: VecDeque::new(),
            next_any: 0,
            bell,
            abort,
            sleep: if polls { Sleep::Poll } else { Sleep::Futex },
            watch,
            limits,
            pool,
            waits: Waits::default(),
            _owner: PhantomData,
        })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.peers.len()
    }

    /// The epoch for which the ranks are linked.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// How `rank` is linked. Panics when there is no such rank.
    pub fn link(&self, rank: usize) -> LinkKind {
        self.peers[rank].as_ref().map_or(LinkKind::Own, |peer| {
            if peer.is_memory() { LinkKind::SharedMemory } else { LinkKind::Tcp }
        })
    }

    /// Ends [`Fabric::wait`] from any thread.
    pub fn waker(&self) -> Waker {
        Waker::new(self.bell.clone())
    }

    /// Ends all calls from any thread, for good.
    pub fn abort_handle(&self) -> Abort {
        self.abort.clone()
    }

    /// How long [`Fabric::recv`] has blocked since this was last asked.
    pub fn take_waited(&mut self) -> Waited {
        self.waits.take()
    }

    /// Whether single waits are kept from now on; at most a few thousand between two calls of
    /// [`Fabric::take_waits`].
    pub fn keep_waits(&mut self, keep: bool) {
        self.waits.keep_single(keep);
    }

    /// The single waits since this was last asked, oldest first.
    pub fn take_waits(&mut self) -> Vec<Wait> {
        self.waits.take_single()
    }

    /// Sends a frame whose payload is all `parts` in order. Returns once the link has taken every byte, not when the
    /// rank has received it. To this rank itself is allowed.
    ///
    /// Blocks while the link has no room, taking in what arrives meanwhile. After an error in the middle of a frame
    /// nothing more can be sent to that rank in this epoch.
    pub fn send(&mut self, to: usize, tag: Tag, parts: &[&[u8]]) -> Result<(), FabricError> {
        self.check(to)?;
        let len = parts.iter().map(|part| part.len()).sum();
        if len > self.limits.frame_bytes_max {
            let max = self.limits.frame_bytes_max;
            return Err(FabricError::Argument(format!("a frame of {len} bytes is over the limit of {max}")));
        }
        let Some(peer) = &mut self.peers[to] else { return self.send_own(tag, len, parts) };
        if *peer.state() != State::Linked {
            return Err(peer.failure());
        }
        let header = peer.begin(tag, len);
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(parts.iter().filter(|part| !part.is_empty()).map(|part| IoSlice::new(part)));
        let result = self.push_all(to, tag, header.len() + len, &mut slices);
        if result.is_err()
            && let Some(peer) = &mut self.peers[to]
        {
            peer.set_state(State::Broken("a frame to it was cut off by an earlier error".to_owned()));
        }
        result
    }

    fn push_all(
        &mut self,
        to: usize,
        tag: Tag,
        mut bytes: usize,
        mut slices: &mut [IoSlice<'_>],
    ) -> Result<(), FabricError> {
        let mut clock = Clock::new(Some(self.limits.timeout));
        while let Some(peer) = &mut self.peers[to]
            && bytes > 0
        {
            let pushed = peer.push(slices)?;
            if pushed == 0 {
                self.block(Want::Room { to, tag, bytes }, &mut clock)?;
            }
            bytes -= pushed;
            IoSlice::advance_slices(&mut slices, pushed);
        }
        Ok(())
    }

    fn send_own(&mut self, tag: Tag, len: usize, parts: &[&[u8]]) -> Result<(), FabricError> {
        let mut frame = Frame::new(tag, len, &self.pool);
        let mut rest = frame.payload_mut();
        for part in parts {
            let (here, after) = rest.split_at_mut(part.len());
            here.copy_from_slice(part);
            rest = after;
        }
        self.arrived.push_back(frame);
        self.stow(self.rank)
    }

    /// Receives the next frame of `from` in the stream of `tag`. Any other tag than this one is a protocol error.
    pub fn recv(&mut self, from: usize, tag: Tag) -> Result<Frame, FabricError> {
        let mut clock = Clock::new(Some(self.limits.timeout));
        loop {
            if let Some(frame) = self.try_recv(from, tag)? {
                if let Some(began) = clock.started() {
                    self.waits.note(tag, from, began);
                }
                return Ok(frame);
            }
            if from == self.rank {
                return Err(FabricError::Argument(format!("rank {from} waits for itself to send {tag}")));
            }
            self.block(Want::Frame { from, tag }, &mut clock)?;
        }
    }

    /// As [`Fabric::recv`], but returns `None` when the frame is not there yet. Fails when it cannot come any more.
    pub fn try_recv(&mut self, from: usize, tag: Tag) -> Result<Option<Frame>, FabricError> {
        self.check(from)?;
        if let Some(frame) = self.take(from, tag)? {
            return Ok(Some(frame));
        }
        if self.pull(from)? > 0
            && let Some(frame) = self.take(from, tag)?
        {
            return Ok(Some(frame));
        }
        match &self.peers[from] {
            Some(peer) if *peer.state() != State::Linked => Err(peer.failure()),
            Some(_) | None => Ok(None),
        }
    }

    /// Receives the next frame of the kind's stream from whichever rank has one, in turn.
    pub fn recv_any(&mut self, kind: Kind) -> Result<(usize, Frame), FabricError> {
        let mut clock = Clock::new(Some(self.limits.timeout));
        loop {
            self.check_abort()?;
            if let Some(found) = self.take_any(kind) {
                return Ok(found);
            }
            self.block(Want::AnyFrame, &mut clock)?;
        }
    }

    /// Sleeps until a frame of the kind's stream is there, a waker rings, or the deadline passes. Fails when the fabric
    /// is aborted or a rank is lost or has left. Without a deadline it may sleep for ever; it uses no CPU.
    pub fn wait(&mut self, kind: Kind, deadline: Option<Duration>) -> Result<Event, FabricError> {
        let mut clock = Clock::new(deadline);
        loop {
            self.check_abort()?;
            if let Some(from) = self.ready(kind.stream()) {
                return Ok(Event::Frame { from });
            }
            if self.bell.take_woken() {
                return Ok(Event::Woken);
            }
            match self.block(Want::News, &mut clock) {
                Err(FabricError::Timeout { .. }) => return Ok(Event::Deadline),
                other => other?,
            }
        }
    }

    fn check(&mut self, rank: usize) -> Result<(), FabricError> {
        self.note_losses();
        if rank >= self.peers.len() {
            let world = self.peers.len();
            return Err(FabricError::Argument(format!("there is no rank {rank} in a group of {world}")));
        }
        self.check_abort()
    }

    pub(super) fn check_abort(&self) -> Result<(), FabricError> {
        self.abort.reason().map_or(Ok(()), |reason| Err(FabricError::Aborted { reason }))
    }

    /// The next frame that is already here, if it bears this tag.
    fn take(&mut self, from: usize, tag: Tag) -> Result<Option<Frame>, FabricError> {
        let queue = &mut self.pending[from][tag.kind.stream() as usize];
        let Some(frame) = queue.front() else { return Ok(None) };
        if frame.tag() != tag {
            let what = format!("it sent {} where {tag} was expected", frame.tag());
            return Err(FabricError::Protocol { rank: from, what });
        }
        let frame = queue.pop_front();
        self.pending_bytes -= frame.as_ref().map_or(0, |frame| frame.payload().len());
        Ok(frame)
    }

    fn ready(&self, stream: Stream) -> Option<usize> {
        let world = self.peers.len();
        (0..world)
            .map(|at| (self.next_any + at) % world)
            .find(|&rank| !self.pending[rank][stream as usize].is_empty())
    }

    fn take_any(&mut self, kind: Kind) -> Option<(usize, Frame)> {
        let from = self.ready(kind.stream())?;
        let frame = self.pending[from][kind.stream() as usize].pop_front()?;
        self.pending_bytes -= frame.payload().len();
        self.next_any = from + 1;
        Some((from, frame))
    }

    /// Takes in what has arrived from one rank. Returns how many bytes.
    pub(super) fn pull(&mut self, rank: usize) -> Result<usize, FabricError> {
        let Some(peer) = &mut self.peers[rank] else { return Ok(0) };
        let moved = peer.pull(&mut self.arrived, PULL_BYTES);
        self.stow(rank)?;
        moved
    }

    fn stow(&mut self, rank: usize) -> Result<(), FabricError> {
        for frame in self.arrived.drain(..) {
            self.pending_bytes += frame.payload().len();
            self.pending[rank][frame.tag().kind.stream() as usize].push_back(frame);
        }
        let bytes = self.pending_bytes + self.peers[rank].as_ref().map_or(0, Peer::reserved);
        if bytes > self.limits.pending_bytes_max {
            let max = self.limits.pending_bytes_max;
            let what = format!("{bytes} bytes wait to be received, over the limit of {max}");
            return Err(FabricError::Protocol { rank, what });
        }
        Ok(())
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        self.watch = None;
        for peer in self.peers.iter_mut().flatten() {
            // A panic is no farewell: the peers must take this rank for lost.
            if std::thread::panicking() { peer.close() } else { peer.leave() }
        }
    }
}

impl fmt::Debug for Fabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fabric")
            .field("rank", &self.rank)
            .field("world", &self.peers.len())
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}
