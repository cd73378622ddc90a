//! Ray's deployment options -> how many replicas, how they are updated and ended.

use std::time::Duration;

use serde_json::Value as Json;

use super::fields::{Fields, Refused, no};
use crate::serve::target::{Autoscaling, Backpressure, Rollout, Scale, Settings};

/// Replicas of `num_replicas: auto` at most, as in Ray.
const AUTO_REPLICAS_MAX: u32 = 100;

const REFUSED: &[Refused] = &[
    no("graceful_shutdown_wait_loop_s", &["2"], "the end of the last request is noticed at once"),
    no(
        "health_check_period_s",
        &["10"],
        "the death of a process is noticed at once ([supervision] in cluster.toml)",
    ),
    no(
        "health_check_timeout_s",
        &["10", "30"],
        "a rank that hangs is noticed by `step_timeout_s` in [parallel]",
    ),
    no("placement_group_bundles", &[], "a replica takes one device per rank"),
    no("placement_group_strategy", &["\"PACK\""], "use placement_group_config.strategy"),
    no("placement_group_bundle_label_selector", &[], ""),
    no("max_replicas_per_node", &[], ""),
    no("logging_config", &["{}"], "helio logs shows what actors write"),
    no("gang_scheduling_config", &[], "the ranks of a replica are placed and repaired one by one"),
    no("deployment_actors", &["[]"], ""),
];

/// Ray's routers that choose as ours does: by load, and by cached prefixes.
const ROUTERS: &[&str] = &[
    "\"ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter\"",
    "\"ray.serve.llm.request_router.PrefixCacheAffinityRouter\"",
    "\"ray.serve.llm.request_router:PrefixCacheAffinityRouter\"",
];

/// Options of a deployment -> settings.
pub(super) fn settings(mut options: Fields<'_>) -> Settings {
    let mut settings = Settings::default();
    let replicas = options.raw("num_replicas");
    let autoscaling = options.object("autoscaling_config");
    settings.scale = match (replicas, autoscaling) {
        (Some(Json::String(auto)), config) if auto == "auto" => {
            Scale::Auto(autoscale(config, AUTO_REPLICAS_MAX))
        }
        (None, Some(config)) => Scale::Auto(autoscale(Some(config), 1)),
        (Some(_), Some(_)) => {
            options.wrong("num_replicas", "it excludes autoscaling_config, unless it is \"auto\"");
            Scale::Fixed(1)
        }
        (Some(number), None) => {
            match number.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0) {
                Some(number) => Scale::Fixed(number),
                None => {
                    options
                        .wrong("num_replicas", format!("{number} is neither a number above 0 nor \"auto\""));
                    Scale::Fixed(1)
                }
            }
        }
        (None, None) => Scale::Fixed(1),
    };
    settings.max_ongoing_requests = options.positive("max_ongoing_requests");
    match options.take::<i64>("max_queued_requests") {
        None | Some(-1) => {}
        Some(max) => match u32::try_from(max) {
            Ok(max) => settings.max_queued_requests = Some(max),
            Err(_) => {
                options.wrong("max_queued_requests", format!("{max} is neither -1 nor a number of requests"))
            }
        },
    }
    if settings.max_queued_requests.is_some() && settings.max_ongoing_requests.is_none() {
        options
            .wrong("max_queued_requests", "it needs max_ongoing_requests: only what is beyond those waits");
    }
    settings.backpressure = backpressure(&mut options);
    if let Some(timeout) = options.seconds("graceful_shutdown_timeout_s") {
        settings.graceful_shutdown_timeout = timeout;
    }
    settings.rollout = rollout(&mut options);
    router_and_actor(&mut options);
    options.refuse(REFUSED);
    options.finish();
    settings
}

/// How a request for which there is no room is refused.
fn backpressure(options: &mut Fields<'_>) -> Option<Backpressure> {
    let mut config = options.object("backpressure_config")?;
    let status_code = config.take("status_code").unwrap_or(503);
    if !matches!(status_code, 429 | 503) {
        config.wrong("status_code", format!("{status_code} is neither 503 nor 429"));
    }
    let retry_after = config.seconds("retry_after_s");
    config.finish();
    // HTTP has whole seconds; who comes too early comes again.
    let whole = |time: Duration| u32::try_from(time.as_millis().div_ceil(1000)).unwrap_or(u32::MAX);
    Some(Backpressure { status_code, retry_after_s: retry_after.map(whole) })
}

/// What Ray lets one choose of routers and actors, and what of it is so anyway.
fn router_and_actor(options: &mut Fields<'_>) {
    if let Some(mut router) = options.object("request_router_config") {
        router.refuse(&[
            no("request_router_class", ROUTERS, "ranks are always chosen by cached prefixes and load"),
            no("request_router_kwargs", &["{}"], ""),
            no("request_routing_stats_period_s", &["10"], "ranks report after each step"),
            no("request_routing_stats_timeout_s", &["30"], ""),
            no("initial_backoff_s", &["0.025"], ""),
            no("backoff_multiplier", &["2"], ""),
            no("max_backoff_s", &["0.5"], ""),
        ]);
        router.finish();
    }
    if let Some(mut actor) = options.object("ray_actor_options") {
        actor.refuse(&[
            no("runtime_env", &["{}"], ""),
            no("num_cpus", &["0", "1"], "a replica takes one device per rank"),
            no("num_gpus", &["0"], "a replica takes one device per rank"),
            no("memory", &[], ""),
            no("resources", &["{}"], ""),
            no("accelerator_type", &[], "use accelerator_type of the LLMConfig"),
            no("label_selector", &[], ""),
            no("fallback_strategy", &[], ""),
        ]);
        actor.finish();
    }
}

/// New replicas come first unless the document says that old ones are to make room.
fn rollout(options: &mut Fields<'_>) -> Rollout {
    let share: f64 = options.take("rolling_update_percentage").unwrap_or(0.2);
    if !(share > 0.0 && share <= 1.0) {
        options.wrong("rolling_update_percentage", format!("{share} is not above 0 and at most 1"));
    }
    let thousandths = (share * 1000.0).round().clamp(1.0, 1000.0) as u32;
    match options.take::<u32>("max_surge_percent") {
        Some(0) => Rollout::InPlace { thousandths },
        Some(percent) if percent <= 100 => Rollout::Surge { percent },
        Some(percent) => {
            options.wrong("max_surge_percent", format!("{percent} is not between 0 and 100"));
            Rollout::Surge { percent: 100 }
        }
        None => Rollout::Surge { percent: thousandths.div_ceil(10) },
    }
}

fn autoscale(config: Option<Fields<'_>>, max_default: u32) -> Autoscaling {
    let seconds = Duration::from_secs;
    let mut auto = Autoscaling {
        min_replicas: 1,
        initial_replicas: 1,
        max_replicas: max_default,
        target_ongoing_requests: 2.0,
        look_back: seconds(30),
        upscale_delay: seconds(30),
        downscale_delay: seconds(600),
        downscale_to_zero_delay: seconds(600),
        upscaling_factor: 1.0,
        downscaling_factor: 1.0,
    };
    let Some(mut config) = config else { return auto };
    auto.min_replicas = config.take("min_replicas").unwrap_or(1);
    auto.max_replicas = config.positive("max_replicas").unwrap_or(max_default.max(auto.min_replicas));
    if auto.max_replicas < auto.min_replicas {
        config.wrong("max_replicas", format!("{} is below min_replicas", auto.max_replicas));
        auto.max_replicas = auto.min_replicas;
    }
    auto.initial_replicas = config.take("initial_replicas").unwrap_or(auto.min_replicas);
    if auto.initial_replicas < auto.min_replicas || auto.initial_replicas > auto.max_replicas {
        let initial = auto.initial_replicas;
        config.wrong("initial_replicas", format!("{initial} is not between min_replicas and max_replicas"));
    }
    let mut above_zero = |key: &str, default: f64| {
        let value: f64 = config.take(key).unwrap_or(default);
        if value > 0.0 && value.is_finite() {
            return value;
        }
        config.wrong(key, format!("{value} is not above 0"));
        default
    };
    auto.target_ongoing_requests = above_zero("target_ongoing_requests", 2.0);
    auto.upscaling_factor = above_zero("upscaling_factor", 1.0);
    auto.downscaling_factor = above_zero("downscaling_factor", 1.0);
    auto.look_back = config.seconds("look_back_period_s").unwrap_or(auto.look_back);
    auto.upscale_delay = config.seconds("upscale_delay_s").unwrap_or(auto.upscale_delay);
    auto.downscale_delay = config.seconds("downscale_delay_s").unwrap_or(auto.downscale_delay);
    auto.downscale_to_zero_delay =
        config.seconds("downscale_to_zero_delay_s").unwrap_or(auto.downscale_delay);
    config.refuse(&[
        no("metrics_interval_s", &["10"], "load is looked at all the time"),
        no("smoothing_factor", &["1"], "use upscaling_factor and downscaling_factor"),
        no("upscale_smoothing_factor", &[], "use upscaling_factor"),
        no("downscale_smoothing_factor", &[], "use downscaling_factor"),
        no("aggregation_function", &["\"mean\""], ""),
        no("policy", &["{}"], "the load alone decides"),
    ]);
    config.finish();
    auto
}
