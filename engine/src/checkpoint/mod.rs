//! Hugging Face checkpoint directories: what is in them, and whether it is what the model needs.
//!
//! Opening reads headers only; a tensor's bytes are read when it is asked for, so a rank reads no more than it owns.

mod inventory;
mod reader;
mod shard;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::Deserialize;

use crate::config::{ConfigError, ModelConfig};
pub(crate) use inventory::{Expected, Role, expert_tensor, layer_tensor};
pub(crate) use reader::Reader;
use shard::Shard;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const DOWNLOAD_AGAIN: &str = "download it again from the release that config.json is of";

/// A checkpoint that cannot be served. The message names the file, the tensor and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// config.json or generation_config.json.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file.
    #[error("{}: {problem}; {remedy}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A tensor.
    #[error("{}: tensor {tensor}: {problem}; {remedy}", file.display())]
    Tensor {
        /// The file that holds it, or should.
        file: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: String,
    },
}

/// An opened checkpoint directory.
#[derive(Debug)]
pub struct Checkpoint {
    /// The index, or the only file: where a missing tensor is missing.
    root: PathBuf,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
}

/// Where one tensor lies.
#[derive(Clone, Debug)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// First byte in the file.
    offset: u64,
    len: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens `dir` and reads the headers of all its safetensors files.
    ///
    /// # Errors
    /// No such directory, no safetensors in it, a missing or torn file, or an index that does not match its files.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(file_error(dir, "no such directory", "give a Hugging Face checkpoint directory"));
        }
        let index = dir.join(INDEX);
        if index.exists() {
            return Self::open_index(dir, index);
        }
        let single = dir.join(SINGLE);
        if !single.exists() {
            let problem = format!("neither {INDEX} nor {SINGLE} is here");
            let remedy = "give a Hugging Face checkpoint directory with safetensors weights (pickled .bin weights and \
                          GGUF are not read)";
            return Err(file_error(dir, problem, remedy));
        }
        let (shard, entries) = Shard::open(single.clone(), 0)?;
        Ok(Self { root: single, shards: vec![shard], tensors: entries.into_iter().collect() })
    }

    fn open_index(dir: &Path, index: PathBuf) -> Result<Self, CheckpointError> {
        let text = std::fs::read(&index).map_err(|e| file_error(&index, e.to_string(), DOWNLOAD_AGAIN))?;
        let parsed: Result<Index, _> = serde_json::from_slice(&text);
        let weight_map = parsed.map_err(|e| file_error(&index, e.to_string(), DOWNLOAD_AGAIN))?.weight_map;
        let names: BTreeSet<&String> = weight_map.values().collect();
        let mut shards = Vec::with_capacity(names.len());
        let mut tensors = HashMap::with_capacity(weight_map.len());
        for (number, name) in names.into_iter().enumerate() {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                let problem = format!("names the file {name:?}, which is not a plain file name");
                return Err(file_error(&index, problem, DOWNLOAD_AGAIN));
            }
            let (shard, entries) = Shard::open(dir.join(name), number)?;
            tensors.extend(entries.into_iter().filter(|(tensor, _)| weight_map.get(tensor) == Some(name)));
            shards.push(shard);
        }
        if let Some((tensor, file)) = weight_map.iter().find(|(tensor, _)| !tensors.contains_key(*tensor)) {
            let problem = format!("{INDEX} places it in this file, but it is not there");
            return Err(tensor_error(&dir.join(file), tensor, problem, "download both files again"));
        }
        Ok(Self { root: index, shards, tensors })
    }

    /// Checks that every tensor of `config`'s model is here with the right shape and a supported type, and nothing
    /// that the model would silently ignore. Reads no weights.
    ///
    /// # Errors
    /// The first tensor that is missing, wrong or not understood.
    pub fn validate(&self, config: &ModelConfig) -> Result<(), CheckpointError> {
        let mut known = 0;
        inventory::for_each(config, &mut |expected| {
            known += self.check(config, &expected)?;
            Ok(())
        })?;
        // Counting first: only a checkpoint with too many tensors needs the search for the odd one.
        if known == self.tensors.len() { Ok(()) } else { self.refuse_unknown(config) }
    }

    /// Checks one tensor and its scales; returns how many tensors that were.
    fn check(&self, config: &ModelConfig, expected: &Expected) -> Result<usize, CheckpointError> {
        let entry = self.entry(&expected.name)?;
        if entry.shape != expected.shape() {
            let problem =
                format!("has shape {:?}, but config.json asks for {:?}", entry.shape, expected.shape());
            let remedy = "config.json and weights are not of the same model: take both from one release";
            return Err(self.tensor_error(&expected.name, problem, remedy));
        }
        match (entry.dtype, expected.role) {
            (Dtype::F32 | Dtype::BF16, _) => Ok(1),
            (Dtype::F8_E4M3, Role::Linear) if config.fp8_blocks => {
                self.check_scales(expected)?;
                Ok(2)
            }
            (Dtype::F8_E4M3, Role::Linear) => {
                let problem =
                    "is F8_E4M3, but config.json has no quantization_config that says how to scale it";
                Err(self.tensor_error(&expected.name, problem, "take config.json from the same release"))
            }
            (dtype, role) => {
                let supported = match role {
                    Role::Linear => "F32, BF16, or F8_E4M3 with 128x128 block scales",
                    Role::Matrix | Role::Vector => "F32 and BF16",
                };
                let problem =
                    format!("has type {dtype:?}, which is not supported here; supported: {supported}");
                let remedy = "take a release in one of these types, or convert it";
                Err(self.tensor_error(&expected.name, problem, remedy))
            }
        }
    }

    fn check_scales(&self, expected: &Expected) -> Result<(), CheckpointError> {
        let name = expected.scale_name();
        let Some(entry) = self.tensors.get(&name) else {
            let problem = format!("missing, though {} is F8_E4M3 and needs its block scales", expected.name);
            return Err(self.tensor_error(&name, problem, DOWNLOAD_AGAIN));
        };
        if entry.dtype != Dtype::F32 {
            let problem = format!("has type {:?}, which is not supported here; supported: F32", entry.dtype);
            return Err(self.tensor_error(
                &name,
                problem,
                "take a release with F32 block scales, or convert it",
            ));
        }
        if entry.shape != expected.scale_shape() {
            let problem =
                format!("has shape {:?}, but 128x128 blocks need {:?}", entry.shape, expected.scale_shape());
            return Err(self.tensor_error(&name, problem, DOWNLOAD_AGAIN));
        }
        Ok(())
    }

    fn refuse_unknown(&self, config: &ModelConfig) -> Result<(), CheckpointError> {
        let mut unknown: BTreeSet<&str> = self.tensors.keys().map(String::as_str).collect();
        inventory::for_each(config, &mut |expected| {
            unknown.remove(expected.name.as_str());
            unknown.remove(expected.scale_name().as_str());
            Ok(())
        })?;
        match unknown.into_iter().find(|name| !inventory::is_skipped(config, name)) {
            None => Ok(()),
            Some(name) => {
                let problem =
                    format!("is not part of a {:?} model as config.json describes it", config.model_type);
                let remedy = "leaving it out would change the results, so it is refused; take config.json from the \
                              same release";
                Err(self.tensor_error(name, problem, remedy))
            }
        }
    }

    /// Bytes that loading everything but the routed experts reads.
    pub(crate) fn dense_bytes(&self, config: &ModelConfig) -> Result<u64, CheckpointError> {
        let mut bytes = 0;
        inventory::for_each_dense(config, &mut |expected| {
            bytes += self.stored_bytes(&expected)?;
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Bytes that a tensor and its scales take in the checkpoint.
    pub(crate) fn stored_bytes(&self, expected: &Expected) -> Result<u64, CheckpointError> {
        let scales = self.tensors.get(&expected.scale_name()).map_or(0, |entry| entry.len);
        Ok((self.entry(&expected.name)?.len + scales) as u64)
    }

    fn entry(&self, name: &str) -> Result<&Entry, CheckpointError> {
        self.tensors.get(name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> CheckpointError {
        let stacked = name
            .rsplit_once(".experts.")
            .map(|(layer, _)| ["gate_up_proj", "down_proj"].map(|stack| format!("{layer}.experts.{stack}")));
        if let Some(stack) = stacked.iter().flatten().find(|&stack| self.tensors.contains_key(stack)) {
            let problem =
                "holds all experts stacked; supported: one tensor per expert, as releases have them";
            let remedy = format!("save the checkpoint in its original format, which has {name}");
            return self.tensor_error(stack, problem, remedy);
        }
        self.tensor_error(name, "missing", DOWNLOAD_AGAIN)
    }

    fn tensor_error(
        &self,
        name: &str,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> CheckpointError {
        let shard = self.tensors.get(name).map(|entry| self.shards[entry.shard].path());
        tensor_error(shard.unwrap_or(&self.root), name, problem, remedy)
    }
}

fn file_error(file: &Path, problem: impl Into<String>, remedy: impl Into<String>) -> CheckpointError {
    CheckpointError::File { file: file.to_owned(), problem: problem.into(), remedy: remedy.into() }
}

fn tensor_error(
    file: &Path,
    tensor: &str,
    problem: impl Into<String>,
    remedy: impl Into<String>,
) -> CheckpointError {
    let (tensor, problem, remedy) = (tensor.to_owned(), problem.into(), remedy.into());
    CheckpointError::Tensor { file: file.to_owned(), tensor, problem, remedy }
}
