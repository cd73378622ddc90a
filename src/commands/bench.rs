//! `helio bench ops|slice`: measures GPUs and prints what was measured.

use super::{print, print_json};
use crate::args::{Bench, BenchExchange, BenchGpu, BenchOps, BenchRanks, BenchSlice, PrefillArg};
use crate::failure::{FAILED, Failure, say};
use crate::{config, gpus, show};
use anyhow::Result;
use heliostat_actors::bench::meeting::{Guest, Meeting};
use heliostat_actors::bench::{self, Options, SliceError};
use heliostat_engine::batch::PrefillAttention;
use heliostat_engine::cuda::LoadError;
use heliostat_kernels::cuda::CudaError;
use heliostat_kernels::cuda::exchange::Transport;
use std::process::{Command, Stdio};

/// Measures and prints. Fails where the GPU or its libraries cannot be used.
pub(crate) fn run(args: &Bench) -> Result<()> {
    let gpus = gpus::count()
        .map_err(|why| Failure::error(FAILED, format!("helio bench measures an NVIDIA GPU, and {why}")))?;
    match args {
        Bench::Ops(args) => {
            let (options, meeting) = place(ops_options(args), &args.ranks, gpus)?;
            let guest = meeting.rank() > 0;
            let mut say = |line: &str| {
                if !guest {
                    progress(line)
                }
            };
            let report = bench::ops(&options, meeting, &mut say).map_err(|why| failed(&why))?;
            if guest {
                return Ok(());
            }
            if args.gpu.json { print_json(&report) } else { print(&show::bench::ops(&report)) }
        }
        Bench::Slice(args) => {
            let (options, meeting) = place(slice_options(args), &args.ranks, gpus)?;
            let guest = meeting.rank() > 0;
            let mut say = |line: &str| {
                if !guest {
                    progress(line)
                }
            };
            let report = bench::slice(&options, meeting, &mut say).map_err(|why| failed(&why))?;
            if guest {
                return Ok(());
            }
            if args.gpu.json { print_json(&report) } else { print(&show::bench::slice(&report)) }
        }
    }
}

/// This process's part of a measurement; the first rank starts the others.
fn place(mut options: Options, args: &BenchRanks, gpus: u32) -> Result<(Options, Meeting)> {
    let first = options.device;
    let ranks = args.gpus.unwrap_or_else(|| gpus.saturating_sub(first).clamp(1, 2));
    let there = first + ranks <= gpus;
    let why = format!(
        "{ranks} GPUs from {first} on were asked for, and there are {gpus}: lower --gpus or --device"
    );
    there.then_some(()).ok_or_else(|| Failure::error(FAILED, why))?;
    let meeting = match args.guest {
        Some(rank) => Meeting::Guest { rank: rank as usize, ranks: ranks as usize },
        None => Meeting::Host((1..ranks).map(|rank| guest(rank, ranks)).collect::<Result<_>>()?),
    };
    options.device += meeting.rank() as u32;
    Ok((options, meeting))
}

/// Starts another rank with the arguments of this one.
fn guest(rank: u32, ranks: u32) -> Result<Guest> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1));
    command.args(["--guest".to_owned(), rank.to_string()]);
    if !std::env::args_os().any(|arg| arg.to_string_lossy().starts_with("--gpus")) {
        command.args(["--gpus".to_owned(), ranks.to_string()]);
    }
    Ok(Guest::new(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?))
}

fn progress(line: &str) {
    say(format_args!("{line}"));
}

fn failed(why: &SliceError) -> anyhow::Error {
    match why {
        SliceError::Cuda(why) | SliceError::Load(LoadError::Cuda(why)) => cuda(why),
        SliceError::KvRoom { .. } => {
            Failure::error(FAILED, format!("{why}: lower --batch or --context, or measure fewer --layers"))
        }
        SliceError::Config(_)
        | SliceError::Load(_)
        | SliceError::Step(_)
        | SliceError::Pool(_)
        | SliceError::Meeting(_) => Failure::error(FAILED, why.to_string()),
    }
}

/// Where there is no cluster, its settings are no way out.
fn cuda(why: &CudaError) -> anyhow::Error {
    let message = match why {
        CudaError::OutOfMemory { asked, free, total } => format!(
            "out of GPU memory: {} MiB were asked for, {} of {} MiB are free: end what else runs on this GPU, or lower \
             --batch, --context or --layers",
            asked >> 20,
            free >> 20,
            total >> 20
        ),
        CudaError::NoLibrary { library, package, .. } => format!(
            "{library} was not found: install it (`pip install {package}`) and name its folder by --library-dir"
        ),
        other => other.to_string(),
    };
    Failure::error(FAILED, message)
}

fn ops_options(args: &BenchOps) -> Options {
    Options {
        batch: sizes(&args.batch),
        context: sizes(&args.context),
        rounds: args.rounds as usize,
        ..gpu_options(&args.gpu)
    }
}

fn slice_options(args: &BenchSlice) -> Options {
    Options {
        batch: sizes(&args.batch),
        context: sizes(&args.context),
        prompt: sizes(&args.prompt),
        rounds: args.steps as usize,
        layers: Some(args.layers as usize),
        graphs: !args.no_graphs,
        chunk: args.chunk as usize,
        prefill_attention: match args.prefill_attention {
            PrefillArg::Absorbed => PrefillAttention::Absorbed,
            PrefillArg::Expanded => PrefillAttention::Expanded,
        },
        remap: args.remap,
        transport: match args.exchange {
            BenchExchange::Peer => Transport::Peer,
            BenchExchange::Nccl => Transport::Nccl,
        },
        ..gpu_options(&args.gpu)
    }
}

/// Without anything to measure.
fn gpu_options(gpu: &BenchGpu) -> Options {
    let shared = || config::user_cache().map(|cache| cache.join("heliostat/kernels"));
    Options {
        device: gpu.device,
        library_dirs: gpu.library_dirs.clone(),
        kernel_cache: gpu.kernel_cache.clone().or_else(shared),
        batch: Vec::new(),
        context: Vec::new(),
        prompt: Vec::new(),
        rounds: 2,
        layers: None,
        graphs: true,
        chunk: 4096,
        prefill_attention: PrefillAttention::Expanded,
        remap: false,
        transport: Transport::Peer,
    }
}

/// Zeros are left out: a way to name none.
fn sizes(sizes: &[u32]) -> Vec<usize> {
    sizes.iter().filter(|&&size| size > 0).map(|&size| size as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{self, Cli};
    use clap::Parser;

    fn parse(line: &str) -> Bench {
        match Cli::parse_from(line.split(' ')).command {
            args::Command::Bench(bench) => bench,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_come_from_arguments() {
        let line = "helio bench slice --batch 8 --prompt 0 --steps 7 --no-graphs --kernel-cache /k";
        let Bench::Slice(args) = parse(line) else { panic!("a slice") };
        let options = slice_options(&args);
        assert_eq!((options.batch, options.prompt, options.rounds), (vec![8], vec![], 7));
        assert_eq!((options.graphs, options.kernel_cache), (false, Some("/k".into())));
        let Bench::Ops(args) = parse("helio bench ops --context 64 --library-dir /l") else { panic!("ops") };
        let options = ops_options(&args);
        assert_eq!((options.context, options.library_dirs), (vec![64], vec!["/l".into()]));
    }

    #[test]
    fn errors_name_what_helps_here() {
        let full = CudaError::OutOfMemory { asked: 5 << 30, free: 1 << 30, total: 80 << 30 };
        let text = failed(&SliceError::Load(LoadError::Cuda(full))).to_string();
        assert!(text.contains("5120 MiB were asked for") && text.contains("--batch"), "{text}");
        let text = failed(&SliceError::KvRoom { batch: 512, context: 4096, tokens: 64 }).to_string();
        assert!(
            text.contains("512 sequences of 4096 tokens do not fit") && text.contains("--layers"),
            "{text}"
        );
        let (library, package) = ("libnvrtc.so.13", "nvidia-cuda-nvrtc");
        let text = cuda(&CudaError::NoLibrary { library, package, searched: vec![] }).to_string();
        assert!(text.contains("pip install nvidia-cuda-nvrtc") && text.contains("--library-dir"), "{text}");
    }
}
