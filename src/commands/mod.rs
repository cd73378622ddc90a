//! One module per command; each turns checked arguments into calls of the runtime and prints the result.

pub(crate) mod bench;
pub(crate) mod cert;
pub(crate) mod check;
pub(crate) mod down;
pub(crate) mod drain;
pub(crate) mod entrypoint;
pub(crate) mod eplb;
pub(crate) mod head;
pub(crate) mod job;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod node;
pub(crate) mod package;
pub(crate) mod serve;
pub(crate) mod status;
pub(crate) mod submit;
pub(crate) mod timeline;
pub(crate) mod top;
pub(crate) mod up;
pub(crate) mod worker;

use anyhow::{Context, Result};
use std::io::Write;

/// Prints to stdout; a reader that went away is an error, which ends the command.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to stdout")
}

/// Prints JSON, indented.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value).context("cannot encode JSON")?;
    print(&format!("{json}\n"))
}
