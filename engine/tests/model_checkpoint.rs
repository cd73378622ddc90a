//! Broken checkpoint directories are refused before anything is served, with file, tensor and remedy.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use heliostat_engine::checkpoint::Checkpoint;
use heliostat_engine::config::ModelConfig;
use serde_json::{Value, json};
use tempfile::TempDir;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/models").join(name)
}

/// A copy of a test checkpoint to break.
fn copy_of(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(data(name)).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    dir
}

/// Opens and validates, as serving does first.
fn check(dir: &Path) -> Result<(), String> {
    let config = ModelConfig::from_dir(dir).map_err(|error| error.to_string())?;
    Checkpoint::open(dir)
        .and_then(|checkpoint| checkpoint.validate(&config))
        .map_err(|error| error.to_string())
}

#[track_caller]
fn assert_refused(dir: &Path, parts: &[&str]) {
    let error = check(dir).expect_err("refused");
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

/// Rewrites the tensors of one safetensors file: header entry and data of each.
fn rewrite(file: &Path, change: impl FnOnce(&mut BTreeMap<String, (String, Vec<usize>, Vec<u8>)>)) {
    let bytes = fs::read(file).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: BTreeMap<String, Value> = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let data = &bytes[8 + header_len..];
    let mut tensors = BTreeMap::new();
    for (name, info) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let at: Vec<usize> = serde_json::from_value(info["data_offsets"].clone()).unwrap();
        let shape = serde_json::from_value(info["shape"].clone()).unwrap();
        tensors
            .insert(name, (info["dtype"].as_str().unwrap().to_owned(), shape, data[at[0]..at[1]].to_vec()));
    }
    change(&mut tensors);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend(bytes);
    }
    let header = Value::Object(header).to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.bytes());
    out.extend(data);
    fs::write(file, out).unwrap();
}

#[test]
fn whole_checkpoints_pass() {
    let models = fs::read_dir(data("")).unwrap().map(|entry| entry.unwrap().path());
    for dir in models.chain([data("../../../models/sundial-20m")]) {
        assert_eq!(check(&dir), Ok(()), "{}", dir.display());
    }
}

#[test]
fn a_torn_file_is_named() {
    let dir = copy_of("deepseek-v3-groups");
    let name = "model-00002-of-00002.safetensors";
    let len = fs::metadata(dir.path().join(name)).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(dir.path().join(name)).unwrap();
    file.set_len(len - 10).unwrap();
    assert_refused(dir.path(), &[name, "torn", &(len - 10).to_string(), "download it again"]);
    file.set_len(100).unwrap();
    assert_refused(dir.path(), &[name, "torn", "download it again"]);
    file.set_len(3).unwrap();
    assert_refused(dir.path(), &[name, "torn", "download it again"]);
    fs::write(dir.path().join(name), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert_refused(dir.path(), &[name, "Git LFS pointer", "git lfs pull"]);
}

#[test]
fn a_missing_file_is_named() {
    let dir = copy_of("deepseek-v3-groups");
    fs::remove_file(dir.path().join("model-00001-of-00002.safetensors")).unwrap();
    assert_refused(dir.path(), &["model-00001-of-00002.safetensors: missing", "download it again"]);
    let empty = tempfile::tempdir().unwrap();
    fs::copy(dir.path().join("config.json"), empty.path().join("config.json")).unwrap();
    assert_refused(
        empty.path(),
        &["neither model.safetensors.index.json nor model.safetensors", "safetensors weights"],
    );
    assert_refused(&empty.path().join("nowhere"), &["config.json", "download it again"]);
    fs::remove_file(empty.path().join("config.json")).unwrap();
    assert_refused(empty.path(), &["config.json", "needs this file"]);
}

#[test]
fn a_missing_tensor_is_named() {
    let dir = copy_of("qwen3-moe-tied");
    let tensor = "model.layers.1.mlp.experts.5.up_proj.weight";
    rewrite(&dir.path().join("model.safetensors"), |tensors| {
        tensors.remove(tensor).unwrap();
    });
    let parts = [
        "model.safetensors",
        "tensor model.layers.1.mlp.experts.5.up_proj.weight: missing",
        "download it again",
    ];
    assert_refused(dir.path(), &parts);

    let dir = copy_of("deepseek-v3-groups");
    rewrite(&dir.path().join("model-00002-of-00002.safetensors"), |tensors| {
        tensors.remove("model.norm.weight").unwrap();
    });
    let parts = [
        "model-00002-of-00002.safetensors",
        "tensor model.norm.weight",
        "index.json places it",
        "download both",
    ];
    assert_refused(dir.path(), &parts);
}

#[test]
fn a_wrong_shape_is_named() {
    let dir = copy_of("qwen3-moe-tied");
    rewrite(&dir.path().join("model.safetensors"), |tensors| {
        tensors.get_mut("model.layers.0.self_attn.q_proj.weight").unwrap().1.reverse();
    });
    let parts =
        ["model.safetensors", "layers.0.self_attn.q_proj.weight", "[64, 96]", "[96, 64]", "from one release"];
    assert_refused(dir.path(), &parts);
}

#[test]
fn a_wrong_type_is_named() {
    let dir = copy_of("qwen3-moe-tied");
    rewrite(&dir.path().join("model.safetensors"), |tensors| {
        tensors.get_mut("model.layers.0.mlp.gate.weight").unwrap().0 = "F16".to_owned();
    });
    let parts = [
        "model.safetensors",
        "layers.0.mlp.gate.weight",
        "type F16",
        "supported: F32 and BF16",
        "convert it",
    ];
    assert_refused(dir.path(), &parts);
}

#[test]
fn fp8_needs_its_scales() {
    let dir = copy_of("deepseek-v3-fp8");
    let file = dir.path().join("model-00001-of-00002.safetensors");
    let scale = "model.layers.0.mlp.down_proj.weight_scale_inv";
    rewrite(&file, |tensors| tensors.get_mut(scale).unwrap().0 = "I32".to_owned());
    assert_refused(dir.path(), &[scale, "type I32", "supported: F32"]);

    let dir = copy_of("deepseek-v3-fp8");
    let file = dir.path().join("model-00001-of-00002.safetensors");
    rewrite(&file, |tensors| drop(tensors.remove(scale).unwrap()));
    let index = dir.path().join("model.safetensors.index.json");
    let mut listed: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    listed["weight_map"].as_object_mut().unwrap().remove(scale).unwrap();
    fs::write(&index, listed.to_string()).unwrap();
    assert_refused(
        dir.path(),
        &["index.json", scale, "missing", "needs its block scales", "download it again"],
    );

    let dir = copy_of("deepseek-v3-fp8");
    let config = dir.path().join("config.json");
    let mut fields: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    fields["quantization_config"] = Value::Null;
    fs::write(&config, fields.to_string()).unwrap();
    assert_refused(dir.path(), &["is F8_E4M3", "no quantization_config", "take config.json"]);
}

#[test]
fn what_the_model_would_ignore_is_refused() {
    let dir = copy_of("qwen3-moe-tied");
    let bias = "model.layers.0.self_attn.q_proj.bias";
    rewrite(&dir.path().join("model.safetensors"), |tensors| {
        tensors.insert(bias.to_owned(), ("F32".to_owned(), vec![1], vec![0; 4]));
    });
    assert_refused(dir.path(), &["model.safetensors", bias, "not part of a Qwen3Moe model", "config.json"]);
}

#[test]
fn stacked_experts_are_recognised() {
    let dir = copy_of("qwen3-moe-tied");
    rewrite(&dir.path().join("model.safetensors"), |tensors| {
        tensors.retain(|name, _| !name.contains(".experts."));
        let stack = ("F32".to_owned(), vec![8, 64, 64], vec![0; 4 * 8 * 64 * 64]);
        tensors.insert("model.layers.0.mlp.experts.gate_up_proj".to_owned(), stack);
    });
    assert_refused(
        dir.path(),
        &["layers.0.mlp.experts.gate_up_proj", "stacked", "one tensor per expert", "original format"],
    );
}
