//! What `helio up` has to say while a cluster starts, and how it is shown: bars on a terminal, lines elsewhere, JSON to
//! the process that waits for `--detach`.

use crate::failure::say;
use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Something to show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub(crate) enum Report {
    /// A sentence that stays.
    Note {
        /// Without a line end.
        text: String,
    },
    /// How far every process and actor is; replaces the one before.
    Progress {
        /// In the order of display.
        rows: Vec<Row>,
    },
    /// The cluster serves.
    Ready(Ready),
    /// It does not, and everything was stopped.
    Failed {
        /// Exit code.
        code: u8,
        /// Why.
        message: String,
    },
}

/// One line of progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Process or actor.
    pub(crate) name: String,
    /// Where it runs, if that is known.
    pub(crate) place: String,
    /// How far it is.
    pub(crate) state: RowState,
}

/// How far one process or actor is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum RowState {
    /// It waits for something.
    Waiting {
        /// For what.
        reason: String,
    },
    /// It is on its way.
    Starting {
        /// What it does.
        phase: String,
        /// Bytes (or units) done.
        done: u64,
        /// Bytes in all; 0 where unknown.
        total: u64,
    },
    /// It works.
    Ready,
    /// It died and will be started again, or not.
    Down {
        /// Why.
        cause: String,
    },
}

/// Where a running cluster is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ready {
    /// Name of the cluster.
    pub(crate) cluster: String,
    /// Name of the model, if one is served.
    pub(crate) model: Option<String>,
    /// Base URL of the dashboard, if there is one.
    pub(crate) dashboard: Option<String>,
    /// Base URL of the HTTP server.
    pub(crate) url: String,
    /// Address of the head.
    pub(crate) head: String,
    /// Run directory.
    pub(crate) run_dir: String,
    /// From start to ready.
    pub(crate) took_ms: u64,
}

/// Shows reports.
#[derive(Debug)]
pub(crate) enum Display {
    /// Bars that move.
    Bars(Bars),
    /// A line for each change.
    Lines(Lines),
    /// JSON lines to stdout, for `--detach`.
    Json,
}

impl Display {
    /// Bars on a terminal, lines elsewhere.
    pub(crate) fn for_stderr() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Bars(Bars::default())
        } else {
            Self::Lines(Lines::default())
        }
    }

    /// Shows one report. Fails where the one who waits for `--detach` is gone; what people would read may be lost.
    pub(crate) fn show(&mut self, report: &Report) -> Result<()> {
        match self {
            Self::Bars(bars) => {
                bars.show(report);
                Ok(())
            }
            Self::Lines(lines) => {
                lines.show(report);
                Ok(())
            }
            Self::Json => {
                let mut line = serde_json::to_string(report).context("cannot encode a report")?;
                line.push('\n');
                let mut out = std::io::stdout().lock();
                out.write_all(line.as_bytes())
                    .and_then(|()| out.flush())
                    .context("nobody waits for this cluster")
            }
        }
    }
}

/// Progress bars, one per row.
#[derive(Debug, Default)]
pub(crate) struct Bars {
    multi: MultiProgress,
    bars: BTreeMap<String, ProgressBar>,
}

impl Bars {
    fn show(&mut self, report: &Report) {
        match report {
            Report::Note { text } => drop(self.multi.println(text)),
            Report::Progress { rows } => {
                self.bars.retain(|name, bar| {
                    let stays = rows.iter().any(|row| row.name == *name);
                    if !stays {
                        bar.finish_and_clear();
                    }
                    stays
                });
                let width = rows.iter().map(|r| r.name.len()).max().unwrap_or_default();
                for row in rows {
                    self.show_row(row, width);
                }
            }
            Report::Ready(_) | Report::Failed { .. } => {
                for bar in self.bars.values().filter(|bar| !bar.is_finished()) {
                    bar.abandon();
                }
                self.bars.clear();
                self.multi = MultiProgress::new();
            }
        }
    }

    fn show_row(&mut self, row: &Row, width: usize) {
        let multi = &self.multi;
        let bar = self.bars.entry(row.name.clone()).or_insert_with(|| {
            let bar = multi.add(ProgressBar::new(0));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        bar.set_prefix(format!("{:width$}", row.name));
        if bar.is_finished() && row.state != RowState::Ready {
            bar.reset();
        }
        let (template, message) = match &row.state {
            RowState::Waiting { reason } => ("  {prefix}  {spinner} {msg:.dim}", reason.clone()),
            RowState::Starting { phase, total: 0, .. } => ("  {prefix}  {spinner} {msg}", phase.clone()),
            RowState::Starting { phase, done, total } => {
                bar.set_length(*total);
                bar.set_position(*done);
                let template =
                    "  {prefix}  {msg} {bar:24.cyan/dim} {bytes}/{total_bytes} {bytes_per_sec:.dim}";
                (template, phase.clone())
            }
            RowState::Ready => ("  {prefix}  {msg:.green}", format!("ready  {}", row.place)),
            RowState::Down { cause } => ("  {prefix}  {msg:.red}", first_line(cause).to_string()),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(message);
        if row.state == RowState::Ready {
            bar.finish();
        }
    }
}

/// Plain lines: one when a row's state or phase changes.
#[derive(Debug)]
pub(crate) struct Lines {
    started: Instant,
    said: BTreeMap<String, String>,
}

impl Default for Lines {
    fn default() -> Self {
        Self { started: Instant::now(), said: BTreeMap::new() }
    }
}

impl Lines {
    fn show(&mut self, report: &Report) {
        let lines = match report {
            Report::Note { text } => vec![text.clone()],
            Report::Progress { rows } => rows.iter().filter_map(|row| self.change(row)).collect(),
            Report::Ready(_) | Report::Failed { .. } => Vec::new(),
        };
        for line in lines {
            say(format_args!("{:7.2}s  {line}", self.started.elapsed().as_secs_f64()));
        }
    }

    /// The line for a row, if it says anything new.
    fn change(&mut self, row: &Row) -> Option<String> {
        let what = match &row.state {
            RowState::Waiting { reason } => format!("waiting: {reason}"),
            RowState::Starting { phase, total: 0, .. } => phase.clone(),
            RowState::Starting { phase, total, .. } => format!("{phase} ({})", indicatif::HumanBytes(*total)),
            RowState::Ready => format!("ready  {}", row.place),
            RowState::Down { cause } => cause.clone(),
        };
        if what.is_empty() || self.said.get(&row.name) == Some(&what) {
            return None;
        }
        self.said.insert(row.name.clone(), what.clone());
        Some(format!("{}: {}", row.name, what.trim_end()))
    }
}

/// Says on stdout where a cluster is reached that serves. Nobody need be there to read it.
pub(crate) fn welcome(ready: &Ready, detached: bool) {
    let _ = std::io::stdout().write_all(welcome_text(ready, detached).as_bytes());
}

fn welcome_text(ready: &Ready, detached: bool) -> String {
    let Ready { cluster, model, dashboard, url, head, run_dir, took_ms } = ready;
    let seconds = *took_ms as f64 / 1000.0;
    let stop = if detached { "helio down" } else { "Ctrl-C, or helio down" };
    let Some(model) = model else {
        let dashboard = dashboard.as_deref().unwrap_or("none ([dashboard])");
        return format!(
            "
{cluster} runs after {seconds:.1} s; nothing is served yet

  serves     {url}
  head       {head} (helio status)
  dashboard  {dashboard}
  logs       {run_dir} (helio logs ACTOR -f)

Try:   helio serve deploy DOCUMENT, helio submit PROGRAM, or helio job submit -- COMMAND
Stop:  {stop}
"
        );
    };
    let page =
        dashboard.as_ref().map_or_else(String::new, |page| format!("  page         {page} (helio top)\n"));
    format!(
        "
{cluster} serves {model} after {seconds:.1} s

{page}  completions  {url}/v1/completions
  models       {url}/v1/models
  metrics      {url}/metrics
  experts      {url}/api/eplb (helio eplb show)
  head         {head} (helio status)
  logs         {run_dir} (helio logs ACTOR -f)

Try:   curl -N {url}/v1/completions -H 'content-type: application/json' \\
         -d '{{\"model\": \"{model}\", \"prompt\": \"The SELECT statement\", \"max_tokens\": 64, \"stream\": true}}'
Stop:  {stop}
"
    )
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(state: RowState) -> Row {
        Row { name: "rank-0".into(), place: "node-0 pid 7".into(), state }
    }

    #[test]
    fn a_line_is_printed_when_something_changes_and_not_per_byte() {
        let mut lines = Lines::default();
        let loading = |done| row(RowState::Starting { phase: "loading weights".into(), done, total: 1024 });
        assert_eq!(lines.change(&loading(1)).as_deref(), Some("rank-0: loading weights (1.00 KiB)"));
        assert_eq!(lines.change(&loading(512)), None);
        assert_eq!(lines.change(&row(RowState::Ready)).as_deref(), Some("rank-0: ready  node-0 pid 7"));
        assert_eq!(lines.change(&row(RowState::Ready)), None);
    }

    #[test]
    fn reports_survive_the_pipe() {
        let reports = [
            Report::Progress { rows: vec![row(RowState::Waiting { reason: "a device".into() })] },
            Report::Failed { code: 4, message: "torn\nweights".into() },
        ];
        for report in reports {
            let json = serde_json::to_string(&report).expect("encode");
            assert!(!json.contains('\n'));
            assert_eq!(serde_json::from_str::<Report>(&json).expect("decode"), report);
        }
    }
}
