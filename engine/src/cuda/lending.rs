//! Experts that go from one GPU to another: ranks map each other's pools, and copy from places that are lent to them.
//!
//! Who owns an expert keeps its place as it is while it is lent. Who borrows it copies it place to place with the copy engines,
//! on the pool's stream of low priority, and compares the checksum of what arrived, worked out where it lies, with the
//! one that the weights had when they came into a pool for the first time. So a place that was overwritten all the same, by an
//! owner that took it back, is noticed.
//!
//! Nothing of this can hold up a step for ever. No kernel waits for a pool's stream; that stream waits only for steps that were
//! launched before; and who waits for it asks the driver again and again instead of sleeping within it, so no lock of
//! the driver is held that a launch needs.

use std::sync::{PoisonError, RwLockReadGuard};

use bincode::{Decode, Encode};
use heliostat_kernels::cuda::heap::{HeapHandle, PeerHeap};
use heliostat_kernels::cuda::{CudaError, StoredAs};

use super::pool::{ExpertPool, PoolError, PoolShape, PooledExpert};

/// Names a pool to the other ranks.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct PoolOffer {
    handle: Vec<u8>,
    places: u64,
    hidden: u64,
    width: u64,
    fp8: bool,
}

/// A place that its owner keeps as it is for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct LentPlace {
    /// Its index in the owner's pool.
    pub place: u32,
    /// Of the weights in it.
    pub checksum: u64,
}

/// The mapped pool of another rank.
#[derive(Debug)]
pub(super) struct Lender {
    heap: PeerHeap,
    shape: PoolShape,
}

impl PoolOffer {
    fn of(handle: HeapHandle, shape: PoolShape) -> Self {
        let PoolShape { places, hidden, width, stored } = shape;
        Self {
            handle: handle.to_bytes().to_vec(),
            places: places as u64,
            hidden: hidden as u64,
            width: width as u64,
            fp8: stored == StoredAs::Fp8,
        }
    }

    fn shape(&self) -> PoolShape {
        PoolShape {
            places: self.places as usize,
            hidden: self.hidden as usize,
            width: self.width as usize,
            stored: if self.fp8 { StoredAs::Fp8 } else { StoredAs::Bf16 },
        }
    }
}

impl ExpertPool {
    /// Its name, for the other ranks.
    pub fn offer(&self) -> PoolOffer {
        PoolOffer::of(self.0.heap.handle(), self.0.shape)
    }

    /// Maps the pools of other ranks, given by rank, in place of those mapped before; returns which could not be mapped,
    /// and why. No step may run: the driver may wait for the device.
    pub fn reach(&self, offers: &[Option<PoolOffer>]) -> Vec<(usize, CudaError)> {
        self.let_go();
        let mut failed = Vec::new();
        let open = |(rank, offer): (usize, &Option<PoolOffer>)| {
            let opened = offer.as_ref().map(|offer| self.open(offer))?;
            opened.map_err(|why| failed.push((rank, why))).ok()
        };
        let opened = offers.iter().enumerate().map(open).collect();
        *self.0.lenders.write().unwrap_or_else(PoisonError::into_inner) = opened;
        failed
    }

    fn open(&self, offer: &PoolOffer) -> Result<Lender, CudaError> {
        let (shape, mine) = (offer.shape(), self.0.shape);
        if (PoolShape { places: mine.places, ..shape }) != mine {
            return Err(CudaError::Other(format!("its experts are not stored as here: {shape:?}, {mine:?}")));
        }
        let handle = HeapHandle::from_bytes(&offer.handle)
            .ok_or_else(|| CudaError::Other("it sent no handle of a heap".to_owned()))?;
        let heap = PeerHeap::open(self.0.heap.memory().device(), handle, shape.bytes())?;
        Ok(Lender { heap, shape })
    }

    /// Lets go of all pools of other ranks, when the copy under way has ended: memory of a rank that is gone is free when
    /// nobody maps it.
    pub fn let_go(&self) {
        self.0.lenders.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether experts of `rank` can be borrowed.
    pub fn reaches(&self, rank: usize) -> bool {
        self.lenders().get(rank).is_some_and(Option::is_some)
    }

    /// Copies an expert that `rank` lends to a free place of this pool, and checks it. Blocks until it is there.
    ///
    /// # Errors
    /// There is no place, the rank's pool is not mapped, what arrived is not what was lent, or the device failed.
    pub fn borrow(&self, rank: usize, lent: LentPlace) -> Result<PooledExpert, PoolError> {
        let taken = self.take_soon()?;
        // Held until the copy has ended, so that nobody lets go of the memory that it reads.
        let lenders = self.lenders();
        let lender = lenders.get(rank).and_then(Option::as_ref).ok_or(PoolError::OutOfReach(rank))?;
        let (place, places) = (lent.place, lender.shape.places);
        if place as usize >= places {
            return Err(PoolError::NoSuchPlace { rank, place, places });
        }
        let found = self.fill(taken.place(), |stream| {
            let parts = lender.shape.parts(place).zip(self.0.shape.parts(taken.place()));
            for (theirs, mine) in parts {
                lender.heap.copy_to(stream, theirs.start, &self.0.heap.memory().slice(mine))?;
            }
            Ok(())
        })?;
        if found == lent.checksum {
            Ok(taken.checked(found))
        } else {
            Err(PoolError::Damaged { found, lent: lent.checksum })
        }
    }

    fn lenders(&self) -> RwLockReadGuard<'_, Vec<Option<Lender>>> {
        self.0.lenders.read().unwrap_or_else(PoisonError::into_inner)
    }
}
