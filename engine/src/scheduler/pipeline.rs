//! The steps in flight, oldest first: which of them the rank was told to run, and whose their shares are.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::batch::Step;

use super::Turn;

#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) step: Arc<Step>,
    /// Whose share each of `step.seqs` is; `None` where the sequence was preempted since. Turns that are gone were
    /// aborted, or ended with a draw of an older step.
    pub(super) turns: Vec<Option<Turn>>,
}

/// At most `depth` steps that are scheduled but not complete.
#[derive(Debug)]
pub(super) struct Pipeline {
    depth: usize,
    steps: VecDeque<InFlight>,
    /// How many of `steps`, from the oldest on, the rank has been given since the last `rewind`.
    given: usize,
    /// What the last complete step drew where its `Sampling` says `Device`.
    drawn: Vec<u32>,
}

impl Pipeline {
    /// Without steps.
    pub(super) fn new(depth: usize) -> Self {
        assert!(depth > 0, "a step must be in flight while it is computed");
        Self { depth, steps: VecDeque::new(), given: 0, drawn: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether a step can be given that is not being computed already.
    pub(super) fn has_room(&self) -> bool {
        self.given < self.depth
    }

    pub(super) fn steps(&self) -> impl ExactSizeIterator<Item = &Arc<Step>> {
        self.steps.iter().map(|in_flight| &in_flight.step)
    }

    /// The next step to run, if it is scheduled already. With depth 1 the only step is given again and again.
    pub(super) fn give(&mut self) -> Option<Arc<Step>> {
        if self.depth == 1 {
            self.given = 0;
        }
        assert!(self.has_room(), "{} steps are in flight: complete one first", self.depth);
        let next = self.steps.get(self.given)?;
        self.given += 1;
        Some(Arc::clone(&next.step))
    }

    /// The step that `give` gave last.
    pub(super) fn last_given(&self) -> Option<&InFlight> {
        self.steps.get(self.given.checked_sub(1)?)
    }

    /// Adds the newest step.
    pub(super) fn push(&mut self, step: Step, turns: Vec<Option<Turn>>) {
        self.steps.push_back(InFlight { step: Arc::new(step), turns });
    }

    /// Takes out the oldest step; the caller completes it.
    pub(super) fn pop(&mut self) -> InFlight {
        assert!(self.given > 0, "complete follows schedule");
        self.given -= 1;
        self.steps.pop_front().expect("what was given is there")
    }

    /// Keeps what the step just taken out drew on the device.
    pub(super) fn set_drawn(&mut self, drawn: Vec<u32>) {
        self.drawn = drawn;
    }

    /// The oldest step, which the rank computes.
    pub(super) fn oldest(&self) -> &Arc<Step> {
        assert!(self.given > 0, "complete follows schedule");
        &self.steps[0].step
    }

    /// All steps will be given again. The oldest gets the tokens that its predecessor drew, which is complete: the
    /// device need not remember them. The others are fed by their predecessors, which are computed again.
    pub(super) fn rewind(&mut self) {
        self.given = 0;
        let Some(oldest) = self.steps.front_mut().filter(|oldest| !oldest.step.feeds.is_empty()) else {
            return;
        };
        let step = Arc::make_mut(&mut oldest.step);
        for feed in step.feeds.drain(..) {
            step.batch.tokens[feed.row as usize] = self.drawn[feed.draw as usize];
        }
    }

    /// What steps in flight compute for this sequence will be dropped.
    pub(super) fn disown(&mut self, turn: Turn) {
        for in_flight in &mut self.steps {
            in_flight.turns.iter_mut().filter(|owner| **owner == Some(turn)).for_each(|owner| *owner = None);
        }
    }

    /// Forgets all steps.
    pub(super) fn clear(&mut self) {
        self.steps.clear();
        self.given = 0;
    }
}
