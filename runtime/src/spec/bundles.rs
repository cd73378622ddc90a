//! Placement groups: bundles of resources that are reserved all together or not at all. Plain data.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::labels::{LabelSelector, check_key};
use super::resources::Resources;
use super::{InvalidSpec, is_name};

/// Bundles of one group at most.
const BUNDLES_MAX: usize = 4096;

/// Bundles that are reserved all together or not at all. A group never changes: to have another, remove it first.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct PlacementGroupSpec {
    /// Unique among placement groups.
    pub name: String,
    /// What is reserved, by index.
    pub bundles: Vec<Bundle>,
    /// How the bundles lie to each other.
    #[serde(default)]
    pub strategy: Strategy,
    /// A label, such as that of an NVLink domain: all bundles go to nodes with the same value of it.
    #[serde(default)]
    pub topology: Option<String>,
}

/// A reservation on one node, which actors share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Bundle {
    /// What is set aside.
    pub resources: Resources,
    /// What the labels of its node must be.
    #[serde(default)]
    pub selector: LabelSelector,
}

/// How the bundles of a group lie to each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Strategy {
    /// On few nodes, if possible.
    #[default]
    Pack,
    /// On many nodes, if possible.
    Spread,
    /// All on one node.
    StrictPack,
    /// Each on a node of its own.
    StrictSpread,
}

impl PlacementGroupSpec {
    /// So many equal bundles, packed.
    pub fn new(name: impl Into<String>, bundles: usize, resources: Resources) -> Self {
        let bundle = Bundle { resources, selector: LabelSelector::default() };
        Self { name: name.into(), bundles: vec![bundle; bundles], strategy: Strategy::Pack, topology: None }
    }

    /// The same with another strategy.
    pub fn strategy(self, strategy: Strategy) -> Self {
        Self { strategy, ..self }
    }

    /// Says what is wrong, so that a mistake is refused before anything is reserved.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        let fail = |why: String| Err(InvalidSpec::placement_group(&self.name, why));
        if !is_name(&self.name) {
            return fail(
                "the name must be 1 to 128 letters, digits, '-', '_' or '.', not starting with '.'".into(),
            );
        }
        if self.bundles.is_empty() || self.bundles.len() > BUNDLES_MAX {
            return fail(format!("it has {} bundles, 1 to {BUNDLES_MAX} are allowed", self.bundles.len()));
        }
        for (index, bundle) in self.bundles.iter().enumerate() {
            let fail = |why: String| fail(format!("bundle {index}: {why}"));
            if *bundle == Bundle::default() {
                return fail(
                    "it asks for nothing; ask for a device, CPUs, memory, a custom resource or labels".into(),
                );
            }
            bundle.resources.validate().or_else(fail)?;
            bundle.selector.validate().or_else(fail)?;
        }
        self.topology.as_deref().map_or(Ok(()), check_key).or_else(fail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validate_names_the_mistake() {
        let group = PlacementGroupSpec::new("pg", 2, Resources::device());
        assert_eq!(group.validate(), Ok(()));
        let why = |group: PlacementGroupSpec| group.validate().unwrap_err().to_string();
        assert!(why(PlacementGroupSpec { bundles: vec![], ..group.clone() }).contains("has 0 bundles"));
        let empty = PlacementGroupSpec::new("pg", 1, Resources::default());
        assert_eq!(
            why(empty),
            "placement group \"pg\": bundle 0: it asks for nothing; ask for a device, CPUs, memory, a custom resource \
             or labels"
        );
        assert!(why(PlacementGroupSpec { topology: Some("a b".into()), ..group }).contains("label"));
    }
}
