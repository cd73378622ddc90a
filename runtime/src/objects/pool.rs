//! The segments of this process: those that hold its objects, and those that wait for the next one.
//!
//! A segment is written anew only when nobody reads what was in it: the store says so of other processes, its own count of
//! this one. (OB-2)

use std::collections::BTreeMap;
use std::sync::Arc;

use super::map::Segment;

/// Capacities are multiples of this.
const PAGE_BYTES: usize = 4096;
/// An idle segment may be larger than what is put into it: up to twice and this.
const SPARE_BYTES: usize = 1 << 20;

#[derive(Default)]
pub(super) struct Pool {
    idle: Vec<Segment>,
    published: BTreeMap<u64, Published>,
    /// Of objects that were freed, until nobody reads them.
    freeing: BTreeMap<u64, Published>,
    /// The same, until this process itself does not read them.
    read_here: Vec<Arc<Segment>>,
    /// Sizes of objects whose only memory is the store's, or its disk.
    evicted: BTreeMap<u64, u64>,
}

pub(super) struct Published {
    pub(super) segment: Arc<Segment>,
    pub(super) bytes: u64,
    /// It was shown to a store that is no more: nobody knows who reads it.
    stale: bool,
}

/// What a new store has to be told.
pub(super) enum Known {
    Memory(u64, u64, Arc<Segment>),
    Spilled(u64, u64),
}

impl Pool {
    /// The capacity for an object, so that segments fit more than one size.
    pub(super) fn capacity(bytes: usize) -> usize {
        let step = (bytes.next_power_of_two() / 16).max(PAGE_BYTES);
        bytes.max(1).next_multiple_of(step)
    }

    /// An idle segment for an object of that size.
    pub(super) fn take(&mut self, bytes: usize) -> Option<Segment> {
        for segment in std::mem::take(&mut self.read_here) {
            self.keep(segment);
        }
        let fits = |segment: &Segment| (bytes..=2 * bytes + SPARE_BYTES).contains(&segment.capacity());
        let best = self.idle.iter().enumerate().filter(|(_, segment)| fits(segment));
        let best = best.min_by_key(|(_, segment)| segment.capacity())?.0;
        Some(self.idle.swap_remove(best))
    }

    /// A segment that nothing was published in.
    pub(super) fn give_back(&mut self, segment: Segment) {
        self.idle.push(segment);
    }

    pub(super) fn publish(&mut self, number: u64, segment: Arc<Segment>, bytes: u64) {
        self.published.insert(number, Published { segment, bytes, stale: false });
    }

    /// The store did not take an object.
    pub(super) fn withdraw(&mut self, number: u64) {
        self.published.remove(&number);
    }

    /// The segment of an object, while it is mapped here.
    pub(super) fn published(&self, number: u64) -> Option<Arc<Segment>> {
        self.published.get(&number).map(|published| published.segment.clone())
    }

    /// Nobody has a ref to the object any more.
    pub(super) fn free(&mut self, number: u64) {
        self.evicted.remove(&number);
        if let Some(published) = self.published.remove(&number) {
            self.freeing.insert(number, published);
        }
    }

    /// Nobody else reads a freed object. The bytes that are to be given back to the store, if it is not used again.
    pub(super) fn recycled(&mut self, number: u64) -> u64 {
        let Some(published) = self.freeing.remove(&number).or_else(|| self.published.remove(&number)) else {
            return 0;
        };
        if published.stale {
            return published.segment.capacity() as u64;
        }
        self.keep(published.segment);
        0
    }

    fn keep(&mut self, segment: Arc<Segment>) {
        match Arc::try_unwrap(segment) {
            Ok(segment) => self.idle.push(segment),
            Err(read_here) => self.read_here.push(read_here),
        }
    }

    /// Unmaps an object unless it is read here. Whether it did.
    pub(super) fn evict(&mut self, number: u64) -> bool {
        if self.freeing.remove(&number).is_some() {
            return true;
        }
        match self.published.remove(&number) {
            Some(published) if Arc::strong_count(&published.segment) > 1 => {
                self.published.insert(number, published);
                false
            }
            Some(published) => {
                self.evicted.insert(number, published.bytes);
                true
            }
            None => true,
        }
    }

    /// Gives up all idle segments; their size.
    pub(super) fn trim(&mut self) -> u64 {
        std::mem::take(&mut self.idle).iter().map(|segment| segment.capacity() as u64).sum()
    }

    /// The store is gone, and with it the knowledge of who reads what.
    pub(super) fn store_lost(&mut self) {
        self.idle.clear();
        self.freeing.clear();
        self.read_here.clear();
        for published in self.published.values_mut() {
            published.stale = true;
        }
    }

    /// What a new store has to be told.
    pub(super) fn known(&self) -> Vec<Known> {
        let memory = self.published.iter().map(|(n, p)| Known::Memory(*n, p.bytes, p.segment.clone()));
        let spilled = self.evicted.iter().map(|(n, bytes)| Known::Spilled(*n, *bytes));
        memory.chain(spilled).collect()
    }

    /// Objects that were freed and that the store may still have.
    pub(super) fn freeing(&self) -> Vec<u64> {
        self.freeing.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_used_again_only_when_nobody_reads_it() {
        let mut pool = Pool::default();
        let segment = Arc::new(Segment::create(Pool::capacity(100_000)).unwrap());
        let address = segment.bytes().as_ptr();
        pool.publish(1, segment.clone(), 100_000);
        pool.free(1);
        assert!(pool.take(100_000).is_none(), "the store has not said that nobody reads it");
        assert_eq!(pool.recycled(1), 0);
        assert!(pool.take(100_000).is_none(), "it is read here");
        drop(segment);
        let again = pool.take(100_000).unwrap();
        assert_eq!(again.bytes().as_ptr(), address, "the same memory, mapped and warm");
        assert!(pool.take(100_000).is_none());
    }

    #[test]
    fn after_the_loss_of_a_store_nothing_that_it_knew_is_written_anew() {
        let mut pool = Pool::default();
        let segment = Arc::new(Segment::create(Pool::capacity(100_000)).unwrap());
        let capacity = segment.capacity() as u64;
        pool.publish(1, segment, 100_000);
        pool.store_lost();
        assert_eq!(pool.known().len(), 1);
        pool.free(1);
        assert_eq!(pool.recycled(1), capacity, "its memory goes back");
        assert!(pool.take(100_000).is_none());
    }

    #[test]
    fn capacities_waste_little_and_segments_fit_more_than_one_size() {
        for bytes in [1, 4096, 65_537, 1_000_000, 1 << 30, (1 << 30) + 1] {
            let capacity = Pool::capacity(bytes);
            assert!(capacity >= bytes && capacity <= bytes + bytes / 8 + PAGE_BYTES, "{bytes}: {capacity}");
            assert_eq!(capacity % PAGE_BYTES, 0);
        }
        assert_eq!(Pool::capacity(1 << 30), 1 << 30);
    }
}
