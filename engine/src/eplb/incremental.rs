//! The incremental policy: the few moves from the present map that restore balance.
//!
//! Local search. A rank above its fair share divided by the target is too hot; the sum of the squares of what is too
//! much is brought to zero, each time by the move that takes away most per expert that has to travel. Two kinds of
//! moves: two slots of two ranks swap their experts, or a slot gets a copy of another expert in place of one that has
//! more copies. An expert is never put on a rank that has it.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::map::ExpertMap;

/// Moves that lower the hottest rank's load by less than this share of it are not made.
const WORTH_MOVING: f64 = 1e-4;

/// What the search is to reach, and at what price.
#[derive(Clone, Debug, PartialEq, Encode, Decode, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Search {
    /// Balancedness at which it stops.
    pub target: f32,
    /// Moves per layer, at most.
    pub max_moves: usize,
    /// Relative speed of each rank; empty when all are alike. A rank's fair share is proportional to it.
    pub rank_speeds: Vec<f32>,
}

impl Default for Search {
    fn default() -> Self {
        Self { target: 0.98, max_moves: usize::MAX, rank_speeds: Vec::new() }
    }
}

/// One step of the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// Two slots of two ranks swap their experts.
    Swap(u32, u32),
    /// A slot gets a copy of an expert; what it held has other copies.
    Copy {
        /// The expert that gets one more copy.
        expert: u32,
        /// Where.
        slot: u32,
    },
}

impl Move {
    /// Experts that have to travel for it.
    fn receives(self) -> f64 {
        match self {
            Self::Swap(..) => 2.0,
            Self::Copy { .. } => 1.0,
        }
    }
}

/// What the search found for one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Improved {
    /// The new map.
    pub map: ExpertMap,
    /// The moves that lead to it, in order.
    pub moves: Vec<Move>,
}

/// Improves one layer's map for `loads`, `[experts]`, until the target is reached or no move helps. Deterministic.
/// Loads that are not finite and positive count as none.
pub fn improve(present: &ExpertMap, loads: &[f32], search: &Search) -> Improved {
    assert_eq!(loads.len(), present.shape().experts as usize, "one load for each expert");
    let mut state = State::new(present, loads, search);
    let mut moves = Vec::new();
    // The excess may shrink while the hottest rank gets hotter: the search ends where it was coolest.
    let mut best = (state.heat(), 0, state.slots.clone());
    let mut splitting = true;
    while moves.len() < search.max_moves {
        let split = if splitting { state.split() } else { None };
        // Only at first: later a move may take such a copy back, and that must not go on for ever.
        splitting = split.is_some();
        let Some(next) = split.or_else(|| state.best_move()) else {
            break;
        };
        state.apply(next);
        moves.push(next);
        if state.heat() < best.0 * (1.0 - WORTH_MOVING) {
            best = (state.heat(), moves.len(), state.slots.clone());
        }
    }
    let (_, kept, slots) = best;
    moves.truncate(kept);
    let map = ExpertMap::new(present.shape(), slots).expect("moves keep every expert");
    Improved { map, moves }
}

/// A map under search.
struct State {
    slots: Vec<u32>,
    slots_per_rank: usize,
    /// Tokens of each expert.
    loads: Vec<f64>,
    /// The ranks of each expert's copies; a rank appears as often as it has copies.
    hosts: Vec<Vec<usize>>,
    /// Tokens of each rank.
    rank_loads: Vec<f64>,
    /// What each rank may have: its fair share divided by the target.
    limits: Vec<f64>,
    /// Changes smaller than this are rounding.
    epsilon: f64,
}

impl State {
    fn new(map: &ExpertMap, loads: &[f32], search: &Search) -> Self {
        let shape = map.shape();
        let ranks = shape.ranks as usize;
        let loads: Vec<f64> =
            loads.iter().map(|&load| if load.is_finite() { f64::from(load.max(0.0)) } else { 0.0 }).collect();
        let total: f64 = loads.iter().sum();
        let speed =
            |rank: usize| search.rank_speeds.get(rank).map_or(1.0, |&speed| f64::from(speed).max(1e-6));
        let all_speeds: f64 = (0..ranks).map(speed).sum();
        let target = f64::from(search.target).clamp(0.01, 1.0);
        let limits: Vec<f64> = (0..ranks).map(|rank| total * speed(rank) / all_speeds / target).collect();
        let mut state = Self {
            slots: map.physical_to_logical().to_vec(),
            slots_per_rank: shape.slots_per_rank() as usize,
            hosts: vec![Vec::new(); loads.len()],
            loads,
            rank_loads: vec![0.0; ranks],
            limits,
            epsilon: (total / ranks as f64 * 1e-6).powi(2),
        };
        for slot in 0..state.slots.len() {
            state.hosts[state.slots[slot] as usize].push(slot / state.slots_per_rank);
        }
        for expert in 0..state.loads.len() {
            let share = state.share(expert, 0);
            state.hosts[expert].iter().for_each(|&rank| state.rank_loads[rank] += share);
        }
        state
    }

    /// Tokens of each copy of an expert when it has `more` copies than now.
    fn share(&self, expert: usize, more: isize) -> f64 {
        self.loads[expert] / self.hosts[expert].len().saturating_add_signed(more) as f64
    }

    /// The square of what a rank has too much at `load`.
    fn excess(&self, rank: usize, load: f64) -> f64 {
        (load - self.limits[rank]).max(0.0).powi(2)
    }

    /// How much the excess of the given ranks changes with their loads. A rank may appear several times.
    fn change(&self, deltas: &mut [(usize, f64)]) -> f64 {
        deltas.sort_unstable_by_key(|(rank, _)| *rank);
        deltas
            .chunk_by(|a, b| a.0 == b.0)
            .map(|same| {
                let (rank, delta) = (same[0].0, same.iter().map(|d| d.1).sum::<f64>());
                self.excess(rank, self.rank_loads[rank] + delta) - self.excess(rank, self.rank_loads[rank])
            })
            .sum()
    }

    /// The hottest rank's load relative to its limit.
    fn heat(&self) -> f64 {
        self.rank_loads.iter().zip(&self.limits).map(|(load, limit)| load / limit).fold(0.0, f64::max)
    }

    /// Another copy for the expert whose copies are most, if one is too much for a rank that has nothing else. Swaps
    /// cannot help there, and once all ranks are full no place for a copy is left, so this comes first.
    fn split(&self) -> Option<Move> {
        let most = self.limits.iter().copied().fold(0.0, f64::max);
        let shares = (0..self.loads.len()).map(|expert| (expert, self.share(expert, 0)));
        let mut hot: Vec<(usize, f64)> = shares.filter(|(_, share)| *share > most).collect();
        hot.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        hot.into_iter().find_map(|(expert, share)| self.best_copy(expert, share))
    }

    /// The copy of an expert that does least harm elsewhere; none may leave another expert with a share as large.
    fn best_copy(&self, expert: usize, share: f64) -> Option<Move> {
        let mut best: Option<(f64, Move)> = None;
        let mut deltas = Vec::new();
        for (slot, &old) in self.slots.iter().enumerate() {
            if self.hosts[old as usize].len() < 2 || self.share(old as usize, -1) >= share {
                continue;
            }
            self.copy_deltas(expert, slot, &mut deltas);
            let change = self.change(&mut deltas);
            if !deltas.is_empty() && best.is_none_or(|(least, _)| change < least) {
                best = Some((change, copy_to(expert, slot)));
            }
        }
        best.map(|(_, copy)| copy)
    }

    /// The move that helps most per expert that travels, for the hottest rank that any move helps.
    fn best_move(&self) -> Option<Move> {
        let excess = |rank: &usize| self.excess(*rank, self.rank_loads[*rank]);
        let mut hot: Vec<usize> =
            (0..self.rank_loads.len()).filter(|rank| excess(rank) > self.epsilon).collect();
        hot.sort_by(|a, b| excess(b).total_cmp(&excess(a)).then(a.cmp(b)));
        hot.into_iter().find_map(|rank| self.best_move_for(rank))
    }

    fn best_move_for(&self, rank: usize) -> Option<Move> {
        let mut best: Option<(f64, Move)> = None;
        let mut offer = |candidate: Move, change: f64| {
            let score = change / candidate.receives();
            if change < -self.epsilon && best.is_none_or(|(least, _)| score < least) {
                best = Some((score, candidate));
            }
        };
        let own = rank * self.slots_per_rank..(rank + 1) * self.slots_per_rank;
        let mut deltas = Vec::new();
        for slot in 0..self.slots.len() {
            let removable = self.hosts[self.slots[slot] as usize].len() > 1;
            if own.contains(&slot) {
                if removable {
                    for expert in 0..self.loads.len() {
                        self.copy_deltas(expert, slot, &mut deltas);
                        offer(copy_to(expert, slot), self.change(&mut deltas));
                    }
                }
                continue;
            }
            for hot in own.clone() {
                offer(Move::Swap(hot as u32, slot as u32), self.swap_change(hot, slot));
                if removable {
                    let expert = self.slots[hot] as usize;
                    self.copy_deltas(expert, slot, &mut deltas);
                    offer(copy_to(expert, slot), self.change(&mut deltas));
                }
            }
        }
        best.map(|(_, best)| best)
    }

    /// The change of excess when the slots of two ranks swap; 0 when a rank would have an expert twice.
    fn swap_change(&self, a: usize, b: usize) -> f64 {
        let (x, y) = (self.slots[a] as usize, self.slots[b] as usize);
        let (from, to) = (a / self.slots_per_rank, b / self.slots_per_rank);
        let moved = self.share(x, 0) - self.share(y, 0);
        if moved <= 0.0 || self.hosts[x].contains(&to) || self.hosts[y].contains(&from) {
            return 0.0;
        }
        let (hot, cool) = (self.rank_loads[from], self.rank_loads[to]);
        self.excess(from, hot - moved) - self.excess(from, hot) + self.excess(to, cool + moved)
            - self.excess(to, cool)
    }

    /// How the ranks' loads change when `slot` gets a copy of `expert`; none when its rank has one.
    fn copy_deltas(&self, expert: usize, slot: usize, deltas: &mut Vec<(usize, f64)>) {
        deltas.clear();
        let (old, rank) = (self.slots[slot] as usize, slot / self.slots_per_rank);
        if old == expert || self.hosts[expert].contains(&rank) {
            return;
        }
        let (before, after) = (self.share(expert, 0), self.share(expert, 1));
        deltas.extend(self.hosts[expert].iter().map(|&host| (host, after - before)));
        deltas.push((rank, after));
        let (before, after) = (self.share(old, 0), self.share(old, -1));
        deltas.extend(self.hosts[old].iter().map(|&host| (host, after - before)));
        deltas.push((rank, -after));
    }

    fn apply(&mut self, chosen: Move) {
        match chosen {
            Move::Swap(a, b) => {
                let (a, b) = (a as usize, b as usize);
                let (x, y) = (self.slots[a] as usize, self.slots[b] as usize);
                let (from, to) = (a / self.slots_per_rank, b / self.slots_per_rank);
                let moved = self.share(x, 0) - self.share(y, 0);
                self.rank_loads[from] -= moved;
                self.rank_loads[to] += moved;
                self.replace_host(x, from, to);
                self.replace_host(y, to, from);
                self.slots.swap(a, b);
            }
            Move::Copy { expert, slot } => {
                let (expert, slot) = (expert as usize, slot as usize);
                let mut deltas = Vec::new();
                self.copy_deltas(expert, slot, &mut deltas);
                deltas.into_iter().for_each(|(rank, delta)| self.rank_loads[rank] += delta);
                let (old, rank) = (self.slots[slot] as usize, slot / self.slots_per_rank);
                let hosts = &mut self.hosts[old];
                let at =
                    hosts.iter().position(|&host| host == rank).expect("the slot's rank hosts its expert");
                hosts.swap_remove(at);
                self.hosts[expert].push(rank);
                self.slots[slot] = expert as u32;
            }
        }
    }

    fn replace_host(&mut self, expert: usize, from: usize, to: usize) {
        let host = self.hosts[expert].iter_mut().find(|host| **host == from);
        *host.expect("the slot's rank hosts its expert") = to;
    }
}

fn copy_to(expert: usize, slot: usize) -> Move {
    Move::Copy { expert: expert as u32, slot: slot as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eplb::load::map_balancedness;
    use crate::eplb::map::{MapShape, PlacementStrategy};

    fn map(slots: &[u32], experts: u32, ranks: u32) -> ExpertMap {
        let shape = MapShape { experts, slots: slots.len() as u32, ranks };
        ExpertMap::new(shape, slots.to_vec()).unwrap()
    }

    #[test]
    fn a_swap_where_nothing_is_redundant() {
        let present = map(&[0, 1, 2, 3], 4, 2);
        let improved = improve(&present, &[5.0, 3.0, 1.0, 1.0], &Search::default());
        // 8 | 2 cannot become 5 | 5, but 6 | 4.
        assert_eq!(improved.moves.len(), 1);
        assert!(matches!(improved.moves[0], Move::Swap(..)));
        assert_eq!(map_balancedness(&improved.map, &[5.0, 3.0, 1.0, 1.0]), 5.0 / 6.0);
    }

    #[test]
    fn a_copy_of_the_hot_expert_replaces_an_idle_copy() {
        let present = map(&[0, 1, 2, 1], 3, 2);
        let improved = improve(&present, &[8.0, 0.0, 0.0], &Search::default());
        assert_eq!(improved.moves, [Move::Copy { expert: 0, slot: 3 }]);
        assert_eq!(improved.map.physical_to_logical(), [0, 1, 2, 0]);
    }

    #[test]
    fn what_is_good_enough_stays() {
        let present =
            ExpertMap::initial(MapShape { experts: 8, slots: 12, ranks: 4 }, PlacementStrategy::RoundRobin);
        let present = present.unwrap();
        for loads in [[0.0; 8], [f32::NAN; 8]] {
            assert_eq!(improve(&present, &loads, &Search::default()).moves, []);
        }
        let loads = [9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        let lax = Search { target: map_balancedness(&present, &loads), ..Search::default() };
        assert_eq!(improve(&present, &loads, &lax).moves, []);
        let bounded = Search { max_moves: 1, ..Search::default() };
        assert_eq!(improve(&present, &loads, &bounded).moves.len(), 1);
    }

    #[test]
    fn a_slow_rank_gets_less() {
        let present = map(&[0, 1, 2, 3, 4, 5], 6, 2);
        let search = Search { rank_speeds: vec![1.0, 0.5], ..Search::default() };
        let improved = improve(&present, &[3.0, 2.0, 2.0, 3.0, 1.0, 1.0], &search);
        let loads =
            crate::eplb::rank_loads(&improved.map, &improved.map.slot_loads(&[3., 2., 2., 3., 1., 1.]));
        assert_eq!(loads, [8.0, 4.0]);
    }
}
