//! Decides which node and device an actor goes to, and says exactly why when there is none.
//!
//! Pure: the nodes' free resources come in, a slot or the reason comes out.

use std::fmt;

use bincode::{Decode, Encode};

use crate::spec::{Placement, Resources};

/// Where one incarnation runs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Slot {
    /// Name of the node.
    pub node: String,
    /// Index of the device it owns there, if it asked for one.
    pub device: Option<u32>,
}

/// What one node offers at this moment.
#[derive(Debug, Clone, Default)]
pub struct Offer {
    /// Name of the node.
    pub node: String,
    /// Why nothing may be placed there now (unreachable, leaving), if so.
    pub closed: Option<String>,
    /// Its devices, and who owns each.
    pub devices: Vec<(u32, Option<String>)>,
    /// Its CPUs.
    pub cpus: u32,
    /// CPUs that are set aside for actors.
    pub cpus_used: u32,
    /// Actors that run there.
    pub actors: usize,
}

/// Why an actor cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaceable(String);

impl fmt::Display for Unplaceable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Places one actor: back to `last` if that is free, else the first free device in node order, and actors
/// without a device on the node that hosts fewest.
pub fn place(
    resources: Resources,
    placement: &Placement,
    last: Option<&Slot>,
    offers: &[Offer],
) -> Result<Slot, Unplaceable> {
    if offers.is_empty() {
        return Err(Unplaceable("no node has joined the cluster".into()));
    }
    let mut candidates: Vec<(&Offer, Slot)> = Vec::new();
    let mut reasons: Vec<String> = Vec::new();
    for offer in offers {
        match fit(resources, placement, last, offer) {
            Ok(slot) => candidates.push((offer, slot)),
            Err(Some(reason)) => reasons.push(reason),
            Err(None) => {}
        }
    }
    if let Some((_, slot)) = candidates.iter().find(|(_, slot)| Some(slot) == last) {
        return Ok(slot.clone());
    }
    let best = if resources.devices > 0 {
        candidates.into_iter().next()
    } else {
        candidates.into_iter().min_by_key(|(offer, _)| offer.actors)
    };
    match best {
        Some((_, slot)) => Ok(slot),
        None if reasons.is_empty() => Err(Unplaceable(match placement {
            Placement::Anywhere => "no node fits".into(),
            Placement::Node(node) | Placement::Device { node, .. } => {
                format!("node {node} has not joined the cluster")
            }
        })),
        None => Err(Unplaceable(reasons.join("; "))),
    }
}

/// The slot that this node would give, or why not; `Err(None)` when the actor does not want this node.
fn fit(
    resources: Resources,
    placement: &Placement,
    last: Option<&Slot>,
    offer: &Offer,
) -> Result<Slot, Option<String>> {
    let name = &offer.node;
    let index = match placement {
        Placement::Anywhere => None,
        Placement::Node(node) if node == name => None,
        Placement::Device { node, index } if node == name => Some(*index),
        Placement::Node(_) | Placement::Device { .. } => return Err(None),
    };
    if let Some(why) = &offer.closed {
        return Err(Some(format!("node {name} {why}")));
    }
    let cpus_free = offer.cpus.saturating_sub(offer.cpus_used);
    if resources.cpus > cpus_free {
        let (want, all) = (resources.cpus, offer.cpus);
        return Err(Some(format!("node {name} has {cpus_free} of {all} CPUs free, {want} are wanted")));
    }
    let slot = |device| Slot { node: name.clone(), device };
    if resources.devices == 0 {
        return Ok(slot(None));
    }
    if let Some(index) = index {
        return match offer.devices.iter().find(|(device, _)| *device == index) {
            None => Err(Some(format!("node {name} has no device {index}"))),
            Some((_, Some(owner))) => Err(Some(format!("device {index} of node {name} belongs to {owner}"))),
            Some((_, None)) => Ok(slot(Some(index))),
        };
    }
    let free = |index: u32| offer.devices.iter().any(|(device, owner)| *device == index && owner.is_none());
    let back =
        last.filter(|last| last.node == *name).and_then(|last| last.device).filter(|&index| free(index));
    let first = || offer.devices.iter().find(|(_, owner)| owner.is_none()).map(|(device, _)| *device);
    match back.or_else(first) {
        Some(device) => Ok(slot(Some(device))),
        None if offer.devices.is_empty() => Err(Some(format!("node {name} has no device"))),
        None => Err(Some(format!("no device of node {name} is free ({} in use)", offer.devices.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: Resources = Resources { devices: 1, cpus: 0 };

    fn offer(node: &str, owners: &[Option<&str>]) -> Offer {
        let devices =
            owners.iter().enumerate().map(|(i, owner)| (i as u32, owner.map(String::from))).collect();
        Offer {
            node: node.into(),
            devices,
            cpus: 8,
            actors: owners.iter().flatten().count(),
            ..Offer::default()
        }
    }

    fn slot(node: &str, device: Option<u32>) -> Slot {
        Slot { node: node.into(), device }
    }

    fn reason(resources: Resources, placement: &Placement, offers: &[Offer]) -> String {
        place(resources, placement, None, offers).unwrap_err().to_string()
    }

    #[test]
    fn fills_the_first_free_device_and_goes_back_where_it_was() {
        let offers = [offer("a", &[Some("x"), None]), offer("b", &[None, None])];
        let placed =
            |last: Option<Slot>| place(DEVICE, &Placement::Anywhere, last.as_ref(), &offers).unwrap();
        assert_eq!(placed(None), slot("a", Some(1)));
        assert_eq!(placed(Some(slot("b", Some(1)))), slot("b", Some(1)));
        assert_eq!(placed(Some(slot("a", Some(0)))), slot("a", Some(1)), "its old device is taken");
    }

    #[test]
    fn an_actor_without_device_goes_to_the_emptiest_node() {
        let offers = [offer("a", &[Some("x")]), offer("b", &[None])];
        assert_eq!(place(Resources::default(), &Placement::Anywhere, None, &offers), Ok(slot("b", None)));
    }

    #[test]
    fn says_exactly_why_not() {
        let any = Placement::Anywhere;
        assert_eq!(reason(DEVICE, &any, &[]), "no node has joined the cluster");
        assert_eq!(
            reason(DEVICE, &any, &[offer("a", &[Some("x")])]),
            "no device of node a is free (1 in use)"
        );
        assert_eq!(reason(DEVICE, &any, &[offer("a", &[])]), "node a has no device");
        let at = |node: &str, index| Placement::Device { node: node.into(), index };
        let offers = [offer("a", &[Some("x")])];
        assert_eq!(reason(DEVICE, &at("a", 0), &offers), "device 0 of node a belongs to x");
        assert_eq!(reason(DEVICE, &at("a", 3), &offers), "node a has no device 3");
        assert_eq!(reason(DEVICE, &at("z", 0), &offers), "node z has not joined the cluster");
        let cpus = Resources { devices: 0, cpus: 9 };
        assert_eq!(reason(cpus, &any, &offers), "node a has 8 of 8 CPUs free, 9 are wanted");
        let closed = Offer { closed: Some("is unreachable".into()), ..offer("a", &[None]) };
        assert_eq!(reason(DEVICE, &any, &[closed]), "node a is unreachable");
    }
}
