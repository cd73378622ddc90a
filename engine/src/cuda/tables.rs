//! The expert map as kernels read it, changed between two steps without a new recording.

use heliostat_kernels::cuda::router::slot_table;
use heliostat_kernels::cuda::{Buffer, CudaError, Device, Event, Pinned, Stream};

use crate::eplb::map::{ExpertMap, MapShape};

/// Messages that wait to be copied, at most; a further one waits for the first.
const PENDING_MAX: usize = 64;

/// Small host-to-device copies that do not block: each from its own place, which is used again when it was copied.
#[derive(Debug)]
pub(super) struct Mail {
    words: Pinned<u32>,
    words_max: usize,
    sent: Vec<Option<Event>>,
    next: usize,
}

impl Mail {
    /// For messages of up to `words_max` words.
    pub(super) fn new(device: &Device, words_max: usize) -> Result<Self, CudaError> {
        let sent = std::iter::repeat_with(|| None).take(PENDING_MAX).collect();
        Ok(Self { words: device.pinned(words_max * PENDING_MAX)?, words_max, sent, next: 0 })
    }

    /// Queues a copy of `words` to the front of `to`.
    pub(super) fn send(&mut self, stream: &Stream, words: &[u32], to: &Buffer<u32>) -> Result<(), CudaError> {
        let index = self.next;
        self.next = (index + 1) % PENDING_MAX;
        if let Some(event) = self.sent[index].take() {
            event.synchronize()?;
        }
        self.words.write(index * self.words_max, words);
        to.copy_from_pinned_at(stream, &self.words, index * self.words_max, words.len())?;
        self.sent[index] = Some(stream.record()?);
        Ok(())
    }
}

/// Maps of all MoE layers.
#[derive(Debug)]
pub(super) struct Tables {
    /// Per layer: slots by expert, as the router kernel reads them.
    pub(super) slots: Vec<Buffer<u32>>,
    /// Per layer: place in the pool of each local slot. Empty on a rank without experts.
    pub(super) places: Vec<Buffer<u32>>,
    mail: Mail,
}

impl Tables {
    /// Empty tables of `moe_layers` layers.
    pub(super) fn new(
        device: &Device,
        moe_layers: usize,
        shape: MapShape,
        local: usize,
    ) -> Result<Self, CudaError> {
        let words = shape.experts as usize + 1 + shape.slots as usize;
        let buffers = |words: usize| (0..moe_layers).map(|_| device.alloc::<u32>(words)).collect();
        let (slots, places): (Result<Vec<_>, _>, Result<Vec<_>, _>) = (buffers(words), buffers(local));
        Ok(Self { slots: slots?, places: places?, mail: Mail::new(device, words.max(local))? })
    }

    /// Queues a map that no layout describes: expert e on slot e modulo `slots`.
    pub(super) fn fold(
        &mut self,
        stream: &Stream,
        moe_layer: usize,
        (experts, slots): (usize, usize),
        places: &[u32],
    ) -> Result<(), CudaError> {
        let starts = 0..=experts as u32;
        let table: Vec<u32> = starts.chain((0..experts).map(|expert| (expert % slots) as u32)).collect();
        self.mail.send(stream, &table, &self.slots[moe_layer])?;
        self.mail.send(stream, places, &self.places[moe_layer])
    }

    /// Queues the map of one layer; `places`: where the local slots' weights lie, on a rank with experts.
    pub(super) fn set(
        &mut self,
        stream: &Stream,
        moe_layer: usize,
        map: &ExpertMap,
        places: Option<&[u32]>,
    ) -> Result<(), CudaError> {
        let table = slot_table(map.shape().experts as usize, map.physical_to_logical());
        self.mail.send(stream, &table, &self.slots[moe_layer])?;
        places.map_or(Ok(()), |places| self.mail.send(stream, places, &self.places[moe_layer]))
    }
}
