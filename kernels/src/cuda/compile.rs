//! Compiles kernel sources for the present chip and keeps the result on disk, by content and chip.

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use super::CudaError;
use super::library::preload;

/// The headers that sources may include, by name.
const HEADERS: &[(&str, &str)] = &[
    ("cluster_row.cuh", include_str!("cu/cluster_row.cuh")),
    ("common.cuh", include_str!("cu/common.cuh")),
    ("exchange.cuh", include_str!("cu/exchange.cuh")),
    ("gemm_ptx.cuh", include_str!("cu/gemm_ptx.cuh")),
    ("rows.cuh", include_str!("cu/rows.cuh")),
];

/// A kernel source with its compile-time constants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// File stem, for messages.
    pub name: &'static str,
    /// CUDA C++.
    pub text: &'static str,
    /// Macros and their values.
    pub defines: Vec<(String, String)>,
}

impl Source {
    /// A source without constants.
    pub fn new(name: &'static str, text: &'static str) -> Self {
        Self { name, text, defines: Vec::new() }
    }

    /// With one more constant.
    #[must_use]
    pub fn define(mut self, name: &str, value: impl ToString) -> Self {
        self.defines.push((name.to_owned(), value.to_string()));
        self
    }

    fn options(&self, chip: &str) -> Vec<String> {
        let fixed = [
            format!("--gpu-architecture={chip}"),
            "--std=c++20".to_owned(),
            "-default-device".to_owned(),
            "-lineinfo".to_owned(),
            "--ptxas-options=-v".to_owned(),
        ];
        let defines = self.defines.iter().map(|(name, value)| format!("-D{name}={value}"));
        fixed.into_iter().chain(defines).collect()
    }
}

/// NVRTC with a cache in front.
#[derive(Debug)]
pub struct Compiler {
    chip: String,
    cache: Option<PathBuf>,
    version: (i32, i32),
}

/// What versions of NVRTC call the file with their builtins.
const BUILTINS: [&str; 4] = [
    "libnvrtc-builtins.so.13.0",
    "libnvrtc-builtins.so.13.1",
    "libnvrtc-builtins.so.13.2",
    "libnvrtc-builtins.so.13.3",
];

/// NVRTC is not known to be reentrant over all versions, and compiling is rare.
static COMPILING: Mutex<()> = Mutex::new(());

impl Compiler {
    /// Loads NVRTC; `chip` is as in `sm_90a`. Cubins are kept in `cache`, if given, which needs not exist.
    ///
    /// # Errors
    /// NVRTC is not found.
    pub fn load(chip: &str, dirs: &[PathBuf], cache: Option<PathBuf>) -> Result<Self, CudaError> {
        let package = "nvidia-cuda-nvrtc";
        // NVRTC opens its builtins by a name with its version, from the loader's path only.
        for builtins in BUILTINS {
            std::mem::forget(preload(builtins, package, dirs));
        }
        std::mem::forget(preload("libnvrtc.so.13", package, dirs)?);
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both places are valid; the library is loaded.
        let result = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
        nvrtc("nvrtcVersion", result)?;
        Ok(Self { chip: chip.to_owned(), cache, version: (major, minor) })
    }

    /// Machine code for `source`, from the cache or compiled now.
    ///
    /// # Errors
    /// The source does not compile. A cache that cannot be written is no error.
    pub fn compile(&self, source: &Source) -> Result<Vec<u8>, CudaError> {
        let cached = self.cache.as_ref().map(|dir| dir.join(self.key(source)));
        if let Some(cubin) = cached.as_deref().and_then(read_cached) {
            return Ok(cubin);
        }
        let (cubin, _) = self.compile_with_log(source)?;
        if let Some(path) = cached {
            write_cached(&path, &cubin);
        }
        Ok(cubin)
    }

    /// Machine code and what the compiler said: registers and spills of every kernel.
    ///
    /// # Errors
    /// The source does not compile.
    pub fn compile_with_log(&self, source: &Source) -> Result<(Vec<u8>, String), CudaError> {
        let _one = COMPILING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let program = Program::new(source)?;
        let options: Vec<CString> = source.options(&self.chip).into_iter().map(c_string).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive and the options are NUL-terminated strings that outlive the call.
        let result =
            unsafe { sys::nvrtcCompileProgram(program.0, pointers.len() as c_int, pointers.as_ptr()) };
        let log = program.log();
        if result != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(CudaError::Compile { source_name: source.name, log });
        }
        Ok((program.cubin()?, log))
    }

    /// File name in the cache: a hash of all that the machine code depends on.
    fn key(&self, source: &Source) -> String {
        let mut hash = Sha256::new();
        let options = source.options(&self.chip).join(" ");
        let version = format!("{}.{}", self.version.0, self.version.1);
        let headers = HEADERS.iter().map(|(_, text)| *text);
        for part in [source.text, options.as_str(), version.as_str()].into_iter().chain(headers) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let digest: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{}-{digest}.cubin", source.name, self.chip)
    }
}

/// A cubin followed by its own hash; anything else is ignored.
fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let cut = bytes.len().checked_sub(32)?;
    let hash = bytes.split_off(cut);
    (Sha256::digest(&bytes).as_slice() == hash).then_some(bytes)
}

/// Written beside and renamed, so that another process never reads half a file.
fn write_cached(path: &Path, cubin: &[u8]) {
    let beside = path.with_extension(format!("{}.tmp", std::process::id()));
    let write = || -> std::io::Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write(&beside, [cubin, Sha256::digest(cubin).as_slice()].concat())?;
        std::fs::rename(&beside, path)
    };
    if write().is_err() {
        let _ = std::fs::remove_file(&beside);
    }
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn new(source: &Source) -> Result<Self, CudaError> {
        let (text, name) = (c_string(source.text.to_owned()), c_string(format!("{}.cu", source.name)));
        let headers: Vec<(CString, CString)> = HEADERS
            .iter()
            .map(|(name, text)| (c_string((*text).to_owned()), c_string((*name).to_owned())))
            .collect();
        let texts: Vec<*const c_char> = headers.iter().map(|(text, _)| text.as_ptr()).collect();
        let names: Vec<*const c_char> = headers.iter().map(|(_, name)| name.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: all strings are NUL-terminated and NVRTC copies them; `program` is a valid place.
        let result = unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        nvrtc("nvrtcCreateProgram", result)?;
        Ok(Self(program))
    }

    fn log(&self) -> String {
        let mut len = 0;
        // SAFETY: the program is alive and `len` is a valid place.
        if unsafe { sys::nvrtcGetProgramLogSize(self.0, &mut len) } != sys::nvrtcResult::NVRTC_SUCCESS {
            return String::new();
        }
        let mut bytes = vec![0u8; len];
        // SAFETY: the buffer has the length that NVRTC named.
        let result = unsafe { sys::nvrtcGetProgramLog(self.0, bytes.as_mut_ptr().cast()) };
        match result {
            sys::nvrtcResult::NVRTC_SUCCESS => {
                String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
            }
            _ => String::new(),
        }
    }

    fn cubin(&self) -> Result<Vec<u8>, CudaError> {
        let mut len = 0;
        // SAFETY: the program is alive and `len` is a valid place.
        nvrtc("nvrtcGetCUBINSize", unsafe { sys::nvrtcGetCUBINSize(self.0, &mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: the buffer has the length that NVRTC named.
        nvrtc("nvrtcGetCUBIN", unsafe { sys::nvrtcGetCUBIN(self.0, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program is alive and not used again.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn nvrtc(call: &'static str, result: sys::nvrtcResult) -> Result<(), CudaError> {
    match result {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        other => Err(CudaError::Other(format!("{call} failed: {other:?}"))),
    }
}

fn c_string(text: String) -> CString {
    CString::new(text).expect("sources and options hold no NUL")
}
