//! `helio list nodes|workers|actors`.

use super::{print, print_json};
use crate::args::{List, Listed};
use crate::cluster::{self, Access};
use crate::show::cluster as show;
use anyhow::Result;

/// Lists one kind of thing.
pub(crate) async fn run(args: &List) -> Result<()> {
    let status = cluster::status(&Access::find(&args.target)?).await?;
    match (args.what, args.json) {
        (Listed::Nodes, true) => print_json(&status.nodes),
        (Listed::Workers, true) => print_json(&status.workers),
        (Listed::Actors, true) => print_json(&status.actors),
        (Listed::Nodes, false) => print(&show::nodes(&status.nodes)),
        (Listed::Workers, false) => print(&show::workers(&status.workers)),
        (Listed::Actors, false) => print(&show::actors(&status.actors, &status.nodes)),
    }
}
