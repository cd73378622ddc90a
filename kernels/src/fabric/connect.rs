//! Links one rank with all others for one epoch.
//!
//! The higher rank dials the lower one. All pairings advance side by side in one `poll` loop; one that fails is tried
//! again until the deadline, the abort flag or a newer epoch ends the call.

use std::cmp::Ordering;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::{PollFd, PollFlags, poll};

use super::bell::{Abort, Interest, Sleep};
use super::endpoint::Endpoint;
use super::error::FabricError;
use super::frame::Pool;
use super::links::{Fabric, FabricParts, Limits};
use super::listener::Shared;
use super::pairing::{Group, PairError, Pairing};
use super::peer::Peer;

/// How long to wait before a rank is dialed again.
const REDIAL_TIME: Duration = Duration::from_millis(20);
/// A wake-up costs several times a look at every link; most answers of a rank with a core of its own come within this.
const SPIN_TIME: Duration = Duration::from_micros(20);
/// The doorbell has 16 bits for a rank.
const WORLD_MAX: usize = 4096;

/// Which transports may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory between ranks of one host, TCP between hosts.
    #[default]
    Auto,
    /// TCP everywhere.
    Tcp,
}

/// How to link the ranks of one epoch. [`Connect::new`] fills in what need not be chosen.
#[derive(Clone, Debug)]
pub struct Connect<'a> {
    /// The membership epoch; all ranks use the same one.
    pub epoch: u64,
    /// This rank.
    pub rank: usize,
    /// Endpoints of all ranks, this one included.
    pub endpoints: &'a [Endpoint],
    /// Ends this call and those of the fabric that it returns.
    pub abort: Abort,
    /// Which transports may be used; both ends of a link must allow shared memory for it to be used.
    pub transport: Transport,
    /// How long to wait for all ranks.
    pub connect_timeout: Duration,
    /// How long a `send` or a receive may block.
    pub call_timeout: Duration,
    /// Bytes of a ring in shared memory, per direction; rounded up to a power of two. Frames may be larger.
    pub ring_bytes: usize,
    /// How long to look for news before the thread sleeps. By default a little when this host has two cores for every
    /// rank on it, else not at all: where ranks share cores, it keeps the awaited rank from running.
    pub spin: Option<Duration>,
    /// The largest frame.
    pub frame_bytes_max: usize,
    /// Most bytes that may have arrived without having been received.
    pub pending_bytes_max: usize,
}

impl<'a> Connect<'a> {
    /// The defaults: 30 s for every wait, rings of 2 MiB, frames up to 1 GiB, 4 GiB pending.
    pub fn new(epoch: u64, rank: usize, endpoints: &'a [Endpoint]) -> Self {
        Self {
            epoch,
            rank,
            endpoints,
            abort: Abort::new(),
            transport: Transport::Auto,
            connect_timeout: Duration::from_secs(30),
            call_timeout: Duration::from_secs(30),
            ring_bytes: 2 << 20,
            spin: None,
            frame_bytes_max: 1 << 30,
            pending_bytes_max: 4 << 30,
        }
    }
}

pub(super) fn connect(shared: &Shared, how: Connect<'_>) -> Result<Fabric, FabricError> {
    check(shared, &how)?;
    how.abort.attach(&shared.bell);
    let pool = Arc::new(Pool::default());
    let group = Group {
        epoch: how.epoch,
        rank: how.rank,
        endpoints: how.endpoints,
        secret: shared.secret.as_deref(),
        bell: &shared.bell,
        share_memory: how.transport == Transport::Auto,
        ring_bytes: how.ring_bytes,
        frame_bytes_max: how.frame_bytes_max,
        pool: &pool,
    };
    let peers = Meeting::new(shared, &how, group).run()?;
    let limits = Limits {
        timeout: how.call_timeout,
        spin: how.spin.unwrap_or_else(|| spin_time(&how)),
        frame_bytes_max: how.frame_bytes_max,
        pending_bytes_max: how.pending_bytes_max,
    };
    let (rank, epoch, bell) = (how.rank, how.epoch, shared.bell.clone());
    Fabric::new(FabricParts { rank, epoch, peers, bell, abort: how.abort, limits, pool })
}

/// The default of [`Connect::spin`].
fn spin_time(how: &Connect<'_>) -> Duration {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let host = &how.endpoints[how.rank].host;
    let ranks = how.endpoints.iter().filter(|endpoint| endpoint.host == *host).count();
    if cores >= 2 * ranks { SPIN_TIME } else { Duration::ZERO }
}

fn check(shared: &Shared, how: &Connect<'_>) -> Result<(), FabricError> {
    let world = how.endpoints.len();
    if how.rank >= world || world > WORLD_MAX {
        let rank = how.rank;
        return Err(FabricError::Argument(format!(
            "rank {rank} of {world}: 1..={WORLD_MAX} ranks can be linked"
        )));
    }
    let (given, own) = (&how.endpoints[how.rank], &shared.endpoint);
    if given != own {
        return Err(FabricError::Argument(format!("rank {} listens at {own:?}, not at {given:?}", how.rank)));
    }
    Ok(())
}

/// One rank's side of an epoch that is being linked.
struct Meeting<'a> {
    shared: &'a Shared,
    how: &'a Connect<'a>,
    group: Group<'a>,
    start: Instant,
    slots: Vec<Slot>,
    /// What the last attempt to link each rank failed with.
    failures: Vec<String>,
}

/// Where the link to one rank stands.
enum Slot {
    /// This rank itself.
    Own,
    /// To be dialed at that time, or to dial in.
    Idle { dial_at: Option<Instant> },
    /// Under way or done.
    Pairing(Box<Pairing>),
}

impl<'a> Meeting<'a> {
    fn new(shared: &'a Shared, how: &'a Connect<'a>, group: Group<'a>) -> Self {
        let start = Instant::now();
        let world = how.endpoints.len();
        let slots = (0..world)
            .map(|rank| match rank.cmp(&how.rank) {
                Ordering::Less => Slot::Idle { dial_at: Some(start) },
                Ordering::Equal => Slot::Own,
                Ordering::Greater => Slot::Idle { dial_at: None },
            })
            .collect();
        let failures = vec!["it has not answered".to_owned(); world];
        Self { shared, how, group, start, slots, failures }
    }

    fn run(mut self) -> Result<Vec<Option<Peer>>, FabricError> {
        self.open_hall()?;
        loop {
            self.shared.bell.announce(Interest::Anyone, Sleep::Poll);
            let result = self.step();
            self.shared.bell.retract();
            if result? {
                let Self { group, slots, .. } = self;
                let peer = |slot| match slot {
                    Slot::Pairing(pairing) => pairing.into_peer(&group),
                    Slot::Own | Slot::Idle { .. } => None,
                };
                return Ok(slots.into_iter().map(peer).collect());
            }
        }
    }

    /// Lets dialers of this epoch in and sends those of older ones away.
    fn open_hall(&self) -> Result<(), FabricError> {
        let mut hall = self.shared.hall();
        let epoch = self.how.epoch;
        if hall.epoch > epoch {
            return Err(FabricError::StaleEpoch { epoch, newer: hall.epoch, rank: self.how.rank });
        }
        hall.epoch = epoch;
        let newer = hall.parked.split_off(&(epoch, 0));
        let old = std::mem::replace(&mut hall.parked, newer);
        drop(hall);
        for (_, stream) in old.into_values() {
            super::listener::refuse_stale(&stream, epoch);
        }
        Ok(())
    }

    /// Does what can be done, then sleeps for news. Returns whether all ranks are linked.
    fn step(&mut self) -> Result<bool, FabricError> {
        if let Some(reason) = self.how.abort.reason() {
            return Err(FabricError::Aborted { reason });
        }
        self.check_time()?;
        self.let_in()?;
        self.dial()?;
        if self.all(Pairing::is_linked) {
            self.each_pairing(|pairing, _| pairing.say_ready())?;
        }
        if self.all(Pairing::is_done) {
            return Ok(true);
        }
        let ready = self.sleep();
        let mut at = 0;
        self.each_pairing(|pairing, group| {
            at += 1;
            if ready[at - 1] { pairing.advance(group) } else { Ok(()) }
        })?;
        Ok(false)
    }

    fn all(&self, stage: impl Fn(&Pairing) -> bool) -> bool {
        self.slots.iter().all(|slot| match slot {
            Slot::Own => true,
            Slot::Idle { .. } => false,
            Slot::Pairing(pairing) => stage(pairing),
        })
    }

    fn check_time(&self) -> Result<(), FabricError> {
        let waited = self.start.elapsed();
        if waited < self.how.connect_timeout {
            return Ok(());
        }
        let mut missing = Vec::new();
        let mut last = String::new();
        for (rank, slot) in self.slots.iter().enumerate() {
            let why = match slot {
                Slot::Own => continue,
                Slot::Pairing(pairing) if pairing.is_done() => continue,
                Slot::Pairing(pairing) if pairing.is_linked() => "it still waits for other ranks",
                Slot::Pairing(_) | Slot::Idle { .. } => &self.failures[rank],
            };
            missing.push(rank);
            last = format!("rank {rank}: {why}");
        }
        Err(FabricError::ConnectTimeout { epoch: self.how.epoch, missing, waited, last })
    }

    /// Takes over the dialers of this epoch. One that dials again replaces its earlier link.
    fn let_in(&mut self) -> Result<(), FabricError> {
        let epoch = self.how.epoch;
        let mut hall = self.shared.hall();
        if let Some((&(newer, rank), _)) =
            hall.parked.range((Bound::Excluded((epoch, u32::MAX)), Bound::Unbounded)).next()
        {
            return Err(FabricError::StaleEpoch { epoch, newer, rank: rank as usize });
        }
        let dialers = std::mem::take(&mut hall.parked);
        drop(hall);
        for ((_, from), (hello, stream)) in dialers {
            let from = from as usize;
            if from <= self.how.rank || from >= self.slots.len() {
                continue;
            }
            self.slots[from] = match Pairing::welcome(&self.group, hello, stream) {
                Ok(pairing) => Slot::Pairing(Box::new(pairing)),
                Err(error) => self.idle(from, error)?,
            };
        }
        Ok(())
    }

    fn dial(&mut self) -> Result<(), FabricError> {
        let now = Instant::now();
        for rank in 0..self.how.rank {
            if let Slot::Pairing(pairing) = &self.slots[rank]
                && pairing.deadline.is_some_and(|deadline| deadline <= now)
            {
                let error = PairError::Retry("its listener does not answer".to_owned());
                self.slots[rank] = self.idle(rank, error)?;
            }
            if let Slot::Idle { dial_at: Some(at) } = self.slots[rank]
                && at <= now
            {
                self.slots[rank] = match Pairing::dial(&self.group, rank) {
                    Ok(pairing) => Slot::Pairing(Box::new(pairing)),
                    Err(error) => self.idle(rank, error)?,
                };
            }
        }
        Ok(())
    }

    /// Does something with every pairing; those that fail start anew.
    fn each_pairing(
        &mut self,
        mut act: impl FnMut(&mut Pairing, &Group<'_>) -> Result<(), PairError>,
    ) -> Result<(), FabricError> {
        for rank in 0..self.slots.len() {
            if let Slot::Pairing(pairing) = &mut self.slots[rank]
                && let Err(error) = act(pairing, &self.group)
            {
                self.slots[rank] = self.idle(rank, error)?;
            }
        }
        Ok(())
    }

    fn idle(&mut self, rank: usize, error: PairError) -> Result<Slot, FabricError> {
        match error {
            PairError::Stale { newer } => Err(FabricError::StaleEpoch { epoch: self.how.epoch, newer, rank }),
            PairError::Retry(why) => {
                let dial_at = (rank < self.how.rank).then(|| Instant::now() + REDIAL_TIME);
                self.failures[rank] = why;
                Ok(Slot::Idle { dial_at })
            }
        }
    }

    /// Sleeps until a pairing can go on, the bell rings or a time is up. Returns which pairings can go on, in order.
    fn sleep(&self) -> Vec<bool> {
        let mut wake_at = self.start + self.how.connect_timeout;
        let mut fds = vec![PollFd::from_borrowed_fd(self.shared.bell.event(), PollFlags::IN)];
        for slot in &self.slots {
            match slot {
                Slot::Own => {}
                Slot::Idle { dial_at } => wake_at = dial_at.map_or(wake_at, |at| at.min(wake_at)),
                Slot::Pairing(pairing) => {
                    wake_at = pairing.deadline.map_or(wake_at, |at| at.min(wake_at));
                    let events = if pairing.is_connecting() { PollFlags::OUT } else { PollFlags::IN };
                    let events = if pairing.is_done() { PollFlags::empty() } else { events };
                    fds.push(PollFd::new(pairing.stream(), events));
                }
            }
        }
        let left = wake_at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let left = Timespec::try_from(left).ok();
        // An interruption finds nothing ready; the caller looks again.
        let _ = poll(&mut fds, left.as_ref());
        if !fds[0].revents().is_empty() {
            self.shared.bell.drain_event();
        }
        fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect()
    }
}
