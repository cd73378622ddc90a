//! One safetensors file: its header, checked against the file's length, and positioned reads of its data.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;

use super::{CheckpointError, DOWNLOAD_AGAIN, Entry, file_error};

/// Largest header accepted, as the format's own library has it.
const HEADER_LEN_MAX: u64 = 100_000_000;

/// An open file of a checkpoint.
#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    file: File,
}

impl Shard {
    /// Opens `path`, the checkpoint's file `number`, and returns it with its tensors.
    pub(super) fn open(
        path: PathBuf,
        number: usize,
    ) -> Result<(Self, Vec<(String, Entry)>), CheckpointError> {
        let file = File::open(&path).map_err(|e| file_error(&path, open_problem(&e), DOWNLOAD_AGAIN))?;
        let file_len = file.metadata().map_err(|e| file_error(&path, e.to_string(), DOWNLOAD_AGAIN))?.len();
        let shard = Self { path, file };
        let (header, data_start) = shard.header(file_len)?;
        let expected_len = data_start + header.data_len() as u64;
        if file_len != expected_len {
            let problem =
                format!("has {file_len} bytes, but its header describes {expected_len}: the file is torn");
            return Err(file_error(&shard.path, problem, "download it again"));
        }
        let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
            let (begin, end) = info.data_offsets;
            let offset = data_start + begin as u64;
            (
                name,
                Entry {
                    shard: number,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    offset,
                    len: end - begin,
                },
            )
        };
        let entries = header.tensors().into_iter().map(entry).collect();
        Ok((shard, entries))
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `out` with the bytes from `offset` on.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        self.file.read_exact_at(out, offset).map_err(|e| {
            let problem = match e.kind() {
                ErrorKind::UnexpectedEof => "became shorter while it was read".to_owned(),
                _ => e.to_string(),
            };
            file_error(&self.path, problem, "download it again")
        })
    }

    /// The parsed header and where the data begins.
    fn header(&self, file_len: u64) -> Result<(Metadata, u64), CheckpointError> {
        let torn = |problem: String| file_error(&self.path, problem, "download it again");
        if file_len < 8 {
            return Err(torn(format!(
                "has only {file_len} bytes, which is no safetensors file: the file is torn"
            )));
        }
        let mut len = [0; 8];
        self.read(0, &mut len)?;
        if &len == b"version " {
            let problem = "is a Git LFS pointer, not the weights themselves";
            return Err(file_error(&self.path, problem, "run `git lfs pull` in the checkpoint directory"));
        }
        let len = u64::from_le_bytes(len);
        if len > HEADER_LEN_MAX {
            return Err(torn(format!("claims a header of {len} bytes, which is no safetensors file")));
        }
        if len > file_len - 8 {
            return Err(torn(format!(
                "has {file_len} bytes, but its header alone has {len}: the file is torn"
            )));
        }
        let mut header = vec![0; len as usize];
        self.read(8, &mut header)?;
        let header =
            serde_json::from_slice(&header).map_err(|e| torn(format!("has a damaged header: {e}")))?;
        Ok((header, 8 + len))
    }
}

fn open_problem(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => "missing".to_owned(),
        _ => error.to_string(),
    }
}
