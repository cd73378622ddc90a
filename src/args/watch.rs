//! `helio top` and `helio timeline`.

use super::Target;
use clap::Args;
use std::path::PathBuf;

/// `helio top`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio top
  helio top --once                  one look of a second, as text, for scripts
  helio top --once | grep tokens/s

q or Ctrl-C ends it. The same, and more, is shown by the page of the dashboard: http://127.0.0.1:8265")]
pub(crate) struct Top {
    /// Look for one second, print what was seen, and end.
    #[arg(long)]
    pub(crate) once: bool,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
}

/// `helio timeline`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio timeline                              3 seconds, into timeline.json
  helio timeline --seconds 10 -o slow.json    then open it in https://ui.perfetto.dev or chrome://tracing

Rows: the steps of each rank with their parts, waits for other ranks by layer, changes of the map; remaps; sequences from
their arrival to their end.")]
pub(crate) struct Timeline {
    /// How long to record; at most 60.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = parse_seconds)]
    pub(crate) seconds: f64,
    /// Where to write; `-` is stdout.
    #[arg(long, short, value_name = "FILE", default_value = "timeline.json")]
    pub(crate) output: PathBuf,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.0..=60.0).contains(seconds));
    seconds.ok_or_else(|| "write a number of seconds between 0 and 60".to_owned())
}
