//! config.json: published models are understood, and what is not supported is refused by name.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

use std::path::{Path, PathBuf};

use heliostat_engine::config::{Attention, GenerationDefaults, ModelConfig, ModelType, Scoring};
use serde_json::{Value, json};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/models").join(name)
}

/// The error of `name`'s config.json after `change`.
fn refusal(name: &str, change: impl FnOnce(&mut Value)) -> String {
    let text = std::fs::read_to_string(data(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    change(&mut config);
    read(&config.to_string()).expect_err("refused")
}

fn read(text: &str) -> Result<ModelConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    ModelConfig::from_dir(dir.path()).map_err(|error| error.to_string())
}

/// The fields of DeepSeek-V3's published config.json that matter here.
fn deepseek_v3() -> Value {
    json!({
        "model_type": "deepseek_v3", "attention_bias": false, "hidden_act": "silu", "hidden_size": 7168,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false, "topk_group": 4,
        "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
        },
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"
        }
    })
}

#[test]
fn deepseek_v3_as_published() {
    let config = read(&deepseek_v3().to_string()).unwrap();
    assert_eq!(config.moe_layers(), 58);
    assert_eq!((config.layer_of_moe(0), config.layer_of_moe(57)), (3, 60));
    assert_eq!(config.kv_elements_per_token(), 576);
    assert!(config.fp8_blocks);
    assert_eq!(config.num_nextn_predict_layers, 1);
    // 0.1 ln 40 + 1, squared; cosine and sine stay as they are because both scales are equal.
    assert!((config.rope.softmax_factor - 1.873_85).abs() < 1e-4, "{}", config.rope.softmax_factor);
    assert_eq!(config.rope.attention_factor, 1.0);
    assert_eq!(config.rope.inv_freq[0], 1.0);
    let slowest = 10000f64.powf(-62.0 / 64.0) / 40.0;
    assert!((f64::from(config.rope.inv_freq[31]) / slowest - 1.0).abs() < 1e-6);
}

#[test]
fn kimi_k2_is_deepseek_v3_by_another_name() {
    let mut fields = deepseek_v3();
    fields["model_type"] = json!("kimi_k2");
    fields["n_group"] = json!(1);
    fields["topk_group"] = json!(1);
    let config = read(&fields.to_string()).unwrap();
    assert_eq!(config.model_type, ModelType::KimiK2);
    assert_eq!(config.moe.router.scoring, Scoring::Sigmoid);
}

#[test]
fn qwen3_30b_a3b_as_published() {
    let fields = json!({
        "model_type": "qwen3_moe", "attention_bias": false, "decoder_sparse_step": 1, "eos_token_id": 151645,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
        "sliding_window": null, "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936
    });
    let config = read(&fields.to_string()).unwrap();
    assert_eq!(config.moe_layers(), 48);
    let Attention::Gqa(gqa) = &config.attention else { panic!("grouped-query attention") };
    assert_eq!((gqa.num_heads, gqa.num_kv_heads, gqa.head_dim), (32, 4, 128));
    assert!(config.moe.router.norm_topk_prob);
    assert_eq!(config.moe.router.scoring, Scoring::Softmax);
}

#[test]
fn old_and_new_rope_fields_mean_the_same() {
    let old = read(&deepseek_v3().to_string()).unwrap();
    let mut fields = deepseek_v3();
    let mut rope = fields["rope_scaling"].take();
    rope["rope_type"] = rope["type"].take();
    rope["rope_theta"] = fields["rope_theta"].take();
    fields["rope_parameters"] = rope;
    assert_eq!(read(&fields.to_string()).unwrap(), old);
}

#[test]
fn sparse_layers_follow_qwens_rule() {
    let config = ModelConfig::from_dir(&data("qwen3-moe-sparse")).unwrap();
    assert_eq!(config.moe_layer_of, [None, None, None, Some(0), None, Some(1)]);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    type Change = fn(&mut Value);
    let cases: &[(&str, Change, &[&str])] = &[
        (
            "model_type",
            |c| c["model_type"] = json!("llama"),
            &["\"llama\" is not supported", "deepseek_v3", "qwen3_moe"],
        ),
        ("hidden_act", |c| c["hidden_act"] = json!("gelu"), &["\"gelu\" is not supported; supported: silu"]),
        (
            "attention_bias",
            |c| c["attention_bias"] = json!(true),
            &["true is not supported; supported: false"],
        ),
        ("hidden_size", |c| c["hidden_size"] = json!(0), &["at least 1"]),
        ("hidden_size", |c| c["hidden_size"] = json!(-64), &["-64 is not an integer from 0"]),
        ("vocab_size", |c| c["vocab_size"] = json!("many"), &["\"many\" is not an integer"]),
        ("rms_norm_eps", |c| c["rms_norm_eps"] = json!(0.0), &["0 must be above 0"]),
        ("kv_lora_rank", |c| c["kv_lora_rank"] = Value::Null, &["missing"]),
        ("n_group", |c| c["n_group"] = json!(3), &["3 does not divide n_routed_experts, 8"]),
        ("topk_group", |c| c["topk_group"] = json!(5), &["5 is more than n_group, 4"]),
        ("num_experts_per_tok", |c| c["num_experts_per_tok"] = json!(5), &["do not fit into 2 groups of 2"]),
        ("num_key_value_heads", |c| c["num_key_value_heads"] = json!(2), &["2 is not supported"]),
        ("scoring_func", |c| c["scoring_func"] = json!("softmax"), &["supported: sigmoid"]),
        (
            "rope_parameters.rope_type",
            |c| c["rope_parameters"]["rope_type"] = json!("llama3"),
            &["\"llama3\" is not supported; supported: default, yarn"],
        ),
        (
            "quantization_config.quant_method",
            |c| c["quantization_config"] = json!({"quant_method": "awq"}),
            &["\"awq\" is not supported; supported: fp8"],
        ),
        (
            "quantization_config.weight_block_size",
            |c| c["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [64, 64]}),
            &["[64,64] is not supported; supported: [128, 128]"],
        ),
    ];
    for (field, change, parts) in cases {
        let error = refusal("deepseek-v3-groups", change);
        assert!(error.contains("config.json: ") && error.contains(&format!("field {field}: ")), "{error}");
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    let error = refusal("qwen3-moe-tied", |c| c["use_sliding_window"] = json!(true));
    assert!(error.contains("field use_sliding_window: true is not supported"), "{error}");
    let error = refusal("qwen3-moe-tied", |c| c["mlp_only_layers"] = json!([7]));
    assert!(error.contains("field mlp_only_layers: there is no layer 7 of 3"), "{error}");
}

#[test]
fn nan_is_refused_with_its_place() {
    let text = std::fs::read_to_string(data("deepseek-v3-groups").join("config.json")).unwrap();
    let error = read(&text.replace("2.5", "NaN")).expect_err("refused");
    assert!(
        error.contains("config.json: not valid JSON") && error.contains("line") && error.contains("NaN"),
        "{error}"
    );
}

#[test]
fn generation_defaults_prefer_their_own_file() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 7, "bos_token_id": 3}"#).unwrap();
    let defaults = GenerationDefaults::from_dir(dir.path()).unwrap();
    assert_eq!((defaults.eos_token_ids.as_slice(), defaults.bos_token_id), (&[7][..], Some(3)));
    let text =
        r#"{"eos_token_id": [8, 9], "do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20}"#;
    std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
    let defaults = GenerationDefaults::from_dir(dir.path()).unwrap();
    assert_eq!(defaults.eos_token_ids, [8, 9]);
    assert_eq!((defaults.temperature, defaults.top_p, defaults.top_k), (Some(0.6), Some(0.95), Some(20)));
    std::fs::write(dir.path().join("generation_config.json"), r#"{"temperature": -1}"#).unwrap();
    let error = GenerationDefaults::from_dir(dir.path()).expect_err("refused").to_string();
    assert!(error.contains("generation_config.json: field temperature: -1 must be at least 0"), "{error}");
}
