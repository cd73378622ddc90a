//! Documents of Ray and of vLLM, and what is said of those that ask for too much.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use heliostat_engine::config::ModelConfig;
use heliostat_engine::eplb::Policy;
use heliostat_runtime::package::{Digest, PackageId};
use heliostat_runtime::spec::{LabelSelector, Quantity, Resources};
use serde_json::json;

use super::*;
use crate::rank::KvCacheArgs;
use crate::serve::core::{ProxyLocation, test_model};
use crate::serve::target::{Backpressure, Rollout, Scale};

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/sundial-20m")
}

fn read_with(
    document: Json,
    look: &dyn Fn(&Path) -> Result<ModelConfig, String>,
) -> Result<Vec<AppTarget>, Vec<String>> {
    read_whole(document, look).map(|document| document.apps)
}

fn read_whole(
    document: Json,
    look: &dyn Fn(&Path) -> Result<ModelConfig, String>,
) -> Result<Document, Vec<String>> {
    let mut base = test_model("sundial-20m", 64);
    base.model = bundled();
    base.model_name = "sundial-20m".into();
    let facts = Facts {
        base: &base,
        dir: Path::new("/models"),
        http: SocketAddr::from((Ipv4Addr::LOCALHOST, 8000)),
        num_nodes: 1,
        packages: &packages(),
        look,
    };
    read(&document.to_string(), &facts)
}

fn read_document(document: Json) -> Result<Vec<AppTarget>, Vec<String>> {
    let shape = ModelConfig::from_dir(&bundled()).unwrap();
    read_with(document, &move |_| Ok(shape.clone()))
}

/// A document with one model, and what is added to its parts.
fn document(engine_kwargs: Json, deployment_config: Json) -> Json {
    json!({ "applications": [{
        "name": "chat",
        "route_prefix": "/chat",
        "import_path": "ray.serve.llm:build_dp_openai_app",
        "args": { "llm_config": {
            "model_loading_config": { "model_id": "sundial-20m" },
            "engine_kwargs": engine_kwargs,
            "deployment_config": deployment_config,
        } },
    }] })
}

/// Programs that the cluster has: one with a version, one with two, of which one was replaced.
fn packages() -> Vec<PackageStatus> {
    let package = |(name, version, content, replaced): (&str, &str, u8, bool)| PackageStatus {
        id: PackageId { name: name.into(), version: version.into(), sha256: Digest([content; 32]) },
        bytes: 1,
        actors: Vec::new(),
        nodes: Vec::new(),
        replaced,
    };
    let all = [
        ("greeter", "1", 1, true),
        ("greeter", "1", 2, false),
        ("many", "1", 3, false),
        ("many", "2", 4, false),
    ];
    all.into_iter().map(package).collect()
}

fn model_of(apps: &[AppTarget]) -> &ModelDeployment {
    apps[0].deployments[0].workload.model().unwrap()
}

/// A document with an actor of a user, and what is added to its deployment.
fn of_actor(import_path: &str, deployment: Json) -> Json {
    json!({ "applications": [{
        "name": "hello", "route_prefix": "/hello", "import_path": import_path, "args": { "word": "hi" },
        "deployments": [deployment],
    }] })
}

fn one(document: Json) -> DeploymentTarget {
    read_document(document).unwrap().remove(0).deployments.remove(0)
}

fn problems(document: Json) -> Vec<String> {
    read_document(document).unwrap_err()
}

#[test]
fn rays_wide_ep_document_is_understood() {
    let made = one(document(
        json!({
            "data_parallel_size": 4, "enable_expert_parallel": true, "enable_eplb": true,
            "eplb_config": { "window_size": 7, "step_interval": 9, "num_redundant_experts": 8, "policy": "incremental" },
            "max_num_seqs": 3, "max_num_batched_tokens": 32, "max_model_len": 48, "block_size": 8,
            "enable_prefix_caching": false, "kv_cache_memory_bytes": 4096, "enable_dbo": false, "seed": 0,
            "tensor_parallel_size": 1, "trust_remote_code": true,
        }),
        json!({ "num_replicas": 2, "max_ongoing_requests": 10, "max_queued_requests": 5, "graceful_shutdown_timeout_s": 3 }),
    ));
    assert_eq!(made.name, "DPServer:sundial-20m");
    let model = made.workload.model().unwrap();
    assert_eq!((model.topology.dp, model.topology.ep, model.redundant_experts), (4, 4, 8));
    assert_eq!((model.eplb.window_size, model.eplb.step_interval), (7, 9));
    assert!(matches!(model.eplb.policy, Policy::Incremental(_)));
    let engine = &model.engine;
    assert_eq!((engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_model_len), (3, 32, 48));
    assert_eq!((engine.block_size, engine.enable_prefix_caching), (8, false));
    assert_eq!(engine.kv_cache, KvCacheArgs::Bytes(4096));
    assert_eq!(made.settings.scale, Scale::Fixed(2));
    assert_eq!((made.settings.max_ongoing_requests, made.settings.max_queued_requests), (Some(10), Some(5)));
    assert_eq!(made.settings.graceful_shutdown_timeout, Duration::from_secs(3));
}

#[test]
fn every_mistake_is_named_with_its_place() {
    let mut wrong = document(
        json!({ "data_parallel_size": 2, "enable_expert_parallel": false, "tensor_parallel_size": 8, "spec": 1 }),
        json!({ "num_replicas": 0, "gang_scheduling_config": { "gang_size": 4 } }),
    );
    wrong["grpc_options"] = json!({ "port": 9001 });
    wrong["http_options"] = json!({ "host": "0.0.0.0", "port": 8000 });
    let kwargs = "applications.0.args.llm_config.engine_kwargs";
    let options = "applications.0.args.llm_config.deployment_config";
    let said = problems(wrong);
    for start in [
        "grpc_options: ".to_owned(),
        "http_options.host: HTTP is served at 127.0.0.1, not at 0.0.0.0".to_owned(),
        format!("{kwargs}.enable_expert_parallel: "),
        format!("{kwargs}.tensor_parallel_size: 8 is not supported"),
        format!("{kwargs}.spec: there is no such field"),
        format!("{options}.num_replicas: 0 is neither"),
        format!("{options}.gang_scheduling_config: "),
    ] {
        assert!(said.iter().any(|line| line.starts_with(&start)), "{start}\n{}", said.join("\n"));
    }
    assert_eq!(said.len(), 7, "{}", said.join("\n"));
}

/// Ray's document of prefill and decode apart; `decode` is added to the second LLMConfig's engine arguments.
fn of_pair(model_id: &str, decode: Json) -> Json {
    let llm = |id: &str, role: &str, more: Json| {
        let mut kwargs =
            json!({ "kv_transfer_config": { "kv_connector": "NixlConnector", "kv_role": role } });
        kwargs.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        json!({
            "model_loading_config": { "model_id": id, "model_source": "sundial-20m" },
            "engine_kwargs": kwargs,
        })
    };
    json!({ "applications": [{ "import_path": "ray.serve.llm:build_pd_openai_app", "args": {
        "prefill_config": llm("a", "kv_both", json!({ "max_num_batched_tokens": 256 })),
        "decode_config": llm(model_id, "kv_consumer", decode),
    } }] })
}

#[test]
fn prefill_and_decode_are_two_deployments_of_one_model() {
    let apps = read_document(of_pair("a", json!({ "data_parallel_size": 2 }))).unwrap();
    let all: Vec<_> =
        apps[0].deployments.iter().map(|it| (it.name.as_str(), it.workload.model().unwrap())).collect();
    let [(prefill, one), (decode, two)] = all.as_slice() else { panic!("{all:?}") };
    assert_eq!((*prefill, *decode), ("PDPrefillServer:a", "PDDecodeServer:a"));
    assert_eq!((one.duty, one.topology.dp, one.engine.max_num_batched_tokens), (Duty::Prefill, 1, 256));
    assert_eq!((two.duty, two.topology.dp), (Duty::Decode, 2));

    let said = problems(of_pair(
        "b",
        json!({
            "enable_prefix_caching": false, "max_model_len": 32,
            "kv_transfer_config": { "kv_connector": "LMCacheConnectorV1", "kv_role": "kv_producer" },
        }),
    ));
    let at = "applications.0.args.decode_config";
    for start in [
        format!(
            "{at}.engine_kwargs.kv_transfer_config.kv_connector: \"LMCacheConnectorV1\" is not supported"
        ),
        format!("{at}.engine_kwargs.kv_transfer_config.kv_role: here it is \"kv_consumer\""),
        format!("{at}.model_loading_config.model_id: it is b, and a in prefill_config"),
        format!("{at}.engine_kwargs.max_model_len: it is 32"),
        format!("{at}.engine_kwargs.enable_prefix_caching: prompts go from prefill to decode"),
    ] {
        assert!(said.iter().any(|line| line.starts_with(&start)), "{start}\n{}", said.join("\n"));
    }
    let mut half = of_pair("a", json!({}));
    half["applications"][0]["args"].as_object_mut().unwrap().shift_remove("decode_config");
    assert!(problems(half)[0].starts_with(&format!("{at}: it is missing")));
    let alone = json!({ "kv_transfer_config": { "kv_connector": "NixlConnector" } });
    assert!(problems(document(alone, json!({})))[0].contains("build_pd_openai_app only"));
}

#[test]
fn builders_are_rays_and_ours_and_no_others() {
    let with = |import_path: &str, args: Json| {
        read_document(json!({ "applications": [{ "import_path": import_path, "args": args }] }))
    };
    let llm = |id: &str| json!({ "model_loading_config": { "model_id": id, "model_source": "sundial-20m" } });
    let apps =
        with("ray.serve.llm:build_openai_app", json!({ "llm_configs": [llm("org/a.b"), llm("c")] })).unwrap();
    assert_eq!((apps[0].name.as_str(), apps[0].route_prefix.as_deref()), ("default", Some("/")));
    let names: Vec<&str> = apps[0].deployments.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["LLMServer:org--a_b", "LLMServer:c"]);
    assert_eq!(model_of(&apps).topology.dp, 1);
    assert_eq!(model_of(&apps).model, Path::new("/models/sundial-20m"));
    let own = with("heliostat:build_openai_app", json!({ "llm_configs": [llm("a")] })).unwrap();
    assert_eq!(model_of(&own).topology.dp, 2, "as in cluster.toml");
    let said = with("my.app:main", json!({})).unwrap_err();
    assert!(said[0].contains("builders are ray.serve.llm:build_openai_app"), "{said:?}");
    let said =
        with("ray.serve.llm:build_openai_app", json!({ "llm_configs": [llm("a"), llm("a")] })).unwrap_err();
    assert!(
        said[0].starts_with("applications.0.args.llm_configs.1: model \"a\" is listed twice"),
        "{said:?}"
    );
}

#[test]
fn deployments_of_the_document_override_by_name() {
    let mut it = document(json!({}), json!({ "autoscaling_config": { "max_replicas": 3 } }));
    it["applications"][0]["deployments"] = json!([{ "name": "DPServer:sundial-20m", "num_replicas": 4 }]);
    assert_eq!(one(it.clone()).settings.scale, Scale::Fixed(4));
    it["applications"][0]["deployments"] = json!([{ "name": "other", "num_replicas": 4 }]);
    let said = problems(it);
    assert_eq!(said.len(), 1);
    assert!(
        said[0].starts_with("applications.0.deployments.0.name: no deployment is named \"other\""),
        "{said:?}"
    );
}

#[test]
fn user_config_sets_what_changes_live() {
    let made = one(document(
        json!({}),
        json!({ "user_config": { "enable_eplb": false, "eplb_config": { "step_interval": 5 } } }),
    ));
    let eplb = &made.workload.model().unwrap().eplb;
    assert_eq!((eplb.enabled, eplb.step_interval), (false, 5));
    let said = problems(document(json!({}), json!({ "user_config": { "temperature": 1 } })));
    assert!(said[0].contains("user_config.temperature: there is no such field"), "{said:?}");
}

#[test]
fn scaling_and_roll_outs_have_rays_defaults() {
    let auto = |config: Json| one(document(json!({}), config)).settings;
    let Scale::Auto(made) = auto(json!({ "num_replicas": "auto" })).scale else { panic!("it is auto") };
    assert_eq!((made.min_replicas, made.max_replicas, made.target_ongoing_requests), (1, 100, 2.0));
    assert_eq!((made.upscale_delay.as_secs(), made.downscale_to_zero_delay.as_secs()), (30, 600));
    let zero =
        json!({ "autoscaling_config": { "min_replicas": 0, "max_replicas": 2, "downscale_delay_s": 1.5 } });
    let Scale::Auto(made) = auto(zero).scale else { panic!("it is auto") };
    assert_eq!((made.min_replicas, made.initial_replicas), (0, 0));
    assert_eq!(made.downscale_to_zero_delay, Duration::from_millis(1500));
    assert_eq!(auto(json!({})).rollout, Rollout::Surge { percent: 20 });
    assert_eq!(auto(json!({ "max_surge_percent": 0 })).rollout, Rollout::InPlace { thousandths: 200 });
    let said = problems(document(json!({}), json!({ "num_replicas": 2, "autoscaling_config": {} })));
    assert!(said[0].contains("num_replicas: it excludes autoscaling_config"), "{said:?}");
}

#[test]
fn a_model_that_is_not_there_is_named() {
    let said =
        read_with(document(json!({}), json!({})), &|dir| Err(format!("{} is not there", dir.display())))
            .unwrap_err();
    assert!(
        said[0].starts_with("applications.0.args.llm_config.model_loading_config.model_id: "),
        "{said:?}"
    );
}

#[test]
fn prefixes_are_checked() {
    for prefix in ["chat", "/chat/", "/api", "/-/x", "/a b", "/{a}"] {
        let mut it = document(json!({}), json!({}));
        it["applications"][0]["route_prefix"] = json!(prefix);
        assert!(problems(it)[0].starts_with("applications.0.route_prefix: "), "{prefix}");
    }
    let mut it = document(json!({}), json!({}));
    it["applications"][0]["route_prefix"] = Json::Null;
    assert_eq!(read_document(it).unwrap()[0].route_prefix, None);
}

#[test]
fn an_actor_of_a_user_has_rays_options() {
    let made = one(of_actor(
        "greeter:Greeter",
        json!({
            "name": "Greeter", "num_replicas": 2, "max_queued_requests": 7, "user_config": { "tone": "dry" },
            "health_check_period_s": 1, "health_check_timeout_s": 2.5, "graceful_shutdown_timeout_s": 3,
            "ray_actor_options": {
                "num_cpus": 0.5, "num_gpus": 1, "resources": { "tpu": 2 }, "label_selector": { "zone": "a" },
            },
        }),
    ));
    let actor = made.workload.actor().unwrap();
    assert_eq!((actor.package.sha256, actor.actor_type.as_str()), (Digest([2; 32]), "Greeter"));
    assert_eq!((made.name.as_str(), actor.application.as_str()), ("Greeter", "hello"));
    assert_eq!(
        (actor.args.as_str(), actor.user_config.as_deref()),
        (r#"{"word":"hi"}"#, Some(r#"{"tone":"dry"}"#))
    );
    let needs = Resources { devices: 1, ..Resources::cpus(Quantity::milli(500)).with("tpu", 2) };
    assert_eq!((&actor.resources, &actor.selector), (&needs, &LabelSelector::of("zone", "a")));
    assert_eq!((actor.health.period.as_secs(), actor.health.timeout.as_millis()), (1, 2500));
    let settings = &made.settings;
    assert_eq!((settings.max_ongoing_requests, settings.max_queued_requests), (Some(5), Some(7)));
    let plain = one(of_actor("many@2:It", json!({ "name": "It" })));
    let actor = plain.workload.actor().unwrap();
    assert_eq!((actor.package.sha256, &actor.resources), (Digest([4; 32]), &Resources::cpus(1)));
}

#[test]
fn an_application_of_actors_has_the_deployments_that_it_lists() {
    let mut document =
        of_actor("greeter:Gateway", json!({ "name": "Words", "num_replicas": 3, "user_config": 1 }));
    let made = read_document(document.clone()).unwrap().remove(0).deployments;
    let shown = made.iter().map(|it| {
        let actor = it.workload.actor().unwrap();
        (it.name.as_str(), actor.actor_type.as_str(), actor.ingress, actor.args.as_str(), &it.settings.scale)
    });
    let args = r#"{"word":"hi"}"#;
    assert_eq!(
        shown.collect::<Vec<_>>(),
        [
            ("Words", "Words", false, args, &Scale::Fixed(3)),
            ("Gateway", "Gateway", true, args, &Scale::Fixed(1)),
        ]
    );
    document["applications"][0]["deployments"] = json!([{ "name": "Words" }, { "name": "Words" }, 7]);
    assert_eq!(
        problems(document),
        [
            "applications.0.deployments.1.name: deployment \"Words\" is listed twice",
            "applications.0.deployments.2.name: null is not the name of a type of actor; HTTP goes to Gateway",
        ]
    );
}

#[test]
fn an_actor_that_cannot_be_is_refused_by_name() {
    let said = |import_path: &str| problems(of_actor(import_path, json!({ "name": "It" }))).remove(0);
    for (import_path, why) in [
        ("none:It", "no package is called"),
        ("many:It", "say which: many@1:It"),
        ("many@3:It", "no version \"3\" that is registered; there is 1, 2"),
        ("greeter", "PACKAGE@VERSION:ACTOR_TYPE"),
        ("ray.serve.llm:other", "cannot be imported; there are"),
    ] {
        let said = said(import_path);
        assert!(said.starts_with("applications.0.import_path: ") && said.contains(why), "{said}");
    }
    for (option, why) in [
        (json!({ "name": "" }), "\"\" is not the name of a type of actor; HTTP goes to It"),
        (json!({ "num_replicas": 1 }), "null is not the name of a type of actor"),
        (json!({ "name": "It", "ray_actor_options": { "num_gpus": 2 } }), "an actor has one or none"),
        (json!({ "name": "It", "health_check_period_s": 0 }), "it must be above 0"),
        (json!({ "name": "It", "wings": 2 }), "there is no such field"),
        (
            json!({ "name": "It", "request_router_config": { "request_router_class":
                "ray.serve.llm.request_router.PrefixCacheAffinityRouter" } }),
            "the less busy one of two",
        ),
    ] {
        let said = problems(of_actor("many@1:It", option));
        assert!(said.iter().any(|said| said.contains(why)), "{said:?}");
    }
}

#[test]
fn where_http_is_served_is_one_of_rays_words_or_left_to_cluster_toml() {
    let location = |written: Json| {
        let document = json!({ "proxy_location": written, "applications": [] });
        read_whole(document, &|_| Err("there is none".to_owned())).map(|document| document.location)
    };
    assert_eq!(location(json!("EveryNode")), Ok(Some(ProxyLocation::EveryNode)));
    assert_eq!(location(json!("HeadOnly")), Ok(Some(ProxyLocation::HeadOnly)));
    assert_eq!(location(json!("Disabled")), Ok(Some(ProxyLocation::Disabled)));
    assert_eq!(location(Json::Null), Ok(None));
    let refused = location(json!("NoServer")).unwrap_err();
    assert!(refused[0].starts_with("proxy_location: \"NoServer\" cannot be used"), "{refused:?}");
}

#[test]
fn backpressure_is_what_is_written_of_it() {
    let read = |config: Json| {
        let apps = read_document(document(json!({}), json!({ "backpressure_config": config })))?;
        Ok::<_, Vec<String>>(apps[0].deployments[0].settings.backpressure)
    };
    assert_eq!(read(Json::Null), Ok(None));
    let terms = |status_code, retry_after_s| Ok(Some(Backpressure { status_code, retry_after_s }));
    assert_eq!(read(json!({})), terms(503, None), "Ray's default");
    assert_eq!(read(json!({ "status_code": 429, "retry_after_s": 2.5 })), terms(429, Some(3)));
    for (wrong, path) in [
        (json!({ "status_code": 500 }), "status_code: 500 is neither"),
        (json!({ "retry_after_s": -1 }), "retry_after_s: -1 is no number"),
        (json!({ "retry": 1 }), "retry: there is no such field"),
    ] {
        let said = read(wrong).unwrap_err();
        assert!(said[0].contains(&format!("deployment_config.backpressure_config.{path}")), "{said:?}");
    }
}
