//! `helio check`: reads the configuration and the model's files, and starts nothing.

use super::{cert, print};
use crate::args::Check;
use crate::config::{Config, Devices};
use crate::deploy;
use crate::failure::{self, Failure, USAGE, say};
use crate::gpus::{self, Gpu};
use anyhow::Result;

/// Checks everything that can be checked on this machine.
pub(crate) fn run(args: &Check) -> Result<()> {
    let config = Config::load(args.file.as_deref())?;
    let plan = deploy::plan(&config)
        .map_err(|e| Failure::error(USAGE, format!("the model cannot be served: {}", failure::text(&e))))?;
    let p = config.parallel;
    let devices: u32 = config.nodes.iter().map(|n| n.devices.count()).sum();
    let found = found(&config)?;
    let layout = if p.colocate { "on the same devices" } else { "on devices of their own" };
    warn(&config);
    let Some(model) = &config.model else {
        return print(&format!(
            "cluster {} is fine\n  model    none: it runs actors and jobs, and serves documents (helio serve)\n  \
             devices  {found}; {} nodes, {devices} devices\n  actors   {}\n  serves   {}\n",
            config.name,
            config.nodes.len(),
            plan.names().join(", "),
            config.serve_url(),
        ));
    };
    print(&format!(
        "cluster {} is fine\n  model    {} ({})\n  ranks    dp = {}, ep = {} {layout}; {} nodes, {devices} devices\n  \
         devices  {found}\n  \
         experts  {} redundant slots per layer\n  actors   {}\n  serves   {}\n",
        config.name,
        model.name,
        model.path.display(),
        p.dp,
        p.ep,
        config.nodes.len(),
        config.redundant_experts,
        plan.names().join(", "),
        config.serve_url(),
    ))
}

/// Says what is allowed and better known.
fn warn(config: &Config) {
    let ends = config.security.iter().filter_map(|tls| cert::ends_soon(&tls.cert));
    for text in config.in_clear().into_iter().chain(ends) {
        say(format_args!("warning: {text}"));
    }
}

/// The devices that this machine has for the cluster. Fails where a GPU cannot be opened as a rank would.
fn found(config: &Config) -> Result<String> {
    let here: Vec<Devices> = config.nodes.iter().filter(|n| n.host.is_none()).map(|n| n.devices).collect();
    match here.first() {
        None => Ok("none of this machine".into()),
        Some(Devices::Cuda { .. }) => {
            let dirs = config.cuda.as_ref().map_or(&[][..], |cuda| &cuda.library_dirs);
            let gpus = gpus::inspect(dirs)
                .map_err(|why| Failure::error(USAGE, format!("a GPU cannot be used: {why}")))?;
            Ok(summary(&gpus))
        }
        Some(Devices::Cpu { threads, .. }) => {
            let count: u32 = here.iter().map(|devices| devices.count()).sum();
            let plural = if *threads == 1 { "" } else { "s" };
            let unused =
                gpus::count().map_or_else(|why| format!("no GPU: {why}"), |n| format!("{n} GPUs unused"));
            Ok(format!("{count} CPU ({threads} thread{plural} each); {unused}"))
        }
    }
}

/// "2 CUDA (NVIDIA H200, 140 GiB)", with one part per kind.
fn summary(gpus: &[Gpu]) -> String {
    let mut kinds: Vec<(&Gpu, usize)> = Vec::new();
    for gpu in gpus {
        match kinds.iter_mut().find(|(kind, _)| *kind == gpu) {
            Some((_, count)) => *count += 1,
            None => kinds.push((gpu, 1)),
        }
    }
    let gib = |bytes: u64| (bytes as f64 / f64::from(1u32 << 30)).round();
    let parts =
        kinds.iter().map(|(gpu, count)| format!("{count} CUDA ({}, {} GiB)", gpu.name, gib(gpu.bytes)));
    parts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_counted_by_name_and_memory() {
        let gpu = |name: &str, bytes| Gpu { name: name.into(), bytes };
        let h200 = || gpu("NVIDIA H200", 150_754_820_096);
        assert_eq!(summary(&[h200(), h200()]), "2 CUDA (NVIDIA H200, 140 GiB)");
        let mixed = summary(&[h200(), gpu("NVIDIA H100 80GB HBM3", 85_017_231_360)]);
        assert_eq!(mixed, "1 CUDA (NVIDIA H200, 140 GiB), 1 CUDA (NVIDIA H100 80GB HBM3, 79 GiB)");
    }
}
