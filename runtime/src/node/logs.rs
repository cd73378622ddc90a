//! Logs of workers: opened for each incarnation, bounded in size, read and followed.
//!
//! A worker writes to its log file itself, not through the agent: it must outlive one.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::inotify;

use crate::handle::Incarnation;
use crate::head::messages::LogChunk;
use crate::process::watch_fd;

/// How much of the end of a log is looked at for last words, and how much of these is kept.
const LAST_BYTES: u32 = 8192;
const LAST_LINES: usize = 12;
const LAST_WORDS_BYTES: usize = 1200;

/// Opens the log for one more incarnation, after a header line.
pub(super) fn open(
    path: &Path,
    actor: &str,
    incarnation: Incarnation,
    bytes_max: u64,
) -> std::io::Result<File> {
    if path.metadata().is_ok_and(|meta| meta.len() > bytes_max) {
        std::fs::rename(path, rotated(path))?;
    }
    let mut log = OpenOptions::new().create(true).append(true).open(path)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    writeln!(log, "=== {actor}, incarnation {incarnation}, {} ===", utc(now.as_secs()))?;
    Ok(log)
}

/// Rotates a log that a worker has open: its bytes are copied away and the file starts anew at 0. What is written
/// between the two is lost.
pub(super) fn rotate(path: &Path, bytes_max: u64) -> std::io::Result<()> {
    if path.metadata().is_ok_and(|meta| meta.len() > bytes_max) {
        std::fs::copy(path, rotated(path))?;
        OpenOptions::new().write(true).open(path)?.set_len(0)?;
    }
    Ok(())
}

/// The last lines that an incarnation wrote, as far as they are worth keeping; `None` if it wrote nothing.
pub(super) fn last_words(path: &Path, incarnation: Incarnation) -> Option<String> {
    let chunk = read_now(path, u64::MAX, LAST_BYTES).ok()?;
    let text = String::from_utf8_lossy(&chunk.bytes);
    // What stands before its header is of others.
    let header = format!(", incarnation {incarnation}, ");
    let at = text.rfind("\n=== ").map_or(0, |at| at + 1);
    let own = match text[at..].strip_prefix("=== ") {
        Some(rest) => rest.split_once('\n').filter(|(first, _)| first.contains(&header))?.1,
        None => &text,
    };
    let lines: Vec<&str> = own.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let mut last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
    let surplus = last.len().saturating_sub(LAST_WORDS_BYTES);
    last.drain(..last.ceil_char_boundary(surplus));
    (!last.is_empty()).then_some(last)
}

fn rotated(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

/// Seconds since 1970 as `2026-11-23T10:46:00Z`.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's civil_from_days, for days after 1970.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

/// Reads from `offset`; waits up to `wait` for something to read when there is nothing.
pub(super) async fn read(path: PathBuf, offset: u64, max: u32, wait: Duration) -> std::io::Result<LogChunk> {
    let chunk = read_now(&path, offset, max)?;
    if !chunk.bytes.is_empty() || wait.is_zero() {
        return Ok(chunk);
    }
    // Watched before it is read again, so that nothing slips between the two.
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watch, &path, inotify::WatchFlags::MODIFY | inotify::WatchFlags::MOVE_SELF)?;
    let watch = watch_fd(watch)?;
    let deadline = tokio::time::Instant::now() + wait;
    loop {
        let chunk = read_now(&path, offset, max)?;
        if !chunk.bytes.is_empty() || chunk.next < offset {
            return Ok(chunk);
        }
        match tokio::time::timeout_at(deadline, watch.readable()).await {
            Ok(ready) => {
                let mut ready = ready?;
                drain(watch.get_ref());
                ready.clear_ready();
            }
            Err(_) => return Ok(chunk),
        }
    }
}

/// Takes the events off, whatever they are: the file is read again anyway.
fn drain(watch: &rustix::fd::OwnedFd) {
    let mut buffer = [MaybeUninit::uninit(); 1024];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    while events.next().is_ok() {}
}

fn read_now(path: &Path, offset: u64, max: u32) -> std::io::Result<LogChunk> {
    let mut log = File::open(path)?;
    let len = log.metadata()?.len();
    let offset = match offset {
        u64::MAX => len.saturating_sub(u64::from(max)),
        // The log was rotated: what is there now is all new.
        offset if offset > len => 0,
        offset => offset,
    };
    log.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    log.take(u64::from(max)).read_to_end(&mut bytes)?;
    let next = offset + bytes.len() as u64;
    Ok(LogChunk { bytes, next })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utc_of_known_seconds() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_795_430_771), "2026-11-23T10:46:11Z");
    }

    #[test]
    fn last_words_are_those_of_the_incarnation_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let mut log = open(&path, "a", Incarnation(3), 1 << 20).unwrap();
        assert_eq!(last_words(&path, Incarnation(3)), None);
        log.write_all(b"one\n\ntwo\n").unwrap();
        assert_eq!(last_words(&path, Incarnation(3)).unwrap(), "one\ntwo");
        let mut log = open(&path, "a", Incarnation(4), 1 << 20).unwrap();
        assert_eq!(last_words(&path, Incarnation(4)), None, "what the one before said is its own");
        for n in 0..1000 {
            writeln!(log, "line {n} {}", "é".repeat(150)).unwrap();
        }
        let words = last_words(&path, Incarnation(4)).unwrap();
        assert!(words.len() <= LAST_WORDS_BYTES && words.contains("line 999 "), "{words}");
    }

    #[tokio::test]
    async fn a_follower_wakes_on_a_write_and_starts_over_after_a_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let mut log = open(&path, "a", Incarnation(3), 1 << 20).unwrap();
        let header = read(path.clone(), 0, 1 << 16, Duration::ZERO).await.unwrap();
        assert!(String::from_utf8(header.bytes).unwrap().starts_with("=== a, incarnation 3, "));
        let follower = tokio::spawn(read(path.clone(), header.next, 1 << 16, Duration::from_secs(20)));
        tokio::task::yield_now().await;
        log.write_all(b"hello\n").unwrap();
        let chunk = follower.await.unwrap().unwrap();
        assert_eq!(chunk.bytes, b"hello\n");
        rotate(&path, 3).unwrap();
        log.write_all(b"new\n").unwrap();
        let chunk = read(path.clone(), chunk.next, 1 << 16, Duration::from_secs(20)).await.unwrap();
        assert_eq!((chunk.bytes.as_slice(), chunk.next), (b"new\n".as_slice(), 4));
        assert!(path.with_extension("log.1").exists());
    }
}
