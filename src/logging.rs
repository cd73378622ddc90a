//! Logs: to stderr, which is the log file of a process that was started by another. HELIO_LOG changes the level;
//! HELIO_LOG_FORMAT=json has every line be an object that says whose it is, for whoever collects them.

use heliostat_runtime::worker::WorkerConfig;
use serde_json::{Map, Value as Json};
use std::fmt;
use std::io::IsTerminal;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Whose lines a log has.
pub enum Whose<'a> {
    /// A process that hosts no actor, by what it is.
    Process(&'static str),
    /// A worker, by the arguments that its node agent gave it.
    Worker(&'a [String]),
}

/// Begins to log what is at least as grave as `level`, unless HELIO_LOG says otherwise. A program that has set a log of
/// its own keeps it.
pub fn init(level: &str, whose: &Whose<'_>) {
    let filter = EnvFilter::try_from_env("HELIO_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    // Its own complaint about a log that cannot be written, on a full disk, would end the process.
    let log = tracing_subscriber::fmt()
        .log_internal_errors(false)
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let set = if std::env::var_os("HELIO_LOG_FORMAT").is_some_and(|format| format == "json") {
        log.fmt_fields(JsonFields::new()).event_format(JsonLines::of(whose)).try_init()
    } else {
        log.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init()
    };
    // It fails where there is one already.
    drop(set);
}

/// One object a line: `timestamp`, `level`, `process` or `actor` with its `incarnation`, `message`, what the event says in
/// fields of its own, and what is said of everything that it is a part of (`request_id`).
struct JsonLines(Map<String, Json>);

impl JsonLines {
    fn of(whose: &Whose<'_>) -> Self {
        let mut said = Map::new();
        let process = match whose {
            Whose::Worker(args) => {
                if let Ok(config) = WorkerConfig::from_args(args.iter().cloned()) {
                    said.insert("actor".into(), config.actor.into());
                    said.insert("incarnation".into(), config.incarnation.0.into());
                }
                "worker"
            }
            Whose::Process(name) => name,
        };
        said.insert("process".into(), process.into());
        said.insert("pid".into(), std::process::id().into());
        Self(said)
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
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut said = Fields(Map::new());
        event.record(&mut said);
        // The innermost first, so that it wins.
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            let Some(fields) = extensions.get::<FormattedFields<N>>() else { continue };
            if let Ok(Json::Object(fields)) = serde_json::from_str(fields) {
                fields.into_iter().for_each(|(key, value)| _ = said.0.entry(key).or_insert(value));
            }
        }
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
