//! The directory of objects that have no room in memory. A store that takes over finds there what owners say they have.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use super::super::{CHUNK_BYTES, ObjectId, map};
use super::hosting::read_at;

pub(super) struct Disk {
    dir: PathBuf,
}

impl Disk {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Whether an earlier store has left that object, whole.
    pub(super) fn has(&self, object: ObjectId, bytes: u64) -> bool {
        fs::metadata(self.path(object)).is_ok_and(|file| file.len() == bytes.max(1))
    }

    /// Removes what an earlier store has left and nobody has claimed.
    pub(super) fn sweep(&self, claimed: impl Fn(&str) -> bool) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_none_or(|name| !claimed(name)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Removes everything.
    pub(super) fn clear(&self) {
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot remove spilled objects");
        }
    }

    fn path(&self, object: ObjectId) -> PathBuf {
        self.dir.join(object.to_string())
    }

    /// Writes an object, whole or not at all.
    pub(super) fn write(&self, object: ObjectId, memory: BorrowedFd<'_>, bytes: u64) -> Result<(), String> {
        let path = self.path(object);
        let written = || -> io::Result<()> {
            fs::create_dir_all(&self.dir)?;
            let mut file = File::create(&path)?;
            // A full disk says so here, before much was written. Some file systems cannot tell.
            match fallocate(&file, FallocateFlags::empty(), 0, bytes.max(1)) {
                Err(error) if error != rustix::io::Errno::OPNOTSUPP => return Err(error.into()),
                Ok(()) | Err(_) => {}
            }
            let mut offset = 0;
            while offset < bytes {
                let piece = (bytes - offset).min(u64::from(CHUNK_BYTES)) as usize;
                let piece = read_at(memory, offset, piece)?;
                file.write_all(&piece)?;
                offset += piece.len() as u64;
            }
            Ok(())
        };
        written().map_err(|error| {
            self.remove(object);
            format!("{}: {error}", self.dir.display())
        })
    }

    /// A piece of an object.
    pub(super) fn read(&self, object: ObjectId, offset: u64, max: usize) -> io::Result<Vec<u8>> {
        read_at(File::open(self.path(object))?.as_fd(), offset, max)
    }

    /// The object in sealed memory.
    pub(super) fn read_whole(&self, object: ObjectId, bytes: u64) -> io::Result<OwnedFd> {
        let file = File::open(self.path(object))?;
        let memory = map::memory_file(bytes)?;
        let mut offset = 0;
        while offset < bytes {
            let piece = read_at(file.as_fd(), offset, CHUNK_BYTES as usize)?;
            if piece.is_empty() {
                return Err(io::Error::other(format!("the file of object {object} is too short")));
            }
            write_at(memory.as_fd(), offset, &piece)?;
            offset += piece.len() as u64;
        }
        map::seal(memory.as_fd())?;
        Ok(memory)
    }

    pub(super) fn remove(&self, object: ObjectId) {
        if let Err(error) = fs::remove_file(self.path(object))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%object, %error, "cannot remove a spilled object");
        }
    }
}

/// Writes all bytes at `offset`.
pub(super) fn write_at(fd: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut written = 0;
    while written < bytes.len() {
        written += rustix::io::pwrite(fd, &bytes[written..], offset + written as u64)?;
    }
    Ok(())
}
