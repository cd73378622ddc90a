//! How things look in a terminal: tables, colours and the widths of both. Text goes out as strings; commands print them.

pub(crate) mod bench;
pub(crate) mod cluster;
pub(crate) mod eplb;
pub(crate) mod heat;
pub(crate) mod job;
pub(crate) mod package;
pub(crate) mod top;

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, Table};
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::IsTerminal;

/// What the terminal can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terminal {
    /// ANSI colours may be written.
    pub(crate) colour: bool,
    /// Columns.
    pub(crate) width: usize,
}

impl Terminal {
    /// Of stdout. NO_COLOR switches colours off, a pipe does, too.
    pub(crate) fn of_stdout() -> Self {
        let tty = std::io::stdout().is_terminal();
        let colour = tty && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok().filter(|_| tty);
        Self { colour, width: size.map_or(110, |s| usize::from(s.ws_col).max(60)) }
    }

    /// The text in an SGR style, e.g. `1` for bold, where colours may be written.
    pub(crate) fn style(self, sgr: &str, text: &str) -> String {
        if self.colour { format!("\u{1b}[{sgr}m{text}\u{1b}[0m") } else { text.to_string() }
    }
}

/// A table without lines: what `grep` and `awk` can read, too.
pub(crate) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(header.map(|text| Cell::new(text.to_uppercase())));
    table
}

/// The table as text, without spaces at the ends of lines.
pub(crate) fn render(table: &Table) -> String {
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_string()).collect();
    let indent = lines.iter().map(|l| l.len() - l.trim_start().len()).min().unwrap_or_default();
    lines.iter().map(|line| format!("{}\n", &line[indent.min(line.len())..])).collect()
}

/// One thing, a line for each of its values; what is within a value is indented, what is nothing is left out.
pub(crate) fn record(row: &Map<String, Json>) -> String {
    fn lines(row: &Map<String, Json>, indent: usize, text: &mut String) {
        let width = row.keys().map(String::len).max().unwrap_or_default();
        for (key, value) in row {
            let _ = match value {
                Json::Null => Ok(()),
                Json::Object(inner) if inner.is_empty() => Ok(()),
                Json::Object(inner) => {
                    let _ = writeln!(text, "{:indent$}{key}", "");
                    lines(inner, indent + 2, text);
                    Ok(())
                }
                Json::Array(all) => {
                    let all: Vec<String> = all.iter().map(plain).collect();
                    writeln!(text, "{:indent$}{key:width$}  {}", "", all.join(", "))
                }
                Json::Bool(_) | Json::Number(_) | Json::String(_) => {
                    writeln!(text, "{:indent$}{key:width$}  {}", "", plain(value))
                }
            };
        }
    }
    let mut text = String::new();
    lines(row, 0, &mut text);
    text
}

/// A value in one line.
fn plain(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), |text| text.trim_end().replace('\n', "\n  "))
}

/// Counts by one thing and a state: a line for each of both.
pub(crate) fn counts(by: &str, counts: &BTreeMap<String, BTreeMap<String, u64>>) -> String {
    let mut table = table([by, "state", "count"]);
    for (what, states) in counts {
        for (state, count) in states {
            table.add_row([what.clone(), state.clone(), count.to_string()]);
        }
    }
    render(&table)
}

/// Something optional in a table.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |v| v.to_string())
}

/// A duration for people.
pub(crate) fn seconds(s: u64) -> String {
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}
