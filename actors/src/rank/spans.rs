//! The rank's part of traces: for each recorded sequence one span, with its wait, its prefill and its decode within it.
//! The steps that worked on it are events with their numbers, by which `helio timeline` shows them.
//!
//! Nothing is kept of sequences whose traces are not recorded.

use std::collections::HashMap;
use std::time::SystemTime;

use heliostat_engine::request::{FinishReason, Output, RequestId};
use opentelemetry::KeyValue;

use crate::ingress::Hex;
use crate::telemetry::{Kind, Provenance, Span, SpanCounts, TraceContext, Tracing};

/// Where the spans of a sequence begin, and when it came to the rank.
#[derive(Clone, Debug)]
pub(super) struct Traced {
    pub(super) context: TraceContext,
    pub(super) arrived: SystemTime,
}

impl Traced {
    /// It comes now.
    pub(super) fn now(from: &Provenance) -> Option<Self> {
        from.trace.clone().map(|context| Self { context, arrived: SystemTime::now() })
    }
}

/// The spans of all recorded sequences of the rank.
pub(super) struct Spans {
    tracing: Tracing,
    rank: u32,
    open: HashMap<RequestId, Open>,
    /// Number of the present step.
    step: u64,
}

struct Open {
    whole: Span,
    /// Queue, prefill or decode.
    part: Option<(Part, Span)>,
    began: SystemTime,
    first_step: Option<u64>,
    steps: i64,
    tokens: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Queue,
    Prefill,
    Decode,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// vLLM's name for how long it took, on the span of the sequence.
    fn latency(self) -> &'static str {
        match self {
            Self::Queue => "gen_ai.latency.time_in_queue",
            Self::Prefill => "gen_ai.latency.time_in_model_prefill",
            Self::Decode => "gen_ai.latency.time_in_model_decode",
        }
    }
}

impl Spans {
    /// None yet.
    pub(super) fn new(tracing: Tracing, rank: u32) -> Self {
        Self { tracing, rank, open: HashMap::new(), step: 0 }
    }

    /// What became of those that ended.
    pub(super) fn counts(&self) -> SpanCounts {
        self.tracing.counts()
    }

    /// Whether no sequence is recorded.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// A sequence was queued, with so many tokens of a prompt and so many that it generated elsewhere.
    pub(super) fn queued(&mut self, id: RequestId, traced: &Traced, (prompt, generated): (usize, usize)) {
        let at = traced.arrived;
        let attributes = vec![
            KeyValue::new("heliostat.sequence", Hex(id).to_string()),
            KeyValue::new("heliostat.rank", i64::from(self.rank)),
            KeyValue::new("gen_ai.usage.prompt_tokens", prompt as i64),
            KeyValue::new("heliostat.generated_before", generated as i64),
        ];
        let what = ("rank.generate", Kind::Server);
        let Some(whole) = self.tracing.under(&traced.context, what, at, attributes) else { return };
        let mut open = Open { whole, part: None, began: at, first_step: None, steps: 0, tokens: 0 };
        open.enter(Part::Queue, at);
        self.open.insert(id, open);
    }

    /// The steps that follow have numbers from this one on.
    pub(super) fn begin_step(&mut self, step: u64) {
        self.step = step;
    }

    /// The present step computes so many tokens of a sequence.
    pub(super) fn scheduled(&mut self, id: RequestId, tokens: usize) {
        let Some(open) = self.open.get_mut(&id) else { return };
        let (step, now) = (self.step, SystemTime::now());
        open.first_step.get_or_insert(step);
        open.steps += 1;
        if open.is_in(Part::Queue) {
            open.enter(Part::Prefill, now);
        }
        if let Some((_, span)) = &mut open.part {
            let tokens = KeyValue::new("heliostat.tokens", tokens as i64);
            span.event("step", now, vec![KeyValue::new("heliostat.step", step as i64), tokens]);
        }
    }

    /// A step brought something to a sequence.
    pub(super) fn brought(&mut self, output: &Output) {
        let Some(open) = self.open.get_mut(&output.id) else { return };
        let now = SystemTime::now();
        open.tokens += output.tokens.len() as i64;
        if !open.is_in(Part::Decode) && !output.tokens.is_empty() {
            let cached = KeyValue::new("heliostat.cached_tokens", i64::from(output.cached_tokens));
            open.whole.set([cached]);
            open.enter(Part::Decode, now);
        }
        if let Some(finish) = &output.finish {
            let (word, failure) = match finish {
                FinishReason::Stop(_) => ("stop", None),
                FinishReason::Length => ("length", None),
                FinishReason::Aborted => ("abort", None),
                FinishReason::Error(why) => ("error", Some(why.clone())),
            };
            self.end(output.id, word, failure);
        }
    }

    /// A sequence was taken away by its ingress.
    pub(super) fn aborted(&mut self, id: RequestId) {
        self.end(id, "abort", None);
    }

    /// The rank left its group in the middle of a step, which is done again when it is back.
    pub(super) fn interrupted(&mut self) {
        let now = SystemTime::now();
        for open in self.open.values_mut() {
            open.whole.event("membership epoch left", now, Vec::new());
        }
    }

    fn end(&mut self, id: RequestId, finish: &'static str, failure: Option<String>) {
        let Some(mut open) = self.open.remove(&id) else { return };
        let now = SystemTime::now();
        open.leave(now);
        open.whole.set([
            KeyValue::new("gen_ai.usage.completion_tokens", open.tokens),
            KeyValue::new("heliostat.finish_reason", finish),
            KeyValue::new("heliostat.steps", open.steps),
        ]);
        open.whole.set(open.first_step.map(|first| KeyValue::new("heliostat.step.first", first as i64)));
        open.whole.set(open.first_step.map(|_| KeyValue::new("heliostat.step.last", self.step as i64)));
        if let Some(why) = failure {
            open.whole.fail(why);
        }
        open.whole.end(now);
    }
}

impl Open {
    fn is_in(&self, part: Part) -> bool {
        self.part.as_ref().is_some_and(|(present, _)| *present == part)
    }

    fn enter(&mut self, part: Part, now: SystemTime) {
        self.leave(now);
        self.began = now;
        self.part = self.whole.child((part.name(), Kind::Internal), now, Vec::new()).map(|span| (part, span));
    }

    fn leave(&mut self, now: SystemTime) {
        let Some((part, span)) = self.part.take() else { return };
        // A clock that was set back has taken no time.
        let took = now.duration_since(self.began).unwrap_or_default().as_secs_f64();
        self.whole.set([KeyValue::new(part.latency(), took)]);
        span.end(now);
    }
}
