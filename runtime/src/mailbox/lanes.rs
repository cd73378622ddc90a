//! The queues of one mailbox: one for each concurrency group, and which message is next.
//!
//! Pure: nothing here wakes, waits or runs anything.

use std::collections::VecDeque;

/// How many messages of a concurrency group may be under way at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit(pub(crate) usize);

impl Limit {
    /// Of messages without a group, unless the actor says otherwise.
    pub(crate) const NONE: Self = Self(usize::MAX);
}

/// Queues in the order of the actor's groups.
pub(super) struct Lanes<T> {
    lanes: Vec<Lane<T>>,
    /// Numbers messages as they arrive, so that lanes are served in that order.
    next: u64,
}

struct Lane<T> {
    queue: VecDeque<(u64, T)>,
    limit: Limit,
    running: usize,
}

impl<T> Lanes<T> {
    pub(super) fn new(limits: &[Limit]) -> Self {
        let lane = |&limit| Lane { queue: VecDeque::new(), limit, running: 0 };
        Self { lanes: limits.iter().map(lane).collect(), next: 0 }
    }

    /// Messages that wait in a lane.
    pub(super) fn waiting(&self, lane: usize) -> usize {
        self.lanes[lane].queue.len()
    }

    /// Appends a message; true if the lane was empty, so that somebody may wait for it.
    pub(super) fn push(&mut self, lane: usize, item: T) -> bool {
        let number = self.next;
        self.next += 1;
        let queue = &mut self.lanes[lane].queue;
        queue.push_back((number, item));
        queue.len() == 1
    }

    /// The oldest message of all lanes that may run one more. If its lane has a limit, the lane's number is told and is
    /// to be released when the message is done with.
    pub(super) fn pop(&mut self) -> Option<(T, Option<usize>)> {
        let free = self.lanes.iter().enumerate().filter(|(_, lane)| lane.running < lane.limit.0);
        let oldest = free.filter_map(|(i, lane)| Some((lane.queue.front()?.0, i))).min()?.1;
        let lane = &mut self.lanes[oldest];
        let (_, item) = lane.queue.pop_front()?;
        if lane.limit == Limit::NONE {
            return Some((item, None));
        }
        lane.running += 1;
        Some((item, Some(oldest)))
    }

    /// A message of the lane is done with.
    pub(super) fn release(&mut self, lane: usize) {
        let lane = &mut self.lanes[lane];
        assert!(lane.running > 0, "a place is given back once");
        lane.running -= 1;
    }

    /// Takes out of a lane what is not to be kept.
    pub(super) fn sweep(&mut self, lane: usize, keep: impl Fn(&T) -> bool) -> Vec<T> {
        let queue = &mut self.lanes[lane].queue;
        let mut swept = Vec::new();
        for (number, item) in std::mem::take(queue) {
            match keep(&item) {
                true => queue.push_back((number, item)),
                false => swept.push(item),
            }
        }
        swept
    }

    /// Takes everything out.
    pub(super) fn drain(&mut self) -> Vec<T> {
        let queues = self.lanes.iter_mut().map(|lane| std::mem::take(&mut lane.queue));
        queues.flatten().map(|(_, item)| item).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_group_holds_up_nobody_else_and_goes_on_in_order() {
        let mut lanes = Lanes::new(&[Limit::NONE, Limit(2), Limit(1)]);
        for (lane, item) in [(1, 'a'), (1, 'b'), (1, 'c'), (0, 'd'), (2, 'e'), (2, 'f'), (0, 'g')] {
            lanes.push(lane, item);
        }
        let mut popped = Vec::new();
        while let Some(next) = lanes.pop() {
            popped.push(next);
        }
        let expected = [('a', Some(1)), ('b', Some(1)), ('d', None), ('e', Some(2)), ('g', None)];
        assert_eq!(popped, expected);
        lanes.release(2);
        lanes.release(1);
        assert_eq!(lanes.pop(), Some(('c', Some(1))), "the older one first");
        assert_eq!(lanes.pop(), Some(('f', Some(2))));
        assert_eq!(lanes.pop(), None);
    }

    #[test]
    fn a_lane_says_when_it_was_empty_and_is_swept_alone() {
        let mut lanes = Lanes::new(&[Limit::NONE, Limit(1)]);
        assert!(lanes.push(0, 1) && !lanes.push(0, 2) && lanes.push(1, 3));
        assert_eq!(lanes.sweep(0, |&item| item == 2), [1]);
        assert_eq!((lanes.waiting(0), lanes.waiting(1)), (1, 1));
        assert_eq!(lanes.drain(), [2, 3]);
    }
}
