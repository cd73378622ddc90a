//! Labels of nodes, and what an actor or a bundle wants of them. Plain data with one question: does it match?

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// A node's labels.
pub type Labels = BTreeMap<String, String>;

/// Every node has this label; its value is the node's name.
pub const NODE_LABEL: &str = "heliostat/node";
/// Every node has this label; its value is the name of its machine.
pub const HOST_LABEL: &str = "heliostat/host";
/// Labels that begin so are set by the node itself.
const OWN_PREFIX: &str = "heliostat/";

/// What the value of one label must be. Written as in Ray: `v`, `!v`, `in(a,b)`, `!in(a,b)`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum LabelRule {
    /// One of these; a node without the label does not match.
    In(Vec<String>),
    /// None of these; a node without the label matches.
    NotIn(Vec<String>),
}

impl LabelRule {
    fn matches(&self, value: Option<&String>) -> bool {
        match self {
            Self::In(values) => value.is_some_and(|value| values.contains(value)),
            Self::NotIn(values) => !value.is_some_and(|value| values.contains(value)),
        }
    }
}

/// No rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("label rule {0:?} is none of \"v\", \"!v\", \"in(a,b)\" and \"!in(a,b)\"")]
pub struct InvalidRule(String);

impl FromStr for LabelRule {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        let (not, rest) = text.strip_prefix('!').map_or((false, text), |rest| (true, rest));
        let list = rest.strip_prefix("in(").and_then(|rest| rest.strip_suffix(')'));
        let values: Vec<String> = match list {
            Some(list) => list.split(',').map(|value| value.trim().to_owned()).collect(),
            None => vec![rest.trim().to_owned()],
        };
        if !values.iter().all(|value| is_value(value)) {
            return Err(InvalidRule(text.to_owned()));
        }
        Ok(if not { Self::NotIn(values) } else { Self::In(values) })
    }
}

impl fmt::Display for LabelRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (not, values) = match self {
            Self::In(values) => ("", values),
            Self::NotIn(values) => ("!", values),
        };
        match values.as_slice() {
            [one] => write!(f, "{not}{one}"),
            many => write!(f, "{not}in({})", many.join(",")),
        }
    }
}

impl Serialize for LabelRule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LabelRule {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What the labels of a node must be; the empty one matches every node.
#[derive(
    Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct LabelSelector(BTreeMap<String, LabelRule>);

impl LabelSelector {
    /// Matches nodes whose label `key` is `value`.
    pub fn of(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self::default().and(key, LabelRule::In(vec![value.into()]))
    }

    /// The same with one more rule; a rule for the same label is replaced.
    pub fn and(mut self, key: impl Into<String>, rule: LabelRule) -> Self {
        self.0.insert(key.into(), rule);
        self
    }

    /// Whether it matches every node.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first rule that does not match: its label and itself.
    pub fn mismatch(&self, labels: &Labels) -> Option<(&str, &LabelRule)> {
        let broken = |(key, rule): &(&String, &LabelRule)| !rule.matches(labels.get(*key));
        self.0.iter().find(broken).map(|(key, rule)| (key.as_str(), rule))
    }

    /// Says what is wrong with its labels and values.
    pub fn validate(&self) -> Result<(), String> {
        for (key, rule) in &self.0 {
            check_key(key)?;
            let (LabelRule::In(values) | LabelRule::NotIn(values)) = rule;
            if values.is_empty() {
                return Err(format!("the rule for label {key:?} lists no value"));
            }
            for value in values {
                check_value(key, value)?;
            }
        }
        Ok(())
    }
}

fn is_value(value: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    !value.is_empty() && value.len() <= 128 && value.bytes().all(plain)
}

pub(super) fn check_key(key: &str) -> Result<(), String> {
    let part = |part: &str| is_value(part) && part.len() <= 63;
    let parts: Vec<&str> = key.split('/').collect();
    if parts.len() > 2 || !parts.iter().copied().all(part) {
        return Err(format!("label {key:?} must be letters, digits, '-', '_' and '.', with at most one '/'"));
    }
    Ok(())
}

fn check_value(key: &str, value: &str) -> Result<(), String> {
    if is_value(value) {
        return Ok(());
    }
    Err(format!("value {value:?} of label {key:?} must be 1 to 128 letters, digits, '-', '_' or '.'"))
}

/// Whether a node may be given these labels; if not, why.
pub fn check_labels(labels: &Labels) -> Result<(), String> {
    for (key, value) in labels {
        check_key(key)?;
        check_value(key, value)?;
        if key.starts_with(OWN_PREFIX) {
            return Err(format!("label {key:?}: what begins with {OWN_PREFIX:?} is set by the node itself"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_read_as_they_are_written() {
        let labels = Labels::from([("zone".to_owned(), "a".to_owned())]);
        for (rule, zone, rack) in [
            ("a", true, false),
            ("!a", false, true),
            ("in(b, a)", true, false),
            ("!in(b,c)", true, true),
            ("b", false, false),
        ] {
            let parsed: LabelRule = rule.parse().unwrap();
            assert_eq!(parsed.to_string(), rule.replace(' ', ""));
            assert_eq!(parsed.matches(labels.get("zone")), zone, "zone is {rule}");
            assert_eq!(parsed.matches(labels.get("rack")), rack, "rack is {rule}");
        }
        for broken in ["", "!", "in()", "in(a,)", "a b", "in(a"] {
            assert!(broken.parse::<LabelRule>().is_err(), "{broken}");
        }
    }

    #[test]
    fn a_selector_names_what_does_not_match() {
        let selector = LabelSelector::of("zone", "a").and("rack", "!r1".parse().unwrap());
        let labels =
            Labels::from([("zone".to_owned(), "a".to_owned()), ("rack".to_owned(), "r1".to_owned())]);
        let (key, rule) = selector.mismatch(&labels).unwrap();
        assert_eq!((key, rule.to_string().as_str()), ("rack", "!r1"));
        assert!(LabelSelector::of("a/b/c", "d").validate().is_err());
        let own = Labels::from([(NODE_LABEL.to_owned(), "x".to_owned())]);
        assert!(check_labels(&own).unwrap_err().contains("set by the node itself"));
    }
}
