//! What the head keeps is encoded as its format says.

use std::path::PathBuf;

use super::core::{Key, Record};
use super::election::Candidate;
use crate::spec::{ActorSpec, DeathCause, PlacementGroupSpec, SupervisorSpec};
use crate::state::FORMAT_VERSION;

#[path = "../../tests/support/format.rs"]
mod format;

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/head/format")
}

/// `Record` has all that the head writes; the others say which part of it has changed.
fn lines() -> String {
    [
        format::line::<Record>("Record"),
        format::line::<ActorSpec>("ActorSpec"),
        format::line::<SupervisorSpec>("SupervisorSpec"),
        format::line::<PlacementGroupSpec>("PlacementGroupSpec"),
        format::line::<super::core::ActorRecord>("ActorRecord"),
        format::line::<super::core::GroupRecord>("GroupRecord"),
        format::line::<super::core::NodeRecord>("NodeRecord"),
        format::line::<super::core::PlacementGroupRecord>("PlacementGroupRecord"),
        format::line::<super::core::SupervisorRecord>("SupervisorRecord"),
        format::line::<crate::package::PackageInfo>("PackageInfo"),
        format::line::<super::messages::Kept>("Kept"),
        format::line::<DeathCause>("DeathCause"),
        format::line::<Candidate>("Candidate"),
        keys(),
    ]
    .concat()
}

/// Where records lie is part of the format, too.
fn keys() -> String {
    let name = || "x".to_owned();
    let keys = [
        Key::Spec(name()),
        Key::Actor(name()),
        Key::Group(name()),
        Key::Node(name()),
        Key::PlacementGroup(name()),
        Key::Incarnations,
        Key::Supervisor(name()),
        Key::Driver(crate::spec::DriverId(1)),
        Key::Package(crate::package::Digest([1; 32])),
        Key::Value(name()),
    ];
    format!("keys {}\n", keys.map(|key| key.path()).join(" "))
}

#[test]
fn what_is_kept_is_encoded_as_its_format_says() {
    format::check(&dir(), FORMAT_VERSION, &lines());
}

#[test]
#[ignore = "writes the examples of a format that has none"]
fn write_the_format() {
    format::write(&dir(), FORMAT_VERSION, &lines());
}
