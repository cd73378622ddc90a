//! A directory of packages: files named by their SHA-256, whole and verified or not there.
//!
//! It knows no name, no version and no actor. It removes only what it is told to.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use super::{Digest, PackageChunk};

/// What a package store says no with.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk.
    #[error("package {sha256}: {source}", sha256 = .sha256.short())]
    Io {
        /// Which.
        sha256: Digest,
        /// What the system says.
        source: io::Error,
    },
    /// It is not here.
    #[error("package {} is not here", .0.short())]
    NotHere(Digest),
    /// It is not what its name says.
    #[error("package {expected} has SHA-256 {found}: it was damaged or exchanged")]
    Hash {
        /// What it should have.
        expected: Digest,
        /// What it has.
        found: Digest,
    },
    /// Larger than may be.
    #[error("a package of {bytes} bytes is larger than {max}, `max_package_bytes` in [packages]")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The bound.
        max: u64,
    },
    /// Pieces must follow each other.
    #[error("the upload is at byte {at}, not {given}; begin again")]
    Order {
        /// Where it is.
        at: u64,
        /// What was given.
        given: u64,
    },
    /// Too many at once.
    #[error("{0} packages are being received already; try again later")]
    Busy(usize),
}

/// What a file is as long as nobody touched it.
type Stamp = (u64, u64, i64, i64);

/// A directory of packages.
#[derive(Debug)]
pub struct PackageStore {
    dir: PathBuf,
    package_bytes_max: u64,
    /// What was verified by this process, as it was then.
    verified: Mutex<HashMap<Digest, Stamp>>,
}

impl PackageStore {
    /// Opens a directory, making it where it is missing, and removes what was received in part.
    pub fn open(dir: &Path, package_bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
        for entry in fs::read_dir(dir)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with('.') {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { dir: dir.to_owned(), package_bytes_max, verified: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Stamp>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a package lies, whether it is there or not.
    pub fn path(&self, sha256: Digest) -> PathBuf {
        self.dir.join(sha256.to_string())
    }

    /// Size of a package, if it is here.
    pub fn size(&self, sha256: Digest) -> Option<u64> {
        fs::metadata(self.path(sha256)).ok().map(|metadata| metadata.len())
    }

    /// All packages that are here with their sizes, the one used longest ago first.
    pub fn list(&self) -> io::Result<Vec<(Digest, u64)>> {
        let mut found: Vec<(SystemTime, Digest, u64)> = Vec::new();
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Ok(digest) = Digest::try_from(name) else { continue };
            let metadata = entry.metadata()?;
            found.push((metadata.accessed()?, digest, metadata.len()));
        }
        found.sort();
        Ok(found.into_iter().map(|(_, digest, bytes)| (digest, bytes)).collect())
    }

    /// The path of a package that is here and is what its name says. Hashed once per process and again when the file has
    /// changed since.
    pub fn verified(&self, sha256: Digest) -> Result<PathBuf, StoreError> {
        let path = self.path(sha256);
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => StoreError::NotHere(sha256),
            _ => StoreError::Io { sha256, source },
        };
        let now = stamp(&path).map_err(failed)?;
        if self.lock().get(&sha256) == Some(&now) {
            return Ok(path);
        }
        let found = File::open(&path).and_then(sha256_of).map_err(failed)?;
        if found != sha256 {
            return Err(StoreError::Hash { expected: sha256, found });
        }
        self.lock().insert(sha256, now);
        Ok(path)
    }

    /// A piece of a package.
    pub fn read(&self, sha256: Digest, offset: u64, max: u32) -> Result<PackageChunk, StoreError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => StoreError::NotHere(sha256),
            _ => StoreError::Io { sha256, source },
        };
        let file = File::open(self.path(sha256)).map_err(failed)?;
        let total = file.metadata().map_err(failed)?.len();
        let wanted = total.saturating_sub(offset).min(u64::from(max));
        let mut bytes = vec![0; usize::try_from(wanted).unwrap_or_default()];
        file.read_exact_at(&mut bytes, offset).map_err(failed)?;
        Ok(PackageChunk { bytes, total })
    }

    /// Begins to receive a package; dropped before its end it leaves nothing behind.
    pub fn receive(&self, sha256: Digest, total: u64) -> Result<Receiving, StoreError> {
        if total > self.package_bytes_max {
            return Err(StoreError::TooLarge { bytes: total, max: self.package_bytes_max });
        }
        let temporary = self.dir.join(format!(".{:016x}", rand::random::<u64>()));
        let file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary);
        let file = file.map_err(|source| StoreError::Io { sha256, source })?;
        Ok(Receiving { sha256, total, at: 0, file, temporary, hash: Sha256::new() })
    }

    /// Keeps what was received, if it is what its name says. Nothing else ever comes into the directory.
    pub fn keep(&self, mut received: Receiving) -> Result<(), StoreError> {
        let sha256 = received.sha256;
        let found = Digest(std::mem::take(&mut received.hash).finalize().into());
        if found != sha256 {
            return Err(StoreError::Hash { expected: sha256, found });
        }
        let path = self.path(sha256);
        let keep = || {
            received.file.set_permissions(fs::Permissions::from_mode(0o500))?;
            received.file.sync_data()?;
            fs::rename(&received.temporary, &path)?;
            stamp(&path)
        };
        let now = keep().map_err(|source| StoreError::Io { sha256, source })?;
        self.lock().insert(sha256, now);
        Ok(())
    }

    /// Notes that a package is used now, for `list`.
    pub fn touch(&self, sha256: Digest) {
        let now = fs::FileTimes::new().set_accessed(SystemTime::now());
        let _ = File::open(self.path(sha256)).and_then(|file| file.set_times(now));
    }

    /// Removes a package, if it is here. A process that runs it keeps it until it ends.
    pub fn remove(&self, sha256: Digest) -> io::Result<()> {
        self.lock().remove(&sha256);
        match fs::remove_file(self.path(sha256)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// A package that is being received.
#[derive(Debug)]
pub struct Receiving {
    sha256: Digest,
    total: u64,
    at: u64,
    file: File,
    temporary: PathBuf,
    hash: Sha256,
}

impl Receiving {
    /// Adds the piece at `offset`; true when it was the last.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<bool, StoreError> {
        if offset != self.at {
            return Err(StoreError::Order { at: self.at, given: offset });
        }
        let end = self.at + bytes.len() as u64;
        if end > self.total {
            return Err(StoreError::TooLarge { bytes: end, max: self.total });
        }
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(|source| StoreError::Io { sha256: self.sha256, source })?;
        self.at = end;
        Ok(self.at == self.total)
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        // After `keep` it has another name.
        let _ = fs::remove_file(&self.temporary);
    }
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}

/// SHA-256 of what can be read.
pub fn sha256_of(mut from: impl Read) -> io::Result<Digest> {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 256 << 10]);
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(Digest(hash.finalize().into())),
            read => hash.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(bytes: &[u8]) -> Digest {
        sha256_of(bytes).unwrap()
    }

    fn put(store: &PackageStore, name: Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let mut receiving = store.receive(name, bytes.len() as u64)?;
        assert!(receiving.write(0, bytes)?);
        store.keep(receiving)
    }

    #[test]
    fn a_package_is_what_its_name_says_or_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = PackageStore::open(dir.path(), 10).unwrap();
        let abc = digest(b"abc");
        assert!(matches!(put(&store, abc, b"abd"), Err(StoreError::Hash { .. })));
        assert!(matches!(store.verified(abc), Err(StoreError::NotHere(_))));
        assert!(matches!(put(&store, abc, &[0; 11]), Err(StoreError::TooLarge { .. })));
        put(&store, abc, b"abc").unwrap();
        assert_eq!(fs::read(store.verified(abc).unwrap()).unwrap(), b"abc");
        let chunk = store.read(abc, 1, 9).unwrap();
        assert_eq!((chunk.bytes.as_slice(), chunk.total), (&b"bc"[..], 3));
        // What was exchanged since is not run.
        fs::remove_file(store.path(abc)).unwrap();
        fs::write(store.path(abc), "abd").unwrap();
        assert!(matches!(store.verified(abc), Err(StoreError::Hash { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left of the others");
    }

    #[test]
    fn pieces_follow_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let store = PackageStore::open(dir.path(), 10).unwrap();
        let mut receiving = store.receive(digest(b"abcd"), 4).unwrap();
        assert!(!receiving.write(0, b"ab").unwrap());
        assert!(matches!(receiving.write(3, b"d"), Err(StoreError::Order { at: 2, given: 3 })));
        assert!(matches!(receiving.write(2, b"cde"), Err(StoreError::TooLarge { .. })));
        assert!(receiving.write(2, b"cd").unwrap());
        store.keep(receiving).unwrap();
        assert_eq!(store.list().unwrap(), [(digest(b"abcd"), 4)]);
    }
}
