//! Experts of this rank that peers copy from its GPU at this moment.
//!
//! A lease keeps the weights, so that their place is not written to. It ends when the borrower gives it back or asks for
//! another expert, when its process or the plan is gone, and, by whoever made it, when it has lasted too long. One that ended too
//! early costs a copy, not a token: the borrower checks what has arrived.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use heliostat_engine::ep::ExpertWeights;
use heliostat_runtime::handle::ProcessId;

/// What is lent, shared by the rank's actor and its step thread. At most one expert per borrower.
#[derive(Clone, Default)]
pub(super) struct Leases(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    /// The newest lease.
    last: u64,
    lent: HashMap<ProcessId, Lease>,
}

struct Lease {
    id: u64,
    /// Epoch of the plan that it is for; 0: a rank fills its slots.
    plan: u64,
    /// Kept, and never read here.
    _weights: ExpertWeights,
}

impl Leases {
    /// Keeps `weights` for a process, instead of what it had before; returns the lease.
    pub(super) fn lend(&self, borrower: ProcessId, plan: u64, weights: ExpertWeights) -> u64 {
        let mut table = self.table();
        table.last += 1;
        let id = table.last;
        table.lent.insert(borrower, Lease { id, plan, _weights: weights });
        id
    }

    /// Ends a lease; false if it had ended before.
    pub(super) fn end(&self, id: u64) -> bool {
        let mut table = self.table();
        let before = table.lent.len();
        table.lent.retain(|_, lease| lease.id != id);
        table.lent.len() < before
    }

    /// Ends the lease of a process that is gone.
    pub(super) fn borrower_lost(&self, process: ProcessId) {
        self.table().lent.remove(&process);
    }

    /// Ends the leases for plans up to `epoch`.
    pub(super) fn plan_ended(&self, epoch: u64) {
        self.table().lent.retain(|_, lease| lease.plan > epoch);
    }

    /// Ends all leases: the membership changed.
    pub(super) fn clear(&self) {
        self.table().lent.clear();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use heliostat_engine::model::Expert;
    use heliostat_kernels::weight::Weight;

    use super::*;

    const A: ProcessId = ProcessId(1);
    const B: ProcessId = ProcessId(2);

    fn expert() -> ExpertWeights {
        let matrix = || Weight::from_f32(1, 1, vec![1.0]).unwrap();
        ExpertWeights::Host(Arc::new(Expert { gate: matrix(), up: matrix(), down: matrix() }))
    }

    /// Leases of A for plan 3 and of B for plan 4, and how many still keep their weights.
    fn lent() -> (Leases, [u64; 2], impl Fn() -> [bool; 2]) {
        let leases = Leases::default();
        let weights = [expert(), expert()];
        let ids = [leases.lend(A, 3, weights[0].clone()), leases.lend(B, 4, weights[1].clone())];
        let kept = move || {
            weights.each_ref().map(|weights| match weights {
                ExpertWeights::Host(expert) => Arc::strong_count(expert) > 1,
                ExpertWeights::Cuda(_) => unreachable!("made above"),
            })
        };
        assert_eq!(kept(), [true, true]);
        (leases, ids, kept)
    }

    #[test]
    fn a_lease_ends_once_and_only_its_own() {
        let (leases, [a, _], kept) = lent();
        assert!(leases.end(a) && !leases.end(a));
        assert_eq!(kept(), [false, true]);
    }

    #[test]
    fn a_borrower_has_one_lease_and_loses_it_with_its_life() {
        let (leases, [a, _], kept) = lent();
        let newer = leases.lend(A, 3, expert());
        assert_eq!(kept(), [false, true], "the first went with the second");
        assert!(!leases.end(a), "a late return of the first leaves the second");
        assert!(leases.end(newer));
        leases.borrower_lost(B);
        assert_eq!(kept(), [false, false]);
    }

    #[test]
    fn the_end_of_a_plan_or_a_membership_ends_its_leases() {
        let (leases, _, kept) = lent();
        leases.plan_ended(3);
        assert_eq!(kept(), [false, true]);
        leases.clear();
        assert_eq!(kept(), [false, false]);
    }
}
