//! `helio logs`: an actor's log through its node, from any machine; logs of head, node agents and `up` from the run
//! directory.

use super::print;
use crate::args::Logs;
use crate::cluster::{Access, run_dir};
use crate::failure::say;
use anyhow::{Context, Result};
use heliostat_runtime::cluster::Cluster;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

/// Bytes asked for at a time.
const CHUNK: u32 = 256 << 10;
/// Longest wait for more.
const WAIT: Duration = Duration::from_secs(10);
/// How often a file of this machine is looked at.
const POLL: Duration = Duration::from_millis(200);

/// Prints a log, and what is added to it.
pub(crate) async fn run(args: &Logs) -> Result<()> {
    let local = run_dir(args.target.run_dir.as_deref(), None)?.log_path(&args.actor);
    if local.is_file() {
        return follow_file(&local, args.follow).await;
    }
    follow_actor(&Access::find(&args.target)?.connect().await?, &args.actor, args.follow).await
}

async fn follow_actor(cluster: &Cluster, actor: &str, follow: bool) -> Result<()> {
    let mut offset = 0;
    loop {
        let wait = if follow { WAIT } else { Duration::ZERO };
        let chunk = match cluster.logs(actor, offset, CHUNK, wait).await {
            Ok(chunk) => chunk,
            // The actor moves, or its node or head comes back: go on where it ended.
            Err(e) if follow && offset > 0 => {
                say(format_args!("{e}; trying again"));
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        write(&chunk.bytes)?;
        if chunk.bytes.is_empty() && !follow {
            return Ok(());
        }
        offset = chunk.next;
    }
}

async fn follow_file(path: &Path, follow: bool) -> Result<()> {
    let opened = std::fs::File::open(path);
    let mut file = opened.with_context(|| format!("cannot open {}", path.display()))?;
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        file.read_to_end(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
        write(&bytes)?;
        if !follow {
            return Ok(());
        }
        let length = file.metadata().map(|m| m.len()).unwrap_or_default();
        if file.stream_position().is_ok_and(|at| at > length) {
            file.seek(SeekFrom::Start(0)).context("cannot follow the log")?;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Bytes as they are: a log may hold anything.
fn write(bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return print("");
    }
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("cannot write to stdout")
}
