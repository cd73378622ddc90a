//! Finds places for the bundles of a group, all or none.
//!
//! Equal bundles are placed greedily, which is exact for them. Where bundles differ, a bounded search goes back on
//! choices that lead nowhere; one node per bundle is a matching, which is exact, too.

use std::collections::{BTreeMap, BTreeSet};

use bincode::{Decode, Encode};

use super::Unplaceable;
use super::offer::{Miss, Offer, refusal};
use crate::spec::{Bundle, PlacementGroupSpec, Strategy};

/// Choices that a search may try.
const TRIES_MAX: u32 = 20_000;

/// Where a bundle is reserved.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct BundleSlot {
    /// Name of the node.
    pub node: String,
    /// Indices of its devices there.
    pub devices: Vec<u32>,
}

/// Places of bundles, by index.
pub type Places = BTreeMap<u32, BundleSlot>;

/// Why a plan fails, and how far it came.
struct Failure {
    placed: usize,
    why: String,
}

/// Places the bundles of the group that are not among `kept`, as its strategy says. What `kept` holds is taken from
/// `offers` already.
pub fn plan(spec: &PlacementGroupSpec, kept: &Places, offers: &[Offer]) -> Result<Places, Unplaceable> {
    if offers.is_empty() {
        return Err(Unplaceable("no node has joined the cluster".into()));
    }
    let planned = match &spec.topology {
        None => Planner::new(spec, kept, offers.to_vec()).plan(),
        Some(label) => plan_in_domain(spec, kept, offers, label),
    };
    planned.map_err(|failure| Unplaceable(failure.why))
}

/// All in one domain: that of the bundles which have a place, else the one with the fewest free devices that fits, so
/// that large domains stay whole for those who need them.
fn plan_in_domain(
    spec: &PlacementGroupSpec,
    kept: &Places,
    offers: &[Offer],
    label: &str,
) -> Result<Places, Failure> {
    let mut domains: BTreeMap<&str, Vec<Offer>> = BTreeMap::new();
    for offer in offers {
        if let Some(value) = offer.labels.get(label) {
            domains.entry(value).or_default().push(offer.clone());
        }
    }
    let holds =
        |offers: &[Offer]| kept.values().all(|slot| offers.iter().any(|offer| offer.node == slot.node));
    let mut domains: Vec<(&str, Vec<Offer>)> =
        domains.into_iter().filter(|(_, offers)| holds(offers)).collect();
    let free = |offers: &[Offer]| {
        offers
            .iter()
            .filter(|offer| offer.closed.is_none())
            .map(|o| o.free_devices(u32::MAX).len())
            .sum::<usize>()
    };
    domains.sort_by_cached_key(|(_, offers)| free(offers));
    let mut nearest: Option<(usize, String)> = None;
    for (value, offers) in domains {
        match Planner::new(spec, kept, offers).plan() {
            Ok(places) => return Ok(places),
            Err(Failure { placed, why }) if nearest.as_ref().is_none_or(|(most, _)| placed > *most) => {
                let all = format!("all bundles must be on nodes with the same {label}");
                nearest = Some((placed, format!("{all}; nearest is {label}={value}: {why}")));
            }
            Err(_) => {}
        }
    }
    let (placed, why) = nearest.unwrap_or_else(|| (0, format!("no node has label {label}")));
    Err(Failure { placed, why })
}

struct Planner<'a> {
    spec: &'a PlacementGroupSpec,
    kept: &'a Places,
    /// What is free now, less what is placed so far.
    offers: Vec<Offer>,
    /// Bundles of the group on each node.
    count: Vec<usize>,
    missing: Vec<u32>,
    places: Places,
    tries: u32,
    /// How far the search came at best, and why no further.
    best: Failure,
}

impl<'a> Planner<'a> {
    fn new(spec: &'a PlacementGroupSpec, kept: &'a Places, offers: Vec<Offer>) -> Self {
        let on = |offer: &Offer| kept.values().filter(|slot| slot.node == offer.node).count();
        let count = offers.iter().map(on).collect();
        let missing = (0..spec.bundles.len() as u32).filter(|index| !kept.contains_key(index)).collect();
        let best = Failure { placed: 0, why: String::new() };
        Self { spec, kept, offers, count, missing, places: Places::new(), tries: TRIES_MAX, best }
    }

    fn plan(mut self) -> Result<Places, Failure> {
        match self.spec.strategy {
            Strategy::StrictPack => self.on_one_node(),
            Strategy::StrictSpread => self.on_own_nodes(),
            Strategy::Pack | Strategy::Spread => {
                self.missing = self.hardest_first();
                if self.search(0) { Ok(self.places) } else { Err(self.best) }
            }
        }
    }

    fn bundle(&self, index: u32) -> &'a Bundle {
        &self.spec.bundles[index as usize]
    }

    fn misses(&self, node: usize, index: u32) -> Vec<Miss<'_>> {
        let bundle = self.bundle(index);
        self.offers[node].misses(&bundle.resources, &bundle.selector)
    }

    fn subject(&self, node: usize) -> String {
        format!("node {}", self.offers[node].node)
    }

    fn fits(&self, node: usize, index: u32) -> bool {
        self.misses(node, index).is_empty()
    }

    fn take(&mut self, node: usize, index: u32) {
        let resources = &self.bundle(index).resources;
        let devices = self.offers[node].free_devices(resources.devices);
        self.offers[node].take(resources, &devices, "this group");
        self.count[node] += 1;
        self.places.insert(index, BundleSlot { node: self.offers[node].node.clone(), devices });
    }

    fn give_back(&mut self, node: usize, index: u32) {
        if let Some(slot) = self.places.remove(&index) {
            let resources = &self.spec.bundles[index as usize].resources;
            self.offers[node].give_back(resources, &slot.devices);
            self.count[node] -= 1;
        }
    }

    /// "7 of 8 bundles fit; bundle 3 (1 device) does not: ..."
    fn stuck(&self, placed: usize, index: u32, misses: Vec<(String, Vec<Miss<'_>>)>) -> Failure {
        let (all, needs) = (self.missing.len(), &self.bundle(index).resources);
        let why = refusal(misses);
        let lost = if self.kept.is_empty() { "" } else { "of those without a place, " };
        Failure {
            placed,
            why: format!("{lost}{placed} of {all} bundles fit; bundle {index} ({needs}) does not: {why}"),
        }
    }

    /// Bundles that fit on few nodes first, then large ones.
    fn hardest_first(&self) -> Vec<u32> {
        let mut nodes: Vec<(&Bundle, usize)> = Vec::new();
        let mut fitting = |index: u32| {
            let bundle = self.bundle(index);
            if let Some((_, fitting)) = nodes.iter().find(|(other, _)| *other == bundle) {
                return *fitting;
            }
            let fitting = (0..self.offers.len()).filter(|&node| self.fits(node, index)).count();
            nodes.push((bundle, fitting));
            fitting
        };
        let mut missing = self.missing.clone();
        missing.sort_by_cached_key(|&index| {
            let needs = &self.bundle(index).resources;
            (fitting(index), std::cmp::Reverse((needs.devices, needs.cpus, needs.memory)), index)
        });
        missing
    }

    /// Places the bundles from the `depth`-th on; goes back on a choice only where another one could help.
    fn search(&mut self, depth: usize) -> bool {
        let Some(&index) = self.missing.get(depth) else { return true };
        let mut nodes: Vec<usize> = (0..self.offers.len()).filter(|&node| self.fits(node, index)).collect();
        if nodes.is_empty() {
            if depth >= self.best.placed || self.best.why.is_empty() {
                let misses =
                    (0..self.offers.len()).map(|node| (self.subject(node), self.misses(node, index)));
                self.best = self.stuck(depth, index, misses.collect());
            }
            return false;
        }
        let left = (self.missing.len() - depth) as u32;
        nodes.sort_by_cached_key(|&node| self.preference(node, index, left));
        let equal = self.missing[depth..].iter().all(|&other| self.bundle(other) == self.bundle(index));
        let choices = if equal { 1 } else { nodes.len() };
        for node in nodes.into_iter().take(choices) {
            if self.tries == 0 {
                return false;
            }
            self.tries -= 1;
            self.take(node, index);
            if self.search(depth + 1) {
                return true;
            }
            self.give_back(node, index);
        }
        false
    }

    /// Lower is better.
    fn preference(&self, node: usize, index: u32, left: u32) -> (usize, u32, u32, usize) {
        let offer = &self.offers[node];
        let room = offer.room_for(&self.bundle(index).resources);
        match self.spec.strategy {
            // A node that the group is on already, then the one that takes most of it, then the fullest of those.
            Strategy::Pack | Strategy::StrictPack => {
                (usize::from(self.count[node] == 0), u32::MAX - room.min(left), room, node)
            }
            Strategy::Spread | Strategy::StrictSpread => (self.count[node], offer.actors as u32, 0, node),
        }
    }

    fn on_one_node(mut self) -> Result<Places, Failure> {
        let pinned = self.kept.values().next().map(|slot| slot.node.clone());
        let mut nodes: Vec<usize> = (0..self.offers.len()).collect();
        nodes.retain(|&node| pinned.as_ref().is_none_or(|pinned| *pinned == self.offers[node].node));
        // The fullest that takes all.
        nodes.sort_by_cached_key(|&node| self.offers[node].free_devices(u32::MAX).len());
        let mut best: Option<Failure> = None;
        for node in nodes {
            let mut stuck = None;
            for index in self.missing.clone() {
                if !self.fits(node, index) {
                    stuck = Some(index);
                    break;
                }
                self.take(node, index);
            }
            let Some(index) = stuck else { return Ok(self.places) };
            let placed = self.places.len();
            if best.as_ref().is_none_or(|best| placed > best.placed) {
                let name = self.offers[node].node.as_str();
                let mut failure =
                    self.stuck(placed, index, vec![(self.subject(node), self.misses(node, index))]);
                failure.why =
                    format!("all bundles must be on one node; on {name}, the nearest, {}", failure.why);
                best = Some(failure);
            }
            for index in self.missing.clone() {
                self.give_back(node, index);
            }
        }
        let gone =
            || format!("all bundles must be on node {}, which is not here", pinned.unwrap_or_default());
        Err(best.unwrap_or_else(|| Failure { placed: 0, why: gone() }))
    }

    /// A matching of bundles and nodes, by augmenting paths.
    fn on_own_nodes(mut self) -> Result<Places, Failure> {
        let mut owner: Vec<Option<u32>> = vec![None; self.offers.len()];
        let free: Vec<usize> = (0..self.offers.len()).filter(|&node| self.count[node] == 0).collect();
        for (placed, index) in self.missing.clone().into_iter().enumerate() {
            if !self.match_bundle(index, &free, &mut owner, &mut BTreeSet::new()) {
                let misses = (0..self.offers.len()).map(|node| {
                    let misses = self.misses(node, index);
                    let held = misses.is_empty().then_some(Miss::Sibling);
                    (self.subject(node), held.map_or(misses, |held| vec![held]))
                });
                let mut failure = self.stuck(placed, index, misses.collect());
                failure.why = format!("each bundle must be on a node of its own; {}", failure.why);
                return Err(failure);
            }
        }
        for (node, index) in owner.into_iter().enumerate() {
            index.into_iter().for_each(|index| self.take(node, index));
        }
        Ok(self.places)
    }

    fn match_bundle(
        &self,
        index: u32,
        free: &[usize],
        owner: &mut Vec<Option<u32>>,
        seen: &mut BTreeSet<usize>,
    ) -> bool {
        // Nobody is moved where that is not needed.
        let (owned, unowned): (Vec<usize>, Vec<usize>) =
            free.iter().partition(|node| owner[**node].is_some());
        for node in unowned.into_iter().chain(owned) {
            if !self.fits(node, index) || !seen.insert(node) {
                continue;
            }
            let moves = match owner[node] {
                None => true,
                Some(other) => self.match_bundle(other, free, owner, seen),
            };
            if moves {
                owner[node] = Some(index);
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{LabelSelector, Labels, Resources};

    fn node(name: &str, devices: u32, zone: &str) -> Offer {
        Offer {
            node: name.into(),
            labels: Labels::from([("zone".into(), zone.into())]),
            devices: (0..devices).map(|index| (index, None)).collect(),
            cpus: 8.into(),
            ..Offer::default()
        }
    }

    fn group(bundles: usize, strategy: Strategy) -> PlacementGroupSpec {
        PlacementGroupSpec::new("pg", bundles, Resources::device()).strategy(strategy)
    }

    fn nodes(spec: &PlacementGroupSpec, kept: &Places, offers: &[Offer]) -> Result<Vec<String>, String> {
        let places = plan(spec, kept, offers).map_err(|why| why.to_string())?;
        let given = places.values().flat_map(|slot| slot.devices.iter().map(|device| (&slot.node, *device)));
        let given: Vec<(&String, u32)> = given.collect();
        assert_eq!(given.iter().collect::<BTreeSet<_>>().len(), given.len(), "a device is given twice");
        Ok(places.into_values().map(|slot| slot.node).collect())
    }

    fn new(spec: &PlacementGroupSpec, offers: &[Offer]) -> Result<Vec<String>, String> {
        nodes(spec, &Places::new(), offers)
    }

    #[test]
    fn strategies_lay_bundles_out() {
        let offers = [node("a", 2, "x"), node("b", 4, "x"), node("c", 3, "y")];
        let go = |bundles, strategy| new(&group(bundles, strategy), &offers).unwrap().join("");
        assert_eq!(go(4, Strategy::Pack), "bbbb", "one node is enough");
        assert_eq!(go(2, Strategy::Pack), "aa", "the fullest that takes all");
        assert_eq!(go(6, Strategy::Pack), "bbbbaa");
        assert_eq!(go(4, Strategy::Spread), "abca");
        assert_eq!(go(3, Strategy::StrictPack), "ccc");
        assert_eq!(go(3, Strategy::StrictSpread), "abc");
    }

    #[test]
    fn a_domain_is_kept_together() {
        let offers = [node("a", 4, "x"), node("b", 2, "y"), node("c", 2, "y"), node("d", 2, "z")];
        let spec = PlacementGroupSpec { topology: Some("zone".into()), ..group(4, Strategy::Spread) };
        assert_eq!(new(&spec, &offers).unwrap().join(""), "aaaa");
        let spec = PlacementGroupSpec { topology: Some("zone".into()), ..group(2, Strategy::StrictSpread) };
        assert_eq!(new(&spec, &offers).unwrap().join(""), "bc");
        let why = new(&PlacementGroupSpec { topology: Some("rack".into()), ..spec }, &offers).unwrap_err();
        assert_eq!(why, "no node has label rack");
    }

    /// Greedy choices would fail here: the flexible bundle takes the only node of the particular one.
    #[test]
    fn differing_bundles_find_their_places() {
        let offers = [node("a", 1, "x"), node("b", 1, "y")];
        for strategy in [Strategy::Pack, Strategy::Spread, Strategy::StrictSpread] {
            let mut spec = group(2, strategy);
            spec.bundles[1].selector = LabelSelector::of("zone", "x");
            assert_eq!(new(&spec, &offers).unwrap(), ["b", "a"], "{strategy:?}");
        }
        // The first choice for the largest is a, which leaves no room for one of the others.
        let offers = [node("a", 4, "x"), node("b", 3, "x")];
        let mut spec = group(3, Strategy::Pack);
        for (bundle, devices) in spec.bundles.iter_mut().zip([3, 2, 2]) {
            bundle.resources.devices = devices;
        }
        assert_eq!(new(&spec, &offers).unwrap(), ["b", "a", "a"]);
    }

    #[test]
    fn what_is_lost_goes_beside_what_is_kept() {
        let kept = Places::from([(0, BundleSlot { node: "b".into(), devices: vec![0] })]);
        let mut offers = [node("a", 4, "x"), node("b", 2, "y"), node("c", 4, "y")];
        offers[1].take(&Resources::device(), &[0], "bundle 0");
        assert_eq!(nodes(&group(2, Strategy::Pack), &kept, &offers).unwrap(), ["b"]);
        assert_eq!(nodes(&group(2, Strategy::StrictSpread), &kept, &offers).unwrap(), ["a"]);
        let spec = PlacementGroupSpec { topology: Some("zone".into()), ..group(2, Strategy::StrictSpread) };
        assert_eq!(nodes(&spec, &kept, &offers).unwrap(), ["c"]);
        let why = nodes(&group(3, Strategy::StrictPack), &kept, &offers).unwrap_err();
        assert!(
            why.starts_with(
                "all bundles must be on one node; on b, the nearest, of those without a place, 1 of 2"
            ),
            "{why}"
        );
    }

    #[test]
    fn says_how_near_it_came() {
        let offers = [node("a", 2, "x"), node("b", 1, "y")];
        assert_eq!(
            new(&group(4, Strategy::Pack), &offers).unwrap_err(),
            "3 of 4 bundles fit; bundle 3 (1 device) does not: node a has 0 of 2 devices free, 1 is wanted; \
             node b has 0 of 1 devices free, 1 is wanted"
        );
        assert_eq!(
            new(&group(3, Strategy::StrictPack), &offers).unwrap_err(),
            "all bundles must be on one node; on a, the nearest, 2 of 3 bundles fit; bundle 2 (1 device) does not: \
             node a has 0 of 2 devices free, 1 is wanted"
        );
        assert_eq!(
            new(&group(3, Strategy::StrictSpread), &offers).unwrap_err(),
            "each bundle must be on a node of its own; 2 of 3 bundles fit; bundle 2 (1 device) does not: node a has \
             another bundle of the group; node b has another bundle of the group"
        );
    }
}
