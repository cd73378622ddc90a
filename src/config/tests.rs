//! Every error of cluster.toml as its reader sees it.

mod devices;
mod security;
mod telemetry;

use super::*;
use std::fs;

/// A directory with the bundled model's config.json: 32 experts, 2048 positions.
fn model_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temp dir");
    let model = dir.path().join("models/sundial-20m");
    fs::create_dir_all(&model).expect("create");
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/sundial-20m/config.json");
    fs::copy(bundled, model.join("config.json")).expect("copy");
    dir
}

/// Reads the text on a machine without GPUs.
fn parse(text: &str) -> Result<Config, String> {
    parse_with(text, Some(Err("there is no NVIDIA driver".into())))
}

/// Reads the text on a machine with these GPUs.
fn parse_with(text: &str, gpus: Option<Result<u32, String>>) -> Result<Config, String> {
    let dir = model_dir();
    fs::write(dir.path().join("token"), "0123456789abcdef0123\n").expect("write");
    fs::write(dir.path().join("short"), "abc\n").expect("write");
    // At the end, where it moves no line that an error shows.
    let serving = if text.contains("[model]") { text.to_owned() } else { format!("{text}\n[model]\n") };
    Config::parse(&serving, "c.toml", dir.path(), |_| gpus)
        .map_err(|e| e.to_string().replace(&dir.path().display().to_string(), "DIR"))
}

#[track_caller]
fn refused(text: &str, expected: &str) {
    refused_with(text, Some(Err("there is no NVIDIA driver".into())), expected);
}

#[track_caller]
fn refused_with(text: &str, gpus: Option<Result<u32, String>>, expected: &str) {
    match parse_with(text, gpus) {
        Ok(_) => panic!("accepted:\n{text}"),
        Err(e) => assert_eq!(e.trim_end(), expected.trim_matches('\n'), "\ngot:\n{e}\n"),
    }
}

#[test]
fn a_head_may_be_told_where_it_is() {
    let at = |bind: &str, advertise: Option<&str>, token: &str| {
        let at = HeadAt {
            bind: Some(bind.parse().expect(bind)),
            advertise: advertise.map(str::to_owned),
            run_dir: Some("/scratch/job-7".into()),
        };
        let text = format!("[cluster]\n{token}\n[head]\nbind = \"127.0.0.1:1\"");
        Config::parse_at(&text, "c.toml", Path::new("/nowhere"), at, |_| None).map_err(|e| e.to_string())
    };
    let token = "token = \"0123456789abcdef\"";
    let config = at("0.0.0.0:2", Some("head-0.heads"), token).expect("all of it");
    assert_eq!((config.bind.port(), config.advertise.as_deref()), (2, Some("head-0.heads")));
    let state = |dir: &Path| matches!(&config.state, State::Embedded { dir: at } if at.starts_with(dir));
    assert!(
        config.run_dir.ends_with("job-7") && state(&config.run_dir),
        "state goes where the run directory is"
    );
    // What is told is checked as if it were written.
    assert!(at("0.0.0.0:2", None, token).expect_err("a wildcard").contains("advertise"));
    assert!(at("10.0.0.1:2", None, "").expect_err("no token").contains("beyond loopback"));
}

#[test]
fn an_empty_model_section_is_the_default_cluster() {
    let config = parse("[model]").expect("empty section");
    assert_eq!(config.parallel, Parallel { dp: 4, ep: 4, colocate: true });
    assert_eq!(config.nodes.len(), 1);
    assert_eq!((config.nodes[0].name.as_str(), config.nodes[0].devices.count()), ("node-0", 4));
    assert_eq!(config.bind.to_string(), "127.0.0.1:6379");
    let model = config.model.expect("a model");
    assert_eq!((model.name.as_str(), model.max_model_len), ("sundial-20m", 2048));
    assert_eq!(config.redundant_experts, 4);
    assert!(config.run_dir.is_absolute() && config.run_dir.ends_with("run"));
    assert!(matches!(&config.state, State::Embedded { dir } if dir.ends_with("run/state")));
    assert_eq!(config.kv_cache, KvCache::Bytes(128 << 20));
}

#[test]
fn objects_reach_node_agents() {
    let args = |text: &str| parse(text).expect(text).objects.args().join(" ");
    assert_eq!(args(""), "--spill 17179869184", "what the node decides is left to it");
    assert_eq!(
        args(
            "[objects]\nmemory = \"1GiB\"\nspill_dir = \"/spill\"\nspill_bytes = 0\nready = [\"1MiB\", 4096]"
        ),
        "--objects 1073741824 --spill-dir /spill --spill 0 --objects-ready 1048576 --objects-ready 4096"
    );
    let relative = parse("[objects]\nspill_dir = \"spill\"").expect("a relative directory");
    assert!(relative.objects.spill_dir.is_some_and(|dir| dir.is_absolute() && dir.ends_with("spill")));
}

#[test]
fn ranks_follow_devices_where_they_are_not_written() {
    let ranks = |text: &str| {
        let c = parse(text).expect(text);
        (c.parallel.dp, c.parallel.ep, c.redundant_experts)
    };
    assert_eq!(ranks("[devices]\ncpu = 2"), (2, 2, 2));
    assert_eq!(ranks("[parallel]\ncolocate = false"), (2, 2, 2));
    assert_eq!(ranks("[parallel]\ncolocate = false\ndp = 1"), (1, 3, 4), "32 + 4 = 36 slots on 3 ranks");
    assert_eq!(ranks("[parallel]\ndp = 1\nep = 1"), (1, 1, 0));
    assert_eq!(ranks("[[nodes]]\ndevices = 1\n[[nodes]]\ndevices = 2"), (3, 3, 4));
    assert_eq!(ranks("[eplb]\nenable_eplb = false"), (4, 4, 0));
}

#[test]
fn unknown_keys_are_shown_with_a_suggestion() {
    refused(
        "[eplb]\nwindow_sise = 10\n",
        "
c.toml:2:1: unknown key `window_sise` in [eplb]
  |
2 | window_sise = 10
  | ^^^^^^^^^^^ did you mean `window_size`?",
    );
    refused(
        "[head]\nport = 1\n[paralel]\ndp = 1\n",
        "
c.toml:2:1: unknown key `port` in [head]
  |
2 | port = 1
  | ^^^^ `port` is a key of [serve]
c.toml:3:2: unknown section [paralel]
  |
3 | [paralel]
  |  ^^^^^^^ did you mean `parallel`?",
    );
    refused(
        "dp = 4\n",
        "
c.toml:1:1: unknown section [dp]
  |
1 | dp = 4
  | ^^ `dp` is a key of [parallel]",
    );
    refused(
        "[nodes]\nname = \"a\"\n",
        "
c.toml:1:2: `nodes` is a section
  |
1 | [nodes]
  |  ^^^^^ write it as [[nodes]]",
    );
}

#[test]
fn wrong_values_are_shown_where_they_stand() {
    refused(
        "[state]\nstore = \"etc\"\n",
        "
c.toml:2:9: unknown value `etc`, expected `embedded` or `etcd`
  |
2 | store = \"etc\"
  |         ^^^^^ did you mean \"etcd\"?",
    );
    refused(
        "[parallel]\ndp = \"four\"\n",
        "
c.toml:2:6: invalid type: string \"four\", expected u32
  |
2 | dp = \"four\"
  |      ^^^^^^",
    );
    refused(
        "[devices]\nthreads = \"many\"\n",
        "
c.toml:2:11: invalid value: string \"many\", expected a number or \"auto\"
  |
2 | threads = \"many\"
  |           ^^^^^^",
    );
    refused(
        "[engine]\nprefill_attention = \"expand\"\n",
        "
c.toml:2:21: unknown value `expand`, expected `absorbed` or `expanded`
  |
2 | prefill_attention = \"expand\"
  |                     ^^^^^^^^ did you mean \"expanded\"?",
    );
    refused(
        "[engine]\nkv_cache_memory_bytes = \"lots\"\n",
        "
c.toml:2:25: invalid value: string \"lots\", expected a number of bytes, or a string such as \"256MiB\"
  |
2 | kv_cache_memory_bytes = \"lots\"
  |                         ^^^^^^",
    );
    let syntax = parse("[head\nbind = 1").expect_err("broken header");
    assert!(syntax.starts_with("c.toml:1:"), "{syntax}");
}

#[test]
fn ranks_must_have_devices() {
    refused(
        "[parallel]\ndp = 8\n",
        "
c.toml:2:6: dp = 8 and ep = 8 need 8 devices, the nodes have 4
  |
2 | dp = 8
  |      ^ lower dp and ep, or raise `cpu` in [devices]",
    );
    refused(
        "[parallel]\ncolocate = false\ndp = 4\nep = 4\n",
        "
c.toml:3:6: dp = 4 and ep = 4 with colocate = false need 8 devices, the nodes have 4
  |
3 | dp = 4
  |      ^ lower dp and ep, or raise `cpu` in [devices]",
    );
    refused(
        "[parallel]\nep = 0\n",
        "
c.toml:2:6: `ep` must be at least 1
  |
2 | ep = 0
  |      ^ write ep = 1 or more",
    );
    refused(
        "[serve]\nnode = \"a\"\n",
        "
c.toml:2:8: there is no node `a`
  |
2 | node = \"a\"
  |        ^^^ nodes are node-0",
    );
}

#[test]
fn slots_must_divide_among_ranks() {
    refused(
        "[eplb]\nnum_redundant_experts = 6\n",
        "
c.toml:2:25: 32 experts + 6 redundant = 38 slots, not divisible by ep = 4
  |
2 | num_redundant_experts = 6
  |                         ^ write 4 or 8",
    );
    refused(
        "[parallel]\nep = 3\n[eplb]\nnum_redundant_experts = 0\n",
        "
c.toml:4:25: 32 experts + 0 redundant = 32 slots, not divisible by ep = 3
  |
4 | num_redundant_experts = 0
  |                         ^ write 1",
    );
    refused(
        "[eplb]\nnum_redundant_experts = 100\n",
        "
c.toml:2:25: 100 redundant experts are more than one copy of each on every rank
  |
2 | num_redundant_experts = 100
  |                         ^^^ write at most 96",
    );
}

#[test]
fn several_heads_need_etcd() {
    refused(
        "[head]\npeers = [\"10.0.0.2\"]\nlease_s = 1\n",
        "
c.toml:2:9: the embedded store has one head
  |
2 | peers = [\"10.0.0.2\"]
  |         ^^^^^^^^^^^^ set store = \"etcd\" in [state], or leave `peers` out
c.toml:3:11: `lease_s` = 1 is shorter than etcd's shortest lease
  |
3 | lease_s = 1
  |           ^ write 2 or more",
    );
    let config = parse("[head]\npeers = [\"10.0.0.2\"]\n[state]\nstore = \"etcd\"\n").expect("etcd");
    assert_eq!((config.peers, config.lease_s), (vec!["10.0.0.2:6379".to_owned()], 2));
}

#[test]
fn nothing_listens_beyond_loopback_without_a_token() {
    refused(
        "[head]\nbind = \"10.0.0.1:6379\"\n",
        "
c.toml:2:8: the head would listen on 10.0.0.1:6379, beyond loopback, without a cluster token
  |
2 | bind = \"10.0.0.1:6379\"
  |        ^^^^^^^^^^^^^^^ set `token_file` in [cluster]",
    );
    refused(
        "[cluster]\ntoken_file = \"token\"\n[head]\nbind = \"0.0.0.0:6379\"\n",
        "
c.toml:4:8: nobody can connect to the wildcard address 0.0.0.0:6379
  |
4 | bind = \"0.0.0.0:6379\"
  |        ^^^^^^^^^^^^^^ set `advertise` to the address by which others reach this machine",
    );
    let config =
        parse("[cluster]\ntoken_file = \"token\"\n[head]\nbind = \"10.0.0.1:6379\"\n").expect("token file");
    assert_eq!(config.token, Some(Token("0123456789abcdef0123".into())));
    assert!(!format!("{config:?}").contains("0123456789abcdef"), "a token must not be printed");
    refused(
        "[cluster]\ntoken_file = \"short\"\n",
        "
c.toml:2:14: the secret is shorter than 16 characters
  |
2 | token_file = \"short\"
  |              ^^^^^^^ make one with: openssl rand -hex 32",
    );
    refused(
        "[cluster]\ntoken_file = \"missing\"\n",
        "
c.toml:2:14: cannot read the file: DIR/missing: No such file or directory (os error 2)
  |
2 | token_file = \"missing\"
  |              ^^^^^^^^^ create it: openssl rand -hex 32 > FILE",
    );
    refused(
        "[serve]\nhost = \"0.0.0.0\"\n",
        "
c.toml:2:8: HTTP would listen on 0.0.0.0, beyond loopback, without authentication
  |
2 | host = \"0.0.0.0\"
  |        ^^^^^^^^^ set `api_key_file`",
    );
    refused(
        "[[nodes]]\nhost = \"gpu-2\"\n",
        "
c.toml:2:8: a node on another host cannot reach the head at 127.0.0.1:6379
  |
2 | host = \"gpu-2\"
  |        ^^^^^^^ set `bind` in [head] to this machine's address",
    );
}

#[test]
fn the_model_must_be_there() {
    refused(
        "[model]\npath = \"models/none\"\n",
        "
c.toml:2:8: DIR/models/none/config.json: No such file or directory (os error 2); a checkpoint directory needs this file, download it again
  |
2 | path = \"models/none\"
  |        ^^^^^^^^^^^^^ name a Hugging Face checkpoint directory",
    );
    refused(
        "[model]\nmax_model_len = 4096\n",
        "
c.toml:2:17: `max_model_len` = 4096 is beyond the model's 2048 positions
  |
2 | max_model_len = 4096
  |                 ^^^^ write 2048 or less",
    );
}

#[test]
fn prompts_are_expanded_where_there_are_latents() {
    let expanded = "[engine]\nprefill_attention = \"expanded\"\n";
    let chosen = |text: &str| parse(text).expect(text).engine.prefill_attention.name();
    assert_eq!((chosen(""), chosen(expanded)), ("absorbed", "expanded"));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/qwen3-moe-tied");
    refused(
        &format!("{expanded}[model]\npath = {model:?}\n"),
        "
c.toml:2:21: `prefill_attention` = \"expanded\" needs a model with latent attention (MLA)
  |
2 | prefill_attention = \"expanded\"
  |                     ^^^^^^^^^^ write \"absorbed\", or leave it out",
    );
}

#[test]
fn engine_and_supervision_must_make_sense() {
    refused(
        "[engine]\nmax_num_batched_tokens = 8\n",
        "
c.toml:2:26: `max_num_batched_tokens` = 8 is below `max_num_seqs` = 64: a full batch could not decode
  |
2 | max_num_batched_tokens = 8
  |                          ^ write 64 or more",
    );
    refused(
        "[engine]\nnum_gpu_blocks_override = 16\n",
        "
c.toml:2:27: 16 blocks of 16 tokens hold 256 tokens, one sequence may have 2048
  |
2 | num_gpu_blocks_override = 16
  |                           ^^ raise it, or lower `max_model_len` in [model]",
    );
    refused(
        "[engine]\nnum_gpu_blocks_override = 200\nkv_cache_memory_bytes = \"1GiB\"\n",
        "
c.toml:2:27: `num_gpu_blocks_override` and `kv_cache_memory_bytes` are both set
  |
2 | num_gpu_blocks_override = 200
  |                           ^^^ keep one of them",
    );
    refused(
        "[supervision]\nnode_grace_s = 0.5\n",
        "
c.toml:2:16: `node_grace_s` = 0.5 is less than two heartbeats of 500 ms: a late one would cost a node
  |
2 | node_grace_s = 0.5
  |                ^^^ raise it, or lower `heartbeat_ms`",
    );
    refused(
        "[objects]\nmemory = \"1GiB\"\nready = [\"512MiB\", \"1MiB\"]\n",
        "
c.toml:3:9: 513MiB to be kept ready are more than half of the store's 1GiB
  |
3 | ready = [\"512MiB\", \"1MiB\"]
  |         ^^^^^^^^^^^^^^^^^^ leave sizes out, or raise `memory`",
    );
    refused(
        "[state]\nstore = \"etcd\"\ndir = \"x\"\n",
        "
c.toml:3:7: `dir` belongs to store = \"embedded\"
  |
3 | dir = \"x\"
  |       ^^^ leave it out with etcd",
    );
    refused(
        "[eplb]\nuse_async = false\n",
        "
c.toml:2:13: weights always move in the background in this release
  |
2 | use_async = false
  |             ^^^^^ leave `use_async` out",
    );
}

#[test]
fn the_effective_file_says_the_same_from_anywhere_and_holds_no_token() {
    let dir = model_dir();
    let text = "[cluster]\ntoken = \"0123456789abcdef\"\nrun_dir = \"r\"\n[parallel]\ndp = 2\n[[nodes]]\ndevices = 3\n";
    let config = Config::parse(text, "c.toml", dir.path(), |_| None).expect("valid");
    assert!(!config.effective.contains("0123456789abcdef"), "{}", config.effective);
    fs::create_dir(dir.path().join("r")).expect("create");
    fs::write(dir.path().join("r/token"), "0123456789abcdef").expect("write");
    let again =
        Config::parse(&config.effective, "e.toml", Path::new("/nowhere"), |_| None).expect(&config.effective);
    assert_eq!(format!("{again:?}"), format!("{config:?}"));
}

/// Nothing of a model is asked for where none is named, and what a head reads again says so, too.
#[test]
fn without_a_model_there_is_a_cluster_for_actors_and_jobs() {
    let dir = tempfile::tempdir().expect("directory");
    let text = "[devices]\ndevice = \"cpu\"\ncpu = 1\n[parallel]\ndp = 7\n";
    let config = Config::parse(text, "c.toml", dir.path(), |_| None).expect("valid");
    assert_eq!(config.model, None);
    assert_eq!(crate::deploy::plan(&config).expect("a plan").names(), ["ingress", "serve", "jobs"]);
    let again =
        Config::parse(&config.effective, "e.toml", Path::new("/nowhere"), |_| None).expect(&config.effective);
    assert_eq!(format!("{again:?}"), format!("{config:?}"));
}

/// `helio reference > docs/configuration.md` brings the page up to date.
#[test]
fn the_reference_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let page = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        page == reference_page(),
        "docs/configuration.md is out of date: helio reference > docs/configuration.md"
    );
}

/// The example in the root is the default cluster, spelt out.
#[test]
fn the_example_says_the_defaults() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("cluster.toml")).expect("cluster.toml");
    let example = Config::parse(&text, "cluster.toml", root, |_| None).expect("the example is valid");
    let default = Config::parse("[model]", "empty", root, |_| None).expect("the default is valid");
    assert_eq!(format!("{example:?}"), format!("{default:?}"));
}
