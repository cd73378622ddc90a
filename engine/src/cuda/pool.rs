//! The expert weights of one GPU: one pool of places for all MoE layers, and the handles that own places in it.
//!
//! A layer's slot names a place through a device table, so a remap writes the new expert to a free place and then
//! changes a word. A place becomes free when the last handle on it is dropped; the next writer waits for the steps that
//! may still read it.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;

use heliostat_kernels::cuda::checksum::Checksum;
use heliostat_kernels::cuda::heap::Heap;
use heliostat_kernels::cuda::{
    Buffer, CudaError, Device, Event, Pinned, Priority, StoredAs, Stream, WeightStack,
};

use super::lending::{Lender, LentPlace};
use crate::model::Expert;

/// Alignment of what lies in a pool.
const ALIGN: usize = 1024;

/// Places for expert weights. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ExpertPool(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) shape: PoolShape,
    /// All of it, so that peers can reach it.
    pub(super) heap: Heap,
    /// `[2 * width][hidden]` each: gate rows, then up rows.
    gate_up: WeightStack,
    /// `[hidden][width]` each.
    down: WeightStack,
    /// Carries weights here, behind the steps' stream and behind steps that may read a place that is free now.
    stream: Stream,
    /// Carries weights back to the host: waits for no step, since nobody writes to a place that is held.
    reads: Stream,
    /// Held by whoever brings weights here: one at a time.
    arrival: Mutex<Arrival>,
    free: Mutex<Free>,
    /// Rings when a place becomes free.
    freed: Condvar,
    /// Pools of the other ranks, by rank.
    pub(super) lenders: RwLock<Vec<Option<Lender>>>,
    /// How long weights may take to arrive, and a place to become free.
    patience: Duration,
}

/// What checks the weights that arrive.
#[derive(Debug)]
struct Arrival {
    checksum: Checksum,
    sum: Buffer<u64>,
    host: Pinned<u64>,
}

#[derive(Debug)]
struct Free {
    places: Vec<u32>,
    /// Steps before this mark may read places that are free now.
    in_use_until: Option<Event>,
}

/// Why weights found no place.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// All places are taken.
    #[error("all {0} places for expert weights on the GPU are taken")]
    Full(usize),
    /// A rank's pool is not mapped here.
    #[error("the expert weights of rank {0} cannot be reached from this GPU")]
    OutOfReach(usize),
    /// A rank lent a place that it does not have.
    #[error("rank {rank} lent place {place} of its {places}")]
    NoSuchPlace {
        /// The rank.
        rank: usize,
        /// The place.
        place: u32,
        /// Those it has.
        places: usize,
    },
    /// What arrived is not what was lent.
    #[error("the checksum does not match: {found:016x} arrived and {lent:016x} was lent")]
    Damaged {
        /// Of what arrived.
        found: u64,
        /// What the lender said.
        lent: u64,
    },
    /// A copy did not end. It may still be under way, so this process must end.
    #[error("a copy of expert weights hung for {0:?}")]
    Hung(Duration),
    /// The device failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl PoolError {
    /// Whether the device can no longer be used by this process.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Hung(_) => true,
            Self::Cuda(why) => why.is_fatal(),
            Self::Full(_) | Self::OutOfReach(_) | Self::NoSuchPlace { .. } | Self::Damaged { .. } => false,
        }
    }
}

/// What a pool is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolShape {
    /// Places.
    pub places: usize,
    /// Elements of the residual stream.
    pub hidden: usize,
    /// Width of an expert.
    pub width: usize,
    /// How weights are stored.
    pub stored: StoredAs,
}

/// One part of all places, which lie one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    start: usize,
    /// Bytes of one place.
    each: usize,
}

impl Region {
    fn of(self, places: Range<usize>) -> Range<usize> {
        self.start + places.start * self.each..self.start + places.end * self.each
    }
}

impl PoolShape {
    fn gate_up(&self) -> (usize, usize) {
        (2 * self.width, self.hidden)
    }

    fn down(&self) -> (usize, usize) {
        (self.hidden, self.width)
    }

    /// Gate and up elements and scales, down elements and scales.
    fn regions(&self) -> [Region; 4] {
        let (gate_up, gate_up_scales) = WeightStack::sizes(self.stored, self.gate_up());
        let (down, down_scales) = WeightStack::sizes(self.stored, self.down());
        let scale = size_of::<f32>();
        let mut start = 0;
        [gate_up, gate_up_scales * scale, down, down_scales * scale].map(|each| {
            let region = Region { start, each };
            start = region.of(0..self.places).end.next_multiple_of(ALIGN);
            region
        })
    }

    /// Device memory of the whole pool.
    pub fn bytes(&self) -> usize {
        self.regions().map(|region| region.of(0..self.places).end)[3]
    }

    /// Bytes of one expert.
    pub fn expert_bytes(&self) -> usize {
        self.regions().map(|region| region.each).iter().sum()
    }

    /// The bytes of the pool that belong to `place`, in an order that is the same in all pools.
    pub(super) fn parts(&self, place: u32) -> impl Iterator<Item = Range<usize>> {
        let place = place as usize;
        let parts = self.regions().map(|region| region.of(place..place + 1));
        parts.into_iter().filter(|part| !part.is_empty())
    }
}

impl ExpertPool {
    /// Allocates the places. Weights that take longer than `patience` to arrive count as lost with the device.
    ///
    /// # Errors
    /// The device is full.
    pub fn new(device: &Device, shape: PoolShape, patience: Duration) -> Result<Self, CudaError> {
        let PoolShape { places, stored, .. } = shape;
        let heap = Heap::new(device, shape.bytes())?;
        let [gate_up, gate_up_scales, down, down_scales] =
            shape.regions().map(|region| heap.memory().slice(region.of(0..places)));
        let stack =
            |shape, data, scales: Buffer<u8>| WeightStack::within(stored, places, shape, data, scales.cast());
        let checksum = Checksum::new(device)?;
        let arrival = Arrival { checksum, sum: device.alloc(1)?, host: device.pinned(1)? };
        let pool = Self(Arc::new(Inner {
            gate_up: stack(shape.gate_up(), gate_up, gate_up_scales),
            down: stack(shape.down(), down, down_scales),
            shape,
            heap,
            stream: device.stream(Priority::Low)?,
            reads: device.stream(Priority::Low)?,
            arrival: Mutex::new(arrival),
            free: Mutex::new(Free { places: (0..places as u32).rev().collect(), in_use_until: None }),
            freed: Condvar::new(),
            lenders: RwLock::default(),
            patience,
        }));
        // The kernel's first launch may wait for the whole device: not once steps run.
        match pool.fill(0, |_| Ok(())) {
            Ok(_) => Ok(pool),
            Err(PoolError::Cuda(why)) => Err(why),
            Err(why) => Err(CudaError::Other(why.to_string())),
        }
    }

    /// Gate and up matrices of all places.
    pub fn gate_up(&self) -> &WeightStack {
        &self.0.gate_up
    }

    /// Down matrices of all places.
    pub fn down(&self) -> &WeightStack {
        &self.0.down
    }

    /// Takes a free place, whose weights are then the caller's to write.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&self) -> Result<PooledExpert, PoolError> {
        self.take_within(Duration::ZERO)
    }

    /// Takes a place, free now or soon: one that is lent comes back.
    pub(super) fn take_soon(&self) -> Result<PooledExpert, PoolError> {
        self.take_within(self.0.patience)
    }

    fn take_within(&self, limit: Duration) -> Result<PooledExpert, PoolError> {
        // The lock ends here: a handle that is dropped below takes it again.
        let (place, in_use_until) = {
            let free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.0.freed.wait_timeout_while(free, limit, |free| free.places.is_empty());
            let (mut free, _) = waited.unwrap_or_else(PoisonError::into_inner);
            let place = free.places.pop().ok_or(PoolError::Full(self.0.shape.places))?;
            (place, free.in_use_until.clone())
        };
        let taken = PooledExpert { pool: self.clone(), place, checksum: None };
        if let Some(event) = in_use_until {
            self.0.stream.wait(&event)?;
        }
        Ok(taken)
    }

    /// Copies an expert to a free place. Blocks until it is there.
    ///
    /// # Errors
    /// There is no place, or the device failed.
    pub fn put(&self, expert: &Expert) -> Result<PooledExpert, PoolError> {
        let taken = self.take_soon()?;
        let place = taken.place as usize;
        let checksum = self.fill(taken.place, |stream| {
            // A copy from pageable memory waits within the driver for what is ahead of it: nothing may be.
            stream.record()?.wait_patiently(self.0.patience)?;
            self.0.gate_up.write(stream, place, &[&expert.gate, &expert.up])?;
            self.0.down.write(stream, place, &[&expert.down])
        })?;
        Ok(taken.checked(checksum))
    }

    /// Has `queue` bring weights to `place`, and returns their checksum when they are there.
    pub(super) fn fill(
        &self,
        place: u32,
        queue: impl FnOnce(&Stream) -> Result<(), CudaError>,
    ) -> Result<u64, PoolError> {
        let Inner { stream, arrival, shape, heap, patience, .. } = &*self.0;
        let Arrival { checksum, sum, host } = &*arrival.lock().unwrap_or_else(PoisonError::into_inner);
        let parts: Vec<Buffer<u8>> = shape.parts(place).map(|part| heap.memory().slice(part)).collect();
        let queued = queue(stream)
            .and_then(|()| checksum.queue(stream, &parts, sum))
            .and_then(|()| sum.copy_to_pinned(stream, host, 1));
        // What was queued before something failed has to end as well.
        let ended = stream.record()?.wait_patiently(*patience)?;
        queued?;
        if ended { Ok(host.get(0)) } else { Err(PoolError::Hung(*patience)) }
    }

    /// Says that steps before `event` may read places that become free from now on.
    pub fn in_use_until(&self, event: Event) {
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner).in_use_until = Some(event);
    }
}

/// An expert on the GPU. The last handle frees its place.
#[derive(Debug)]
pub struct PooledExpert {
    pool: ExpertPool,
    place: u32,
    /// Of its weights when they came into a pool for the first time; none for a place that somebody else writes.
    checksum: Option<u64>,
}

impl PooledExpert {
    /// Its place in the pool.
    pub fn place(&self) -> u32 {
        self.place
    }

    /// Bytes of its weights.
    pub fn size_bytes(&self) -> usize {
        self.pool.0.shape.expert_bytes()
    }

    /// What a peer has to know to copy it, as long as this handle keeps it where it is.
    pub fn lent(&self) -> Option<LentPlace> {
        self.checksum.map(|checksum| LentPlace { place: self.place, checksum })
    }

    /// The same handle, its weights having this checksum.
    pub(super) fn checked(mut self, checksum: u64) -> Self {
        self.checksum = Some(checksum);
        self
    }

    /// Copies it to the host. Blocks.
    ///
    /// # Errors
    /// The device failed.
    pub fn to_host(&self) -> Result<Expert, CudaError> {
        let Inner { gate_up, down, reads, .. } = &*self.pool.0;
        let both = gate_up.read(reads, self.place as usize)?;
        let width = both.rows() / 2;
        Ok(Expert {
            gate: both.row_slice(0..width),
            up: both.row_slice(width..2 * width),
            down: down.read(reads, self.place as usize)?,
        })
    }
}

impl Drop for PooledExpert {
    fn drop(&mut self) {
        self.pool.0.free.lock().unwrap_or_else(PoisonError::into_inner).places.push(self.place);
        self.pool.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
        a.start < b.end && b.start < a.end
    }

    #[test]
    fn places_share_no_byte_and_fill_the_pool() {
        for stored in [StoredAs::Bf16, StoredAs::Fp8] {
            let shape = PoolShape { places: 3, hidden: 272, width: 160, stored };
            let all: Vec<Range<usize>> = (0..3).flat_map(|place| shape.parts(place)).collect();
            assert_eq!(all.len(), if stored == StoredAs::Fp8 { 12 } else { 6 });
            for (index, part) in all.iter().enumerate() {
                assert!(
                    part.end <= shape.bytes() && part.start.is_multiple_of(4) && part.len().is_multiple_of(4)
                );
                assert!(all[..index].iter().all(|other| !overlap(part, other)), "{part:?}");
            }
            let bytes: usize = shape.parts(1).map(|part| part.len()).sum();
            assert_eq!(bytes, shape.expert_bytes());
            assert!(shape.bytes() - 3 * bytes < 4 * ALIGN, "{} of {}", 3 * bytes, shape.bytes());
        }
    }
}
