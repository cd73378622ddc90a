//! What is kept of jobs on disk: records, orders, logs, packages. Files are whole or absent, and for this user only.
//!
//! It knows nothing of states; the lock in its directory keeps a second jobs actor out.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::core::Job;
use super::package::{self, PackageError};

/// What the keeper is to do.
pub(super) const ORDER: &str = "order.json";
/// Made by the only keeper of a job.
pub(super) const CLAIM: &str = "claim";
/// Who keeps the job.
pub(super) const KEEPER: &str = "keeper.json";
/// How it ended.
pub(super) const EXIT: &str = "exit.json";
/// Directory of its log.
pub(super) const LOG: &str = "log";
/// Its working directory.
pub(super) const WORK: &str = "work";
const JOB: &str = "job.json";

/// The directory of all jobs.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    temporary: AtomicU64,
}

/// Held while an actor runs jobs in the directory.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Store {
    /// Opens the directory, making it where it is missing.
    ///
    /// # Errors
    /// What the disk says.
    pub fn open(dir: &Path) -> io::Result<Self> {
        for part in ["jobs", "packages"] {
            create_dir(&dir.join(part))?;
        }
        for left in fs::read_dir(dir.join("packages"))?.flatten() {
            if left.file_name().to_string_lossy().starts_with('.') {
                fs::remove_file(left.path())?;
            }
        }
        Ok(Self { dir: dir.to_path_buf(), temporary: AtomicU64::new(0) })
    }

    /// Takes the directory; none while another has it.
    ///
    /// # Errors
    /// What the disk says.
    pub fn lock(&self) -> io::Result<Option<Lock>> {
        let path = self.lock_path();
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The file that the lock is on.
    pub fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// All jobs; a directory without a readable record is left alone.
    ///
    /// # Errors
    /// What the disk says.
    pub fn load(&self) -> io::Result<Vec<Job>> {
        let mut jobs = Vec::new();
        for entry in fs::read_dir(self.dir.join("jobs"))? {
            let dir = entry?.path();
            match read_json(&dir.join(JOB)) {
                Ok(job) => jobs.push(job),
                Err(error) => tracing::warn!(dir = %dir.display(), %error, "a job's record cannot be read"),
            }
        }
        Ok(jobs)
    }

    /// Directory of one job.
    pub fn job_dir(&self, id: &str) -> PathBuf {
        self.dir.join("jobs").join(id)
    }

    /// Writes a job's record.
    ///
    /// # Errors
    /// What the disk says.
    pub fn save(&self, job: &Job) -> io::Result<()> {
        let dir = self.job_dir(&job.id);
        create_dir(&dir)?;
        write_json(&dir.join(JOB), job)
    }

    /// Deletes all that is kept of a job.
    ///
    /// # Errors
    /// What the disk says.
    pub fn forget(&self, id: &str) -> io::Result<()> {
        fs::remove_dir_all(self.job_dir(id))
    }

    /// Makes a job's working directory, empty or from its package.
    ///
    /// # Errors
    /// The package is not there, is not what was uploaded, or does not unpack.
    pub fn make_work_dir(
        &self,
        id: &str,
        package: Option<&str>,
        bytes_max: u64,
    ) -> Result<PathBuf, PackageError> {
        let work = self.job_dir(id).join(WORK);
        let failed = |source| PackageError::Io { path: work.display().to_string(), source };
        match fs::remove_dir_all(&work) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            Ok(()) | Err(_) => create_dir(&work).map_err(failed)?,
        }
        if let Some(name) = package {
            let path = self.package_path(name);
            let at = |source| PackageError::Io { path: name.to_owned(), source };
            let found = File::open(&path).and_then(package::sha256).map_err(at)?;
            let expected = fs::read_to_string(hash_path(&path)).map_err(at)?;
            if found != expected {
                return Err(PackageError::Hash { name: name.to_owned(), expected, found });
            }
            package::unpack(&path, &work, bytes_max)?;
        }
        Ok(work)
    }

    /// Where a package lies that was uploaded, and its SHA-256.
    ///
    /// # Errors
    /// It is not there.
    pub fn package(&self, name: &str) -> io::Result<(PathBuf, String)> {
        let path = self.package_path(name);
        let sha256 = fs::read_to_string(hash_path(&path))?;
        Ok((path, sha256))
    }

    /// Deletes the working directory of a job that has ended.
    pub fn remove_work_dir(&self, id: &str) {
        match fs::remove_dir_all(self.job_dir(id).join(WORK)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(job = id, %error, "a working directory cannot be removed");
            }
            Ok(()) | Err(_) => {}
        }
    }

    fn package_path(&self, name: &str) -> PathBuf {
        self.dir.join("packages").join(name)
    }

    /// Whether a package was uploaded.
    pub fn has_package(&self, name: &str) -> bool {
        hash_path(&self.package_path(name)).is_file() && self.package_path(name).is_file()
    }

    /// Begins to take a package of at most `bytes_max`.
    ///
    /// # Errors
    /// What the disk says.
    pub fn receive(&self, name: &str, bytes_max: u64) -> io::Result<Upload> {
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.dir.join("packages").join(format!(".{number}"));
        let file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary)?;
        let (path, name) = (self.package_path(name), name.to_owned());
        Ok(Upload { name, path, temporary, file, hash: Sha256::new(), bytes: 0, bytes_max })
    }

    /// Removes the oldest packages that are not `needed` until all fit into `bytes_max`.
    ///
    /// # Errors
    /// What the disk says.
    pub fn make_room(&self, bytes_max: u64, needed: &[String]) -> io::Result<()> {
        let mut packages: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(self.dir.join("packages"))? {
            let (path, metadata) = {
                let entry = entry?;
                (entry.path(), entry.metadata()?)
            };
            if hash_path(&path).is_file() {
                packages.push((metadata.modified()?, metadata.len(), path));
            }
        }
        packages.sort();
        let mut total: u64 = packages.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in packages {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if total > bytes_max && !needed.contains(&name) {
                fs::remove_file(hash_path(&path))?;
                fs::remove_file(&path)?;
                total -= bytes;
            }
        }
        Ok(())
    }
}

/// A package that is being uploaded; dropped before its end it leaves nothing behind.
#[derive(Debug)]
pub struct Upload {
    name: String,
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    hash: Sha256,
    bytes: u64,
    bytes_max: u64,
}

impl Upload {
    /// Adds a part.
    ///
    /// # Errors
    /// It is too large, or the disk fails.
    pub fn write(&mut self, part: &[u8]) -> Result<(), PackageError> {
        self.bytes += part.len() as u64;
        if self.bytes > self.bytes_max {
            return Err(PackageError::TooLarge(format!(
                "is larger than {} bytes (`max_package_bytes` in [dashboard])",
                self.bytes_max
            )));
        }
        self.hash.update(part);
        self.file.write_all(part).map_err(|source| self.failed(source))
    }

    /// Keeps it under its name, if it is what the name promises.
    ///
    /// # Errors
    /// It is not, or the disk fails.
    pub fn finish(mut self) -> Result<(), PackageError> {
        let found = package::hex(&std::mem::take(&mut self.hash).finalize());
        if let Some(expected) = package::promised(&self.name).filter(|expected| *expected != found) {
            return Err(PackageError::Hash { name: self.name.clone(), expected: expected.to_owned(), found });
        }
        let keep = || {
            self.file.sync_data()?;
            let _ = fs::remove_file(hash_path(&self.path));
            fs::rename(&self.temporary, &self.path)?;
            write_whole(&hash_path(&self.path), found.as_bytes())
        };
        keep().map_err(|source| self.failed(source))
    }

    /// The name that it will have.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn failed(&self, source: io::Error) -> PackageError {
        PackageError::Io { path: self.name.clone(), source }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Where the SHA-256 of an uploaded package stands; it is written last.
fn hash_path(package: &Path) -> PathBuf {
    let mut name = package.as_os_str().to_owned();
    name.push(".sha256");
    PathBuf::from(name)
}

fn create_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Reads a file of JSON.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)
}

/// Writes a file of JSON that is whole or absent.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_whole(path, &serde_json::to_vec(value).map_err(io::Error::other)?)
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_what_its_name_promises_or_is_not_kept() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = Store::open(dir.path()).expect("opens");
        let put = |name: &str, bytes: &[u8], bytes_max| {
            let mut upload = store.receive(name, bytes_max).expect("begins");
            upload.write(bytes).and_then(|()| upload.finish())
        };
        let name = package::name_of(&package::sha256(&b"abc"[..]).expect("reads"));
        assert!(matches!(put(&name, b"abd", 9), Err(PackageError::Hash { .. })));
        assert!(matches!(put(&name, b"abc", 2), Err(PackageError::TooLarge(_))));
        assert!(!store.has_package(&name));
        put(&name, b"abc", 9).expect("kept");
        assert!(store.has_package(&name));
        // What was changed on disk since is not unpacked.
        fs::write(dir.path().join("packages").join(&name), "abd").expect("write");
        let result = store.make_work_dir("j", Some(&name), 9);
        assert!(matches!(result, Err(PackageError::Hash { .. })), "{result:?}");
        assert_eq!(
            fs::read_dir(dir.path().join("packages")).expect("lists").count(),
            2,
            "nothing is left behind"
        );
    }

    #[test]
    fn the_oldest_packages_make_room_but_not_those_that_are_needed() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = Store::open(dir.path()).expect("opens");
        for name in ["a.zip", "b.zip", "c.zip"] {
            let mut upload = store.receive(name, 9).expect("begins");
            upload.write(b"12345").and_then(|()| upload.finish()).expect("kept");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        store.make_room(10, &["a.zip".to_owned()]).expect("works");
        let there = ["a.zip", "b.zip", "c.zip"].map(|name| store.has_package(name));
        assert_eq!(there, [true, false, true]);
    }

    #[test]
    fn one_actor_at_a_time() {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = Store::open(dir.path()).expect("opens");
        let lock = store.lock().expect("works").expect("free");
        assert!(store.lock().expect("works").is_none());
        drop(lock);
        assert!(store.lock().expect("works").is_some());
    }
}
