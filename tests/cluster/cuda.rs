//! The same clusters on CUDA devices. Without a GPU these tests say so and pass.

use heliostat_kernels::cuda::Device;
use serde_json::{Value, json};

use crate::disaggregated::apps;
use crate::faults::{all_equal, disturbed, undisturbed};
use crate::rig::{Cluster, PATIENCE, helio, kill, text, write_config};

/// One GPU per rank.
const ALONE: &[(&str, &str)] = &[("devices", "device = \"cuda\"\ncuda = 1")];

/// Two ranks take turns on one GPU: slow, and all that two GPUs would do but for the wires.
const SHARED: &[(&str, &str)] = &[
    ("devices", "device = \"cuda\"\ncuda = 1\nranks_per_gpu = 2"),
    ("parallel", "step_timeout_s = 5"),
    ("engine", "kv_cache_memory_bytes = \"256MiB\"\nmax_num_batched_tokens = 1024"),
    ("eplb", "window_size = 50\nstep_interval = 1000000"),
];

/// A GPU for each of two ranks.
const PAIR: &[(&str, &str)] = &[
    ("devices", "device = \"cuda\"\ncuda = 2"),
    ("parallel", "step_timeout_s = 5"),
    ("eplb", "window_size = 50\nstep_interval = 1000000"),
];

/// The same, but that NCCL carries the rows.
const NCCL: &[(&str, &str)] =
    &[PAIR[0], ("parallel", "step_timeout_s = 5\nall2all_backend = \"nccl\""), PAIR[2]];

/// Has experts moved, and returns the epoch of that.
async fn rebalance(cluster: &Cluster) -> u64 {
    let (status, started) = cluster.post("/api/eplb/rebalance", &json!({})).await;
    assert_eq!(status, 202, "{started}");
    started["epoch"].as_u64().unwrap()
}

/// Breaks the GPU of a rank, for its process.
async fn break_device(cluster: &Cluster, rank: &str) {
    let url = std::fs::read_to_string(cluster.dir.path().join("run/dashboard")).unwrap();
    let url = format!("{}/api/actors/{rank}/ask/rank.break_device", url.trim());
    let answer = cluster.client.post(url).json(&json!({})).send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap_or_default());
}

/// Two ranks whose GPUs may be broken: each on its own where there are two.
fn breakable() -> Vec<(&'static str, &'static str)> {
    let ranks = if Device::count().is_ok_and(|count| count > 1) { PAIR } else { SHARED };
    ranks.iter().copied().chain([("devices", "fault_injection = true")]).collect()
}

fn has_gpu() -> bool {
    has_gpus(1)
}

fn has_gpus(wanted: u32) -> bool {
    match Device::count() {
        Ok(count) if count >= wanted => true,
        Ok(count) => {
            eprintln!("skipped: {wanted} GPUs are needed, there are {count}");
            false
        }
        Err(why) => {
            eprintln!("skipped: {why}");
            false
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gpu_rank_loses_no_stream() {
    if !has_gpu() {
        return;
    }
    let cluster = Cluster::up(ALONE).await;
    let expected = undisturbed(&cluster).await;
    let pid = cluster.pid("rank-0");
    let (got, pause) = disturbed(&cluster, async || kill(pid)).await;
    all_equal(got, &expected);
    cluster.until_healed().await;
    assert_eq!(cluster.actor("rank-0")["restarts"], 1);
    eprintln!("rank-0 killed: longest pause of a stream {pause:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn placement_remaps_and_kills_change_no_token_on_one_gpu() {
    if has_gpu() {
        nothing_changes_a_token(SHARED, "nvlink").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn placement_remaps_and_kills_change_no_token_on_two_gpus() {
    if has_gpus(2) {
        nothing_changes_a_token(PAIR, "nvlink").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn placement_remaps_and_kills_change_no_token_by_nccl() {
    if has_gpus(2) {
        nothing_changes_a_token(NCCL, "host").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_and_decode_apart_give_the_same_bits_on_a_gpu() {
    if !has_gpu() {
        return;
    }
    let devices = ("devices", "device = \"cuda\"\ncuda = 1\nranks_per_gpu = 3");
    let cluster = Cluster::up(&[("model", "deploy = false"), devices]).await;
    cluster.deploy_and_wait(apps(1, &json!({ "kv_cache_memory_bytes": 256 << 20 })));
    tokio::time::timeout(PATIENCE, cluster.apart_answers_as_whole()).await.unwrap();
}

/// One rank and two, a remap under streams, whose experts come by `path`, and a killed rank: the texts are the same.
async fn nothing_changes_a_token(two_ranks: &[(&str, &str)], path: &str) {
    let alone = Cluster::up(ALONE).await;
    let expected = undisturbed(&alone).await;
    drop(alone);
    let cluster = Cluster::up(two_ranks).await;
    assert_eq!(undisturbed(&cluster).await, expected, "two ranks and one");
    let mut epoch = None;
    let (got, pause) = disturbed(&cluster, async || {
        epoch = Some(rebalance(&cluster).await);
    })
    .await;
    all_equal(got, &expected);
    let after = cluster.until_remapped(epoch.unwrap()).await;
    let remap: &Value = &after["history"][0];
    assert_eq!(remap["end"], "committed");
    assert!(remap["moves"].as_u64().unwrap() > 0, "{remap}");
    for way in ["nvlink", "host", "disk"] {
        assert_eq!(remap["moved"][way]["experts"].as_u64().unwrap() > 0, way == path, "{way}: {remap}");
    }
    eprintln!("remapped: longest pause of a stream {pause:?}; {remap}");
    let pid = cluster.pid("rank-1");
    let (got, pause) = disturbed(&cluster, async || kill(pid)).await;
    all_equal(got, &expected);
    cluster.until_healed().await;
    eprintln!("rank-1 killed: longest pause of a stream {pause:?}");
    if path != "nvlink" {
        return;
    }
    // What rank 0 holds a copy of, the new process has from there.
    let said = text(&cluster.helio(&["logs", "rank-1"]));
    let filled = said.lines().rev().find(|line| line.contains("filled the slots")).unwrap_or_default();
    assert!(
        filled.contains("nvlink: Carried { experts: ") && !filled.contains("nvlink: Carried { experts: 0,"),
        "{said}"
    );
    eprintln!("{filled}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_killed_while_experts_move_between_gpus_loses_no_stream() {
    if !has_gpu() {
        return;
    }
    let cluster = Cluster::up(&breakable()).await;
    let expected = undisturbed(&cluster).await;
    for rank in ["rank-1", "rank-0"] {
        let pid = cluster.pid(rank);
        let (got, pause) = disturbed(&cluster, async || {
            // The second time there may be nothing left to move.
            let (status, started) = cluster.post("/api/eplb/rebalance", &json!({})).await;
            assert!(status == 202 || rank == "rank-0", "{started}");
            kill(pid);
        })
        .await;
        all_equal(got, &expected);
        cluster.until_healed().await;
        eprintln!("{rank} killed within a remap: longest pause of a stream {pause:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_that_fails_is_named_and_loses_no_stream() {
    if !has_gpu() {
        return;
    }
    let cluster = Cluster::up(&breakable()).await;
    let expected = undisturbed(&cluster).await;
    let before = cluster.actor("rank-1");
    let (got, pause) = disturbed(&cluster, async || break_device(&cluster, "rank-1").await).await;
    all_equal(got, &expected);
    cluster.until_healed().await;
    let after = cluster.actor("rank-1");
    assert_eq!(after["restarts"], 1, "{after}");
    assert_eq!(after["device"], before["device"], "on its device again");
    let death = after["last_death"].to_string();
    assert!(death.contains("CUDA_ERROR_"), "in the driver's words: {death}");
    eprintln!("the GPU of rank-1 failed: longest pause of a stream {pause:?}; {death}");
    // A rank without work notices as well.
    break_device(&cluster, "rank-0").await;
    cluster
        .until("rank-0 restarted", |cluster| (cluster.actor("rank-0")["restarts"] == 1).then_some(()))
        .await;
    cluster.until_healed().await;
    assert_eq!(undisturbed(&cluster).await, expected);
    assert_eq!(cluster.actor("rank-1")["restarts"], 1, "nobody else was restarted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_does_not_fit_says_what_it_asked_for() {
    if !has_gpu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let sections =
        [ALONE[0], ("engine", "kv_cache_memory_bytes = \"900GiB\""), ("supervision", "max_restarts = 1")];
    let (file, _) = write_config(dir.path(), &crate::rig::bundled(), &sections);
    let up = helio(&["up", file.to_str().unwrap(), "--detach"]);
    assert!(!up.status.success());
    let said = text(&up);
    assert!(said.contains("out of GPU memory") && said.contains("are free"), "{said}");
}
