//! A recording of single steps, for `helio timeline`. Off it costs nothing; on it is bounded.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use heliostat_kernels::fabric::{Kind, Wait};

use crate::monitor::trace::{RankTrace, STEPS_MAX, StepSpan, WaitSpan};

/// Records while it is on.
#[derive(Debug, Default)]
pub(super) struct Recorder(Option<Recording>);

#[derive(Debug)]
struct Recording {
    steps_max: usize,
    /// The same moment on both clocks: spans are told by the one that other processes know.
    began: (Instant, Duration),
    trace: RankTrace,
}

impl Recorder {
    /// From now on, at most so many steps.
    pub(super) fn start(&mut self, steps_max: usize) {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (began, trace) = ((Instant::now(), wall), RankTrace::default());
        self.0 = Some(Recording { steps_max: steps_max.min(STEPS_MAX), began, trace });
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// A step that began then, with its waits for other ranks.
    pub(super) fn step(&mut self, began: Instant, span: StepSpan, waits: Vec<Wait>) {
        let Some(recording) = &mut self.0 else { return };
        if recording.trace.steps.len() == recording.steps_max {
            recording.trace.dropped += 1;
            return;
        }
        let (instant, wall) = recording.began;
        let unix_us = |at: Instant| (wall + at.saturating_duration_since(instant)).as_micros() as u64;
        let wait = |wait: Wait| WaitSpan {
            kind: match wait.tag.kind {
                Kind::Header => WaitSpan::HEADER,
                Kind::Dispatch => WaitSpan::DISPATCH,
                Kind::Combine => WaitSpan::COMBINE,
            },
            layer: wait.tag.layer,
            from: wait.from as u32,
            began_us: unix_us(wait.began),
            took_us: wait.took.as_micros() as u64,
        };
        let waits = waits.into_iter().map(wait).collect();
        recording.trace.steps.push(StepSpan { began_us: unix_us(began), waits, ..span });
    }

    /// Ends the recording.
    pub(super) fn take(&mut self, rank: u32) -> RankTrace {
        let trace = self.0.take().map(|recording| recording.trace).unwrap_or_default();
        RankTrace { rank, ..trace }
    }
}
