//! What a file means on machines with and without GPUs.

use super::*;

fn found(gpus: u32) -> Option<Result<u32, String>> {
    Some(Ok(gpus))
}

/// Reads the text on a machine with so many GPUs.
fn on(gpus: u32, text: &str) -> Config {
    parse_with(text, found(gpus)).expect(text)
}

fn cuda(first: u32, gpus: u32) -> Devices {
    Devices::Cuda { first, gpus, ranks_per_gpu: 1 }
}

#[test]
fn auto_takes_the_gpus_that_are_there() {
    let config = on(2, "");
    assert_eq!(config.nodes[0].devices, cuda(0, 2));
    assert_eq!((config.parallel.dp, config.parallel.ep), (2, 2));
    let engine = &config.engine;
    assert_eq!((engine.block_size, engine.max_num_seqs, engine.max_num_batched_tokens), (64, 256, 8192));
    assert_eq!(config.kv_cache, KvCache::Utilization(900));
    let cuda = config.cuda.expect("GPUs");
    assert_eq!((cuda.all2all, cuda.graph_rows_max), (All2All::Peer, 256));
    assert_eq!((cuda.async_scheduling, cuda.ranks_per_gpu), (true, 1));
    assert!(cuda.kernel_cache.is_absolute() && cuda.kernel_cache.ends_with("kernels"));

    let config = on(2, "[devices]\ndevice = \"cpu\"\ncpu = 3");
    assert!(matches!(config.nodes[0].devices, Devices::Cpu { count: 3, .. }) && config.cuda.is_none());
    let engine = &config.engine;
    assert_eq!((engine.block_size, engine.max_num_seqs, engine.max_num_batched_tokens), (16, 64, 512));
}

#[test]
fn gpus_are_only_counted_where_it_matters() {
    let asks = |text: &str| validate::asks_for_gpus(&read::read(text).expect(text));
    assert!(asks("") && asks("[devices]\ndevice = \"cuda\""));
    assert!(!asks("[devices]\ndevice = \"cpu\""));
    assert!(!asks("[[nodes]]\ndevice = \"cpu\""));
    assert!(!asks("[devices]\ndevice = \"cuda\"\n[[nodes]]\nhost = \"b\""));
}

#[test]
fn a_head_by_itself_counts_only_what_the_file_leaves_open() {
    let open = |text: &str| validate::leaves_gpus_open(&read::read(text).expect(text));
    assert!(open("") && open("[devices]\ndevice = \"cuda\"") && open("[devices]\ncuda = 8"));
    assert!(!open("[devices]\ndevice = \"cuda\"\ncuda = 8") && !open("[devices]\ndevice = \"cpu\""));
    assert!(!open("[devices]\ndevice = \"cuda\"\n[[nodes]]\ndevices = 8"));
    assert!(open("[devices]\ndevice = \"cuda\"\n[[nodes]]\ndevices = 8\n[[nodes]]"));
}

#[test]
fn nodes_of_one_machine_take_its_gpus_one_after_the_other() {
    let nodes = |gpus, text: &str| on(gpus, text).nodes.iter().map(|n| n.devices).collect::<Vec<_>>();
    assert_eq!(nodes(4, "[devices]\ncuda = 1\n[[nodes]]\n[[nodes]]\ndevices = 2"), [cuda(0, 1), cuda(1, 2)]);
    let beyond = "[cluster]\ntoken_file = \"token\"\n[head]\nbind = \"10.0.0.1:1\"\n";
    let text = format!("{beyond}[[nodes]]\n[[nodes]]\nhost = \"b\"\ndevices = 8");
    assert_eq!(nodes(4, &text), [cuda(0, 4), cuda(0, 8)]);
    let shared = on(1, "[devices]\nranks_per_gpu = 4");
    assert_eq!((shared.parallel.ep, shared.nodes[0].devices.count()), (4, 4));

    assert_eq!(cuda(0, 2).args(), ["--devices", "cuda=2"]);
    assert_eq!(cuda(1, 2).args(), ["--devices", "cuda=1-2"]);
    assert_eq!(shared.nodes[0].devices.args(), ["--devices", "cuda=1", "--ranks-per-gpu", "4"]);
}

#[test]
fn missing_gpus_are_named() {
    refused(
        "[devices]\ndevice = \"cuda\"\n",
        "
c.toml:2:10: no GPU of this machine can be used: there is no NVIDIA driver
  |
2 | device = \"cuda\"
  |          ^^^^^^ CUDA needs a driver for CUDA 13.0 and an H100 or H200; write device = \"cpu\" to do without",
    );
    refused_with(
        "[devices]\ncuda = 4\n",
        found(2),
        "
c.toml:2:8: 4 GPUs of this machine are wanted, and it shows 2
  |
2 | cuda = 4
  |        ^ lower the number, or see whether CUDA_VISIBLE_DEVICES hides some",
    );
    refused_with(
        "[devices]\ncuda = 0\n",
        found(2),
        "
c.toml:2:8: a node needs at least one device
  |
2 | cuda = 0
  |        ^ write 1 or more
c.toml: `dp` must be at least 1
  = write dp = 1 or more
c.toml: `ep` must be at least 1
  = write ep = 1 or more",
    );
    refused_with(
        "[[nodes]]\nname = \"a\"\n[[nodes]]\nname = \"b\"\ndevices = 1\n",
        found(2),
        "
c.toml:1:1: several nodes of this machine share its GPUs
  |
1 | [[nodes]]
  | ^^^^^^^^^ write how many as `devices` of the node, or as `cuda` in [devices]",
    );
    refused_with(
        "[cluster]\ntoken_file = \"token\"\n[head]\nbind = \"10.0.0.1:1\"\n[[nodes]]\nhost = \"b\"\n",
        found(2),
        "
c.toml:5:1: the GPUs of b cannot be counted from here
  |
5 | [[nodes]]
  | ^^^^^^^^^ write how many as `devices` of the node, or as `cuda` in [devices]",
    );
    refused_with(
        "[parallel]\ndp = 4\n",
        found(2),
        "
c.toml:2:6: dp = 4 and ep = 4 need 4 devices, the nodes have 2
  |
2 | dp = 4
  |      ^ lower dp and ep, or write device = \"cpu\" in [devices]",
    );
}

#[test]
fn all_ranks_compute_on_the_same_kind() {
    refused_with(
        "[[nodes]]\ndevices = 1\n[[nodes]]\ndevice = \"cpu\"\n",
        found(2),
        "
c.toml:4:10: some nodes have CPU devices and some have GPUs, and the ranks of a group need the same
  |
4 | device = \"cpu\"
  |          ^^^^^ write one `device` in [devices] for all",
    );
}

#[test]
fn what_gpus_cannot_do_is_refused() {
    refused_with(
        "[engine]\nblock_size = 16\n",
        found(1),
        "
c.toml:2:14: `block_size` = 16 is not possible on CUDA devices
  |
2 | block_size = 16
  |              ^^ write 64, or leave it out",
    );
    refused_with(
        "[devices]\nranks_per_gpu = 0\n[parallel]\ndp = 1\nep = 1",
        found(1),
        "
c.toml:2:17: `ranks_per_gpu` must be at least 1
  |
2 | ranks_per_gpu = 0
  |                 ^ leave it out for one
c.toml:4:6: dp = 1 and ep = 1 need 1 devices, the nodes have 0
  |
4 | dp = 1
  |      ^ lower dp and ep, or write device = \"cpu\" in [devices]",
    );
    refused_with(
        "[engine]\ngpu_memory_utilization = 90\n",
        found(1),
        "
c.toml:2:26: `gpu_memory_utilization` = 90 is no share of a GPU's memory
  |
2 | gpu_memory_utilization = 90
  |                          ^^ write a number above 0, up to 1",
    );
    refused_with(
        "[engine]\ngpu_memory_utilization = 0.5\nkv_cache_memory_bytes = \"1GiB\"\n",
        found(1),
        "
c.toml:3:25: `kv_cache_memory_bytes` and `gpu_memory_utilization` are both set
  |
3 | kv_cache_memory_bytes = \"1GiB\"
  |                         ^^^^^^ keep one of them",
    );
    refused_with(
        "[engine]\nenforce_eager = true\nmax_cudagraph_capture_size = 8\n",
        found(1),
        "
c.toml:3:30: `enforce_eager` and `max_cudagraph_capture_size` contradict each other
  |
3 | max_cudagraph_capture_size = 8
  |                              ^ keep one of them",
    );
}

#[test]
fn what_is_for_gpus_is_refused_on_cpus() {
    refused(
        "[devices]\ndevice = \"cpu\"\n[engine]\ngpu_memory_utilization = 0.9\n",
        "
c.toml:4:26: `gpu_memory_utilization` is for GPUs, and the ranks compute on CPU devices
  |
4 | gpu_memory_utilization = 0.9
  |                          ^^^ leave it out, or write device = \"cuda\" in [devices]",
    );
    refused(
        "[engine]\nasync_scheduling = true\n",
        "
c.toml:2:20: `async_scheduling` is for GPUs, and none can be used: there is no NVIDIA driver
  |
2 | async_scheduling = true
  |                    ^^^^ leave it out, or write device = \"cuda\" in [devices]",
    );
    for asked in [
        "devices]\nranks_per_gpu = 2",
        "parallel]\nall2all_backend = \"peer\"",
        "engine]\nmax_cudagraph_capture_size = 8",
    ] {
        let why = parse(&format!("[{asked}")).expect_err(asked);
        assert!(why.contains("is for GPUs"), "{why}");
    }
    parse("[engine]\nenforce_eager = true\nasync_scheduling = false").expect("that is how CPU devices work");
}

#[test]
fn backends_of_vllm_are_known_but_not_here() {
    refused_with(
        "[parallel]\nall2all_backend = \"deepep_low_latency\"\n",
        found(1),
        "
c.toml:2:19: unknown value `deepep_low_latency`, expected `peer` or `nccl`
  |
2 | all2all_backend = \"deepep_low_latency\"
  |                   ^^^^^^^^^^^^^^^^^^^^ vLLM's backends are not here: write \"peer\" (NVLink, our own kernels) or \"nccl\"",
    );
    refused_with(
        "[devices]\ndevice = \"cud\"\n",
        found(1),
        "
c.toml:2:10: unknown value `cud`, expected one of `auto`, `cpu`, `cuda`
  |
2 | device = \"cud\"
  |          ^^^^^ did you mean \"cuda\"?",
    );
}

#[test]
fn graphs_can_be_left_out() {
    let rows = |keys: &str| on(1, &format!("[engine]\n{keys}")).cuda.expect("GPUs").graph_rows_max;
    assert_eq!(rows("enforce_eager = true"), 0);
    assert_eq!(rows("max_cudagraph_capture_size = 0"), 0);
    assert_eq!(rows("max_cudagraph_capture_size = 32"), 32);
    let config = on(1, "[engine]\nasync_scheduling = false\ngpu_memory_utilization = 0.5");
    assert!(!config.cuda.expect("GPUs").async_scheduling);
    assert_eq!(config.kv_cache, KvCache::Utilization(500));
}

/// A head that comes back reads what `helio up` wrote and asks no GPU.
#[test]
fn the_effective_file_says_what_was_found() {
    let dir = model_dir();
    for text in [
        "[devices]\nlibrary_dirs = [\"lib\", \"/opt/lib\"]\nkernel_cache = \"k\"",
        "[devices]\ncuda = 1\n[[nodes]]\n[[nodes]]\ndevices = 2\ndevice = \"cuda\"",
    ] {
        let config = Config::parse(text, "c.toml", dir.path(), |_| found(3)).expect(text);
        let again = Config::parse(&config.effective, "e.toml", Path::new("/nowhere"), |_| None);
        let again = again.expect(&config.effective);
        assert_eq!(format!("{again:?}"), format!("{config:?}"));
        assert_eq!(again.nodes.iter().map(|n| n.devices.count()).sum::<u32>(), 3);
        let cuda = again.cuda.expect("GPUs");
        assert!(cuda.library_dirs.iter().all(|path| path.is_absolute()));
    }
}
