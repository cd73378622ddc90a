//! What is wrong with a cluster.toml, shown as the user wrote it: file, line, column, the line itself and the remedy.

use std::fmt;
use std::ops::Range;

/// One thing that is wrong.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    /// Bytes of the file that are wrong; None where the fault is a default or outside of the file.
    pub(crate) span: Option<Range<usize>>,
    /// What is wrong, one sentence without a full stop.
    pub(crate) message: String,
    /// What to write instead; shown under the offending text.
    pub(crate) help: Option<String>,
}

impl Problem {
    /// A problem of the bytes `span`.
    pub(crate) fn at(span: Option<Range<usize>>, message: impl Into<String>) -> Self {
        Self { span, message: message.into(), help: None }
    }

    /// The same with a remedy.
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// Everything that is wrong with one file.
#[derive(Debug, Clone)]
pub(crate) struct ConfigError {
    /// Path as the user gave it.
    pub(crate) file: String,
    /// Text of the file.
    pub(crate) text: String,
    /// At least one, in the order of the file.
    pub(crate) problems: Vec<Problem>,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            self.fmt_problem(f, problem)?;
        }
        Ok(())
    }
}

impl ConfigError {
    fn fmt_problem(&self, f: &mut fmt::Formatter<'_>, problem: &Problem) -> fmt::Result {
        let help = problem.help.as_deref().unwrap_or_default();
        let Some(span) = &problem.span else {
            write!(f, "{}: {}", self.file, problem.message)?;
            return if help.is_empty() { Ok(()) } else { write!(f, "\n  = {help}") };
        };
        let place = Place::of(&self.text, span);
        let number = place.line.to_string();
        let gutter = " ".repeat(number.len());
        writeln!(f, "{}:{}:{}: {}", self.file, place.line, place.column, problem.message)?;
        writeln!(f, "{gutter} |")?;
        writeln!(f, "{number} | {}", place.text)?;
        let marks = format!("{}{} {help}", " ".repeat(place.column - 1), "^".repeat(place.width));
        write!(f, "{gutter} | {}", marks.trim_end())
    }
}

/// Where a span lies, in a reader's terms.
struct Place<'t> {
    /// From 1.
    line: usize,
    /// From 1, in characters.
    column: usize,
    /// Characters to underline on that line, at least one.
    width: usize,
    /// The line without its end.
    text: &'t str,
}

impl<'t> Place<'t> {
    fn of(text: &'t str, span: &Range<usize>) -> Self {
        let floor =
            |at: usize| (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        let (start, end) = (floor(span.start), floor(span.end));
        let line_start = text[..start].rfind('\n').map_or(0, |i| i + 1);
        let line = text[line_start..].lines().next().unwrap_or_default();
        let end_on_line = end.clamp(start, line_start + line.len().max(start - line_start));
        Self {
            line: text[..start].matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            width: text[start..end_on_line].chars().count().max(1),
            text: line,
        }
    }
}
