//! Who takes part in an exchange, how that is told to the kernels, and what they tell back.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::shape::RANKS_MAX;
use crate::cuda::heap::HeapHandle;
use crate::cuda::nccl::Nccl;
use crate::cuda::{CudaError, Device, Pinned};

/// No rank, no slot.
pub(super) const NONE: u32 = u32::MAX;

/// One rank as the others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id, stable over epochs, below 64.
    pub rank: u32,
    /// Its heap.
    pub heap: HeapHandle,
}

/// The group in one epoch. All ranks are told the same, but for `rank`.
#[derive(Clone, Debug)]
pub struct Membership {
    /// Grows with every change, and with every reset after a failure. Below 2^32.
    pub epoch: u64,
    /// This rank's id.
    pub rank: u32,
    /// DP ranks by index; `None`: nobody.
    pub dp: Vec<Option<Member>>,
    /// EP ranks by index; rank `e` owns slots `e * slots .. (e + 1) * slots`. `None`: nobody.
    pub ep: Vec<Option<Member>>,
    /// Slots of one EP rank.
    pub slots: usize,
    /// How long a kernel waits for a silent peer.
    pub timeout: Duration,
}

/// Why a step's exchanges came to nothing. The rest of the step ran on no rows; only a new epoch helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeFailure {
    /// The host ended the epoch while a kernel waited.
    #[error("the exchange was aborted")]
    Aborted,
    /// Peers did not show up in time.
    #[error("ranks {ranks:#b} (bit mask) were silent in {phase:?}")]
    Silent {
        /// Bit mask of rank ids.
        ranks: u64,
        /// What was waited for.
        phase: Phase,
    },
    /// More rows came than the permuted buffers hold.
    #[error("more rows were dispatched to this rank than its buffers hold")]
    Overflow,
    /// NCCL lost a peer, or failed.
    #[error("NCCL failed")]
    Carrier,
    /// A peer's routing makes no sense.
    #[error("ranks {ranks:#b} (bit mask) sent impossible routing")]
    Malformed {
        /// Bit mask of rank ids.
        ranks: u64,
    },
}

/// The two waits of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// EP ranks wait for rows.
    Dispatch,
    /// DP ranks wait for results. A rank that is silent here may itself be waiting for one that another rank names in
    /// [`Phase::Dispatch`].
    Combine,
}

/// Host memory that kernels and host share.
#[derive(Debug)]
pub(super) struct Control {
    /// Epochs below this have ended.
    abort: Mutex<Pinned<u64>>,
    /// Failure and phase, ranks, round.
    report: Pinned<u64>,
    /// What carries rows, and since which epoch. Its kernels watch no cell of ours: it is aborted as a whole.
    carrier: Mutex<Option<(u64, Nccl)>>,
}

impl Control {
    pub(super) fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self {
            abort: Mutex::new(device.pinned(1)?),
            report: device.pinned(3)?,
            carrier: Mutex::default(),
        })
    }

    pub(super) fn addresses(&self) -> (u64, u64) {
        let abort = self.abort.lock().unwrap_or_else(PoisonError::into_inner).address();
        (abort, self.report.address())
    }

    pub(super) fn clear(&self) {
        self.report.write(0, &[0; 3]);
    }

    /// Says what carries rows from `epoch` on.
    pub(super) fn carried_by(&self, epoch: u64, nccl: Option<Nccl>) {
        *self.carrier.lock().unwrap_or_else(PoisonError::into_inner) = nccl.map(|nccl| (epoch, nccl));
    }

    fn carrier(&self) -> Option<(u64, Nccl)> {
        self.carrier.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn status(&self) -> Result<(), ExchangeFailure> {
        match self.carrier() {
            Some((_, nccl)) if nccl.is_aborted() => return Err(ExchangeFailure::Aborted),
            Some((_, nccl)) if nccl.status().is_err() => return Err(ExchangeFailure::Carrier),
            Some(_) | None => {}
        }
        let (first, ranks) = (self.report.get(0), self.report.get(1));
        let phase = if first >> 32 == 1 { Phase::Dispatch } else { Phase::Combine };
        match first as u32 {
            0 => Ok(()),
            1 => Err(ExchangeFailure::Aborted),
            2 => Err(ExchangeFailure::Silent { ranks, phase }),
            3 => Err(ExchangeFailure::Overflow),
            _ => Err(ExchangeFailure::Malformed { ranks }),
        }
    }
}

/// Ends epochs from any thread, also while the device waits. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AbortHandle(pub(super) Arc<Control>);

impl AbortHandle {
    /// Ends `epoch` and all before it: kernels that wait, or come to wait, give up. Later epochs are not touched, so a
    /// word that comes late does no harm.
    pub fn abort(&self, epoch: u64) {
        {
            let cell = self.0.abort.lock().unwrap_or_else(PoisonError::into_inner);
            cell.set(0, cell.get(0).max(epoch + 1));
        }
        if let Some((since, nccl)) = self.0.carrier()
            && since <= epoch
        {
            nccl.abort();
        }
    }
}

/// What `Context` in `exchange.cuh` is filled from.
pub(super) struct ContextWords<'a> {
    pub(super) control: &'a Control,
    pub(super) membership: &'a Membership,
    /// Heaps as this process sees them.
    pub(super) dp: Vec<u64>,
    pub(super) ep: Vec<u64>,
    pub(super) own: u64,
    pub(super) flags: bool,
}

impl ContextWords<'_> {
    /// The struct, word by word.
    pub(super) fn words(&self) -> Vec<u64> {
        let Membership { epoch, rank, dp, ep, slots, timeout, .. } = self.membership;
        let index = |members: &[Option<Member>]| {
            let mine = members.iter().position(|member| member.is_some_and(|member| member.rank == *rank));
            mine.map_or(NONE, |index| index as u32)
        };
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let (abort, report) = self.control.addresses();
        let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        let mut words = vec![abort, report, timeout_ns, *epoch, self.own];
        words.push(pair(*rank, dp.len() as u32));
        words.push(pair(ep.len() as u32, index(dp)));
        words.push(pair(index(ep), *slots as u32));
        words.push(pair(u32::from(self.flags), 0));
        for heaps in [&self.dp, &self.ep] {
            words.extend((0..RANKS_MAX).map(|i| heaps.get(i).copied().unwrap_or(0)));
        }
        for members in [dp, ep] {
            let rank = |i: usize| members.get(i).copied().flatten().map_or(NONE, |member| member.rank);
            words.extend((0..RANKS_MAX).step_by(2).map(|i| pair(rank(i), rank(i + 1))));
        }
        words
    }
}
