//! Packages: the binaries of users, named by their content and shipped to where their actors run.
//!
//! A package is one executable file. Its SHA-256 is its identity; name and version are its key in the head's registry.
//! This file has the plain data and the messages; `store` is the directory of a head or node, `service` the actor that
//! serves it, `transfer` moves a package from one to another. Which packages there are is decided in `head::core`.

mod service;
mod store;
mod transfer;

use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::actor::wire;

pub(crate) use service::{Door, PackageActor};
pub use store::{PackageStore, StoreError, sha256_of};
pub(crate) use transfer::fetch;
pub use transfer::{PushError, TransferError, download, push};

/// First argument of a worker process that runs a package; what follows is written by its node agent.
pub const WORKER: &str = "heliostat-worker";
/// The only argument of a program that is to print what it is.
pub const DESCRIBE: &str = "heliostat-describe";
/// Bytes that packages may take unless something says otherwise.
pub const PACKAGES_BYTES_MAX: u64 = 4 << 30;
/// Bytes of a package in one message.
pub(crate) const CHUNK_BYTES: u32 = 1 << 20;

/// The SHA-256 of a package.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl Digest {
    /// The first digits, for people.
    pub fn short(&self) -> String {
        self.to_string().chars().take(12).collect()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no SHA-256: 64 hexadecimal digits");
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

/// Which package: its key in the registry and its content.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
pub struct PackageId {
    /// Name of the program.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its content.
    pub sha256: Digest,
}

impl fmt::Display for PackageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.name, self.version, self.sha256.short())
    }
}

/// A package in the registry.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct PackageInfo {
    /// Which.
    pub id: PackageId,
    /// Its size.
    pub bytes: u64,
    /// Rises with every registration.
    pub number: u64,
}

/// A package as `helio package list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct PackageStatus {
    /// Which.
    #[serde(flatten)]
    pub id: PackageId,
    /// Its size.
    pub bytes: u64,
    /// Names of the actors that run it.
    pub actors: Vec<String>,
    /// Names of the nodes that have a copy.
    pub nodes: Vec<String>,
    /// Whether another binary has been registered under its name and version: only its actors still use it.
    pub replaced: bool,
}

/// Where a node finds a package that a worker runs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PackageOrder {
    /// Which.
    pub id: PackageId,
    /// Agents of nodes that have it, best first; the head has it, too.
    pub sources: Vec<String>,
}

/// Reads a piece of a package.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ReadPackage {
    /// Which.
    pub sha256: Digest,
    /// First byte wanted.
    pub offset: u64,
    /// Most bytes wanted.
    pub max: u32,
}

/// A piece of a package.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PackageChunk {
    /// The bytes; fewer than wanted at its end.
    pub bytes: Vec<u8>,
    /// Size of the whole package.
    pub total: u64,
}

/// Writes a piece of a package to the head. Pieces of one upload follow each other; the last one is answered when the
/// whole was verified.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WritePackage {
    /// Drawn at random by the client; tells two uploads of the same package apart.
    pub upload: u64,
    /// Which.
    pub sha256: Digest,
    /// Size of the whole package.
    pub total: u64,
    /// Where the piece begins.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Asks the head which packages there are.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ListPackages;

/// Enters a package, whose content the head has, into the registry.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RegisterPackage {
    /// Which.
    pub id: PackageId,
    /// What happens where another content has its name and version.
    pub mode: RegisterMode,
}

/// What happens to a package whose name and version another one has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum RegisterMode {
    /// It is refused.
    Keep,
    /// It takes the place of the other, whose actors go on as they are.
    Replace,
}

/// Takes a package out of the registry.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RemovePackage {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// Why the registry does not do what it is asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum RegistryError {
    /// Name or version cannot be used.
    #[error("package {0:?}: name and version must be 1 to 128 letters, digits, '-', '_', '+' or '.'")]
    Name(String),
    /// The head has not its content.
    #[error("package {0} was not uploaded, or made room for others; upload it again")]
    NotThere(PackageId),
    /// Another one has its key.
    #[error(
        "package {name} {version} is {there} in this cluster, and this binary is {here}: give it another version, or \
         replace the one that is there with --replace (its actors go on as they are)",
        name = .asked.name, version = .asked.version, there = .present.short(), here = .asked.sha256.short()
    )]
    Differs {
        /// What was to be registered.
        asked: PackageId,
        /// What is there.
        present: Digest,
    },
    /// There is no such package.
    #[error("no package {0} {1} is registered (helio package list)")]
    Unknown(String, String),
    /// Actors run it.
    #[error("package {id} is used by {actors}; remove these actors first")]
    InUse {
        /// Which.
        id: PackageId,
        /// Names of some actors.
        actors: String,
    },
    /// All that there is is in use.
    #[error(
        "packages may take {max} bytes, {used} of them are in use by actors, and {asked} more are needed: remove actors, \
         or raise `max_bytes` in [packages]"
    )]
    Full {
        /// The bound.
        max: u64,
        /// What actors use.
        used: u64,
        /// The new package.
        asked: u64,
    },
    /// This head keeps none.
    #[error("this head has no directory for packages")]
    Off,
    /// It took place, but may be lost with the head.
    #[error("not durable yet: {0}; repeat it")]
    NotDurable(String),
}

wire! {
    // To whoever has packages.
    ReadPackage = "package.read" -> Result<PackageChunk, String>;
    WritePackage = "package.write" -> Result<(), String>;
    // To the head.
    ListPackages = "package.list" -> Vec<PackageStatus>;
    RegisterPackage = "package.register" -> Result<(), RegistryError>;
    RemovePackage = "package.remove" -> Result<(), RegistryError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_64_digits() {
        let digest = Digest([0xab; 32]);
        assert_eq!(Digest::try_from(digest.to_string()), Ok(digest));
        for wrong in ["", "ab", &"x".repeat(64), &"é".repeat(32)] {
            assert!(Digest::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }
}
