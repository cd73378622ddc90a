//! One sequence's share of a step: how it is put into the step, and what its result means for the sequence.

use crate::batch::{BatchSeq, DeviceSampling, Drawn, Feed, LogitRows, PLACEHOLDER, Sampling, Step};
use crate::grammar::Constraint;
use crate::request::{FinishReason, Output};
use crate::sampler::{Draw, SampleError, Sampler, TEMPERATURE_MIN, token_logprob, uniform};

use super::sequence::Sequence;

/// Rows of one step that get logits for prompt log-probabilities, at most, over all sequences: a row is a whole
/// vocabulary of floats. Each other sequence of a step wants one row at most.
pub const PROMPT_LOGPROB_ROWS_MAX: usize = 512;

/// What the computing of a share left.
#[derive(Debug)]
pub(super) enum Found<'a> {
    /// The logits that its `LogitRows` ask for.
    Logits(Vec<&'a [f32]>),
    /// The device's draw.
    Drawn(&'a Result<Drawn, SampleError>),
}

/// Tokens that a sequence computes at this step, out of `budget`; `prompt_rows` are left for prompt log-probabilities.
pub(super) fn chunk(sequence: &Sequence, budget: usize, prompt_rows: &mut usize) -> usize {
    let len = sequence.remaining().min(budget);
    if !sequence.owes_prompt_logprobs() {
        return len;
    }
    let len = len.min(*prompt_rows);
    *prompt_rows -= len;
    len
}

/// A step to which shares are added.
#[derive(Debug, Default)]
pub(super) struct StepBuilder {
    step: Step,
    device_draws: u32,
}

impl StepBuilder {
    /// Appends the next `len` tokens of a sequence.
    pub(super) fn push(&mut self, sequence: &mut Sequence, len: usize) {
        let context = sequence.scheduled;
        let end = context + len;
        let draws = sequence.remaining() == len;
        // After a preemption some prompt log-probabilities may be known although their positions are computed again.
        let logits = if sequence.owes_prompt_logprobs() && end > sequence.prompt_logprobs_ahead() {
            LogitRows::All
        } else if draws {
            LogitRows::Last
        } else {
            LogitRows::None
        };
        let batch = &mut self.step.batch;
        let start = batch.tokens.len();
        if sequence.pending == 0 {
            batch.tokens.extend_from_slice(&sequence.tokens[context..end]);
        } else {
            assert_eq!(context, end - 1, "all but the last pending draw is computed");
            let draw = sequence.device_draw.expect("who waits for the host's draw is not scheduled ahead");
            self.step.feeds.push(Feed { row: start as u32, draw });
            batch.tokens.push(PLACEHOLDER);
        }
        batch.positions.extend((context..end).map(|position| position as u32));
        let expanded = sequence.expanded(context, len);
        batch.seqs.push(BatchSeq {
            start,
            len,
            context,
            block_table: sequence.table.clone(),
            logits,
            expanded,
        });
        let sampling = sampling(sequence, logits);
        self.step.sampling.push(sampling);
        sequence.scheduled = end;
        if draws {
            sequence.pending += 1;
            sequence.device_draw = matches!(sampling, Sampling::Device(_)).then_some(self.device_draws);
        }
        self.device_draws += u32::from(matches!(sampling, Sampling::Device(_)));
    }

    pub(super) fn build(self) -> Step {
        self.step
    }
}

/// Where the logits of the share that is being scheduled are used.
fn sampling(sequence: &Sequence, logits: LogitRows) -> Sampling {
    let request = &sequence.request;
    let params = &request.sampling;
    let position = sequence.output().len() + sequence.pending;
    let penalties =
        params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
    let forbids = forbidden(sequence, position).into_iter().any(|tokens| !tokens.is_empty());
    // Where the last chunk of such a prompt begins depends on the batch, and the draw must not: the host draws it always.
    let after_prompt = request.prompt_logprobs.is_some() && position == 0;
    let constrained = sequence.constraint.is_some();
    let adjusted = penalties || forbids || after_prompt || constrained || !params.logit_bias.is_empty();
    match logits {
        LogitRows::None => Sampling::None,
        LogitRows::All => Sampling::Host,
        LogitRows::Last if adjusted || position >= request.stop.max_tokens as usize => Sampling::Host,
        LogitRows::Last => {
            let greedy = params.temperature < TEMPERATURE_MIN;
            Sampling::Device(DeviceSampling {
                temperature: if greedy { 0.0 } else { params.temperature },
                top_k: params.top_k,
                top_p: params.top_p,
                min_p: params.min_p,
                uniform: if greedy { 0.0 } else { uniform(params.seed, position as u64) },
                logprobs: request.logprobs,
            })
        }
    }
}

/// What a computed share means for its sequence: prompt log-probabilities and, at the end of the known tokens, a draw.
/// A sequence whose logits are unusable ends with an error; the others do not notice.
pub(super) fn advance(
    sequence: &mut Sequence,
    share: &BatchSeq,
    found: &Found,
    sampler: &mut Sampler,
    max_len: usize,
) -> Option<Output> {
    let first_index = sequence.output().len() as u32;
    let draws = sequence.computed == sequence.tokens.len();
    if draws {
        sequence.pending -= 1;
    }
    let recorded = match found {
        Found::Logits(rows) if share.logits == LogitRows::All => record_prompt(sequence, share, rows),
        Found::Logits(_) | Found::Drawn(_) => Ok(()),
    };
    let drawn = match (recorded, found) {
        (Ok(()), _) if !draws => return None,
        (Ok(()), Found::Logits(rows)) => {
            draw(sequence, rows.last().expect("the last token has logits"), sampler)
        }
        (Ok(()), Found::Drawn(drawn)) => (*drawn).clone().map(Some),
        (Err(error), _) => Err(error),
    };
    let mut output = Output {
        id: sequence.id(),
        first_index,
        tokens: Vec::new(),
        logprobs: Vec::new(),
        prompt_logprobs: None,
        cached_tokens: sequence.cached_tokens.unwrap_or(0) as u32,
        finish: None,
    };
    match drawn {
        Ok(Some(Drawn { token, logprob })) => {
            sequence.tokens.push(token);
            output.tokens.push(token);
            output.logprobs.extend(logprob);
            output.prompt_logprobs = sequence.prompt_logprobs.take();
            output.finish = sequence.finish(max_len);
        }
        Ok(None) => {
            output.prompt_logprobs = sequence.prompt_logprobs.take();
            output.finish = Some(FinishReason::Length);
        }
        Err(error) => output.finish = Some(FinishReason::Error(error.to_string())),
    }
    Some(output)
}

/// The row of position `p` tells how likely prompt token `p + 1` was.
fn record_prompt(sequence: &mut Sequence, share: &BatchSeq, rows: &[&[f32]]) -> Result<(), SampleError> {
    let Some(done) = &mut sequence.prompt_logprobs else {
        return Ok(());
    };
    let request = &sequence.request;
    let top = request.prompt_logprobs.unwrap_or(0);
    for (position, row) in (share.context..).zip(rows) {
        if let Some(&token) = request.prompt.get(position + 1)
            && position == done.len()
        {
            done.push(token_logprob(row, token, top)?);
        }
    }
    Ok(())
}

/// Draws the next token; `None` when no output is wanted.
fn draw(sequence: &mut Sequence, row: &[f32], sampler: &mut Sampler) -> Result<Option<Drawn>, SampleError> {
    let mut constraint = sequence.constraint.take();
    let drawn = draw_from(sequence, constraint.as_mut(), row, sampler);
    sequence.constraint = constraint;
    drawn
}

fn draw_from(
    sequence: &Sequence,
    mut constraint: Option<&mut Constraint>,
    row: &[f32],
    sampler: &mut Sampler,
) -> Result<Option<Drawn>, SampleError> {
    let request = &sequence.request;
    let output = sequence.output();
    if output.len() >= request.stop.max_tokens as usize {
        return Ok(None);
    }
    let token = sampler.draw(&Draw {
        logits: row,
        params: &request.sampling,
        prompt: &request.prompt,
        output,
        position: output.len() as u64,
        forbidden: forbidden(sequence, output.len()),
        mask: constraint.as_mut().map(|constraint| constraint.mask()).transpose()?,
    })?;
    if let Some(constraint) = constraint {
        constraint.accept(token)?;
    }
    let logprob = request.logprobs.map(|top| token_logprob(row, token, top)).transpose()?;
    Ok(Some(Drawn { token, logprob }))
}

/// Tokens that must not be drawn as the output token at `position`.
fn forbidden(sequence: &Sequence, position: usize) -> [&[u32]; 2] {
    let stop = &sequence.request.stop;
    if position < stop.min_tokens as usize {
        [stop.eos_token_ids.as_slice(), stop.stop_token_ids.as_slice()]
    } else {
        [[].as_slice(); 2]
    }
}
