//! Ray's `LLMConfig` with vLLM's engine arguments -> what each replica runs.
//!
//! What the document leaves out is as in cluster.toml. The model's shape comes in as a fact.

use std::path::{Path, PathBuf};

use heliostat_engine::config::ModelConfig;
use heliostat_engine::ep::Topology;
use heliostat_engine::eplb::{PlacementStrategy, Policy, incremental};
use heliostat_runtime::spec::{LabelRule, LabelSelector};
use serde_json::{Map, Value as Json};

use super::fields::{Fields, Problems, Refused, no};
use super::settings::settings;
use super::{Builder, Facts};
use crate::deployment::{Duty, ModelDeployment};
use crate::rank::{EngineArgs, KvCacheArgs};

/// The label of nodes that `accelerator_type` asks for.
pub(super) const ACCELERATOR_LABEL: &str = "accelerator-type";

const LLM_REFUSED: &[Refused] = &[
    no("llm_engine", &["\"vLLM\""], "Heliostat's own engine takes vLLM's arguments"),
    no("accelerator_config", &[], "[devices] in cluster.toml says what nodes offer"),
    no("lora_config", &[], ""),
    no("server_cls", &[], ""),
    no("runtime_env", &["{}"], ""),
    no("experimental_configs", &["{}"], ""),
    no("log_engine_metrics", &["true", "false"], ""),
    no("callback_config", &["{}"], ""),
];

const ENGINE_REFUSED: &[Refused] = &[
    no("tensor_parallel_size", &["1"], "attention is spread over data-parallel ranks"),
    no("pipeline_parallel_size", &["1"], ""),
    no("data_parallel_size_local", &[], "ranks go to where there are devices"),
    no("data_parallel_backend", &["\"ray\"", "\"mp\""], ""),
    no("data_parallel_rpc_port", &[], ""),
    no("data_parallel_address", &[], ""),
    no("distributed_executor_backend", &["\"ray\"", "\"mp\""], ""),
    no("enable_dbo", &["false"], ""),
    no("speculative_config", &[], ""),
    no("enable_lora", &["false"], ""),
    no("enable_chunked_prefill", &["true"], "prefill is always cut into chunks"),
    no("seed", &["0"], "requests carry their seeds"),
    no("dtype", &["\"auto\"", "\"bfloat16\""], "the checkpoint says it"),
    no("kv_cache_dtype", &["\"auto\""], ""),
    no("quantization", &["\"fp8\""], "the checkpoint says it"),
    no("load_format", &["\"auto\"", "\"safetensors\""], ""),
    no("tokenizer", &[], "the checkpoint has it"),
    no("tokenizer_mode", &["\"auto\""], ""),
    no("trust_remote_code", &["true", "false"], "no code of a checkpoint is ever run"),
    no("revision", &[], "a checkpoint is a directory"),
    no("swap_space", &["0"], ""),
    no("cpu_offload_gb", &["0"], ""),
    no("disable_log_stats", &["true", "false"], ""),
    no("disable_log_requests", &["true", "false"], ""),
    no("scheduling_policy", &["\"fcfs\"", "\"priority\""], ""),
];

/// One LLMConfig: the name of its deployment, what a replica runs, and the options of the deployment.
pub(super) fn deployment(
    value: Json,
    (path, builder, duty): (&str, Builder, Duty),
    facts: &Facts<'_>,
    problems: &Problems,
) -> (String, ModelDeployment, Json) {
    let mut llm = Fields::open(path, value, problems);
    let mut model = ModelDeployment { duty, ..facts.base.clone() };
    let mut loading = llm.object("model_loading_config").unwrap_or_else(|| {
        llm.wrong("model_loading_config", "it is missing: {model_id: NAME, model_source: DIRECTORY}");
        Fields::open(llm.at("model_loading_config"), Json::Null, problems)
    });
    let id: Option<String> = loading.take("model_id");
    let source: Option<Json> = loading.raw("model_source");
    if let Some(source) = &source
        && !source.is_string()
    {
        loading.wrong("model_source", "it must be a directory on every node: buckets are not supported");
    }
    loading.refuse(&[no("tokenizer_source", &[], "the checkpoint has its tokenizer")]);
    if id.is_none() {
        loading.wrong("model_id", "it is missing");
    }
    let id = id.unwrap_or_default();
    let source = source.as_ref().and_then(Json::as_str).map(str::to_owned);
    model.model = directory(source.as_deref().unwrap_or(&id), &id, facts);
    model.model_name.clone_from(&id);
    let shape = (facts.look)(&model.model);
    if let Err(why) = &shape {
        let key = if source.is_some() { "model_source" } else { "model_id" };
        loading.wrong(key, format!("{why}; name a checkpoint directory that is there on every node"));
    }
    loading.finish();
    let is_base = model.model == facts.base.model;
    let engine = llm
        .object("engine_kwargs")
        .unwrap_or_else(|| Fields::open(llm.at("engine_kwargs"), Json::Null, problems));
    if !is_base {
        model.initial_layout = None;
    }
    engine_kwargs(engine, &mut model, (shape.ok(), builder), facts.num_nodes);
    if let Some(kind) = llm.take::<String>("accelerator_type") {
        let rule: Result<LabelRule, _> = kind.parse();
        match rule {
            Ok(rule) => model.selector = LabelSelector::default().and(ACCELERATOR_LABEL, rule),
            Err(why) => llm.wrong("accelerator_type", why.to_string()),
        }
    }
    if let Some(mut group) = llm.object("placement_group_config") {
        match group.take::<String>("strategy").as_deref() {
            None | Some("PACK") => model.spread = false,
            Some("SPREAD") => model.spread = true,
            Some(other) => {
                group.wrong("strategy", format!("{other:?} is not supported; PACK and SPREAD are"))
            }
        }
        group.refuse(&[
            no("bundle_per_worker", &["{\"GPU\":1}", "{\"CPU\":1}"], "a rank takes one device"),
            no("bundles", &[], "a replica takes one device per rank"),
        ]);
        group.finish();
    }
    let options = llm.raw("deployment_config").unwrap_or(Json::Object(Map::new()));
    llm.refuse(LLM_REFUSED);
    llm.finish();
    let name = options
        .get("name")
        .and_then(Json::as_str)
        .map_or_else(|| builder.deployment_name(duty, &id), str::to_owned);
    (name, model, options)
}

/// Settings of a deployment: its `deployment_config`, with the fields of the document's `deployments` entry above it.
pub(super) fn options(
    under: Json,
    over: Option<Json>,
    path: &str,
    problems: &Problems,
) -> crate::serve::target::Settings {
    let mut merged = match under {
        Json::Object(object) => object,
        other => {
            problems.add(path, format!("it must be an object, not {other}"));
            Map::new()
        }
    };
    if let Some(Json::Object(over)) = over {
        // One way to say the number takes the place of the other.
        if over.contains_key("num_replicas") && !over.contains_key("autoscaling_config") {
            merged.shift_remove("autoscaling_config");
        }
        if over.contains_key("autoscaling_config") && !over.contains_key("num_replicas") {
            merged.shift_remove("num_replicas");
        }
        merged.extend(over);
    }
    merged.shift_remove("name");
    settings(Fields::open(path, Json::Object(merged), problems))
}

/// Where a checkpoint lies. A relative path starts at cluster.toml; the name of cluster.toml's model means its directory.
fn directory(source: &str, id: &str, facts: &Facts<'_>) -> PathBuf {
    if source == id && id == facts.base.model_name {
        return facts.base.model.clone();
    }
    facts.dir.join(Path::new(source))
}

fn engine_kwargs(
    mut kwargs: Fields<'_>,
    model: &mut ModelDeployment,
    (shape, builder): (Option<ModelConfig>, Builder),
    num_nodes: usize,
) {
    let context = shape
        .as_ref()
        .map_or(u32::MAX, |shape| u32::try_from(shape.max_position_embeddings).unwrap_or(u32::MAX));
    let engine = &mut model.engine;
    engine.max_model_len = kwargs.positive("max_model_len").unwrap_or(engine.max_model_len.min(context));
    if engine.max_model_len > context {
        kwargs.wrong(
            "max_model_len",
            format!("{} is beyond the model's {context} positions", engine.max_model_len),
        );
    }
    let bounds = [
        ("max_num_seqs", &mut engine.max_num_seqs),
        ("max_num_batched_tokens", &mut engine.max_num_batched_tokens),
    ];
    for (key, bound) in bounds {
        *bound = kwargs.positive(key).unwrap_or(*bound);
    }
    if let Some(block_size) = kwargs.positive("block_size") {
        if matches!(engine.kv_cache, KvCacheArgs::Utilization(_)) && block_size != engine.block_size {
            kwargs.wrong("block_size", format!("{block_size} is not possible on CUDA devices; leave it out"));
        }
        engine.block_size = block_size;
    }
    if engine.max_num_batched_tokens < engine.max_num_seqs {
        let (tokens, seqs) = (engine.max_num_batched_tokens, engine.max_num_seqs);
        kwargs.wrong("max_num_batched_tokens", format!("{tokens} is below max_num_seqs, {seqs}"));
    }
    engine.enable_prefix_caching =
        kwargs.take("enable_prefix_caching").unwrap_or(engine.enable_prefix_caching);
    kv_cache(&mut kwargs, engine);
    if let Some(wanted) = kwargs.take::<bool>("async_scheduling") {
        engine.cuda.async_scheduling = wanted;
    }
    if kwargs.take::<bool>("enforce_eager") == Some(true) {
        engine.cuda.graph_rows_max = 0;
    }
    if let Some(names) = kwargs.raw("served_model_name") {
        match names.as_str() {
            Some(name) => model.model_name = name.to_owned(),
            None => kwargs.wrong("served_model_name", "it must be one name"),
        }
    }
    kv_transfer(&mut kwargs, model.duty);
    parallel(&mut kwargs, model, builder);
    eplb(&mut kwargs, model, shape.as_ref(), num_nodes);
    kwargs.refuse(ENGINE_REFUSED);
    kwargs.finish();
}

/// How blocks go from prefill to decode: there is one way, which vLLM's configurations may name.
fn kv_transfer(kwargs: &mut Fields<'_>, duty: Duty) {
    let Some(mut config) = kwargs.object("kv_transfer_config") else { return };
    let (role, other) = match duty {
        Duty::Prefill => ("kv_producer", "kv_consumer"),
        Duty::Decode => ("kv_consumer", "kv_producer"),
        Duty::Whole => {
            kwargs.wrong(
                "kv_transfer_config",
                "blocks move between the two of ray.serve.llm:build_pd_openai_app only",
            );
            return;
        }
    };
    if let Some(connector) = config.take::<String>("kv_connector")
        && connector != "NixlConnector"
    {
        config.wrong(
            "kv_connector",
            format!("{connector:?} is not supported: blocks are read by the rank that goes on, as with \"NixlConnector\""),
        );
    }
    match config.take::<String>("kv_role").as_deref() {
        Some(named) if named == other => {
            config.wrong("kv_role", format!("here it is {role:?} or \"kv_both\""))
        }
        Some(named) if named != role && named != "kv_both" => {
            config.wrong("kv_role", format!("{named:?} is none of {role:?} and \"kv_both\""));
        }
        Some(_) | None => {}
    }
    config.refuse(&[
        no("engine_id", &[], "ranks have names of their own"),
        no("kv_connector_extra_config", &["{}"], ""),
        no("kv_buffer_device", &["\"cuda\"", "\"cpu\""], ""),
        no("kv_load_failure_policy", &["\"recompute\""], "what does not come is always computed"),
    ]);
    config.finish();
}

/// Room for KV blocks.
fn kv_cache(kwargs: &mut Fields<'_>, engine: &mut EngineArgs) {
    if let Some(blocks) = kwargs.positive("num_gpu_blocks_override") {
        let (tokens, longest) = (u64::from(blocks) * u64::from(engine.block_size), engine.max_model_len);
        if tokens < u64::from(longest) {
            let why = format!("{blocks} blocks hold {tokens} tokens, and one sequence may have {longest}");
            kwargs.wrong("num_gpu_blocks_override", why);
        }
        engine.kv_cache = KvCacheArgs::Blocks(blocks);
    }
    if let Some(bytes) = kwargs.take("kv_cache_memory_bytes") {
        engine.kv_cache = KvCacheArgs::Bytes(bytes);
    }
    if let Some(share) = kwargs.take::<f64>("gpu_memory_utilization") {
        match engine.kv_cache {
            KvCacheArgs::Utilization(_) if share > 0.0 && share <= 1.0 => {
                engine.kv_cache = KvCacheArgs::Utilization(((share * 1000.0).round() as u32).max(1));
            }
            KvCacheArgs::Utilization(_) => {
                kwargs.wrong("gpu_memory_utilization", "it must be above 0 and at most 1")
            }
            KvCacheArgs::Blocks(_) | KvCacheArgs::Bytes(_) => kwargs.wrong(
                "gpu_memory_utilization",
                "ranks do not compute on GPUs here; use kv_cache_memory_bytes",
            ),
        }
    }
}

/// The shape of a replica.
fn parallel(kwargs: &mut Fields<'_>, model: &mut ModelDeployment, builder: Builder) {
    let written = kwargs.positive("data_parallel_size");
    // Ray's own builder makes one rank, unless something else is written.
    let dp = written.unwrap_or(match builder {
        Builder::OpenAi | Builder::DataParallel | Builder::PrefillDecode => 1,
        Builder::Own => model.topology.dp as u32,
    });
    let ep_enabled = kwargs.take::<bool>("enable_expert_parallel");
    let ep = match (ep_enabled, kwargs.positive("expert_parallel_size")) {
        (Some(false), None) if dp > 1 => {
            kwargs.wrong(
                "enable_expert_parallel",
                format!(
                    "false with {dp} data-parallel ranks is not supported: every rank would hold all experts"
                ),
            );
            dp
        }
        (Some(false), _) => 1,
        (_, Some(ep)) => ep,
        (_, None) => dp,
    };
    if let Some(backend) = kwargs.take::<String>("all2all_backend")
        && backend != "peer"
        && backend != "allgather_reducescatter"
    {
        kwargs.wrong(
            "all2all_backend",
            format!(
                "{backend:?} is not supported; leave it out: rows travel by shared memory, TCP or peer memory"
            ),
        );
    }
    match Topology::new(dp as usize, ep as usize, true) {
        Ok(topology) => model.topology = topology,
        Err(why) => kwargs.wrong("data_parallel_size", why.to_string()),
    }
}

/// Balancing of the experts, under vLLM's names.
fn eplb(kwargs: &mut Fields<'_>, model: &mut ModelDeployment, shape: Option<&ModelConfig>, num_nodes: usize) {
    let ep = model.topology.ep as u32;
    model.eplb.enabled = kwargs.take("enable_eplb").unwrap_or(model.eplb.enabled);
    let experts = shape.map_or(ep, |shape| u32::try_from(shape.moe.num_experts).unwrap_or(u32::MAX));
    let mut redundant = default_redundancy(experts, ep, model.eplb.enabled);
    if let Some(path) = shape {
        model.eplb.fit(path);
    }
    if let Some(mut config) = kwargs.object("eplb_config") {
        redundant = config.take("num_redundant_experts").unwrap_or(redundant);
        let slots = experts.saturating_add(redundant);
        if !slots.is_multiple_of(ep) {
            let why =
                format!("{experts} experts + {redundant} = {slots} slots are not divisible by {ep} ranks");
            config.wrong("num_redundant_experts", why);
        }
        live(&mut config, model, shape);
        if let Some(strategy) = config.take::<PlacementStrategy>("expert_placement_strategy") {
            model.strategy = strategy;
        }
        config.refuse(&[
            no("use_async", &["true"], "weights always move in the background"),
            no("communicator", &[], ""),
        ]);
        config.finish();
    }
    if let Some(strategy) = kwargs.take::<PlacementStrategy>("expert_placement_strategy") {
        model.strategy = strategy;
    }
    let slots = experts.saturating_add(redundant);
    // Hierarchical balancing wants whole ranks and slots per node.
    let even = ep.is_multiple_of(num_nodes as u32) && slots.is_multiple_of(num_nodes as u32);
    if let Policy::Deepseek { num_nodes: nodes, .. } = &mut model.eplb.policy {
        *nodes = if even { num_nodes } else { 1 };
    }
    model.redundant_experts = redundant;
}

/// What changes while the ranks serve.
fn live(config: &mut Fields<'_>, model: &mut ModelDeployment, shape: Option<&ModelConfig>) {
    for (key, bound) in
        [("window_size", &mut model.eplb.window_size), ("step_interval", &mut model.eplb.step_interval)]
    {
        *bound = config.positive(key).map_or(*bound, u64::from);
    }
    model.eplb.log_balancedness = config.take("log_balancedness").unwrap_or(model.eplb.log_balancedness);
    match config.take::<String>("policy").as_deref() {
        None => {}
        Some("default" | "deepseek") => {
            let num_groups = shape.map_or(1, |shape| shape.moe.router.n_group);
            model.eplb.policy = Policy::Deepseek { num_groups, num_nodes: 1 };
        }
        Some("incremental") => model.eplb.policy = Policy::Incremental(incremental::Search::default()),
        Some(other) => {
            config.wrong("policy", format!("{other:?} is none of \"deepseek\" and \"incremental\""))
        }
    }
}

/// Slots beyond one per expert where nothing is said: about one per rank.
pub fn default_redundancy(experts: u32, ep: u32, balances: bool) -> u32 {
    let fill = (ep - experts % ep) % ep;
    if balances && ep > 1 { fill + ep } else { fill }
}

/// Applies a `user_config`: settings of EPLB, which change without a restart.
pub(super) fn user_config(mut config: Fields<'_>, model: &mut ModelDeployment, shape: Option<&ModelConfig>) {
    model.eplb.enabled = config.take("enable_eplb").unwrap_or(model.eplb.enabled);
    if let Some(mut eplb) = config.object("eplb_config") {
        live(&mut eplb, model, shape);
        eplb.finish();
    }
    config.finish();
}
