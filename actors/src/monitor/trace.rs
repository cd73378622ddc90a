//! Recordings of steps and sequences, and how they look in Chrome's trace format, which Perfetto reads as well.
//!
//! Pure. Spans are told in microseconds since the Unix epoch: those of several machines lie beside each other as well as
//! their clocks agree.

use bincode::{Decode, Encode};
use heliostat_engine::request::StepPhases;
use serde_json::{Value as Json, json};

use crate::eplb::{EplbStatus, Remap};

/// Longest recording of a rank, in steps.
pub const STEPS_MAX: usize = 20_000;

/// What a rank recorded.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct RankTrace {
    /// The rank.
    pub rank: u32,
    /// Its steps, oldest first.
    pub steps: Vec<StepSpan>,
    /// Steps that found no room.
    pub dropped: u64,
}

/// One step of a rank.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct StepSpan {
    /// Its number since the rank's start.
    pub step: u64,
    /// When it began.
    pub began_us: u64,
    /// How long it took; the wait for the headers lies before it.
    pub took_us: u64,
    /// By what.
    pub phases: StepPhases,
    /// Sequences and rows of its batch; none on a rank that only has experts.
    pub seqs: u32,
    /// See `seqs`.
    pub tokens: u32,
    /// The map in force: epoch of the last plan, and how many of its layers were committed.
    pub map: (u64, u32),
    /// Waits for frames of other ranks.
    pub waits: Vec<WaitSpan>,
}

/// A wait for one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct WaitSpan {
    /// Which kind of frame.
    pub kind: u8,
    /// MoE layer.
    pub layer: u32,
    /// The rank that sent it.
    pub from: u32,
    /// When the wait began.
    pub began_us: u64,
    /// How long it took.
    pub took_us: u64,
}

/// How far one sequence came, from HTTP to its end.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct SequenceSpan {
    /// Its id, hexadecimal.
    pub id: String,
    /// Rank of its last tokens.
    pub rank: u32,
    /// When its request arrived.
    pub arrived_us: u64,
    /// When its first token was there.
    pub first_token_us: Option<u64>,
    /// When it ended.
    pub ended_us: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Tokens that it generated.
    pub output_tokens: u32,
    /// How it ended, in vLLM's word.
    pub finish: String,
}

/// Everything of one recording.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// From then on.
    pub from_us: u64,
    /// By the names of the ranks' actors.
    pub ranks: Vec<(String, RankTrace)>,
    /// By the names of the ingresses.
    pub requests: Vec<(String, Vec<SequenceSpan>)>,
    /// By the names of the EPLB actors.
    pub maps: Vec<(String, EplbStatus)>,
}

impl WaitSpan {
    /// A header, which every rank sends to every other before a step.
    pub const HEADER: u8 = 1;
    /// Rows for this rank's experts.
    pub const DISPATCH: u8 = 2;
    /// Rows that come back from experts.
    pub const COMBINE: u8 = 3;

    fn name(&self) -> &'static str {
        match self.kind {
            Self::DISPATCH => "wait for dispatch",
            Self::COMBINE => "wait for combine",
            _ => "wait for headers",
        }
    }
}

impl StepSpan {
    /// A step of which is not known yet when it began.
    pub fn new(
        step: u64,
        took: std::time::Duration,
        phases: StepPhases,
        (seqs, tokens): (u32, u32),
        map: (u64, u32),
    ) -> Self {
        let took_us = took.as_micros() as u64;
        Self { step, took_us, phases, seqs, tokens, map, ..Self::default() }
    }
}

/// Events of the trace; each is an object of Chrome's format.
struct Events(Vec<Json>);

impl Events {
    /// A process with its threads, which are the rows that one sees.
    fn name(&mut self, pid: usize, name: &str, threads: &[(u64, &str)]) {
        self.0.push(json!({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}));
        self.0
            .push(json!({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}));
        for (tid, name) in threads {
            let args = json!({"name": name});
            self.0.push(json!({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": args}));
        }
    }

    fn span(&mut self, row: (usize, u64), name: &str, (at, took): (u64, u64), args: Json) {
        let (pid, tid) = row;
        self.0.push(
            json!({"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": at, "dur": took, "args": args}),
        );
    }
}

/// The recording in Chrome's trace format: `chrome://tracing` and Perfetto open it.
pub fn chrome(recording: &Recording) -> Json {
    let mut events = Events(Vec::new());
    for (pid, (name, trace)) in (1..).zip(&recording.ranks) {
        events.name(pid, name, &[(1, "steps"), (2, "exchange")]);
        trace.steps.iter().for_each(|step| steps(&mut events, pid, step));
        commits(&mut events, pid, &trace.steps);
    }
    let pid = recording.ranks.len() + 1;
    for (pid, (name, status)) in (pid..).zip(&recording.maps) {
        events.name(pid, name, &[(1, "remaps")]);
        let remaps = status.open.iter().chain(&status.history);
        remaps.for_each(|remap| remapped(&mut events, pid, remap, recording.from_us));
    }
    let pid = pid + recording.maps.len();
    for (pid, (name, requests)) in (pid..).zip(&recording.requests) {
        events.name(pid, name, &[]);
        sequences(&mut events, pid, requests, recording.from_us);
    }
    let dropped: u64 = recording.ranks.iter().map(|(_, trace)| trace.dropped).sum();
    json!({
        "traceEvents": events.0,
        "displayTimeUnit": "ms",
        "otherData": {"heliostat_version": env!("CARGO_PKG_VERSION"), "steps_dropped": dropped},
    })
}

/// A step, its parts within, and the waits for other ranks in a row of their own.
fn steps(events: &mut Events, pid: usize, step: &StepSpan) {
    let args = json!({
        "step": step.step, "sequences": step.seqs, "tokens": step.tokens,
        "map_epoch": step.map.0, "layers_committed": step.map.1,
    });
    events.span((pid, 1), "step", (step.began_us, step.took_us), args);
    let parts = [
        ("schedule", step.phases.schedule),
        ("model", step.phases.compute + step.phases.dispatch + step.phases.combine),
        ("sample", step.phases.sample),
    ];
    let mut at = step.began_us;
    for (name, took) in parts.into_iter().filter(|(_, took)| *took > 0) {
        // Rounding must not let a part end after its step: viewers drop what is not nested.
        let took = took.min((step.began_us + step.took_us).saturating_sub(at));
        events.span((pid, 1), name, (at, took), json!({}));
        at += took;
    }
    for wait in &step.waits {
        let args = json!({"layer": wait.layer, "from_rank": wait.from});
        events.span((pid, 2), wait.name(), (wait.began_us, wait.took_us), args);
    }
}

/// Where the map of a rank changed.
fn commits(events: &mut Events, pid: usize, steps: &[StepSpan]) {
    for pair in steps.windows(2).filter(|pair| pair[0].map != pair[1].map) {
        let (epoch, layers) = pair[1].map;
        events.0.push(json!({
            "ph": "i", "s": "p", "name": format!("map epoch {epoch}: {layers} layers committed"),
            "pid": pid, "tid": 1, "ts": pair[1].began_us,
        }));
    }
}

fn remapped(events: &mut Events, pid: usize, remap: &Remap, from_us: u64) {
    let (at, took) = (remap.started_at_ms * 1000, remap.duration_ms * 1000);
    if at + took >= from_us {
        let name = format!("remap {}", remap.epoch);
        events.span((pid, 1), &name, (at, took), serde_json::to_value(remap).unwrap_or_default());
    }
}

/// Sequences in as few rows as they fit in side by side.
fn sequences(events: &mut Events, pid: usize, spans: &[SequenceSpan], from_us: u64) {
    let mut spans: Vec<&SequenceSpan> = spans.iter().filter(|span| span.ended_us >= from_us).collect();
    spans.sort_by_key(|span| span.arrived_us);
    let mut rows: Vec<u64> = Vec::new();
    for span in spans {
        let free = rows.iter().position(|&until| until <= span.arrived_us);
        let row = free.unwrap_or_else(|| {
            rows.push(0);
            rows.len() - 1
        });
        rows[row] = span.ended_us;
        let (row, took) = ((pid, row as u64 + 1), span.ended_us.saturating_sub(span.arrived_us));
        let args = json!({
            "id": span.id, "rank": span.rank, "prompt_tokens": span.prompt_tokens,
            "output_tokens": span.output_tokens, "finished_reason": span.finish,
        });
        events.span(row, "sequence", (span.arrived_us, took), args);
        if let Some(first) = span.first_token_us {
            events.span(row, "to first token", (span.arrived_us, first - span.arrived_us), json!({}));
            events.span(row, "decode", (first, span.ended_us.saturating_sub(first)), json!({}));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_nest_and_sequences_lie_side_by_side() {
        let phases = StepPhases { schedule: 10, compute: 50, dispatch: 20, sample: 40, ..Default::default() };
        let wait = WaitSpan { kind: WaitSpan::DISPATCH, layer: 3, from: 1, began_us: 1_020, took_us: 20 };
        let step = |step, began_us, map| StepSpan {
            step,
            began_us,
            took_us: 110,
            phases,
            map,
            waits: vec![wait],
            ..Default::default()
        };
        let steps = vec![step(1, 1_000, (0, 0)), step(2, 2_000, (1, 4))];
        let sequence = |arrived_us, ended_us| SequenceSpan {
            arrived_us,
            first_token_us: Some(arrived_us + 5),
            ended_us,
            ..Default::default()
        };
        let requests =
            vec![sequence(1_000, 2_000), sequence(1_500, 1_900), sequence(2_000, 2_100), sequence(1, 2)];
        let recording = Recording {
            from_us: 900,
            ranks: vec![("rank-0".into(), RankTrace { rank: 0, steps, dropped: 0 })],
            requests: vec![("ingress".into(), requests)],
            maps: Vec::new(),
        };
        let trace = chrome(&recording);
        let events = trace["traceEvents"].as_array().unwrap();
        let named = |name: &str| events.iter().filter(|event| event["name"] == name).collect::<Vec<_>>();
        assert_eq!(named("step").len(), 2);
        // 10 + 70 + 40 is more than the 110 of the step: the last part is cut.
        let (step, sample) = (named("step")[0], named("sample")[0]);
        let end = |event: &Json| event["ts"].as_u64().unwrap() + event["dur"].as_u64().unwrap();
        assert_eq!(end(step), end(sample));
        assert_eq!(named("wait for dispatch")[0]["args"]["layer"], 3);
        assert_eq!(named("map epoch 1: 4 layers committed").len(), 1);
        let rows: Vec<u64> = named("sequence").iter().map(|event| event["tid"].as_u64().unwrap()).collect();
        assert_eq!(rows, [1, 2, 1], "the oldest one ended before the recording");
    }
}
