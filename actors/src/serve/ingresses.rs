//! What ingresses answered last, put together: several of them serve the same replicas.
//!
//! Pure. An ingress has at most one question before it, and counts for as long as it has a process: a replica that is
//! drained has nothing left when all of them have said so. One that has ended has no request any more.

use std::collections::BTreeMap;

use heliostat_runtime::cluster::status::{ActorState, ClusterStatus, NodeState, NodeStatus};
use heliostat_runtime::spec::HOST_LABEL;

use super::core::{Room, SeenNode, SeenSite, SeenSites, Sites};
use super::messages::TableReport;
use crate::deployment::SERVE;

/// Of an application and one of its deployments.
type Of = (String, String);

/// All ingresses that have a process, by name.
#[derive(Debug, Default)]
pub(super) struct Ingresses(BTreeMap<String, Line>);

#[derive(Debug, Default)]
struct Line {
    incarnation: u64,
    ready: bool,
    asking: bool,
    report: Option<TableReport>,
}

impl Ingresses {
    /// How nodes and ingresses are; none while the head does not know its nodes.
    pub(super) fn look(&mut self, sites: &Sites, status: &ClusterStatus) -> Option<SeenSites> {
        let mut ingresses = BTreeMap::new();
        let mut running = BTreeMap::new();
        for site in sites.all() {
            let Some(actor) = status.actor(&site.name) else { continue };
            let runs = match actor.state {
                ActorState::Starting { .. } | ActorState::Ready | ActorState::Stopping => true,
                ActorState::Pending { .. } | ActorState::Restarting { .. } | ActorState::Dead { .. } => false,
            };
            if runs {
                running.insert(&site.name, (actor.incarnation.0, actor.state == ActorState::Ready));
            }
            ingresses.insert(site.name.clone(), SeenSite { there: true, runs, ..SeenSite::default() });
        }
        self.set_running(&running);
        for (name, seen) in &mut ingresses {
            let report = self.0.get(name).and_then(|line| line.report.as_ref());
            (seen.open, seen.port) = (report.map(|report| report.open), report.map(|report| report.port));
        }
        let home = status.actor(SERVE).and_then(|controller| controller.node.clone());
        let nodes = status.nodes.iter().filter_map(seen_node).collect();
        (!status.head.recovering).then_some(SeenSites { nodes, home, ingresses })
    }

    fn set_running(&mut self, running: &BTreeMap<&String, (u64, bool)>) {
        self.0.retain(|name, line| running.get(name).is_some_and(|(it, _)| *it == line.incarnation));
        for (name, (incarnation, ready)) in running {
            let new = || Line { incarnation: *incarnation, ..Line::default() };
            self.0.entry((*name).clone()).or_insert_with(new).ready = *ready;
        }
    }

    /// Those to be told now, each with its incarnation. Their answers come by [`Self::told`].
    pub(super) fn ask(&mut self) -> Vec<(String, u64)> {
        let free = self.0.iter_mut().filter(|(_, line)| line.ready && !line.asking);
        free.map(|(name, line)| {
            line.asking = true;
            (name.clone(), line.incarnation)
        })
        .collect()
    }

    /// What one answered, if it did.
    pub(super) fn told(&mut self, (name, incarnation): (&str, u64), report: Option<TableReport>) {
        let Some(line) = self.0.get_mut(name).filter(|line| line.incarnation == incarnation) else { return };
        line.asking = false;
        line.report = report.or(line.report.take());
    }

    fn reports(&self) -> impl Iterator<Item = &TableReport> {
        self.0.values().filter_map(|line| line.report.as_ref())
    }

    /// Requests in flight, queued ones included, at all together.
    pub(super) fn loads(&self) -> BTreeMap<Of, u64> {
        let mut loads: BTreeMap<Of, u64> = BTreeMap::new();
        for (app, deployment, load) in self.reports().flat_map(|report| &report.loads) {
            *loads.entry((app.clone(), deployment.clone())).or_default() += load;
        }
        loads
    }

    /// Requests at these replicas, as far as all ingresses have said that they send nothing new there.
    pub(super) fn at(&self, drained: impl Iterator<Item = u64>) -> BTreeMap<u64, u64> {
        let at = |number: u64| {
            let said = self.0.values().map(|line| {
                let report = line.report.as_ref()?;
                report.draining.iter().find(|(it, _)| *it == number).map(|(_, left)| *left)
            });
            Some((number, said.sum::<Option<u64>>()?))
        };
        drained.filter_map(at).collect()
    }

    /// Why one of them cannot serve a deployment.
    pub(super) fn problems(&self) -> BTreeMap<Of, String> {
        let all = self.reports().flat_map(|report| &report.problems);
        all.map(|(app, deployment, why)| ((app.clone(), deployment.clone()), why.clone())).collect()
    }

    /// How far the order of sequences is, where it is furthest.
    pub(super) fn turns(&self) -> Vec<(String, String, u64)> {
        let mut turns: BTreeMap<Of, u64> = BTreeMap::new();
        for (app, deployment, turn) in self.reports().flat_map(|report| &report.turns) {
            let most = turns.entry((app.clone(), deployment.clone())).or_default();
            *most = (*most).max(*turn);
        }
        turns.into_iter().map(|((app, deployment), turn)| (app, deployment, turn)).collect()
    }
}

fn seen_node(node: &NodeStatus) -> Option<SeenNode> {
    let room = match node.state {
        NodeState::Ready => Room::Open,
        NodeState::Unreachable { .. } => Room::Kept,
        NodeState::Draining { .. } | NodeState::Drained | NodeState::Leaving => Room::Leaving,
        NodeState::Lost { .. } => return None,
    };
    // Ports are of a network, not of a machine: containers of one machine have addresses of their own.
    let host = node.labels.get(HOST_LABEL).map_or("", String::as_str);
    let address = node.endpoint.rsplit_once(':').map_or("", |(address, _)| address);
    Some(SeenNode { name: node.name.clone(), machine: format!("{host} {address}"), room })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(ingresses: &mut Ingresses, all: &[(&str, u64, bool)]) {
        let names: Vec<String> = all.iter().map(|(name, ..)| (*name).to_owned()).collect();
        let all = names.iter().zip(all).map(|(name, (_, incarnation, ready))| (name, (*incarnation, *ready)));
        ingresses.set_running(&all.collect());
    }

    fn report(load: u64, draining: &[(u64, u64)], turn: u64) -> Option<TableReport> {
        let of = |number| ("app".to_owned(), "llm".to_owned(), number);
        let (loads, turns) = (vec![of(load)], vec![of(turn)]);
        Some(TableReport { loads, draining: draining.to_vec(), turns, ..TableReport::default() })
    }

    #[test]
    fn a_replica_is_empty_when_all_that_could_have_something_there_say_so() {
        let mut all = Ingresses::default();
        assert_eq!(all.at([7].into_iter()), BTreeMap::from([(7, 0)]), "there is none that could");
        running(&mut all, &[("a", 1, true), ("b", 2, false)]);
        assert_eq!(all.ask(), [("a".to_owned(), 1)], "who starts is not asked yet");
        assert_eq!(all.ask(), [], "one question at a time");
        all.told(("a", 1), report(3, &[(7, 0)], 50));
        assert_eq!(all.at([7].into_iter()), BTreeMap::new(), "b has not said it");
        running(&mut all, &[("a", 1, true), ("b", 2, true)]);
        assert_eq!(all.ask(), [("a".to_owned(), 1), ("b".to_owned(), 2)]);
        all.told(("b", 2), report(4, &[], 90));
        assert_eq!(all.at([7].into_iter()), BTreeMap::new(), "b did not know yet");
        all.told(("b", 2), report(4, &[(7, 2)], 90));
        assert_eq!(all.at([7].into_iter()), BTreeMap::from([(7, 2)]));
        let of = || ("app".to_owned(), "llm".to_owned());
        assert_eq!(all.loads(), BTreeMap::from([(of(), 7)]));
        assert_eq!(all.turns(), [("app".to_owned(), "llm".to_owned(), 90)]);

        // b dies: what it had is no more, and its next incarnation has said nothing.
        running(&mut all, &[("a", 1, true)]);
        assert_eq!(all.at([7].into_iter()), BTreeMap::from([(7, 0)]));
        running(&mut all, &[("a", 1, true), ("b", 3, true)]);
        all.told(("b", 2), report(9, &[(7, 0)], 0));
        assert_eq!(all.at([7].into_iter()), BTreeMap::new(), "an answer of the one that died");
        assert_eq!(all.loads(), BTreeMap::from([(of(), 3)]));
    }

    #[test]
    fn one_that_is_silent_keeps_what_it_said() {
        let mut all = Ingresses::default();
        running(&mut all, &[("a", 1, true)]);
        all.ask();
        all.told(("a", 1), report(3, &[], 0));
        all.ask();
        all.told(("a", 1), None);
        assert_eq!(all.loads().values().sum::<u64>(), 3);
        assert_eq!(all.ask(), [("a".to_owned(), 1)]);
    }
}
