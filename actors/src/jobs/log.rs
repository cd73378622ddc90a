//! A job's log: the newest bytes, in at most two files, each named by the place of its first byte in the whole.
//!
//! One process writes; any may read, by places that stay true when the oldest bytes are dropped.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Writes a log and keeps it within its bound.
#[derive(Debug)]
pub struct LogWriter {
    dir: PathBuf,
    file: File,
    /// Place of the first byte of `file`.
    start: u64,
    len: u64,
    segment_max: u64,
}

impl LogWriter {
    /// Begins a log that never holds more than `bytes_max`.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn create(dir: &Path, bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let file = File::create(segment(dir, 0))?;
        Ok(Self { dir: dir.to_path_buf(), file, start: 0, len: 0, segment_max: (bytes_max / 2).max(1) })
    }

    /// Adds bytes; the oldest make room.
    ///
    /// # Errors
    /// What the disk says.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.len == self.segment_max {
                self.turn()?;
            }
            let room = usize::try_from(self.segment_max - self.len).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.file.write_all(now)?;
            self.len += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    fn turn(&mut self) -> io::Result<()> {
        let earlier = self.start;
        self.start += self.len;
        self.len = 0;
        self.file = File::create(segment(&self.dir, self.start))?;
        for old in segments(&self.dir)?.into_iter().filter(|&start| start < earlier) {
            fs::remove_file(segment(&self.dir, old))?;
        }
        Ok(())
    }
}

/// A part of a log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Place of its first byte: later than was asked for where those bytes were dropped.
    pub start: u64,
    /// Empty at the end of what is there.
    pub bytes: Vec<u8>,
}

/// At most `max` bytes from `offset` on, or from the first that is kept. A log that was not begun is empty.
///
/// # Errors
/// What the disk says.
pub fn read(dir: &Path, offset: u64, max: usize) -> io::Result<Chunk> {
    // A segment may vanish between the listing and the reading: then those bytes are dropped, too.
    for _ in 0..3 {
        let starts = match segments(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            starts => starts?,
        };
        let Some(&first) = starts.first() else { return Ok(Chunk { start: offset, bytes: Vec::new() }) };
        let offset = offset.max(first);
        let mut from = starts.iter().rev().filter(|&&start| start <= offset).copied();
        let start = from.next().unwrap_or(first);
        let mut file = match File::open(segment(dir, start)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        file.seek(SeekFrom::Start(offset - start))?;
        let mut bytes = Vec::new();
        file.take(max as u64).read_to_end(&mut bytes)?;
        return Ok(Chunk { start: offset, bytes });
    }
    Ok(Chunk { start: offset, bytes: Vec::new() })
}

/// All that is kept.
///
/// # Errors
/// What the disk says.
pub fn read_all(dir: &Path) -> io::Result<Chunk> {
    let mut all = read(dir, 0, usize::MAX)?;
    loop {
        let next = read(dir, all.start + all.bytes.len() as u64, usize::MAX)?;
        if next.bytes.is_empty() {
            return Ok(all);
        }
        all.bytes.extend(next.bytes);
    }
}

/// The last `lines` lines, at most `chars` of them.
pub fn tail(dir: &Path, lines: usize, chars: usize) -> String {
    let starts = segments(dir).unwrap_or_default();
    let len = |start: &u64| fs::metadata(segment(dir, *start)).map_or(0, |file| file.len());
    let end = starts.last().map_or(0, |start| start + len(start));
    let bytes = chars as u64 * 4;
    let text = match read_all_from(dir, end.saturating_sub(bytes)) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => return String::new(),
    };
    let from = text.trim_end_matches('\n').rmatch_indices('\n').nth(lines.saturating_sub(1));
    let text = from.map_or(text.as_str(), |(at, _)| &text[at + 1..]);
    let skipped = text.chars().count().saturating_sub(chars);
    text.chars().skip(skipped).collect()
}

fn read_all_from(dir: &Path, mut offset: u64) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    loop {
        let next = read(dir, offset, usize::MAX)?;
        if next.bytes.is_empty() {
            return Ok(all);
        }
        offset = next.start + next.bytes.len() as u64;
        all.extend(next.bytes);
    }
}

fn segment(dir: &Path, start: u64) -> PathBuf {
    dir.join(format!("{start:020}"))
}

/// Places of the first bytes of all segments, ascending.
fn segments(dir: &Path) -> io::Result<Vec<u64>> {
    let names = fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.file_name()));
    let names = names.collect::<io::Result<Vec<_>>>()?;
    let mut starts: Vec<u64> = names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect();
    starts.sort_unstable();
    Ok(starts)
}

/// Length of the longest start of `bytes` that cuts no character of UTF-8 in two.
pub fn whole_chars(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.len(),
        // Broken in the middle: let the reader replace it. Unfinished at the end: wait for the rest.
        Err(error) => match error.error_len() {
            Some(_) => error.valid_up_to() + error.error_len().unwrap_or(0),
            None => error.valid_up_to(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_bytes_stay_and_places_stay_true() {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut log = LogWriter::create(dir.path(), 20).expect("creates");
        for number in 0..100u32 {
            log.write(format!("{number:03}\n").as_bytes()).expect("writes");
            let held: u64 = segments(dir.path())
                .expect("lists")
                .iter()
                .map(|&start| fs::metadata(segment(dir.path(), start)).expect("there").len())
                .sum();
            assert!(held <= 20, "{held}");
        }
        let all = read_all(dir.path()).expect("reads");
        assert_eq!(all.start + all.bytes.len() as u64, 400);
        assert!(all.bytes.ends_with(b"098\n099\n"));
        let from = read(dir.path(), 396, 2).expect("reads");
        assert_eq!((from.start, from.bytes.as_slice()), (396, &b"09"[..]));
        assert_eq!(read(dir.path(), 400, 9).expect("reads").bytes, b"");
        assert_eq!(read(dir.path(), 0, 1).expect("reads").start, all.start, "what was dropped is skipped");
        assert_eq!(tail(dir.path(), 2, 100), "098\n099\n");
        assert_eq!(tail(dir.path(), 2, 3), "99\n");
    }

    #[test]
    fn a_character_is_not_cut() {
        let text = "aé".as_bytes();
        assert_eq!(whole_chars(&text[..2]), 1);
        assert_eq!(whole_chars(text), 3);
        assert_eq!(whole_chars(b"a\xffb"), 2);
    }
}
