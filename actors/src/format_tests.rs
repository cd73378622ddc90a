//! What actors have in the head's state, their arguments and values, is encoded as its format says.

use std::path::PathBuf;

use heliostat_runtime::state::FORMAT_VERSION;

use crate::eplb::EplbArgs;
use crate::ingress_actor::IngressArgs;
use crate::jobs::JobsArgs;
use crate::rank::RankArgs;
use crate::serve::ServeArgs;
use crate::serve::core::ServeState;
use crate::serve::replica::ReplicaArgs;

#[path = "../../runtime/tests/support/format.rs"]
mod format;

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/format")
}

fn lines() -> String {
    [
        format::line::<RankArgs>("RankArgs"),
        format::line::<EplbArgs>("EplbArgs"),
        format::line::<IngressArgs>("IngressArgs"),
        format::line::<JobsArgs>("JobsArgs"),
        format::line::<ServeArgs>("ServeArgs"),
        format::line::<ReplicaArgs>("ReplicaArgs"),
        format::line::<ServeState>("ServeState"),
    ]
    .concat()
}

#[test]
fn what_actors_keep_is_encoded_as_its_format_says() {
    format::check(&dir(), FORMAT_VERSION, &lines());
}

#[test]
#[ignore = "writes the examples of a format that has none"]
fn write_the_format() {
    format::write(&dir(), FORMAT_VERSION, &lines());
}
