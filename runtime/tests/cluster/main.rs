//! Clusters of real processes: this binary starts itself again as head, node and worker, and kills them.
//!
//! `cargo test -p heliostat-runtime --test cluster [-- NAME...]` prints what each repair took.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that prints what it measured")]

mod actors;
mod causes;
mod harness;
mod kept;
mod mesh;
mod objects;
mod placement;
mod scenarios;
mod tree;

use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long a scenario may take on a slow machine.
const LIMIT: Duration = Duration::from_secs(180);

type Scenario = fn() -> futures_util::future::BoxFuture<'static, ()>;

const SCENARIOS: &[(&str, Scenario)] = &[
    ("worker_killed", || Box::pin(scenarios::worker_killed())),
    ("actor_panics", || Box::pin(scenarios::actor_panics())),
    ("causes", || Box::pin(causes::causes())),
    ("hung_in_create", || Box::pin(causes::hung_in_create())),
    ("ends_by_request", || Box::pin(causes::ends_by_request())),
    ("own_words", || Box::pin(causes::own_words())),
    ("calls_of_a_spec", || Box::pin(causes::calls_of_a_spec())),
    ("out_of_memory", || Box::pin(causes::out_of_memory())),
    ("agent_killed", || Box::pin(scenarios::agent_killed())),
    ("agent_gone", || Box::pin(scenarios::agent_gone())),
    ("agent_gone_gpu_kept", || Box::pin(causes::agent_gone_gpu_kept())),
    ("head_killed", || Box::pin(scenarios::head_killed())),
    ("restart_limit", || Box::pin(scenarios::restart_limit())),
    ("node_lost", || Box::pin(scenarios::node_lost())),
    ("orderly_ends", || Box::pin(scenarios::orderly_ends())),
    ("placement_groups", || Box::pin(placement::placement_groups())),
    ("gang_again", || Box::pin(placement::gang_again())),
    ("drain", || Box::pin(placement::drain())),
    ("logs", || Box::pin(scenarios::logs())),
    ("mesh_rounds", || Box::pin(mesh::mesh_rounds())),
    ("mesh_inner_killed", || Box::pin(mesh::mesh_inner_killed())),
    ("mesh_strategies", || Box::pin(mesh::mesh_strategies())),
    ("mesh_spawn_fails", || Box::pin(mesh::mesh_spawn_fails())),
    ("namespaces", || Box::pin(tree::namespaces())),
    ("drivers", || Box::pin(tree::drivers())),
    ("strategies", || Box::pin(tree::strategies())),
    ("judge", || Box::pin(tree::judge())),
    ("objects_on_a_node", || Box::pin(objects::objects_on_a_node())),
    ("objects_after_deaths", || Box::pin(objects::objects_after_deaths())),
    ("objects_between_nodes", || Box::pin(objects::objects_between_nodes())),
    ("objects_after_the_agent", || Box::pin(objects::objects_after_the_agent())),
    ("objects_on_disk", || Box::pin(objects::objects_on_disk())),
    ("refs_in_arguments", || Box::pin(kept::refs_in_arguments())),
    ("refs_of_functions", || Box::pin(kept::refs_of_functions())),
    ("functions_read_objects", || Box::pin(kept::functions_read_objects())),
    ("etcd_killed", || Box::pin(scenarios::etcd_killed())),
];

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let first = args.next();
    match first.as_deref() {
        Some("head") => harness::head(args),
        Some("node") => harness::node(args),
        Some("worker") => harness::worker(args),
        Some("driver") => tree::driver_process(args),
        _ => run(first.into_iter().chain(args).filter(|arg| !arg.starts_with('-')).collect()),
    }
}

fn run(wanted: Vec<String>) -> ExitCode {
    let chosen =
        SCENARIOS.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| name.contains(w)));
    let mut failed = Vec::new();
    for (name, scenario) in chosen {
        let start = Instant::now();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let outcome = runtime.block_on(async {
            let task = tokio::spawn(async move { scenario().await });
            tokio::time::timeout(LIMIT, task).await
        });
        runtime.shutdown_background();
        match outcome {
            Ok(Ok(())) => println!("test {name} ... ok, {:.1} s", start.elapsed().as_secs_f32()),
            Ok(Err(_)) => failed.push(*name),
            Err(_) => {
                println!("{name}: not over after {} s", LIMIT.as_secs());
                failed.push(*name);
            }
        }
        if failed.last() == Some(name) {
            println!("test {name} ... FAILED");
        }
    }
    println!("failed: {failed:?}");
    ExitCode::from(u8::from(!failed.is_empty()))
}
