//! Jobs as a table, and one job in words.

use super::{render, seconds, table};
use serde_json::Value as Json;
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest command that a table shows, characters.
const COMMAND_CHARS: usize = 60;

/// All jobs, oldest first.
pub(crate) fn list(jobs: &Json) -> String {
    let mut rows = table(["job", "status", "took", "exit", "command"]);
    for job in jobs.as_array().into_iter().flatten() {
        let word = |key: &str| job[key].as_str().unwrap_or("-").to_owned();
        let command = shortened(&word("entrypoint").replace('\n', " "));
        let exit = job["driver_exit_code"].as_i64().map_or_else(|| "-".into(), |code| code.to_string());
        rows.add_row([word("submission_id"), word("status"), took(job), exit, command]);
    }
    render(&rows)
}

fn shortened(command: &str) -> String {
    if command.chars().count() <= COMMAND_CHARS {
        return command.to_owned();
    }
    command.chars().take(COMMAND_CHARS - 1).chain(['…']).collect()
}

/// One job.
pub(crate) fn one(job: &Json) -> String {
    let word = |key: &str| job[key].as_str().unwrap_or_default().to_owned();
    let mut lines = vec![
        ("job", word("submission_id")),
        ("status", word("status")),
        ("command", word("entrypoint")),
        ("took", took(job)),
        ("error", word("error_type")),
        ("message", word("message")),
    ];
    for (key, value) in job["metadata"].as_object().into_iter().flatten() {
        lines.push(("metadata", format!("{key}={}", value.as_str().unwrap_or_default())));
    }
    let shown = lines.into_iter().filter(|(_, text)| !text.is_empty());
    shown.map(|(name, text)| format!("{name:<9} {}\n", text.trim_end())).collect()
}

fn took(job: &Json) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let end = job["end_time"].as_u64().unwrap_or(now);
    seconds(end.saturating_sub(job["start_time"].as_u64().unwrap_or(end)) / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn jobs_are_rows_that_awk_can_read() {
        let job = json!({
            "submission_id": "a", "status": "FAILED", "start_time": 1000, "end_time": 4000,
            "driver_exit_code": 3, "entrypoint": "sh -c 'exit 3'", "message": "boom\n", "metadata": {"k": "v"},
        });
        let text = list(&json!([job]));
        assert!(
            text.lines()
                .nth(1)
                .is_some_and(|row| row.split_whitespace().take(5).eq(["a", "FAILED", "3", "s", "3"])),
            "{text}"
        );
        assert!(one(&job).contains("metadata  k=v") && one(&job).contains("message   boom\n"));
    }
}
