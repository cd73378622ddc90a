//! A submitted request under way: waits for the ranks, turns tokens into text, counts the usage.

use std::pin::Pin;
use std::time::Duration;

use heliostat_engine::request::{Output, TokenLogprob};
use serde::Serialize;
use tokio::time::Sleep;

use crate::ingress::dispatch::Failure;
use crate::ingress::handle::{Event, Generation};
use crate::ingress::metrics::Finish;
use crate::ingress::server::RequestLimit;
use crate::ingress::text::{Delta, Ending, SequenceText};

/// All sequences of a request. Dropping it aborts them.
pub(super) struct Run {
    generation: Generation,
    sequences: Vec<Sequence>,
    choices: usize,
    prompt_tokens: usize,
    limit: Option<(Pin<Box<Sleep>>, Duration)>,
}

struct Sequence {
    text: SequenceText,
    cached_tokens: u32,
    /// The client has seen something of it.
    begun: bool,
}

/// What one or more steps added to one sequence.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) index: usize,
    pub(super) delta: Delta,
    /// It is the first of this sequence.
    pub(super) first: bool,
    /// Of the prompt, once, if asked for.
    pub(super) prompt_logprobs: Option<Vec<TokenLogprob>>,
}

/// OpenAI's `usage`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) total_tokens: usize,
    pub(super) prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct PromptTokensDetails {
    pub(super) cached_tokens: usize,
}

impl Run {
    /// `choices` sequences of each prompt; the prompts have `prompt_tokens` together.
    pub(super) fn new(
        generation: Generation,
        texts: Vec<SequenceText>,
        (choices, prompt_tokens): (usize, usize),
        limit: Option<RequestLimit>,
    ) -> Self {
        let sequence = |text| Sequence { text, cached_tokens: 0, begun: false };
        let sequences = texts.into_iter().map(sequence).collect();
        let limit = limit.map(|(until, time)| (Box::pin(tokio::time::sleep_until(until)), time));
        Self { generation, sequences, choices, prompt_tokens, limit }
    }

    /// Waits until some sequences have something to show, and returns all there is; nothing at the end.
    pub(super) async fn next(&mut self) -> Result<Vec<Progress>, Failure> {
        loop {
            let events = match &mut self.limit {
                None => self.generation.next().await,
                Some((over, time)) => tokio::select! {
                    // First, so that it ends a request for whose client there is always something.
                    biased;
                    () = over => return Err(Failure::TimedOut(*time)),
                    events = self.generation.next() => events,
                },
            };
            if events.is_empty() {
                return Ok(Vec::new());
            }
            let progress = self.take(events)?;
            if !progress.is_empty() {
                return Ok(progress);
            }
        }
    }

    /// One [`Progress`] for each sequence that `events` let show something, in order of index.
    fn take(&mut self, events: Vec<(usize, Event)>) -> Result<Vec<Progress>, Failure> {
        let mut progress: Vec<Progress> = Vec::new();
        for (index, event) in events {
            let output = match event {
                Event::Output(_, output) => output,
                Event::Failed(failure) => {
                    self.generation.close(index, Finish::Error, self.sequences[index].text.tokens());
                    return Err(failure);
                }
            };
            let at = progress.binary_search_by_key(&index, |progress| progress.index).unwrap_or_else(|at| {
                progress.insert(at, Progress { index, ..Progress::default() });
                at
            });
            self.take_output(output, &mut progress[at]);
        }
        progress.retain(|progress| {
            let Progress { delta, prompt_logprobs, .. } = progress;
            !delta.text.is_empty()
                || !delta.pieces.is_empty()
                || delta.ending.is_some()
                || prompt_logprobs.is_some()
        });
        for progress in &mut progress {
            let sequence = &mut self.sequences[progress.index];
            progress.first = !std::mem::replace(&mut sequence.begun, true);
        }
        Ok(progress)
    }

    fn take_output(&mut self, mut output: Output, progress: &mut Progress) {
        let sequence = &mut self.sequences[progress.index];
        sequence.cached_tokens = sequence.cached_tokens.max(output.cached_tokens);
        progress.prompt_logprobs = progress.prompt_logprobs.take().or(output.prompt_logprobs.take());
        sequence.text.push(&output, &mut progress.delta);
        let finish = match &progress.delta.ending {
            Some(Ending::StopString(_) | Ending::StopToken(_)) => Finish::Stop,
            Some(Ending::Length) => Finish::Length,
            None => return,
        };
        self.generation.close(progress.index, finish, sequence.text.tokens());
    }

    /// Prompts count once each, whatever the number of choices.
    pub(super) fn usage(&self) -> Usage {
        let completion_tokens = self.sequences.iter().map(|sequence| sequence.text.tokens() as usize).sum();
        let cached_tokens =
            self.sequences.iter().step_by(self.choices).map(|first| first.cached_tokens as usize).sum();
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            total_tokens: self.prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

impl Usage {
    /// The usage of an answer that generates nothing (echo alone).
    pub(super) fn without_output(self) -> Self {
        Self { completion_tokens: 0, total_tokens: self.prompt_tokens, ..self }
    }
}
