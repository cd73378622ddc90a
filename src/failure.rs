//! How a command fails: exit codes, and the one place that prints an error.

use crate::config::ConfigError;
use std::fmt;
use std::io::{IsTerminal, Write};

/// Something failed.
pub(crate) const FAILED: u8 = 1;
/// Wrong arguments or configuration (clap's own code, too).
pub(crate) const USAGE: u8 = 2;
/// No cluster runs at the address.
pub(crate) const NO_CLUSTER: u8 = 3;
/// `helio up` could not bring the cluster up.
pub(crate) const NOT_STARTED: u8 = 4;

/// An error with an exit code of its own.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code.
    pub(crate) code: u8,
    /// What happened and what to do, for the user.
    pub(crate) message: String,
}

impl Failure {
    /// As an error that `report` understands.
    pub(crate) fn error(code: u8, message: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Self { code, message: message.into() })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// A line to people, on stderr. Where nobody can read it (a full disk, a terminal that went away) the work goes on without
/// it: `eprintln!` would end the process, and a cluster with it.
pub(crate) fn say(line: impl fmt::Display) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Prints the error to stderr and returns the exit code.
pub(crate) fn report(error: &anyhow::Error) -> u8 {
    if is_broken_pipe(error) {
        return FAILED;
    }
    let red = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let head = if red { "\u{1b}[1;31merror\u{1b}[0m" } else { "error" };
    say(format_args!("{head}: {}", text(error)));
    code(error)
}

/// The chain as sentences, each cause once, on a line of its own where it has several lines.
pub(crate) fn text(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(cause.trim()) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(if cause.contains('\n') { ":\n" } else { ": " });
        }
        text.push_str(cause.trim_end());
    }
    text
}

/// The exit code that an error asks for.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return failure.code;
    }
    if error.downcast_ref::<ConfigError>().is_some() { USAGE } else { FAILED }
}

/// Whether the reader of our output went away (`helio logs x | head`).
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|e| e.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_that_is_said_already_is_not_repeated() {
        let io = std::io::Error::other("disk full");
        let error = anyhow::Error::new(io).context("cannot write log: disk full").context("up failed");
        assert_eq!(text(&error), "up failed: cannot write log: disk full");
    }

    #[test]
    fn codes_survive_context() {
        let inner = Failure::error(NO_CLUSTER, "no cluster");
        let error = Err::<(), _>(inner).context("status").expect_err("an error");
        assert_eq!(code(&error), NO_CLUSTER);
    }
}
