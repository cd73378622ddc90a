//! What a measured slice comes to, beside the least time that the chip allows.

use serde::Serialize;

use heliostat_engine::config::ModelConfig;
use heliostat_kernels::cuda::exchange::Transport;

use super::Options;
use super::floor::{Load, PartFloor, floors, step_us};
use super::meeting::Meeting;
use super::slice::{self, RemapReport, SliceArgs, SliceError, SliceRow};

/// What the slice is; it must stand beside its figures.
fn what(ranks: usize, transport: Transport) -> String {
    let rows = match (ranks, transport) {
        (1, _) | (_, Transport::Local) => "rows move within one GPU's memory",
        (_, Transport::Peer) => "rows cross NVLink by our own kernels, one copy per token and expert",
        (_, Transport::Nccl) => "NCCL carries all rows to all ranks",
    };
    let gpus = if ranks == 1 { "GPU" } else { "GPUs" };
    format!("EP32-equivalent compute slice of DeepSeek-R1 with made-up FP8 weights on {ranks} {gpus}; {rows}")
}

/// The steps of a rank; all ranks step alike.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SliceReport {
    /// What was measured, in words.
    pub measured: String,
    /// The GPU's name.
    pub gpu: String,
    /// GPUs, each a rank in a process of its own.
    pub ranks: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Expert slots of the rank per layer.
    pub slots: usize,
    /// Whether decode steps were recorded.
    pub graphs: bool,
    /// Tokens of one prefill step.
    pub chunk_tokens: usize,
    /// How prompts attend: `absorbed` or `expanded`.
    pub prefill_attention: &'static str,
    /// Steps timed for each line of decode.
    pub steps: usize,
    /// Steady-state decode.
    pub decode: Vec<DecodeReport>,
    /// Decode while experts move, if asked for.
    pub remap: Option<RemapReport>,
    /// Prefill.
    pub prefill: Vec<PrefillReport>,
}

/// Steady-state decode of one batch and context.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecodeReport {
    /// Sequences.
    pub batch: usize,
    /// Tokens before the first measured one.
    pub context: usize,
    /// Milliseconds from one step's end to the next's, median.
    pub step_ms: f64,
    /// The same, 99th percentile.
    pub step_p99_ms: f64,
    /// Tokens per second and GPU.
    pub tokens_per_s: f64,
    /// Share of the time in which the host worked rather than waited.
    pub host_share: f64,
    /// The least that the chip allows, at the context before the first measured step.
    pub floor_ms: f64,
    /// `floor_ms / step_ms`.
    pub roofline_share: f64,
    /// Parts of one more step, every kernel timed on its own.
    pub parts: Vec<PartReport>,
}

/// One part of a step. Kernels were timed one by one: their sum is above the step's time, in which they overlap.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PartReport {
    /// Its name.
    pub part: &'static str,
    /// Microseconds in one step.
    pub us: f64,
    /// Layers that have it.
    pub layers: Option<usize>,
    /// Microseconds in one of them.
    pub layer_us: Option<f64>,
    /// Share of the sum of all parts.
    pub share: f64,
    /// The least that the chip allows, in one layer; `None`: not known, or taken to be hidden.
    pub floor_layer_us: Option<f64>,
}

/// Prefill of prompts of one length.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrefillReport {
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens per second and GPU.
    pub tokens_per_s: f64,
    /// Parts of one step, every kernel timed on its own. Without floors: those are decode's.
    pub parts: Vec<PartReport>,
}

/// Loads the slice and measures all that `options` asks for; `progress` hears a line for each measurement.
///
/// # Errors
/// The device is missing, full, or failed.
pub fn slice(
    options: &Options,
    meeting: Meeting,
    progress: &mut dyn FnMut(&str),
) -> Result<SliceReport, SliceError> {
    let device = options.open()?;
    let args = SliceArgs {
        batches: options.batch.clone(),
        contexts: options.context.clone(),
        steps: options.rounds,
        prompts: options.prompt.clone(),
        chunk: options.chunk,
        prefill_attention: options.prefill_attention,
        graphs: options.graphs,
        depth: 2,
        layers: options.layers,
        remap: options.remap,
        transport: options.transport,
        library_dirs: options.library_dirs.clone(),
    };
    let config = args.config()?;
    let layers = config.num_layers;
    progress(&format!("{}: loading {layers} layers", device.properties().name));
    let ranks = meeting.ranks();
    let rows = slice::slice(&device, &args, meeting, &mut |row| progress(&line(row)))?;
    let mut report = SliceReport {
        measured: what(ranks, args.transport),
        ranks,
        gpu: device.properties().name.clone(),
        layers,
        slots: slice::SLOTS,
        graphs: args.graphs,
        chunk_tokens: args.chunk,
        prefill_attention: args.prefill_attention.name(),
        steps: args.steps,
        decode: Vec::new(),
        remap: None,
        prefill: Vec::new(),
    };
    for row in rows {
        report.add(&config, row);
    }
    Ok(report)
}

impl SliceReport {
    fn add(&mut self, config: &ModelConfig, row: SliceRow) {
        match row {
            SliceRow::Decode { batch, context, step_ms, step_p99_ms, tokens_per_s, host_share, parts } => {
                let floors = floors(config, Load { batch, context, slots: self.slots });
                let floor_ms = step_us(&floors) / 1e3;
                self.decode.push(DecodeReport {
                    batch,
                    context,
                    step_ms,
                    step_p99_ms,
                    tokens_per_s,
                    host_share,
                    floor_ms,
                    roofline_share: floor_ms / step_ms,
                    parts: part_reports(&parts, &floors),
                });
            }
            SliceRow::Remap(report) => self.remap = Some(report),
            SliceRow::Prefill { prompt, tokens_per_s, parts } => {
                let parts = part_reports(&parts, &[]);
                self.prefill.push(PrefillReport { prompt, tokens_per_s, parts });
            }
        }
    }
}

fn part_reports(parts: &[(&'static str, f64)], floors: &[PartFloor]) -> Vec<PartReport> {
    let sum: f64 = parts.iter().map(|(_, us)| us).sum();
    let report = |&(part, us): &(&'static str, f64)| {
        let floor = floors.iter().find(|floor| floor.part == part);
        PartReport {
            part,
            us,
            layers: floor.map(|floor| floor.layers),
            layer_us: floor.map(|floor| us / floor.layers as f64),
            share: us / sum,
            floor_layer_us: floor.map(|floor| floor.us).filter(|&us| us > 0.0),
        }
    };
    parts.iter().map(report).collect()
}

/// A measurement in one line.
fn line(row: &SliceRow) -> String {
    match row {
        SliceRow::Decode { batch, context, step_ms, tokens_per_s, .. } => {
            format!("decode {batch} x {context}: {step_ms:.2} ms, {tokens_per_s:.0} tokens/s")
        }
        SliceRow::Remap(RemapReport { moves, step_ms, longest_ms, .. }) => {
            format!(
                "{moves} experts replaced while decoding: {step_ms:.2} ms a step, {longest_ms:.2} ms the longest"
            )
        }
        SliceRow::Prefill { prompt, tokens_per_s, .. } => {
            format!("prefill of {prompt}: {tokens_per_s:.0} tokens/s")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::slice::DEEPSEEK_R1;

    #[test]
    fn a_measured_step_stands_beside_its_floor() {
        let config = ModelConfig::from_json("deepseek-r1.json", DEEPSEEK_R1).unwrap();
        let mut report = SliceReport {
            measured: what(2, Transport::Peer),
            ranks: 2,
            gpu: "a GPU".into(),
            layers: 61,
            slots: 9,
            graphs: true,
            chunk_tokens: 4096,
            prefill_attention: "expanded",
            steps: 10,
            decode: Vec::new(),
            remap: None,
            prefill: Vec::new(),
        };
        let parts = vec![("MLA", 61.0 * 220.0), ("dispatch", 58.0 * 20.0), ("something new", 0.0)];
        report.add(
            &config,
            SliceRow::Decode {
                batch: 128,
                context: 4096,
                step_ms: 46.0,
                step_p99_ms: 47.0,
                tokens_per_s: 2782.6,
                host_share: 0.1,
                parts,
            },
        );
        report.add(&config, SliceRow::Prefill { prompt: 2048, tokens_per_s: 9000.0, parts: Vec::new() });
        let decode = &report.decode[0];
        assert!((decode.roofline_share - 0.5).abs() < 0.01, "{}", decode.roofline_share);
        let [mla, dispatch, new] = &decode.parts[..] else { panic!("three parts") };
        assert_eq!((mla.layers, mla.layer_us.map(f64::round)), (Some(61), Some(220.0)));
        assert_eq!(mla.floor_layer_us.map(f64::round), Some(185.0));
        assert_eq!((dispatch.layers, dispatch.floor_layer_us), (Some(58), None));
        assert_eq!((new.layers, new.layer_us), (None, None));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["decode"][0]["parts"][0]["part"], "MLA");
        assert_eq!(json["prefill"][0]["tokens_per_s"], 9000.0);
    }
}
