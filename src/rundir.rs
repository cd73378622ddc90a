//! The run directory: who runs in it, where its head is, its token and its logs.
//!
//! One cluster per directory, kept apart by a lock that dies with its holder.

use crate::config::Token;
use anyhow::{Context, Result};
use heliostat_runtime::system::TlsFiles;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Names the certificates of this machine.
pub(crate) const TLS: &str = "tls.json";

/// A run directory; it may not exist yet.
#[derive(Debug, Clone)]
pub(crate) struct RunDir {
    path: PathBuf,
}

/// Who runs in a directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Owner {
    /// Process id of `helio up`.
    pub(crate) pid: u32,
    /// Name of the cluster.
    pub(crate) cluster: String,
    /// Address of the head.
    pub(crate) head: String,
    /// URL of the HTTP server.
    pub(crate) url: String,
}

/// Held while a `helio up` runs in the directory.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl RunDir {
    /// The directory at `path`, made absolute.
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).with_context(|| format!("cannot resolve {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its absolute path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory and its parts; only this user may enter.
    pub(crate) fn create(&self) -> Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let create = |path: &Path| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .with_context(|| format!("cannot create {}", path.display()))
        };
        create(&self.path)?;
        create(&self.path.join("logs"))
    }

    /// Takes the directory for this process, or says who has it.
    pub(crate) fn lock(&self) -> Result<Option<Lock>> {
        let path = self.path.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// Whether a `helio up` holds the directory now.
    pub(crate) fn is_held(&self) -> bool {
        self.path.join("lock").exists() && matches!(self.lock(), Ok(None))
    }

    /// Who started the cluster here last; None where nobody did.
    pub(crate) fn owner(&self) -> Option<Owner> {
        let text = fs::read_to_string(self.path.join("cluster.json")).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Says who runs here.
    pub(crate) fn set_owner(&self, owner: &Owner) -> Result<()> {
        let json = serde_json::to_string_pretty(owner).context("cannot encode the owner")?;
        self.write_private("cluster.json", &json)
    }

    /// Forgets who ran here.
    pub(crate) fn clear_owner(&self) {
        for name in ["cluster.json", "address", "token", TLS, "dashboard", "dashboard-key"] {
            let _ = fs::remove_file(self.path.join(name));
        }
    }

    /// The head's address, if one was written here.
    pub(crate) fn address(&self) -> Option<String> {
        let text = fs::read_to_string(self.path.join("address")).ok()?;
        Some(text.trim().to_string()).filter(|t| !t.is_empty())
    }

    /// Writes the head's address for commands to find.
    pub(crate) fn set_address(&self, address: &str) -> Result<()> {
        self.write_private("address", &format!("{address}\n"))
    }

    /// URL of the dashboard, if one was written here.
    pub(crate) fn dashboard(&self) -> Option<String> {
        let text = fs::read_to_string(self.path.join("dashboard")).ok()?;
        Some(text.trim().to_string()).filter(|t| !t.is_empty())
    }

    /// Writes the dashboard's URL and key for commands to find, or removes old ones.
    pub(crate) fn set_dashboard(&self, url: Option<&str>, key: Option<&Token>) -> Result<()> {
        for (name, text) in [("dashboard", url), ("dashboard-key", key.map(|Token(text)| text.as_str()))] {
            match text {
                Some(text) => self.write_private(name, text)?,
                None => {
                    let _ = fs::remove_file(self.path.join(name));
                }
            }
        }
        Ok(())
    }

    /// Where the dashboard's key lies for commands of this machine.
    pub(crate) fn dashboard_key_path(&self) -> PathBuf {
        self.path.join("dashboard-key")
    }

    /// Where the token lies for this machine's processes and commands.
    pub(crate) fn token_path(&self) -> PathBuf {
        self.path.join("token")
    }

    /// Writes the token for this machine's processes, readable by this user only; without one, removes an old one.
    pub(crate) fn set_token(&self, token: Option<&Token>) -> Result<()> {
        match token {
            Some(token) => self.write_private("token", &token.0),
            None => {
                let _ = fs::remove_file(self.token_path());
                Ok(())
            }
        }
    }

    /// Where this machine's certificates are, if that was written here.
    pub(crate) fn tls(&self) -> Option<TlsFiles> {
        serde_json::from_slice(&fs::read(self.path.join(TLS)).ok()?).ok()
    }

    /// Writes where this machine's certificates are, for commands to find; without any, removes an old word of it.
    pub(crate) fn set_tls(&self, files: Option<&TlsFiles>) -> Result<()> {
        match files {
            Some(files) => {
                let json = serde_json::to_string_pretty(files).context("cannot encode the paths")?;
                self.write_private(TLS, &json)
            }
            None => {
                let _ = fs::remove_file(self.path.join(TLS));
                Ok(())
            }
        }
    }

    /// Log file of a process or actor.
    pub(crate) fn log_path(&self, name: &str) -> PathBuf {
        self.path.join("logs").join(format!("{name}.log"))
    }

    /// Log file of a process, open for appending.
    pub(crate) fn log_file(&self, name: &str) -> Result<File> {
        let path = self.log_path(name);
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        file.with_context(|| format!("cannot open {}", path.display()))
    }

    /// Begins a new log for a process; the one before stays beside it as `NAME.log.1`.
    pub(crate) fn begin_log(&self, name: &str) {
        let path = self.log_path(name);
        let _ = fs::rename(&path, path.with_extension("log.1"));
    }

    /// Writes a file that is complete or absent, for this user only.
    pub(crate) fn write_private(&self, name: &str, text: &str) -> Result<()> {
        let (path, temporary) =
            (self.path.join(name), self.path.join(format!(".{name}.{}", std::process::id())));
        let write = || -> std::io::Result<()> {
            let mut file =
                OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
            file.write_all(text.as_bytes())?;
            fs::rename(&temporary, &path)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Reads a token file.
pub(crate) fn read_token(path: &Path) -> Result<Token> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read the token file {}", path.display()))?;
    Ok(Token(text.trim().to_string()))
}

/// The last `lines` lines of a file; empty where it cannot be read.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_keeps_a_second_one_out_until_it_is_dropped() {
        let dir = tempfile::tempdir().expect("temp dir");
        let run = RunDir::new(&dir.path().join("run")).expect("path");
        run.create().expect("create");
        assert!(!run.is_held());
        let lock = run.lock().expect("lock").expect("free");
        assert!(run.lock().expect("lock").is_none());
        assert!(run.is_held());
        drop(lock);
        assert!(run.lock().expect("lock").is_some());
    }

    #[test]
    fn secrets_are_for_this_user_only() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("temp dir");
        let run = RunDir::new(dir.path()).expect("path");
        run.set_token(Some(&Token("0123456789abcdef".into()))).expect("write");
        let mode = fs::metadata(run.token_path()).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o077, 0);
        assert_eq!(read_token(&run.token_path()).expect("read").0, "0123456789abcdef");
        run.set_token(None).expect("remove");
        assert!(!run.token_path().exists());
    }
}
