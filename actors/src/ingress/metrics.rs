//! What `/metrics` shows, in Prometheus' OpenMetrics text: vLLM's names where it has one, each per DP rank (`engine`).

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use heliostat_engine::request::{RankStats, StepPhases};
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use crate::monitor::report::{Latencies, ServingReport};
use crate::monitor::trace::SequenceSpan;
use crate::telemetry::SpanCounts;

/// Content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const FIRST_TOKEN_BUCKETS: [f64; 20] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0,
];
const INTER_TOKEN_BUCKETS: [f64; 17] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0];
const REQUEST_BUCKETS: [f64; 18] =
    [0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 480.0];
const TOKEN_BUCKETS: [f64; 14] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 100_000.0];

/// Ended sequences that are kept for recordings.
const SPANS_MAX: usize = 2048;

type PerEngine<M> = Family<Engine, M, fn() -> M>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Engine {
    engine: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EngineFinish {
    engine: u32,
    finished_reason: Finish,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EnginePhase {
    engine: u32,
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EngineOutcome {
    engine: u32,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: u16,
}

/// How a sequence ended, as `vllm:request_success_total` counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// A stop token or string.
    Stop,
    /// The length limit.
    Length,
    /// Its client went away.
    Abort,
    /// It failed.
    Error,
}

impl Finish {
    /// vLLM's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

impl EncodeLabelValue for Finish {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.word(), encoder)
    }
}

/// A sequence that ended, for [`Metrics::finished`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finished {
    /// Rank of its last tokens.
    pub(crate) rank: u32,
    /// How it ended.
    pub(crate) finish: Finish,
    /// From the arrival of its request.
    pub(crate) duration: Duration,
    /// Tokens of its prompt.
    pub(crate) prompt_tokens: usize,
    /// Tokens it generated.
    pub(crate) output_tokens: u32,
}

/// All metrics of the ingress.
pub struct Metrics {
    registry: Mutex<Registry>,
    running: PerEngine<Gauge>,
    waiting: PerEngine<Gauge>,
    kv_usage: PerEngine<Gauge<f64, std::sync::atomic::AtomicU64>>,
    queued_prefill_tokens: PerEngine<Gauge>,
    step_seconds: PerEngine<Gauge<f64, std::sync::atomic::AtomicU64>>,
    /// Counted by the ranks: prompt tokens, output tokens, preemptions, prefix queries, prefix hits, steps, and of KV blocks
    /// from other ranks fetches, failures, bytes, microseconds.
    counted: [PerEngine<Counter>; 10],
    first_token: PerEngine<Histogram>,
    inter_token: PerEngine<Histogram>,
    request: PerEngine<Histogram>,
    prompt_tokens: PerEngine<Histogram>,
    output_tokens: PerEngine<Histogram>,
    success: Family<EngineFinish, Counter>,
    moves: Counter,
    in_flight: Gauge,
    responses: Family<Code, Counter>,
    phases: Family<EnginePhase, Counter<f64, AtomicU64>>,
    rank_spans: Family<EngineOutcome, Counter>,
    watched: Watched,
}

/// The same for whoever asks the actor, not `/metrics`: exact figures and narrow buckets.
#[derive(Default)]
struct Watched {
    model: String,
    ranks: Mutex<BTreeMap<u32, RankStats>>,
    first_token: Latencies,
    inter_token: Latencies,
    ended: AtomicU64,
    in_flight: AtomicU64,
    spans: Mutex<VecDeque<SequenceSpan>>,
}

impl Metrics {
    /// Metrics that say `model_name` in every line.
    pub fn new(model_name: &str) -> Self {
        Self::labelled(&[("model_name", model_name)])
    }

    /// Metrics that say `labels` in every line.
    pub fn labelled(labels: &[(&'static str, &str)]) -> Self {
        let mut registry = Registry::default();
        let model = labels.iter().find(|(name, _)| *name == "model_name");
        let model = model.map(|(_, value)| (*value).to_owned()).unwrap_or_default();
        let labels = labels.iter().map(|(name, value)| ((*name).into(), (*value).to_owned().into()));
        let vllm = &mut Names { registry: registry.sub_registry_with_labels(labels), prefix: "vllm:" };
        let running = vllm.add("num_requests_running", "Sequences in the running batch", gauge());
        let waiting = vllm.add("num_requests_waiting", "Sequences waiting", gauge());
        let kv_usage = vllm.add("kv_cache_usage_perc", "KV blocks in use, 1 is all", gauge());
        let counted = [
            ("prompt_tokens", "Prompt tokens computed"),
            ("generation_tokens", "Output tokens drawn"),
            ("num_preemptions", "Sequences preempted"),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
            ("prefix_cache_hits", "Prompt tokens that the prefix cache served"),
        ];
        let [a, b, c, d, e] = counted.map(|(name, help)| vllm.add(name, help, per_engine(Counter::default)));
        let first_token =
            vllm.seconds("time_to_first_token", "Arrival to first token", first_token_histogram);
        let inter_token = vllm.seconds("inter_token_latency", "Between two tokens", inter_token_histogram);
        let request = vllm.seconds("e2e_request_latency", "Arrival to end", request_histogram);
        let prompt_tokens = per_engine(token_histogram as fn() -> Histogram);
        let prompt_tokens = vllm.add("request_prompt_tokens", "Tokens of a prompt", prompt_tokens);
        let output_tokens = per_engine(token_histogram as fn() -> Histogram);
        let output_tokens = vllm.add("request_generation_tokens", "Tokens of an output", output_tokens);
        let success = vllm.add("request_success", "Sequences by how they ended", Family::default());

        let own = &mut Names { registry: vllm.registry, prefix: "heliostat:" };
        let queued_prefill_tokens =
            own.add("queued_prefill_tokens", "Prompt tokens not computed yet", gauge());
        let step_seconds = own.add("last_step_seconds", "Duration of the last step", gauge());
        let steps = own.add("steps", "Steps executed", per_engine(Counter::default as fn() -> Counter));
        let transfers = [
            ("kv_fetches", "Sequences that went on here with their prompts computed by another rank"),
            ("kv_fetch_failures", "Those of which not all blocks came, so that the rest was computed"),
            ("kv_fetched_bytes", "Bytes of KV blocks from other ranks"),
            ("kv_fetch_microseconds", "Time from asking for blocks to having them, of all fetches"),
        ];
        let [f, g, h, i] = transfers.map(|(name, help)| own.add(name, help, per_engine(Counter::default)));
        let moves = own.add("sequences_moved", "Sequences that went on at another rank", Counter::default());
        let in_flight =
            own.add("sequences_in_flight", "Sequences between HTTP and the ranks", Gauge::default());
        let responses = own.add("http_responses", "HTTP responses by status", Family::default());
        let phases = own.add("step_phase_seconds", "Time of all steps by what for", Family::default());
        let rank_spans =
            own.add("rank_trace_spans", "Spans of each rank by what became of them", Family::default());
        Self {
            registry: Mutex::new(registry),
            running,
            waiting,
            kv_usage,
            queued_prefill_tokens,
            step_seconds,
            counted: [a, b, c, d, e, steps, f, g, h, i],
            first_token,
            inter_token,
            request,
            prompt_tokens,
            output_tokens,
            success,
            moves,
            in_flight,
            responses,
            phases,
            rank_spans,
            watched: Watched { model, ..Watched::default() },
        }
    }

    /// The figures for whoever watches.
    pub(crate) fn serving(&self) -> ServingReport {
        let watched = &self.watched;
        ServingReport {
            model: watched.model.clone(),
            in_flight: watched.in_flight.load(Ordering::Relaxed),
            ended: watched.ended.load(Ordering::Relaxed),
            moves: self.moves.get(),
            first_token: watched.first_token.counts(),
            inter_token: watched.inter_token.counts(),
            ranks: watched.ranks.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// The sequences that ended last, oldest first.
    pub(crate) fn spans(&self) -> Vec<SequenceSpan> {
        self.watched.spans.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Keeps a sequence that ended.
    pub(crate) fn span(&self, span: SequenceSpan) {
        let mut spans = self.watched.spans.lock().unwrap_or_else(PoisonError::into_inner);
        if spans.len() == SPANS_MAX {
            spans.pop_front();
        }
        spans.push_back(span);
    }

    /// The text of `/metrics`.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().expect("no holder panics");
        encode(&mut text, &registry).expect("writing to a string does not fail");
        text
    }

    pub(crate) fn report(&self, rank: u32, stats: &RankStats) {
        let engine = Engine { engine: rank };
        self.running.get_or_create(&engine).set(stats.running.into());
        self.waiting.get_or_create(&engine).set(stats.waiting.into());
        let usage = f64::from(stats.kv_blocks_used) / f64::from(stats.kv_blocks.max(1));
        self.kv_usage.get_or_create(&engine).set(usage);
        self.queued_prefill_tokens.get_or_create(&engine).set(stats.queued_prefill_tokens as i64);
        self.step_seconds.get_or_create(&engine).set(stats.step_us as f64 / 1e6);
        let counts = [
            stats.prompt_tokens,
            stats.output_tokens,
            stats.preemptions,
            stats.prefix_queries,
            stats.prefix_hits,
            stats.steps,
            stats.transfers.fetches,
            stats.transfers.failures,
            stats.transfers.bytes,
            stats.transfers.us,
        ];
        for (family, count) in self.counted.iter().zip(counts) {
            // A rank that restarts counts from zero, which Prometheus takes for what it is.
            family.get_or_create(&engine).inner().store(count, Ordering::Relaxed);
        }
        for (phase, us) in StepPhases::NAMES.into_iter().zip(stats.phases.values()) {
            let counter = self.phases.get_or_create(&EnginePhase { engine: rank, phase });
            counter.inner().store((us as f64 / 1e6).to_bits(), Ordering::Relaxed);
        }
        self.watched.ranks.lock().unwrap_or_else(PoisonError::into_inner).insert(rank, stats.clone());
    }

    /// Forgets the ranks that are not there any more: their numbers are never used again, and each would leave some thirty
    /// lines behind for ever.
    pub(crate) fn keep(&self, is_there: impl Fn(u32) -> bool) {
        let mut ranks = self.watched.ranks.lock().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<u32> = ranks.keys().copied().filter(|rank| !is_there(*rank)).collect();
        for rank in gone {
            ranks.remove(&rank);
            let engine = Engine { engine: rank };
            for family in [&self.running, &self.waiting, &self.queued_prefill_tokens] {
                family.remove(&engine);
            }
            for family in [&self.kv_usage, &self.step_seconds] {
                family.remove(&engine);
            }
            for family in &self.counted {
                family.remove(&engine);
            }
            let histograms = [
                &self.first_token,
                &self.inter_token,
                &self.request,
                &self.prompt_tokens,
                &self.output_tokens,
            ];
            for family in histograms {
                family.remove(&engine);
            }
            for finished_reason in [Finish::Stop, Finish::Length, Finish::Abort, Finish::Error] {
                self.success.remove(&EngineFinish { engine: rank, finished_reason });
            }
            for phase in StepPhases::NAMES {
                self.phases.remove(&EnginePhase { engine: rank, phase });
            }
            for (outcome, _) in SpanCounts::default().by_outcome() {
                self.rank_spans.remove(&EngineOutcome { engine: rank, outcome });
            }
        }
    }

    /// What became of the spans of a rank's process: nothing is shown where none ever ended.
    pub(crate) fn spans_of(&self, rank: u32, spans: SpanCounts) {
        if spans == SpanCounts::default() {
            return;
        }
        for (outcome, count) in spans.by_outcome() {
            let counter = self.rank_spans.get_or_create(&EngineOutcome { engine: rank, outcome });
            counter.inner().store(count, Ordering::Relaxed);
        }
    }

    /// Tokens of one sequence arrived, the first of them `since` its request or the tokens before.
    pub(crate) fn tokens(&self, rank: u32, tokens: usize, since: Duration, first: bool) {
        let engine = Engine { engine: rank };
        if first {
            self.first_token.get_or_create(&engine).observe(since.as_secs_f64());
            self.watched.first_token.observe(since, 1);
            return;
        }
        self.watched.inter_token.observe(since / tokens.max(1) as u32, tokens as u64);
        let inter_token = self.inter_token.get_or_create(&engine);
        (0..tokens).for_each(|_| inter_token.observe(since.as_secs_f64() / tokens as f64));
    }

    pub(crate) fn finished(&self, sequence: &Finished) {
        self.watched.ended.fetch_add(1, Ordering::Relaxed);
        let engine = Engine { engine: sequence.rank };
        let finished_reason = sequence.finish;
        self.success.get_or_create(&EngineFinish { engine: sequence.rank, finished_reason }).inc();
        self.request.get_or_create(&engine).observe(sequence.duration.as_secs_f64());
        self.prompt_tokens.get_or_create(&engine).observe(sequence.prompt_tokens as f64);
        self.output_tokens.get_or_create(&engine).observe(f64::from(sequence.output_tokens));
    }

    pub(crate) fn dispatch(&self, in_flight: usize, moves: u64) {
        self.in_flight.set(in_flight as i64);
        self.watched.in_flight.store(in_flight as u64, Ordering::Relaxed);
        self.moves.inner().store(moves, Ordering::Relaxed);
    }

    pub(crate) fn response(&self, code: u16) {
        self.responses.get_or_create(&Code { code }).inc();
    }
}

/// The text of `/metrics` about the spans of this process.
pub(super) fn spans_of_process(spans: SpanCounts) -> String {
    let mut registry = Registry::default();
    let family: Family<Outcome, Counter> = Family::default();
    registry.register("heliostat:trace_spans", "Spans of the ingress by what became of them", family.clone());
    for (outcome, count) in spans.by_outcome() {
        family.get_or_create(&Outcome { outcome }).inc_by(count);
    }
    let mut text = String::new();
    encode(&mut text, &registry).expect("writing to a string does not fail");
    text
}

/// A registry whose metrics begin with a prefix.
struct Names<'a> {
    registry: &'a mut Registry,
    prefix: &'static str,
}

impl Names<'_> {
    fn add<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.registry.register(format!("{}{name}", self.prefix), help, metric.clone());
        metric
    }

    fn seconds(&mut self, name: &str, help: &str, histogram: fn() -> Histogram) -> PerEngine<Histogram> {
        self.add(&format!("{name}_seconds"), help, per_engine(histogram))
    }
}

fn per_engine<M>(constructor: fn() -> M) -> PerEngine<M> {
    Family::new_with_constructor(constructor)
}

fn gauge<M: Default>() -> PerEngine<M> {
    per_engine(M::default)
}

fn first_token_histogram() -> Histogram {
    Histogram::new(FIRST_TOKEN_BUCKETS)
}

fn inter_token_histogram() -> Histogram {
    Histogram::new(INTER_TOKEN_BUCKETS)
}

fn request_histogram() -> Histogram {
    Histogram::new(REQUEST_BUCKETS)
}

fn token_histogram() -> Histogram {
    Histogram::new(TOKEN_BUCKETS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_are_gone_leave_no_line() {
        let metrics = Metrics::new("sundial");
        let (duration, finish) = (Duration::from_secs(1), Finish::Length);
        for rank in [1, 2] {
            metrics.report(rank, &RankStats::default());
            metrics.tokens(rank, 1, duration, true);
            metrics.tokens(rank, 1, duration, false);
            metrics.finished(&Finished { rank, finish, duration, prompt_tokens: 7, output_tokens: 3 });
        }
        metrics.keep(|rank| rank == 2);
        let text = metrics.render();
        assert!(text.contains("engine=\"2\"") && !text.contains("engine=\"1\""), "{text}");
        assert_eq!(metrics.serving().ranks.keys().collect::<Vec<_>>(), [&2]);
    }

    #[test]
    fn names_and_labels_are_vllms() {
        let metrics = Metrics::new("sundial");
        let stats =
            RankStats { kv_blocks: 8, kv_blocks_used: 2, prompt_tokens: 7, running: 3, ..Default::default() };
        metrics.report(1, &stats);
        metrics.tokens(1, 1, Duration::from_millis(30), true);
        metrics.tokens(1, 2, Duration::from_millis(30), false);
        let duration = Duration::from_secs(1);
        let finish = Finish::Length;
        metrics.finished(&Finished { rank: 1, finish, duration, prompt_tokens: 7, output_tokens: 3 });
        let text = metrics.render();
        for line in [
            r#"vllm:num_requests_running{model_name="sundial",engine="1"} 3"#,
            r#"vllm:kv_cache_usage_perc{model_name="sundial",engine="1"} 0.25"#,
            r#"vllm:prompt_tokens_total{model_name="sundial",engine="1"} 7"#,
            r#"vllm:time_to_first_token_seconds_bucket{model_name="sundial",le="0.04",engine="1"} 1"#,
            r#"vllm:inter_token_latency_seconds_count{model_name="sundial",engine="1"} 2"#,
            r#"vllm:e2e_request_latency_seconds_count{model_name="sundial",engine="1"} 1"#,
            r#"vllm:request_success_total{model_name="sundial",engine="1",finished_reason="length"} 1"#,
        ] {
            assert!(text.contains(&format!("\n{line}\n")), "{line} is not in\n{text}");
        }
    }
}
