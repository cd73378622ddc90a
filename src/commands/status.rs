//! `helio status`.

use super::{print, print_json};
use crate::args::Show;
use crate::cluster::{self, Access};
use crate::show::{self, Terminal};
use anyhow::Result;

/// Shows the whole cluster.
pub(crate) async fn run(args: &Show) -> Result<()> {
    let status = cluster::status(&Access::find(&args.target)?).await?;
    if args.json {
        print_json(&status)
    } else {
        print(&show::cluster::status(&status, Terminal::of_stdout()))
    }
}
