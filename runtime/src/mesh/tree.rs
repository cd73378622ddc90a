//! The tree that a round goes down and comes back up, and the order in which results are reduced.
//!
//! Pure. The tree is over *runs*: neighbours in a slice that live in one process are one stop. Each stop's subtree is a
//! range of runs that begins with it. The order of reduction is another, fixed tree, over positions: see `Fold`.

use std::ops::Range;

use crate::group::GroupView;
use crate::handle::{ActorAddr, ProcessId};

use super::dims::Slice;

/// Who takes part in the rounds of one slice in one epoch, in order of position.
#[derive(Debug)]
pub(super) struct Plan {
    /// Rank and address of each position.
    pub(super) members: Vec<(u32, ActorAddr)>,
    /// Positions of each stop of the tree.
    pub(super) runs: Vec<Range<usize>>,
}

impl Plan {
    /// The plan of a slice, or the ranks of it that are not ready.
    pub(super) fn new(view: &GroupView, slice: &Slice) -> Result<Self, Vec<u32>> {
        let seat = |rank: u32| (rank, view.members.get(rank as usize).and_then(|member| member.addr.clone()));
        let seats: Vec<(u32, Option<ActorAddr>)> = slice.ranks().map(seat).collect();
        let absent: Vec<u32> =
            seats.iter().filter(|(_, addr)| addr.is_none()).map(|(rank, _)| *rank).collect();
        if !absent.is_empty() {
            return Err(absent);
        }
        let members: Vec<(u32, ActorAddr)> =
            seats.into_iter().filter_map(|(rank, addr)| Some((rank, addr?))).collect();
        let runs = runs(members.iter().map(|(_, addr)| addr.process));
        Ok(Self { members, runs })
    }

    /// Members of the stops in a range.
    pub(super) fn members_of(&self, runs: Range<usize>) -> &[(u32, ActorAddr)] {
        match (self.runs.get(runs.start), self.runs.get(runs.end.wrapping_sub(1))) {
            (Some(first), Some(last)) => &self.members[first.start..last.end],
            _ => &[],
        }
    }
}

/// Ranges of neighbours in the same process.
fn runs(processes: impl Iterator<Item = ProcessId>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut last = None;
    for (position, process) in processes.enumerate() {
        match runs.last_mut() {
            Some(run) if last == Some(process) => run.end = position + 1,
            _ => runs.push(position..position + 1),
        }
        last = Some(process);
    }
    runs
}

/// The subtrees right below the first stop of `range`, largest first: a k-nomial tree. Of 64 stops with `fan_out` 4 the
/// first has 9 children and the depth is 3.
pub(super) fn children(range: Range<usize>, fan_out: usize) -> Vec<Range<usize>> {
    let fan_out = fan_out.max(2);
    let count = range.len();
    let mut block = 1;
    while block * fan_out < count {
        block *= fan_out;
    }
    let (mut children, mut end) = (Vec::new(), range.end);
    while block > 0 && count > 1 {
        let first = range.start + block;
        children.extend((first..end).step_by(block).map(|start| start..(start + block).min(end)));
        end = end.min(first);
        block /= fan_out;
    }
    children
}

/// Reduces values of neighbouring positions in a fixed order: that of a binary tree over all `count` positions, left
/// before right. Which values meet, and in which order, depends on `count` alone, so neither fan-out nor processes
/// change a bit of the result, even where the operation is associative on paper only (floats).
///
/// MS-3.
#[derive(Debug)]
pub(super) struct Fold<T> {
    count: u32,
    /// Ascending; no two of them can be reduced any further yet.
    parts: Vec<Part<T>>,
}

/// The reduced value of one node of the binary tree: of positions `index << level` to `(index + 1) << level`, as far as
/// there are any.
#[derive(Debug, Clone, PartialEq, bincode::Encode, bincode::Decode)]
pub(super) struct Part<T> {
    level: u8,
    index: u32,
    pub(super) value: T,
}

impl<T> Part<T> {
    /// The value of one position.
    pub(super) fn of(position: u32, value: T) -> Self {
        Self { level: 0, index: position, value }
    }

    fn start(&self) -> u64 {
        u64::from(self.index) << self.level.min(32)
    }

    fn end(&self) -> u64 {
        (u64::from(self.index) + 1) << self.level.min(32)
    }

    /// The position that it is of, if it is of one that was not reduced.
    pub(super) fn position(&self) -> Option<u32> {
        (self.level == 0).then_some(self.index)
    }

    pub(super) fn try_map<U, E>(self, change: impl FnOnce(T) -> Result<U, E>) -> Result<Part<U>, E> {
        Ok(Part { level: self.level, index: self.index, value: change(self.value)? })
    }
}

impl<T> Fold<T> {
    /// Reduces all that can be.
    pub(super) fn new(count: u32, mut parts: Vec<Part<T>>, mut reduce: impl FnMut(T, T) -> T) -> Self {
        parts.sort_by_key(Part::start);
        let mut fold = Self { count, parts: Vec::with_capacity(parts.len()) };
        for part in parts {
            fold.push(part, &mut reduce);
        }
        fold
    }

    fn push(&mut self, mut part: Part<T>, reduce: &mut impl FnMut(T, T) -> T) {
        while !self.is_whole(&part) {
            let left = |left: &mut Part<T>| left.level == part.level && left.index + 1 == part.index;
            match part.index % 2 {
                1 => match self.parts.pop_if(left) {
                    Some(left) => part.value = reduce(left.value, part.value),
                    None => break,
                },
                // What would stand to its right is beyond the end.
                _ if part.end() >= u64::from(self.count) => {}
                _ => break,
            }
            part.index /= 2;
            part.level += 1;
        }
        self.parts.push(part);
    }

    fn is_whole(&self, part: &Part<T>) -> bool {
        part.index == 0 && part.end() >= u64::from(self.count)
    }

    /// What is there, ascending.
    pub(super) fn into_parts(self) -> Vec<Part<T>> {
        self.parts
    }

    /// The value of all positions, if all were there.
    pub(super) fn into_whole(mut self) -> Option<T> {
        let last = self.parts.pop()?;
        (self.parts.is_empty() && self.is_whole(&last)).then_some(last.value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Levels below the first stop of a tree of so many stops.
    fn depth(count: usize, fan_out: usize) -> u32 {
        let (mut depth, mut reach) = (0, 1);
        while reach < count {
            reach *= fan_out.max(2);
            depth += 1;
        }
        depth
    }

    fn count(range: &Range<usize>, fan_out: usize, level: u32, deepest: &mut u32, seen: &mut Vec<usize>) {
        seen.push(range.start);
        *deepest = (*deepest).max(level);
        for child in children(range.clone(), fan_out) {
            assert!(child.start > range.start && child.end <= range.end && !child.is_empty());
            count(&child, fan_out, level + 1, deepest, seen);
        }
    }

    #[test]
    fn the_tree_of_64_stops() {
        let of_root = |fan_out| children(0..64, fan_out);
        assert_eq!(of_root(2), [32..64, 16..32, 8..16, 4..8, 2..4, 1..2]);
        assert_eq!(of_root(8).len(), 14);
        assert_eq!(of_root(64).len(), 63, "flat");
        assert!(children(5..6, 4).is_empty());
        assert_eq!(children(0..5, 4), [4..5, 1..2, 2..3, 3..4]);
        assert_eq!([depth(1, 4), depth(4, 4), depth(5, 4), depth(64, 4)], [0, 1, 2, 3]);
    }

    #[test]
    fn neighbours_in_one_process_are_one_stop() {
        let processes = [1, 1, 2, 2, 2, 1, 3];
        let found = runs(processes.into_iter().map(ProcessId));
        assert_eq!(found, [0..2, 2..5, 5..6, 6..7]);
    }

    /// Reduces a range of positions as its tree of processes would: each stop its own values and what its children say.
    fn up(positions: &[Range<usize>], range: Range<usize>, fan_out: usize, of: u32) -> Vec<Part<String>> {
        let own =
            positions[range.start].clone().map(|position| Part::of(position as u32, position.to_string()));
        let mut parts: Vec<Part<String>> = own.collect();
        for child in children(range, fan_out) {
            parts.extend(up(positions, child, fan_out, of));
        }
        Fold::new(of, parts, |left, right| format!("({left} {right})")).into_parts()
    }

    fn flat(count: u32) -> String {
        let parts = (0..count).map(|position| Part::of(position, position.to_string())).collect();
        Fold::new(count, parts, |left, right| format!("({left} {right})")).into_whole().unwrap()
    }

    #[test]
    fn the_order_of_reduction() {
        assert_eq!(flat(1), "0");
        assert_eq!(flat(4), "((0 1) (2 3))");
        assert_eq!(flat(7), "(((0 1) (2 3)) ((4 5) 6))");
    }

    #[test]
    fn a_value_that_is_missing_or_there_twice_makes_no_whole() {
        let whole = |positions: &[u32]| {
            let parts = positions.iter().map(|position| Part::of(*position, ())).collect();
            Fold::new(4, parts, |(), ()| ()).into_whole()
        };
        assert_eq!(whole(&[2, 0, 3, 1]), Some(()), "in whatever order they come");
        assert_eq!([whole(&[0, 1, 3]), whole(&[0, 1, 1, 2, 3]), whole(&[]), whole(&[1, 2, 3])], [None; 4]);
    }

    proptest! {
        #[test]
        fn every_stop_is_in_the_tree_once_and_no_deeper_than_it_need_be(stops in 1usize..300, fan_out in 0usize..70) {
            let (mut deepest, mut seen) = (0, Vec::new());
            count(&(0..stops), fan_out, 0, &mut deepest, &mut seen);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..stops).collect::<Vec<_>>());
            prop_assert!(deepest <= depth(stops, fan_out));
        }

        /// MS-3: the order of reduction is that of one process with all values, whoever holds them.
        #[test]
        fn neither_fan_out_nor_processes_change_the_order(
            lens in prop::collection::vec(1usize..6, 1..40),
            fan_out in 2usize..9,
        ) {
            let mut end = 0;
            let positions: Vec<Range<usize>> =
                lens.iter().map(|len| { let start = end; end += len; start..end }).collect();
            let parts = up(&positions, 0..positions.len(), fan_out, end as u32);
            prop_assert_eq!(parts.len(), 1);
            prop_assert_eq!(&parts[0].value, &flat(end as u32));
        }
    }
}
