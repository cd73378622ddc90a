//! The heartbeat of a worker's actor: whether its thread still takes work.
//!
//! It looks at the thread and not at messages: an actor that waits for something, with its thread free, does not hang. It
//! ends nothing; that is up to the worker.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::actor::Reports;
use crate::mailbox::Entry;
use crate::spec::DeathCause;

/// Beats in the time after which a hung actor is to answer again.
const BEATS: u32 = 40;
/// Beats after which it counts as hung. One is left for its end and its next start; one more has passed before the first
/// that is missed, and the hang may have begun right at its beginning.
const MISSED_MAX: u32 = BEATS - 2;

/// Which part of its life is watched.
pub(super) enum Watched {
    /// Its creation.
    Create(Reports),
    /// All that comes after it.
    Handlers(Arc<Entry>),
}

impl Watched {
    /// How often the actor has shown by itself that it goes on, with its thread held.
    fn words(&self) -> u64 {
        match self {
            Self::Create(reports) => reports.words(),
            Self::Handlers(_) => 0,
        }
    }

    /// What the actor is at.
    fn at(&self) -> String {
        match self {
            Self::Create(_) => {
                "it is being created (Spawn::create), and says nothing of its progress".to_owned()
            }
            Self::Handlers(entry) => match entry.handling() {
                Some(message) => format!("it is at message {message:?}"),
                None => "its thread is at something that is no message".to_owned(),
            },
        }
    }
}

/// Returns when the actor's thread has taken no work for so long that another one is just about to be there after `limit`: a
/// twentieth earlier. Never for an actor without a thread of its own, and for one that ended.
pub(super) async fn hung(watched: Watched, limit: Duration) -> DeathCause {
    let beat = (limit / BEATS).max(Duration::from_millis(1));
    let (arbiter, mut thread) = match &watched {
        Watched::Create(reports) => {
            let (arbiter, thread) = reports.thread().await;
            (Some(arbiter), Some(thread))
        }
        Watched::Handlers(entry) => (entry.thread().cloned(), None),
    };
    while let Some(arbiter) = &arbiter {
        let (told, mut heard) = oneshot::channel();
        let beat_once = move || {
            // Nobody listens where the worker ends already.
            let _ = told.send(rustix::thread::gettid());
        };
        if !arbiter.spawn_fn(beat_once) {
            break;
        }
        // Counted in beats, not by a clock: a process that was frozen as a whole has missed one at most.
        let (mut missed, mut words) = (0, watched.words());
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
            let said = watched.words();
            if said != words {
                (missed, words) = (0, said);
            }
            if missed == MISSED_MAX {
                let waited_ms = u64::try_from((beat * missed).as_millis()).unwrap_or(u64::MAX);
                return DeathCause::Hung { waited_ms, what: what(&watched, thread) };
            }
        }
        tokio::time::sleep(beat).await;
    }
    std::future::pending().await
}

/// What the actor is at, as far as can be seen from outside of its thread.
fn what(watched: &Watched, thread: Option<rustix::process::Pid>) -> String {
    let at = watched.at();
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
