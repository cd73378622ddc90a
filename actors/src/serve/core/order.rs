//! In which order the deployments of one application of users' actors come and go: those that are asked before the one that
//! asks them, the ingress; and the other way round at the end.
//!
//! SD-6: no replica of a new ingress is started before all other deployments serve as they are wanted, and none of them is
//! drained that is not wanted any more before the ingress has done without it.

use std::collections::{BTreeMap, BTreeSet};

use super::Deployment;

type Deployments = BTreeMap<String, Deployment>;

/// Those that are to stay as they are for now.
pub(super) fn held(deployments: &Deployments) -> BTreeSet<String> {
    let wanted = || deployments.values().filter(|it| !it.removing);
    let behind_settled = wanted().filter(|it| !it.is_ingress()).all(Deployment::is_settled);
    let ingress_settled = wanted().filter(|it| it.is_ingress()).all(Deployment::is_settled);
    let leaving = deployments.values().any(|it| it.is_ingress() && it.removing && !it.is_empty());
    let is_held = |it: &Deployment| match (it.is_ingress(), it.removing) {
        (true, false) => !behind_settled && !it.is_settled(),
        // Another one takes its place.
        (true, true) => !ingress_settled,
        (false, false) => false,
        (false, true) => it.workload().actor().is_some() && (leaving || !ingress_settled),
    };
    deployments.iter().filter(|(_, it)| is_held(it)).map(|(name, _)| name.clone()).collect()
}

/// Where HTTP goes: of two, one of which takes the place of the other, the new one once it serves.
pub(super) fn ingress(deployments: &Deployments) -> Option<&String> {
    let all = || deployments.iter().filter(|(_, it)| it.is_ingress());
    let new = all().find(|(_, it)| !it.removing);
    let serving = new.filter(|(_, it)| it.is_settled());
    serving.or_else(|| all().find(|(_, it)| it.removing)).or(new).map(|(name, _)| name)
}
