//! Finds NVIDIA's libraries where they usually lie and loads them, so that later loads by name find them loaded.

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::CudaError;

/// Where toolkits install themselves, after the loader's own path and the folders given by the caller.
const USUAL_DIRS: [&str; 4] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda-13/lib64",
    "/usr/local/cuda-13.0/lib64",
    "/usr/lib/x86_64-linux-gnu",
];

/// Loads `name`, for good, from the loader's path or one of the folders. Its soname is then known to the process.
pub(super) fn preload(
    name: &'static str,
    package: &'static str,
    dirs: &[PathBuf],
) -> Result<Library, CudaError> {
    let usual = USUAL_DIRS.iter().map(PathBuf::from);
    let searched: Vec<PathBuf> = dirs.iter().cloned().chain(usual).collect();
    let open = |path: &Path| {
        // SAFETY: NVIDIA's libraries run no initialiser that depends on the state of this process.
        unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }
    };
    let given = dirs.iter().map(|dir| dir.join(name)).find_map(|path| open(&path).ok());
    given
        .or_else(|| open(Path::new(name)).ok())
        .or_else(|| searched.iter().map(|dir| dir.join(name)).find_map(|path| open(&path).ok()))
        .ok_or(CudaError::NoLibrary { library: name, package, searched })
}

/// A function of a loaded library, by name; its type is that of the field it goes to, which is the caller's word.
macro_rules! function {
    ($library:ident, $file:literal, $name:expr) => {
        // SAFETY: the caller declares the field with the type that the library's header gives the function.
        *unsafe { $library.get(concat!($name, "\0").as_bytes()) }
            .map_err(|why| $crate::cuda::CudaError::Other(format!("{} lacks {}: {why}", $file, $name)))?
    };
}
pub(super) use function;
