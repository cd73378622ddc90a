//! The expert weights of one GPU: one pool of places for all MoE layers, and the handles that own places in it.
//!
//! A layer's slot names a place through a device table, so a remap writes the new expert to a free place and then
//! changes a word. A place becomes free when the last handle on it is dropped; the next writer waits for the steps that
//! may still read it.

use std::sync::{Arc, Mutex, PoisonError};

use heliostat_kernels::cuda::{CudaError, Device, Event, Priority, StoredAs, Stream, WeightStack};

use crate::model::Expert;

/// Places for expert weights. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ExpertPool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// `[2 * width][hidden]` each: gate rows, then up rows.
    gate_up: WeightStack,
    /// `[hidden][width]` each.
    down: WeightStack,
    /// Carries weights here, behind the steps' stream and behind steps that may read a place that is free now.
    stream: Stream,
    /// Carries weights back to the host: waits for no step, since nobody writes to a place that is held.
    reads: Stream,
    free: Mutex<Free>,
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
    /// The device failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// What a pool is made for.
#[derive(Clone, Copy, Debug)]
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

impl PoolShape {
    /// Device memory of the whole pool.
    pub fn bytes(&self) -> usize {
        let Self { places, hidden, width, stored } = *self;
        let matrix = |shape| WeightStack::bytes_per_matrix(stored, shape);
        places * (matrix((2 * width, hidden)) + matrix((hidden, width)))
    }
}

impl ExpertPool {
    /// Allocates the places.
    ///
    /// # Errors
    /// The device is full.
    pub fn new(device: &Device, shape: PoolShape) -> Result<Self, CudaError> {
        let PoolShape { places, hidden, width, stored } = shape;
        Ok(Self(Arc::new(Inner {
            gate_up: WeightStack::new(device, stored, places, (2 * width, hidden))?,
            down: WeightStack::new(device, stored, places, (hidden, width))?,
            stream: device.stream(Priority::Low)?,
            reads: device.stream(Priority::Low)?,
            free: Mutex::new(Free { places: (0..places as u32).rev().collect(), in_use_until: None }),
        })))
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
        // The lock ends here: a handle that is dropped below takes it again.
        let (place, in_use_until) = {
            let mut free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
            let place = free.places.pop().ok_or(PoolError::Full(self.0.gate_up.count()))?;
            (place, free.in_use_until.clone())
        };
        let taken = PooledExpert { pool: self.clone(), place };
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
        let taken = self.take()?;
        let place = taken.place as usize;
        self.0.gate_up.write(&self.0.stream, place, &[&expert.gate, &expert.up])?;
        self.0.down.write(&self.0.stream, place, &[&expert.down])?;
        Ok(taken)
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
}

impl PooledExpert {
    /// Its place in the pool.
    pub fn place(&self) -> u32 {
        self.place
    }

    /// Bytes of its weights.
    pub fn size_bytes(&self) -> usize {
        let matrix = |stack: &WeightStack| WeightStack::bytes_per_matrix(stack.stored(), stack.shape());
        matrix(&self.pool.0.gate_up) + matrix(&self.pool.0.down)
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
    }
}
