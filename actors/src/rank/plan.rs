//! A plan that is being staged on this rank: what the stager has brought and the step thread has not yet committed.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use heliostat_engine::ep::{ExpertWeights, Slot};
use heliostat_engine::eplb::plan::Plan;
use heliostat_runtime::handle::ActorAddr;
use tokio::sync::Notify;

use crate::messages::Moved;

/// A plan on this rank, shared by its stager and the step thread.
pub(super) struct OpenPlan {
    /// What to change.
    pub(super) plan: Plan,
    /// The EPLB actor.
    pub(super) reply_to: ActorAddr,
    state: Mutex<State>,
    /// Rings when the old weights of a layer are gone, so that the stager goes on.
    released: Notify,
}

#[derive(Default)]
struct State {
    staged: u32,
    committed: u32,
    /// Committed layers whose old weights are gone.
    released: u32,
    /// Nothing of it is wanted any more.
    ended: bool,
    /// Contents of the staged, uncommitted layers, in the plan's order: (local slot, weights).
    layers: VecDeque<Vec<(usize, Slot)>>,
    moved: Moved,
    error: Option<String>,
}

/// Where staging stands.
#[derive(Clone, Debug)]
pub(super) struct Staging {
    /// Layers staged here, the committed ones included.
    pub(super) staged: u32,
    /// What it moved.
    pub(super) moved: Moved,
    /// Why it failed, if it did.
    pub(super) error: Option<String>,
}

impl OpenPlan {
    /// Nothing staged yet.
    pub(super) fn new(plan: Plan, reply_to: ActorAddr) -> Self {
        Self { plan, reply_to, state: Mutex::default(), released: Notify::new() }
    }

    /// Waits until fewer than `ahead` staged layers keep weights beside those of the slots; false when the plan ended.
    pub(super) async fn room(&self, ahead: u32) -> bool {
        loop {
            let rung = self.released.notified();
            {
                let state = self.state();
                if state.ended || state.staged < state.released + ahead.max(1) {
                    return !state.ended;
                }
            }
            rung.await;
        }
    }

    /// Takes in the next layer's weights.
    pub(super) fn stage(&self, contents: Vec<(usize, Slot)>, moved: Moved) {
        let mut state = self.state();
        if state.ended {
            return;
        }
        state.layers.push_back(contents);
        state.staged += 1;
        state.moved.add(moved);
    }

    /// Staging cannot go on.
    pub(super) fn fail(&self, error: String) {
        self.state().error = Some(error);
    }

    /// Hands out the next staged layer, which the caller commits.
    pub(super) fn commit_next(&self) -> Option<Vec<(usize, Slot)>> {
        let mut state = self.state();
        let contents = state.layers.pop_front()?;
        state.committed += 1;
        Some(contents)
    }

    /// Says that the slots hold the last layer handed out, and its old weights are dropped.
    pub(super) fn released(&self) {
        self.state().released += 1;
        self.released.notify_one();
    }

    /// Drops what is staged and ends the staging.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.ended = true;
        state.layers.clear();
        self.released.notify_one();
    }

    /// An expert among the staged, uncommitted layers.
    pub(super) fn find_staged(&self, moe_layer: usize, logical: u32) -> Option<ExpertWeights> {
        let state = self.state();
        let layers = self.plan.layers.iter().skip(state.committed as usize);
        let (_, contents) = layers.zip(&state.layers).find(|(layer, _)| layer.layer as usize == moe_layer)?;
        let found = contents.iter().find(|(_, slot)| slot.logical == logical)?;
        Some(found.1.weights.clone())
    }

    /// Where it stands.
    pub(super) fn staging(&self) -> Staging {
        let state = self.state();
        Staging { staged: state.staged, moved: state.moved, error: state.error.clone() }
    }

    /// Layers staged, without the rest: read before every step.
    pub(super) fn staged(&self) -> u32 {
        self.state().staged
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
