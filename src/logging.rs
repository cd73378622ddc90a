//! Logs: to stderr, which is the log file of a process that was started by another. HELIO_LOG changes the level;
//! HELIO_LOG_FORMAT=json has every line be an object that says whose it is, for whoever collects them.

use crate::args::Command;
use heliostat_runtime::worker::WorkerConfig;
use serde_json::{Map, Value as Json};
use std::fmt;
use std::io::IsTerminal;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Begins to log, by the command that this process runs.
pub(crate) fn init(command: &Command) {
    let level = match command {
        Command::Head(_) | Command::Node(_) | Command::Worker(_) | Command::Entrypoint(_) => "info",
        _ => "warn",
    };
    let filter = EnvFilter::try_from_env("HELIO_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::env::var_os("HELIO_LOG_FORMAT").is_some_and(|format| format == "json") {
        log.event_format(JsonLines::of(command)).init();
    } else {
        log.with_ansi(std::io::stderr().is_terminal()).with_target(false).init();
    }
}

/// One object a line: `timestamp`, `level`, `process` or `actor` with its `incarnation`, `message`, and what the event
/// says in fields of its own.
struct JsonLines(Map<String, Json>);

impl JsonLines {
    fn of(command: &Command) -> Self {
        let mut whose = Map::new();
        let process = match command {
            Command::Worker(worker) => {
                if let Ok(config) = WorkerConfig::from_args(worker.args.iter().cloned()) {
                    whose.insert("actor".into(), config.actor.into());
                    whose.insert("incarnation".into(), config.incarnation.0.into());
                }
                "worker"
            }
            Command::Head(_) => "head",
            Command::Node(_) => "node",
            Command::Entrypoint(_) => "entrypoint",
            _ => "helio",
        };
        whose.insert("process".into(), process.into());
        whose.insert("pid".into(), std::process::id().into());
        Self(whose)
    }

    fn line(&self, level: &str, now: &str, said: Map<String, Json>) -> String {
        let mut line = Map::new();
        line.insert("timestamp".into(), now.into());
        line.insert("level".into(), level.into());
        line.extend(self.0.clone());
        // What an event says never hides whose it is.
        for (key, value) in said {
            line.entry(key).or_insert(value);
        }
        Json::Object(line).to_string()
    }
}

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut said = Fields(Map::new());
        event.record(&mut said);
        let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        writeln!(out, "{}", self.line(event.metadata().level().as_str(), &now, said.0))
    }
}

struct Fields(Map<String, Json>);

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_whose_it_is() {
        let whose = Map::from_iter([("actor".to_owned(), "rank-0".into())]);
        let said =
            Map::from_iter([("message".to_owned(), "a \"b\"\n".into()), ("actor".to_owned(), "x".into())]);
        let line = JsonLines(whose).line("INFO", "2026-01-01T00:00:00Z", said);
        assert!(!line.contains('\n'));
        let line: Json = serde_json::from_str(&line).expect("an object");
        assert_eq!((&line["actor"], &line["message"]), (&"rank-0".into(), &"a \"b\"\n".into()));
    }
}
