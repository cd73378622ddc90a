//! Packages: zipped working directories, named and verified by their hash, unpacked without trust.
//!
//! Nothing is written outside of the directory that is unpacked into, and never more than was allowed.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Start of the names that we give: what follows is the SHA-256 of the file, then `.zip`.
const PREFIX: &str = "helio_pkg_";
/// Files of one package.
const ENTRIES_MAX: usize = 100_000;

/// A package that cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// It is no zip file, or a damaged one.
    #[error("the package is no readable zip file: {0}")]
    Zip(#[from] zip::result::ZipError),
    /// An entry would lie elsewhere, or is no file and no directory.
    #[error("the package holds {0:?}, which is no file or directory below the working directory")]
    Escapes(String),
    /// A link leads back to where it lies.
    #[error("{0:?} is a link to a directory that it lies in itself: leave it out of the working directory")]
    Loop(String),
    /// It is too large.
    #[error("the package {0}")]
    TooLarge(String),
    /// It is not what its name says.
    #[error("the package {name} has SHA-256 {found}, not {expected}")]
    Hash {
        /// Its name.
        name: String,
        /// What it should have.
        expected: String,
        /// What it has.
        found: String,
    },
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> PackageError {
    let path = path.display().to_string();
    move |source| PackageError::Io { path, source }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of what can be read.
///
/// # Errors
/// What reading says.
pub fn sha256(mut from: impl Read) -> io::Result<String> {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 256 << 10]);
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// The name of a package with that SHA-256.
pub fn name_of(sha256: &str) -> String {
    format!("{PREFIX}{sha256}.zip")
}

/// The SHA-256 that a name promises; none for names that others gave.
pub fn promised(name: &str) -> Option<&str> {
    name.strip_prefix(PREFIX)?.strip_suffix(".zip")
}

/// Checks that a package is the one of that SHA-256.
///
/// # Errors
/// It is another.
pub fn check(package: &[u8], expected: &str) -> Result<(), PackageError> {
    let found = hex(&Sha256::digest(package));
    let (name, expected) = (name_of(expected), expected.to_owned());
    if found == expected { Ok(()) } else { Err(PackageError::Hash { name, expected, found }) }
}

/// Zips all below `dir` but `.git`, the same files to the same bytes. Links are followed, as Ray's client does: the package
/// holds what they lead to.
///
/// # Errors
/// A file cannot be read, or is neither file nor directory; a link leads back to where it lies, or there are too many entries.
pub fn pack<W: Write + Seek>(dir: &Path, out: W) -> Result<W, PackageError> {
    let mut zip = ZipWriter::new(out);
    let mut waiting = vec![dir.to_path_buf()];
    let mut entries_left = ENTRIES_MAX;
    while let Some(next) = waiting.pop() {
        let entries = fs::read_dir(&next).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut paths: Vec<PathBuf> = entries.map_err(io_at(&next))?.iter().map(fs::DirEntry::path).collect();
        paths.sort();
        for path in paths.into_iter().filter(|path| !path.ends_with(".git")) {
            let name = path.strip_prefix(dir).unwrap_or(&path).to_string_lossy().into_owned();
            entries_left = entries_left.checked_sub(1).ok_or_else(|| {
                PackageError::TooLarge(format!("would hold more than {ENTRIES_MAX} entries"))
            })?;
            let metadata = fs::metadata(&path).map_err(io_at(&path))?;
            let options = SimpleFileOptions::default()
                .compression_method(CompressionMethod::Deflated)
                .large_file(metadata.len() > u64::from(u32::MAX))
                .unix_permissions(metadata.permissions().mode() & 0o777);
            if metadata.is_file() {
                zip.start_file(name, options)?;
                let mut file = File::open(&path).map_err(io_at(&path))?;
                io::copy(&mut file, &mut zip).map_err(io_at(&path))?;
            } else if metadata.is_dir() {
                if path.is_symlink() && leads_back(&path).map_err(io_at(&path))? {
                    return Err(PackageError::Loop(name));
                }
                zip.add_directory(name, options)?;
                waiting.push(path);
            } else {
                return Err(PackageError::Escapes(name));
            }
        }
    }
    Ok(zip.finish()?)
}

/// Whether a link leads to a directory that it lies in.
fn leads_back(link: &Path) -> io::Result<bool> {
    let parent = link.parent().unwrap_or(link);
    Ok(parent.canonicalize()?.starts_with(link.canonicalize()?))
}

/// Unpacks into a directory that is there, at most `bytes_max` in all.
///
/// # Errors
/// It is no zip file, holds what must not be there, or is too large. What was unpacked until then stays.
pub fn unpack(package: &Path, into: &Path, bytes_max: u64) -> Result<(), PackageError> {
    let file = File::open(package).map_err(io_at(package))?;
    unpack_from(io::BufReader::new(file), into, bytes_max)
}

/// The same from what can be read.
///
/// # Errors
/// As `unpack`.
pub fn unpack_from(package: impl Read + Seek, into: &Path, bytes_max: u64) -> Result<(), PackageError> {
    let mut archive = ZipArchive::new(package)?;
    if archive.len() > ENTRIES_MAX {
        return Err(PackageError::TooLarge(format!(
            "holds {} entries, at most {ENTRIES_MAX}",
            archive.len()
        )));
    }
    let mut left = bytes_max;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        let name = entry.name()?.into_owned();
        if entry.is_symlink() || !is_below(&name) {
            return Err(PackageError::Escapes(name));
        }
        let path = into.join(&name);
        if entry.is_dir() {
            fs::create_dir_all(&path).map_err(io_at(&path))?;
            continue;
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_at(parent))?;
        }
        let mode = entry.unix_mode().unwrap_or(0o644) & 0o777 | 0o600;
        let mut out = File::create_new(&path).map_err(io_at(&path))?;
        // What the entry says of its size is not believed.
        let written = io::copy(&mut (&mut entry).take(left + 1), &mut out).map_err(io_at(&path))?;
        left = left.checked_sub(written).ok_or_else(|| {
            PackageError::TooLarge(format!("holds more than {bytes_max} bytes when unpacked"))
        })?;
        out.set_permissions(fs::Permissions::from_mode(mode)).map_err(io_at(&path))?;
    }
    Ok(())
}

/// Whether a name leads to a place below the directory that it is joined to.
fn is_below(name: &str) -> bool {
    let path = Path::new(name);
    !name.is_empty()
        && !name.contains(['\\', '\0'])
        && path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        && path.components().any(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn zip_of(entries: &[(&str, &[u8])], dir: &Path) -> PathBuf {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in entries {
            zip.start_file(*name, SimpleFileOptions::default()).expect("start");
            zip.write_all(bytes).expect("write");
        }
        let path = dir.join("package.zip");
        fs::write(&path, zip.finish().expect("finish").into_inner()).expect("write");
        path
    }

    #[test]
    fn a_directory_comes_back_as_it_was() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("sub/empty")).expect("create");
        fs::create_dir_all(from.join(".git")).expect("create");
        fs::create_dir(&to).expect("create");
        fs::write(from.join("sub/run.sh"), "echo hi").expect("write");
        fs::write(from.join(".git/config"), "x").expect("write");
        fs::set_permissions(from.join("sub/run.sh"), fs::Permissions::from_mode(0o750)).expect("chmod");
        let zipped = || pack(&from, Cursor::new(Vec::new())).expect("packs").into_inner();
        assert_eq!(zipped(), zipped(), "the same files are the same package");
        let package = dir.path().join("p.zip");
        fs::write(&package, zipped()).expect("write");
        unpack(&package, &to, 7).expect("fits exactly");
        assert_eq!(fs::read_to_string(to.join("sub/run.sh")).expect("there"), "echo hi");
        let mode = fs::metadata(to.join("sub/run.sh")).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o750);
        assert!(to.join("sub/empty").is_dir() && !to.join(".git").exists());
    }

    #[test]
    fn links_are_followed_and_those_that_lead_back_are_named() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("lib/inner")).expect("create");
        fs::create_dir(&to).expect("create");
        fs::write(from.join("lib/inner/a"), "x").expect("write");
        // As a Python environment has it.
        std::os::unix::fs::symlink("lib", from.join("lib64")).expect("link");
        let package = dir.path().join("p.zip");
        pack(&from, File::create(&package).expect("create")).expect("packs");
        unpack(&package, &to, 100).expect("unpacks");
        assert_eq!(fs::read_to_string(to.join("lib64/inner/a")).expect("there"), "x");
        std::os::unix::fs::symlink("..", from.join("lib/up")).expect("link");
        let looped = pack(&from, Cursor::new(Vec::new())).map(drop);
        assert!(matches!(&looped, Err(PackageError::Loop(name)) if name.ends_with("/up")), "{looped:?}");
    }

    #[test]
    fn nothing_leaves_the_directory_or_grows_beyond_its_bound() {
        let dir = tempfile::tempdir().expect("temp dir");
        let into = dir.path().join("into");
        fs::create_dir(&into).expect("create");
        let try_unpack =
            |entries: &[(&str, &[u8])], bytes_max| unpack(&zip_of(entries, dir.path()), &into, bytes_max);
        for name in ["../out", "a/../../out", "/etc/out", "..\\out", "a\\b"] {
            let result = try_unpack(&[(name, b"x")], 100);
            assert!(matches!(result, Err(PackageError::Escapes(_))), "{name}: {result:?}");
        }
        assert!(!dir.path().join("out").exists());
        let large = try_unpack(&[("a", &[0; 60]), ("b", &[0; 60])], 100);
        assert!(matches!(large, Err(PackageError::TooLarge(_))), "{large:?}");
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        zip.add_symlink("link", "/etc", SimpleFileOptions::default()).expect("link");
        let path = dir.path().join("link.zip");
        fs::write(&path, zip.finish().expect("finish").into_inner()).expect("write");
        assert!(matches!(unpack(&path, &into, 100), Err(PackageError::Escapes(_))));
    }
}
