//! Decides which node and device an actor goes to, and says exactly why when there is none.
//!
//! Pure: the nodes' free resources come in, a slot or the reason comes out.

mod bundles;
mod offer;

use std::fmt;

use bincode::{Decode, Encode};

pub use self::bundles::{BundleSlot, Places, plan};
use self::offer::Miss;
pub use self::offer::Offer;
pub(super) use self::offer::refusal;
use crate::spec::{LabelSelector, Placement, Resources};

/// A bundle of one placement group, told from those of earlier groups of the same name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub struct BundleRef {
    /// Name of the group.
    pub group: String,
    /// Number of the group.
    pub id: u64,
    /// Index of the bundle.
    pub index: u32,
}

/// Where one incarnation runs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Slot {
    /// Name of the node.
    pub node: String,
    /// Index of the device it owns there, if it asked for one.
    pub device: Option<u32>,
    /// The bundle that it takes its resources from; without one, they are its own.
    pub bundle: Option<BundleRef>,
}

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// What it needs.
    pub resources: &'a Resources,
    /// Where it may go.
    pub placement: &'a Placement,
    /// What the labels of its node must be.
    pub selector: &'a LabelSelector,
    /// Where it was before.
    pub last: Option<&'a Slot>,
}

/// Why an actor cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaceable(pub(super) String);

impl fmt::Display for Unplaceable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Places one actor, as `Placement` says.
pub fn place(request: &Request<'_>, offers: &[Offer]) -> Result<Slot, Unplaceable> {
    if offers.is_empty() {
        return Err(Unplaceable("no node has joined the cluster".into()));
    }
    let wanted = || offers.iter().filter(|offer| wants(request.placement, offer));
    let fitting = wanted().filter_map(|offer| Some((offer, fit(request, offer).ok()?)));
    if let Some((offer, device)) = fitting.min_by_key(|(offer, device)| order(request, offer, *device)) {
        return Ok(Slot { node: offer.node.clone(), device, bundle: None });
    }
    let misses =
        wanted().filter_map(|offer| Some((format!("node {}", offer.node), fit(request, offer).err()?)));
    let misses: Vec<_> = misses.collect();
    Err(Unplaceable(match request.placement {
        Placement::Bundle { group, .. } => format!("there is no placement group {group}"),
        Placement::Node(node) | Placement::Device { node, .. } if misses.is_empty() => {
            format!("node {node} has not joined the cluster")
        }
        _ => refusal(misses),
    }))
}

/// Whether the actor may go there at all.
fn wants(placement: &Placement, offer: &Offer) -> bool {
    match placement {
        Placement::Anywhere | Placement::Spread | Placement::NodePreferred(_) => true,
        Placement::Node(node) | Placement::Device { node, .. } => *node == offer.node,
        Placement::Bundle { .. } => false,
    }
}

/// Which of the nodes that fit is taken: the lowest, and the first of equals.
fn order(request: &Request<'_>, offer: &Offer, device: Option<u32>) -> (bool, bool, usize) {
    let back = request.last.is_some_and(|last| last.node == offer.node && last.device == device);
    let emptiest = match request.placement {
        Placement::Spread => true,
        Placement::Anywhere
        | Placement::Node(_)
        | Placement::NodePreferred(_)
        | Placement::Device { .. }
        | Placement::Bundle { .. } => request.resources.devices == 0,
    };
    let preferred = matches!(request.placement, Placement::NodePreferred(node) if *node == offer.node);
    (!preferred, !back, if emptiest { offer.actors } else { 0 })
}

/// The device that this node would give, if one is wanted, or what it lacks.
fn fit<'a>(request: &Request<'_>, offer: &'a Offer) -> Result<Option<u32>, Vec<Miss<'a>>> {
    if let Placement::Device { index, .. } = request.placement {
        return fit_device(request, offer, *index);
    }
    let misses = offer.misses(request.resources, request.selector);
    if !misses.is_empty() {
        return Err(misses);
    }
    if request.resources.devices == 0 {
        return Ok(None);
    }
    let last = request.last.filter(|last| last.node == offer.node).and_then(|last| last.device);
    let back = last.filter(|&index| offer.is_free(index));
    Ok(back.or_else(|| offer.free_devices(1).first().copied()))
}

fn fit_device<'a>(request: &Request<'_>, offer: &'a Offer, index: u32) -> Result<Option<u32>, Vec<Miss<'a>>> {
    let others = Resources { devices: 0, ..request.resources.clone() };
    let mut misses = offer.misses(&others, request.selector);
    let owner = offer.devices.iter().find(|(device, _)| *device == index).map(|(_, owner)| owner);
    match owner {
        _ if request.resources.devices == 0 || matches!(misses.as_slice(), [Miss::Closed(_)]) => {}
        None => misses.push(Miss::NoDevice(index)),
        Some(Some(owner)) => misses.push(Miss::OwnedDevice { index, owner }),
        Some(None) => {}
    }
    if !misses.is_empty() {
        return Err(misses);
    }
    Ok((request.resources.devices > 0).then_some(index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Labels, Quantity};

    fn offer(node: &str, owners: &[Option<&str>]) -> Offer {
        let devices =
            owners.iter().enumerate().map(|(i, owner)| (i as u32, owner.map(String::from))).collect();
        Offer {
            node: node.into(),
            devices,
            cpus: 8.into(),
            memory: 1 << 30,
            actors: owners.iter().flatten().count(),
            ..Offer::default()
        }
    }

    fn slot(node: &str, device: Option<u32>) -> Slot {
        Slot { node: node.into(), device, bundle: None }
    }

    fn placed(
        resources: &Resources,
        placement: &Placement,
        last: Option<&Slot>,
        offers: &[Offer],
    ) -> Result<Slot, String> {
        let selector = &LabelSelector::default();
        place(&Request { resources, placement, selector, last }, offers).map_err(|why| why.to_string())
    }

    fn reason(resources: &Resources, placement: &Placement, offers: &[Offer]) -> String {
        placed(resources, placement, None, offers).unwrap_err()
    }

    #[test]
    fn fills_the_first_free_device_and_goes_back_where_it_was() {
        let offers = [offer("a", &[Some("x"), None]), offer("b", &[None, None])];
        let placed = |last: Option<Slot>| {
            placed(&Resources::device(), &Placement::Anywhere, last.as_ref(), &offers).unwrap()
        };
        assert_eq!(placed(None), slot("a", Some(1)));
        assert_eq!(placed(Some(slot("b", Some(1)))), slot("b", Some(1)));
        assert_eq!(placed(Some(slot("a", Some(0)))), slot("a", Some(1)), "its old device is taken");
    }

    #[test]
    fn strategies_choose_among_what_fits() {
        let offers = [offer("a", &[Some("x"), None]), offer("b", &[None])];
        let go = |resources: &Resources, placement: Placement| placed(resources, &placement, None, &offers);
        assert_eq!(go(&Resources::default(), Placement::Anywhere), Ok(slot("b", None)), "the emptiest");
        assert_eq!(go(&Resources::device(), Placement::Spread), Ok(slot("b", Some(0))));
        assert_eq!(go(&Resources::device(), Placement::NodePreferred("b".into())), Ok(slot("b", Some(0))));
        assert_eq!(go(&Resources::device(), Placement::NodePreferred("z".into())), Ok(slot("a", Some(1))));
        let two = Resources { devices: 0, ..Resources::cpus(9) };
        assert!(go(&two, Placement::NodePreferred("b".into())).is_err(), "soft, but nothing has 9 CPUs");
    }

    #[test]
    fn an_actor_goes_only_where_its_selector_matches() {
        let labelled = |node: &str, zone: &str| Offer {
            labels: Labels::from([("zone".into(), zone.into())]),
            ..offer(node, &[])
        };
        let offers = [labelled("a", "x"), labelled("b", "y"), offer("c", &[])];
        let go = |rule: &str| {
            let selector = &LabelSelector::default().and("zone", rule.parse().unwrap());
            let (resources, placement) = (&Resources::default(), &Placement::Anywhere);
            let placed = place(&Request { resources, placement, selector, last: None }, &offers);
            placed.map(|slot| slot.node).map_err(|why| why.to_string())
        };
        assert_eq!(go("y"), Ok("b".into()));
        assert_eq!(go("!in(x,y)"), Ok("c".into()));
        let why = "node a has label zone=x, not z; node b has label zone=y, not z; node c has no label zone, z is wanted";
        assert_eq!(go("z"), Err(why.into()));
    }

    #[test]
    fn says_exactly_why_not() {
        let (any, device) = (Placement::Anywhere, Resources::device());
        assert_eq!(reason(&device, &any, &[]), "no node has joined the cluster");
        let taken = offer("a", &[Some("x")]);
        assert_eq!(reason(&device, &any, &[taken]), "node a has 0 of 1 devices free, 1 is wanted");
        assert_eq!(reason(&device, &any, &[offer("a", &[])]), "node a has no device");
        let at = |node: &str, index| Placement::Device { node: node.into(), index };
        let offers = [offer("a", &[Some("x")])];
        assert_eq!(reason(&device, &at("a", 0), &offers), "node a has device 0, which belongs to x");
        assert_eq!(reason(&device, &at("a", 3), &offers), "node a has no device 3");
        assert_eq!(reason(&device, &at("z", 0), &offers), "node z has not joined the cluster");
        let much = Resources { memory: 3 << 29, ..Resources::cpus(9) }.with("tpu", Quantity::milli(500));
        assert_eq!(
            reason(&much, &any, &offers),
            "node a has 8 of 8 CPUs free, 9 are wanted and has 1 GiB of 1 GiB memory free, 1.5 GiB is wanted \
             and has no tpu"
        );
        let closed = Offer { closed: Some("is unreachable".into()), ..offer("a", &[None]) };
        assert_eq!(reason(&device, &any, &[closed]), "node a is unreachable");
    }

    #[test]
    fn a_reason_names_the_nodes_that_come_nearest() {
        let mut offers: Vec<Offer> = (0..50).map(|n| offer(&format!("n{n}"), &[])).collect();
        offers[40].devices = vec![(0, Some("x".into()))];
        assert_eq!(
            reason(&Resources::device(), &Placement::Anywhere, &offers),
            "node n40 has 0 of 1 devices free, 1 is wanted; node n0 has no device; node n1 has no device; \
             47 others fit no better"
        );
    }

    #[test]
    fn parts_of_a_cpu_add_up() {
        let mut node = offer("a", &[]);
        let half = Resources::cpus(Quantity::milli(500));
        for _ in 0..16 {
            placed(&half, &Placement::Anywhere, None, std::slice::from_ref(&node)).unwrap();
            node.take(&half, &[], "x");
        }
        let tenth = Resources::cpus(Quantity::milli(100));
        assert_eq!(
            reason(&tenth, &Placement::Anywhere, &[node]),
            "node a has 0 of 8 CPUs free, 0.1 is wanted"
        );
    }
}
