//! What may be written after `helio bench`.

use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

/// `helio bench`.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Measure every kernel at the shapes of a decode step: time, and share of what the GPU could do.
    Ops(BenchOps),
    /// Measure the steps of ranks of a wide expert-parallel group, on one GPU or several.
    Slice(BenchSlice),
}

/// What every measurement of a GPU takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchGpu {
    /// Ordinal of the GPU, of those that CUDA_VISIBLE_DEVICES shows.
    #[arg(long, value_name = "ORDINAL", default_value_t = 0)]
    pub(crate) device: u32,
    /// Folder to search for NVIDIA's libraries first; may be given several times.
    #[arg(long = "library-dir", value_name = "DIR")]
    pub(crate) library_dirs: Vec<PathBuf>,
    /// Where compiled kernels are kept. Without it: where ranks keep theirs.
    #[arg(long, value_name = "DIR")]
    pub(crate) kernel_cache: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a measurement of several GPUs takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchRanks {
    /// Ranks, each on a GPU of its own, from `--device` on. Without it: 2 where there are as many GPUs.
    #[arg(long, value_name = "RANKS", value_parser = clap::value_parser!(u32).range(1..=32))]
    pub(crate) gpus: Option<u32>,
    /// A rank that another process started.
    #[arg(long, hide = true, requires = "gpus")]
    pub(crate) guest: Option<u32>,
}

/// How prompts attend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrefillArg {
    /// Like generated tokens, on cached latents
    Absorbed,
    /// On keys and values of every head
    Expanded,
}

/// `helio bench ops`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  helio bench ops
  helio bench ops --batch 1,64,128 --context 4096 --json

The shapes are those of DeepSeek-R1 with 9 experts per GPU. Products are timed beside cuBLASLt
where it is found (pip install nvidia-cublas, or a CUDA 13 toolkit).")]
pub(crate) struct BenchOps {
    /// Rows of a step, one measurement each.
    #[arg(long, value_name = "ROWS,..", value_delimiter = ',', default_values_t = [8, 64, 128, 256], value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) batch: Vec<u32>,
    /// Tokens that each sequence has, one measurement of attention each.
    #[arg(long, value_name = "TOKENS,..", value_delimiter = ',', default_values_t = [2048, 4096], value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) context: Vec<u32>,
    /// Measurements of which the median counts.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// On how many GPUs: with several, what crosses between them is measured beside NCCL.
    #[command(flatten)]
    pub(crate) ranks: BenchRanks,
    /// On which GPU, and how.
    #[command(flatten)]
    pub(crate) gpu: BenchGpu,
}

/// `helio bench slice`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  helio bench slice
  helio bench slice --batch 128 --context 4096 --layers 8      a quick trial
  helio bench slice --gpus 1 --device 1 --json

The model is DeepSeek-R1 with made-up weights: all layers, and 9 of 288 expert slots of each on
every GPU. With several GPUs each is a rank in a process of its own, and rows for the experts
cross NVLink; a rank alone moves them within its memory.")]
pub(crate) struct BenchSlice {
    /// Sequences that decode at once, one measurement each.
    #[arg(long, value_name = "ROWS,..", value_delimiter = ',', default_values_t = [64, 128, 256], value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) batch: Vec<u32>,
    /// Tokens that each sequence has already, one measurement each.
    #[arg(long, value_name = "TOKENS,..", value_delimiter = ',', default_values_t = [2048, 4096], value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) context: Vec<u32>,
    /// Lengths of prompts to prefill, one measurement each; `--prompt 0`: none.
    #[arg(long, value_name = "TOKENS,..", value_delimiter = ',', default_values_t = [2048, 4096])]
    pub(crate) prompt: Vec<u32>,
    /// Decoder layers; the first three have no experts.
    #[arg(long, default_value_t = 61, value_parser = clap::value_parser!(u32).range(4..=61))]
    pub(crate) layers: u32,
    /// Decode once more, at the first batch and context, while experts are replaced one after the other.
    #[arg(long)]
    pub(crate) remap: bool,
    /// Steps to time for each measurement of decode.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) steps: u32,
    /// Tokens of one prefill step.
    #[arg(long, value_name = "TOKENS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) chunk: u32,
    /// How prompts attend, as `prefill_attention` in cluster.toml.
    #[arg(long, value_name = "HOW", default_value = "expanded")]
    pub(crate) prefill_attention: PrefillArg,
    /// How rows travel between GPUs.
    #[arg(long, value_enum, default_value_t = BenchExchange::Peer)]
    pub(crate) exchange: BenchExchange,
    /// On how many GPUs.
    #[command(flatten)]
    pub(crate) ranks: BenchRanks,
    /// Launch every kernel of a step by itself instead of replaying a recording.
    #[arg(long)]
    pub(crate) no_graphs: bool,
    /// On which GPU, and how.
    #[command(flatten)]
    pub(crate) gpu: BenchGpu,
}

/// How rows travel between the GPUs of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BenchExchange {
    /// Our own kernels over NVLink.
    Peer,
    /// NCCL.
    Nccl,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    #[test]
    fn measurements_have_lists_and_defaults() {
        let parse = |line: &str| match Cli::try_parse_from(line.split(' ')).map(|cli| cli.command) {
            Ok(Command::Bench(Bench::Slice(args))) => Ok(args),
            Ok(other) => panic!("{other:?}"),
            Err(why) => Err(why.kind()),
        };
        let all = parse("helio bench slice").unwrap();
        assert_eq!((all.batch, all.context, all.layers), (vec![64, 128, 256], vec![2048, 4096], 61));
        assert_eq!((all.prompt, all.chunk, all.no_graphs), (vec![2048, 4096], 4096, false));
        assert_eq!((all.ranks.gpus, all.exchange), (None, BenchExchange::Peer));
        let some = parse(
            "helio bench slice --batch 8,16 --layers 5 --no-graphs --device 1 --prefill-attention absorbed",
        )
        .unwrap();
        assert_eq!(
            (all.prefill_attention, some.prefill_attention),
            (PrefillArg::Expanded, PrefillArg::Absorbed)
        );
        assert_eq!((some.batch, some.layers, some.no_graphs, some.gpu.device), (vec![8, 16], 5, true, 1));
        for bad in ["--batch 0", "--layers 3", "--layers 62", "--steps 1", "--context x"] {
            assert!(parse(&format!("helio bench slice {bad}")).is_err(), "{bad}");
        }
        let ops = Cli::try_parse_from(["helio", "bench", "ops", "--json"]).unwrap().command;
        let Command::Bench(Bench::Ops(ops)) = ops else { panic!("{ops:?}") };
        assert_eq!((ops.batch, ops.rounds, ops.gpu.json), (vec![8, 64, 128, 256], 10, true));
    }
}
