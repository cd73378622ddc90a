//! The work of expanded attention in a step: which pages are expanded together, and which block of threads attends with
//! which rows and heads. Pure.
//!
//! Nothing here changes a bit of a row: tiles of positions begin at a sequence's first one, and a row's sums see neither
//! the rows beside it nor the passes and blocks that they fall into.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::PAGE;

/// Query rows of an item, and positions of a tile, as in cu/expanded.cu.
pub(super) const TILE: usize = 128;
/// Heads whose keys and values are read at about the same time, so that they stay in the second-level cache.
const HEADS_AT_ONCE: usize = 16;
/// What an item costs besides its tiles, in tiles.
const ITEM_COST: usize = 1;

/// Neighbouring rows of a step that continue one prompt.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// First row of the step.
    pub row0: usize,
    /// Rows, at least one.
    pub rows: usize,
    /// Position of the first row.
    pub position0: usize,
    /// Pages of the sequence, in order; they reach the last row's position.
    pub block_table: &'a [u32],
}

/// The largest step that a plan is made for.
#[derive(Clone, Copy, Debug)]
pub struct PromptLimits {
    /// Rows of a step.
    pub rows: usize,
    /// Chunks of a step.
    pub chunks: usize,
    /// Positions of a sequence.
    pub positions: usize,
}

/// How much is expanded at a time, and who attends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Query heads.
    pub(super) heads: usize,
    /// Positions that can be gathered at a time; at least those of one sequence, a multiple of [`TILE`].
    pub(super) positions: usize,
    /// Keys that can be expanded at a time: positions times heads; at least `positions`.
    pub(super) keys: usize,
    /// Blocks of threads.
    pub(super) blocks: usize,
}

/// Chunks whose positions are gathered together. Ranges are of the plan's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pass {
    /// Two words per page: which, and how many of its positions count.
    pub(super) pages: Range<usize>,
    /// Four words per item: first row, rows, position of the first row, place of the sequence's first position.
    pub(super) items: Range<usize>,
    /// Where the units of each block of threads begin, and where the last ones end.
    pub(super) first: Range<usize>,
    /// Item and, from bit 16 on, head of the group.
    pub(super) units: Range<usize>,
    /// Heads of a group, a divisor of all: groups are expanded one after the other, by the same units.
    pub(super) heads: usize,
}

/// The plan of a step: what the kernels read, and the launches.
#[derive(Clone, Debug, Default)]
pub struct PromptPlan {
    words: Vec<u32>,
    passes: Vec<Pass>,
}

impl PromptLimits {
    /// Words that the plan of a step has at most.
    pub(super) fn words(&self, heads: usize, blocks: usize) -> usize {
        let pages = self.chunks * self.positions.div_ceil(TILE) * (TILE / PAGE) * 2;
        let items = self.rows.div_ceil(TILE) + self.chunks;
        // Each pass begins at a multiple of four words.
        pages + items * (4 + heads) + self.chunks * (blocks + 4)
    }
}

impl PromptPlan {
    /// Whether the step has no row of a prompt.
    pub fn is_empty(&self) -> bool {
        self.passes.is_empty()
    }

    /// What the kernels read, to be copied to the device.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    pub(super) fn passes(&self) -> &[Pass] {
        &self.passes
    }

    /// Puts chunks, in their order, into as few passes as have room.
    pub(super) fn new(chunks: &[Chunk<'_>], room: &Room) -> Self {
        let mut plan = Self::default();
        let mut rest = chunks;
        while !rest.is_empty() {
            let mut positions = 0;
            let fits = |chunk: &&Chunk<'_>| {
                positions += chunk.positions().next_multiple_of(TILE);
                positions <= room.positions
            };
            let count = rest.iter().take_while(fits).count();
            assert!(count > 0, "attention: a prompt of {} positions", rest[0].positions());
            plan.push(&rest[..count], room);
            rest = &rest[count..];
        }
        plan
    }

    fn push(&mut self, chunks: &[Chunk<'_>], room: &Room) {
        self.words.resize(self.words.len().next_multiple_of(4), 0);
        let mut tiles = Vec::new();
        let mut key0 = 0;
        let items = self.append(|words| {
            for chunk in chunks {
                for first in (0..chunk.rows).step_by(TILE) {
                    let rows = TILE.min(chunk.rows - first);
                    let position = chunk.position0 + first;
                    words.extend([chunk.row0 + first, rows, position, key0].map(|word| word as u32));
                    tiles.push((position + rows).div_ceil(TILE));
                }
                key0 += chunk.positions().next_multiple_of(TILE);
            }
        });
        let pages = self.append(|words| chunks.iter().for_each(|chunk| chunk.pages(words)));
        let fits = |heads: &usize| room.heads.is_multiple_of(*heads) && key0 * heads <= room.keys;
        let heads = (1..=room.heads).rev().find(fits).expect("there is room for one head");
        let dealt = deal(&tiles, heads, room.blocks);
        let first = self.append(|words| {
            let mut at = 0;
            for units in &dealt {
                words.push(at);
                at += units.len() as u32;
            }
            words.push(at);
        });
        let units = self.append(|words| words.extend(dealt.into_iter().flatten()));
        self.passes.push(Pass { pages, items, first, units, heads });
    }

    fn append(&mut self, fill: impl FnOnce(&mut Vec<u32>)) -> Range<usize> {
        let from = self.words.len();
        fill(&mut self.words);
        from..self.words.len()
    }
}

impl Chunk<'_> {
    /// Positions that its last row sees.
    fn positions(&self) -> usize {
        self.position0 + self.rows
    }

    /// Its pages up to the end of the last tile, and how many positions of each it sees.
    fn pages(&self, words: &mut Vec<u32>) {
        let positions = self.positions();
        for first in (0..positions.next_multiple_of(TILE)).step_by(PAGE) {
            let count = positions.saturating_sub(first).min(PAGE);
            let page = if count > 0 { self.block_table[first / PAGE] } else { 0 };
            words.extend([page, count as u32]);
        }
    }
}

impl Pass {
    /// Positions that are gathered.
    pub(super) fn positions(&self) -> usize {
        self.pages.len() / 2 * PAGE
    }
}

/// Deals every item, of so many tiles, with every head: a few heads at a time, longest items first, each to the block
/// with the least so far.
fn deal(tiles: &[usize], heads: usize, blocks: usize) -> Vec<Vec<u32>> {
    assert!(tiles.len() <= 1 << 16 && heads <= 1 << 16, "attention: {} items, {heads} heads", tiles.len());
    let mut longest_first: Vec<usize> = (0..tiles.len()).collect();
    longest_first.sort_by_key(|&item| Reverse(tiles[item]));
    let mut dealt = vec![Vec::new(); blocks];
    let mut loads: BinaryHeap<Reverse<(usize, usize)>> =
        (0..blocks).map(|block| Reverse((0, block))).collect();
    for first in (0..heads).step_by(HEADS_AT_ONCE) {
        for &item in &longest_first {
            for head in first..heads.min(first + HEADS_AT_ONCE) {
                let Reverse((load, block)) = loads.pop().expect("there are blocks");
                dealt[block].push((item | head << 16) as u32);
                loads.push(Reverse((load + tiles[item] + ITEM_COST, block)));
            }
        }
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Room = Room { heads: 8, positions: 512, keys: 2048, blocks: 3 };

    fn chunk(row0: usize, rows: usize, position0: usize, block_table: &[u32]) -> Chunk<'_> {
        Chunk { row0, rows, position0, block_table }
    }

    #[test]
    fn every_row_is_dealt_with_every_head_once() {
        let chunks = [
            chunk(3, 200, 50, &[9, 8, 7, 6]),
            chunk(203, 1, 0, &[5]),
            chunk(210, 130, 128, &[1, 2, 3, 4, 0]),
        ];
        let plan = PromptPlan::new(&chunks, &ROOM);
        let limits = PromptLimits { rows: 340, chunks: 3, positions: 512 };
        assert!(plan.words().len() <= limits.words(ROOM.heads, ROOM.blocks));
        let mut seen = std::collections::BTreeMap::new();
        for pass in plan.passes() {
            assert!(pass.positions() <= ROOM.positions && pass.positions() * pass.heads <= ROOM.keys);
            assert!(pass.items.start.is_multiple_of(4), "the kernel reads four words at once");
            let (first, units) = (&plan.words()[pass.first.clone()], &plan.words()[pass.units.clone()]);
            assert!(first.is_sorted() && first.len() == ROOM.blocks + 1 && first[0] == 0);
            assert_eq!(first[ROOM.blocks] as usize, units.len());
            for unit in units {
                let at = pass.items.start + 4 * (unit & 0xffff) as usize;
                let [row0, rows, position0, _] = plan.words()[at..at + 4] else { panic!("four words") };
                for row in 0..rows {
                    for group in 0..ROOM.heads / pass.heads {
                        let head = group * pass.heads + (unit >> 16) as usize;
                        assert_eq!(seen.insert((row0 + row, head), position0 + row), None);
                    }
                }
            }
        }
        let rows = chunks
            .iter()
            .flat_map(|chunk| (0..chunk.rows).map(move |row| (chunk.row0 + row, chunk.position0 + row)));
        let want =
            rows.flat_map(|(row, position)| (0..8).map(move |head| ((row as u32, head), position as u32)));
        assert_eq!(seen, want.collect());
    }

    #[test]
    fn pages_are_listed_to_the_end_of_a_tile() {
        let plan = PromptPlan::new(&[chunk(0, 70, 100, &[4, 2, 9]), chunk(70, 3, 0, &[1])], &ROOM);
        let [pass] = plan.passes() else { panic!("one pass") };
        assert_eq!(plan.words()[pass.pages.clone()], [4, 64, 2, 64, 9, 42, 0, 0, 1, 3, 0, 0]);
        assert_eq!(plan.words()[pass.items.clone()], [0, 70, 100, 0, 70, 3, 0, 256]);
        assert_eq!((pass.positions(), pass.heads), (384, 4));
    }

    #[test]
    fn long_prompts_are_expanded_in_several_passes() {
        let tables = [[0; 8]; 3];
        let chunks = tables.each_ref().map(|table| chunk(0, 2, 300, table));
        let plan = PromptPlan::new(&chunks, &ROOM);
        let passes: Vec<_> = plan.passes().iter().map(|pass| (pass.positions(), pass.heads)).collect();
        assert_eq!(passes, [(384, 4); 3]);
        assert!(PromptPlan::new(&[], &ROOM).is_empty());
    }

    #[test]
    fn blocks_get_about_the_same() {
        let tiles: Vec<usize> = (0..32).map(|item| item % 16 + 1).collect();
        let load =
            |units: &Vec<u32>| units.iter().map(|unit| tiles[(unit & 0xffff) as usize] + 1).sum::<usize>();
        let loads: Vec<usize> = deal(&tiles, 128, 132).iter().map(load).collect();
        let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
        assert!(most - least <= 3, "between {least} and {most} tiles");
    }
}
