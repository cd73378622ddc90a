//! The heartbeat of a worker's actor: whether its thread still takes work.
//!
//! It looks at the thread and not at messages: an actor that waits for something, with its thread free, does not hang. It
//! ends nothing; that is up to the worker.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::mailbox::Entry;
use crate::spec::DeathCause;

/// Beats in the longest time that the actor may take for one.
const BEATS: u32 = 40;

/// Returns when the actor's thread has taken no work for `limit`. Never for an actor without a thread of its own, and for
/// one that ended.
pub(super) async fn hung(entry: Arc<Entry>, limit: Duration) -> DeathCause {
    let beat = (limit / BEATS).max(Duration::from_millis(1));
    let mut thread = None;
    while let Some(arbiter) = entry.thread() {
        let (told, mut heard) = oneshot::channel();
        let beat_once = move || {
            // Nobody listens where the worker ends already.
            let _ = told.send(rustix::thread::gettid());
        };
        if !arbiter.spawn_fn(beat_once) {
            break;
        }
        // Counted in beats, not by a clock: a process that was frozen as a whole has missed one at most.
        let mut missed = 0;
        loop {
            tokio::select! {
                biased;
                answer = &mut heard => match answer {
                    Ok(id) => {
                        thread = Some(id);
                        break;
                    }
                    Err(_) => return std::future::pending().await,
                },
                () = tokio::time::sleep(beat) => missed += 1,
            }
            if missed == BEATS {
                let waited_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                return DeathCause::Hung { waited_ms, what: what(&entry, thread) };
            }
        }
        tokio::time::sleep(beat).await;
    }
    std::future::pending().await
}

/// What the actor is at, as far as can be seen from outside of its thread.
fn what(entry: &Entry, thread: Option<rustix::process::Pid>) -> String {
    let at = match entry.handling() {
        Some(message) => format!("it is at message {message:?}"),
        None => "its thread is at something that is no message".to_owned(),
    };
    match thread.and_then(state) {
        Some(state) => format!("{at}; the thread {state}"),
        None => at,
    }
}

/// What the kernel says of a thread of this process.
fn state(thread: rustix::process::Pid) -> Option<String> {
    let of = format!("/proc/self/task/{}", thread.as_raw_nonzero());
    let stat = std::fs::read_to_string(format!("{of}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let place =
        std::fs::read_to_string(format!("{of}/wchan")).ok().filter(|place| place != "0" && !place.is_empty());
    let place = place.map_or(String::new(), |place| format!(" ({place})"));
    match fields.split_ascii_whitespace().next()? {
        "R" => Some("computes".to_owned()),
        "D" => Some(format!("waits for a device{place}")),
        _ => Some(format!("waits in the kernel{place}")),
    }
}
