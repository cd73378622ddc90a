//! Who was busy: sliding sums of routed tokens, and how even they are.

use std::collections::VecDeque;

use super::map::ExpertMap;

/// Mean over ranks divided by maximum over ranks, in (0, 1]: 1 is perfectly even, and so is no load at all.
pub fn balancedness(rank_loads: &[f32]) -> f32 {
    let max = rank_loads.iter().copied().fold(0.0, f32::max);
    if max <= 0.0 {
        return 1.0;
    }
    let sum: f64 = rank_loads.iter().map(|&load| f64::from(load)).sum();
    (sum / rank_loads.len() as f64 / f64::from(max)) as f32
}

/// Tokens per rank, `[ranks]`, from tokens per slot, `[slots]`.
pub fn rank_loads(map: &ExpertMap, slot_loads: &[f32]) -> Vec<f32> {
    slot_loads.chunks(map.shape().slots_per_rank() as usize).map(|slots| slots.iter().sum()).collect()
}

/// Balancedness of one layer when each expert's tokens, `[experts]`, spread evenly over its replicas.
pub fn map_balancedness(map: &ExpertMap, expert_loads: &[f32]) -> f32 {
    balancedness(&rank_loads(map, &map.slot_loads(expert_loads)))
}

/// How much the distribution of one layer's load changed, in [0, 1]: the share of tokens that go to other experts now
/// (total variation distance). 0 where there was or is no load.
pub fn drift(before: &[f32], now: &[f32]) -> f32 {
    let total = |loads: &[f32]| loads.iter().map(|&load| f64::from(load)).sum::<f64>();
    let (a, b) = (total(before), total(now));
    if a <= 0.0 || b <= 0.0 {
        return 0.0;
    }
    let pairs = before.iter().zip(now);
    let moved: f64 = pairs.map(|(&x, &y)| (f64::from(x) / a - f64::from(y) / b).abs()).sum();
    (moved / 2.0) as f32
}

/// Routed tokens per MoE layer and logical expert over the last steps.
#[derive(Clone, Debug)]
pub struct LoadWindow {
    window_size: u64,
    /// Oldest first: steps, and counts by layer and expert, flat.
    entries: VecDeque<(u64, Vec<u32>)>,
    steps: u64,
    sums: Vec<u64>,
    experts: usize,
}

impl LoadWindow {
    /// An empty window over `window_size` steps, at least one.
    pub fn new(moe_layers: usize, experts: usize, window_size: u64) -> Self {
        assert!(moe_layers > 0 && experts > 0, "a load window needs layers and experts");
        let sums = vec![0; moe_layers * experts];
        Self { window_size: window_size.max(1), entries: VecDeque::new(), steps: 0, sums, experts }
    }

    /// Adds the counts of the next `steps` steps, `[moe layers][experts]`, and forgets what fell out of the window.
    /// A report that straddles the edge stays until the window is full without it. Returns false, and takes nothing,
    /// when the counts have another shape.
    pub fn push(&mut self, steps: u64, counts: &[Vec<u32>]) -> bool {
        if counts.len() * self.experts != self.sums.len() || counts.iter().any(|c| c.len() != self.experts) {
            return false;
        }
        let flat = counts.concat();
        self.sums.iter_mut().zip(&flat).for_each(|(sum, &count)| *sum += u64::from(count));
        self.steps += steps;
        self.entries.push_back((steps, flat));
        while let Some((oldest, _)) = self.entries.front()
            && self.steps - oldest >= self.window_size
            && self.entries.len() > 1
        {
            let (steps, flat) = self.entries.pop_front().expect("the loop saw it");
            self.steps -= steps;
            self.sums.iter_mut().zip(&flat).for_each(|(sum, &count)| *sum -= u64::from(count));
        }
        true
    }

    /// Steps that it covers.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Whether it covers as many steps as it may.
    pub fn is_full(&self) -> bool {
        self.steps >= self.window_size
    }

    /// Tokens of each expert, `[moe layers][experts]`.
    pub fn loads(&self) -> Vec<Vec<f32>> {
        self.sums.chunks(self.experts).map(|layer| layer.iter().map(|&sum| sum as f32).collect()).collect()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.steps = 0;
        self.sums.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eplb::map::{MapShape, PlacementStrategy};

    #[test]
    fn the_window_slides_over_steps_not_reports() {
        let mut window = LoadWindow::new(1, 2, 4);
        for (steps, count) in [(1, 1), (2, 10), (2, 100), (1, 1000)] {
            assert!(window.push(steps, &[vec![count, 0]]));
        }
        assert_eq!(
            (window.steps(), window.loads()),
            (5, vec![vec![1110.0, 0.0]]),
            "the first report fell out"
        );
        window.push(1, &[vec![0, 5]]);
        assert_eq!((window.steps(), window.loads()), (4, vec![vec![1100.0, 5.0]]));
        assert!(window.is_full() && !window.push(1, &[vec![1]]));
        window.push(9, &[vec![7, 7]]);
        assert_eq!(window.loads(), [[7.0, 7.0]], "one report longer than the window is kept");
    }

    #[test]
    fn balancedness_is_over_ranks() {
        let shape = MapShape { experts: 4, slots: 6, ranks: 3 };
        let map = ExpertMap::initial(shape, PlacementStrategy::Linear).unwrap(); // 01 23 01
        // Slots 3 1 | 2 2 | 3 1: every rank has 4 although the slots differ.
        assert_eq!(map_balancedness(&map, &[6.0, 2.0, 2.0, 2.0]), 1.0);
        assert_eq!(map_balancedness(&map, &[0.0, 0.0, 3.0, 0.0]), 1.0 / 3.0);
        assert_eq!(map_balancedness(&map, &[0.0; 4]), 1.0);
    }

    #[test]
    fn drift_is_the_share_of_tokens_that_changed_their_expert() {
        assert_eq!(drift(&[1.0, 1.0], &[30.0, 10.0]), 0.25);
        assert_eq!(drift(&[1.0, 0.0], &[0.0, 5.0]), 1.0);
        assert_eq!(drift(&[0.0, 0.0], &[0.0, 5.0]), 0.0);
    }
}
