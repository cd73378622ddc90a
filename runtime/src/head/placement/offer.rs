//! What a node has free, and what exactly it lacks for somebody who asks.

use std::collections::BTreeMap;
use std::fmt;

use crate::spec::{LabelRule, LabelSelector, Labels, Quantity, Resources, bytes};

/// What one node offers at this moment.
#[derive(Debug, Clone, Default)]
pub struct Offer {
    /// Name of the node.
    pub node: String,
    /// Why nothing may be placed there now (unreachable, leaving), if so.
    pub closed: Option<String>,
    /// Its labels.
    pub labels: Labels,
    /// Its devices, and who owns each.
    pub devices: Vec<(u32, Option<String>)>,
    /// Its CPUs.
    pub cpus: Quantity,
    /// Its memory, bytes.
    pub memory: u64,
    /// What else it has.
    pub custom: BTreeMap<String, Quantity>,
    /// What of that is set aside; its devices have owners instead.
    pub used: Resources,
    /// Actors that run there.
    pub actors: usize,
}

impl Offer {
    /// Its first devices that nobody owns, as many as asked; fewer if there are not so many.
    pub(in crate::head) fn free_devices(&self, most: u32) -> Vec<u32> {
        let free = self.devices.iter().filter(|(_, owner)| owner.is_none());
        free.map(|(index, _)| *index).take(most as usize).collect()
    }

    /// Whether nobody owns that device.
    pub(in crate::head) fn is_free(&self, index: u32) -> bool {
        self.devices.iter().any(|(device, owner)| *device == index && owner.is_none())
    }

    /// Sets this aside. `devices` are the very devices.
    pub fn take(&mut self, resources: &Resources, devices: &[u32], owner: &str) {
        self.used.add(&Resources { devices: 0, ..resources.clone() });
        for (index, owned) in &mut self.devices {
            if devices.contains(index) {
                *owned = Some(owner.to_owned());
            }
        }
    }

    /// Takes that back.
    pub(super) fn give_back(&mut self, resources: &Resources, devices: &[u32]) {
        self.used.remove(&Resources { devices: 0, ..resources.clone() });
        for (index, owned) in &mut self.devices {
            if devices.contains(index) {
                *owned = None;
            }
        }
    }

    /// How many with these needs would fit here.
    pub(super) fn room_for(&self, resources: &Resources) -> u32 {
        let times = |free: u64, wanted: u64| free.checked_div(wanted).unwrap_or(u64::MAX);
        let devices = self.devices.iter().filter(|(_, owner)| owner.is_none()).count() as u64;
        let mut room = times(devices, resources.devices.into());
        room = room.min(self.cpus.saturating_sub(self.used.cpus).times(resources.cpus));
        room = room.min(times(self.memory.saturating_sub(self.used.memory), resources.memory));
        for (name, wanted) in &resources.custom {
            let all = self.custom.get(name).copied().unwrap_or_default();
            let used = self.used.custom.get(name).copied().unwrap_or_default();
            room = room.min(all.saturating_sub(used).times(*wanted));
        }
        u32::try_from(room).unwrap_or(u32::MAX)
    }

    /// What keeps somebody with these needs off the node; nothing if it fits.
    pub(in crate::head) fn misses(&self, resources: &Resources, selector: &LabelSelector) -> Vec<Miss<'_>> {
        if let Some(why) = &self.closed {
            return vec![Miss::Closed(why)];
        }
        if let Some((key, rule)) = selector.mismatch(&self.labels) {
            let value = self.labels.get(key).cloned();
            return vec![Miss::Label { key: key.to_owned(), rule: rule.clone(), value }];
        }
        let mut misses = Vec::new();
        let free = self.cpus.saturating_sub(self.used.cpus);
        if resources.cpus > free {
            misses.push(Miss::Cpus { free, all: self.cpus, wanted: resources.cpus });
        }
        let free = self.memory.saturating_sub(self.used.memory);
        if resources.memory > free {
            misses.push(Miss::Memory { free, all: self.memory, wanted: resources.memory });
        }
        for (name, &wanted) in &resources.custom {
            let all = self.custom.get(name).copied().unwrap_or_default();
            let used = self.used.custom.get(name).copied().unwrap_or_default();
            let free = all.saturating_sub(used);
            if wanted > free {
                misses.push(Miss::Custom { name: name.clone(), free, all, wanted });
            }
        }
        let free = self.free_devices(resources.devices).len() as u32;
        if resources.devices > free {
            let all = self.devices.len();
            let free = self.free_devices(u32::MAX).len();
            misses.push(Miss::Devices { free, all, wanted: resources.devices });
        }
        misses
    }
}

/// One thing that keeps somebody off a node.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::head) enum Miss<'a> {
    Closed(&'a str),
    Label {
        key: String,
        rule: LabelRule,
        value: Option<String>,
    },
    Cpus {
        free: Quantity,
        all: Quantity,
        wanted: Quantity,
    },
    Memory {
        free: u64,
        all: u64,
        wanted: u64,
    },
    Custom {
        name: String,
        free: Quantity,
        all: Quantity,
        wanted: Quantity,
    },
    Devices {
        free: usize,
        all: usize,
        wanted: u32,
    },
    NoDevice(u32),
    OwnedDevice {
        index: u32,
        owner: &'a str,
    },
    /// It fits, but the bundles must be apart.
    Sibling,
}

impl Miss<'_> {
    /// How far the node is from fitting: first those that only need a release, then those that need more than it has,
    /// then those that are not meant.
    fn distance(&self) -> u32 {
        match self {
            Self::Cpus { all, wanted, .. } => over(wanted > all),
            Self::Memory { all, wanted, .. } => over(wanted > all),
            Self::Custom { all, wanted, .. } => over(wanted > all),
            Self::Devices { all, wanted, .. } => over(*wanted as usize > *all),
            Self::OwnedDevice { .. } | Self::Sibling => 1,
            Self::NoDevice(_) => 10,
            Self::Closed(_) => 100,
            Self::Label { .. } => 1000,
        }
    }
}

fn over(never: bool) -> u32 {
    if never { 10 } else { 1 }
}

/// What follows the node's name.
impl fmt::Display for Miss<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed(why) => f.write_str(why),
            Self::Label { key, rule, value: Some(value) } => write!(f, "has label {key}={value}, not {rule}"),
            Self::Label { key, rule, value: None } => write!(f, "has no label {key}, {rule} is wanted"),
            Self::Cpus { free, all, wanted } => {
                write!(f, "has {free} of {all} CPUs free, {wanted} {} wanted", are(*wanted))
            }
            Self::Memory { free, all, wanted } => {
                let (free, all, wanted) = (bytes(*free), bytes(*all), bytes(*wanted));
                write!(f, "has {free} of {all} memory free, {wanted} is wanted")
            }
            Self::Custom { name, all: Quantity::ZERO, .. } => write!(f, "has no {name}"),
            Self::Custom { name, free, all, wanted } => {
                write!(f, "has {free} of {all} {name} free, {wanted} {} wanted", are(*wanted))
            }
            Self::Devices { all: 0, .. } => f.write_str("has no device"),
            Self::Devices { free, all, wanted } => {
                let are = are(Quantity::whole(*wanted));
                write!(f, "has {free} of {all} devices free, {wanted} {are} wanted")
            }
            Self::Sibling => f.write_str("has another bundle of the group"),
            Self::NoDevice(index) => write!(f, "has no device {index}"),
            Self::OwnedDevice { index, owner } => write!(f, "has device {index}, which belongs to {owner}"),
        }
    }
}

fn are(wanted: Quantity) -> &'static str {
    if wanted > Quantity::whole(1) { "are" } else { "is" }
}

/// Nodes that are named in a reason.
const NAMED_MAX: usize = 3;

/// Why nothing fits: those that come nearest, and how many others there are. Each with its subject, such as "node a".
pub(in crate::head) fn refusal(mut misses: Vec<(String, Vec<Miss<'_>>)>) -> String {
    misses.sort_by_key(|(_, misses)| misses.iter().map(Miss::distance).sum::<u32>());
    let named = misses.iter().take(NAMED_MAX).map(|(subject, misses)| {
        let misses: Vec<String> = misses.iter().map(Miss::to_string).collect();
        format!("{subject} {}", misses.join(" and "))
    });
    let named: Vec<String> = named.collect();
    let mut reason = named.join("; ");
    match misses.len().saturating_sub(NAMED_MAX) {
        0 => {}
        1 => reason.push_str("; 1 other fits no better"),
        others => reason.push_str(&format!("; {others} others fit no better")),
    }
    reason
}
