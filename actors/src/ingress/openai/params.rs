//! The fields that both endpoints share: sampling, stopping, streaming. Checked against the model's limits.

use std::collections::BTreeMap;

use heliostat_engine::grammar::Grammar;
use heliostat_engine::request::{SamplingParams, StopConditions};
use serde::Deserialize;

use crate::ingress::error::ApiError;
use crate::ingress::model::ServedModel;
use crate::ingress::text::TextOptions;

use super::body::{Body, Refusal, empty, never};
use super::structured::{self, Structured};

/// Log-probabilities of at most this many alternatives.
pub(super) const TOP_LOGPROBS_MAX: u32 = 20;
const CHOICES_MAX: u32 = 128;
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;

/// Documented fields of both endpoints that are not supported.
pub(super) const REFUSED: &[Refusal] = &[
    Refusal { field: "use_beam_search", neutral: empty, instead: "" },
    Refusal { field: "logits_processors", neutral: empty, instead: "" },
    Refusal { field: "allowed_token_ids", neutral: empty, instead: "Use `logit_bias`." },
    Refusal { field: "bad_words", neutral: empty, instead: "Use `logit_bias`." },
    Refusal { field: "truncate_prompt_tokens", neutral: never, instead: "Shorten the prompt." },
    Refusal { field: "return_tokens_as_token_ids", neutral: empty, instead: "" },
    Refusal { field: "return_token_ids", neutral: empty, instead: "" },
];

/// OpenAI's and vLLM's fields for how tokens are drawn and when to stop.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Params {
    model: Option<String>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<i64>,
    logit_bias: Option<BTreeMap<String, f32>>,
    n: Option<u32>,
    best_of: Option<u32>,
    stop: Option<Stop>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    min_tokens: Option<u32>,
    include_stop_str_in_output: Option<bool>,
    skip_special_tokens: Option<bool>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    prompt_logprobs: Option<i64>,
    priority: Option<i32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string or an array of strings")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// How an answer is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// In one piece.
    Whole,
    /// As server-sent events.
    Stream { usage: ShownUsage },
}

/// Where a stream shows the usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ShownUsage {
    #[default]
    Nowhere,
    /// In a last chunk of its own.
    AtEnd,
    /// In every chunk (vLLM's `continuous_usage_stats`), and at the end.
    Always,
}

impl Params {
    pub(super) fn check_model(&self, model: &ServedModel) -> Result<(), ApiError> {
        match &self.model {
            Some(name) if !model.is_called(name) => Err(ApiError::no_such_model(name, model.name())),
            _ => Ok(()),
        }
    }

    pub(super) fn sampling(&self, model: &ServedModel) -> Result<SamplingParams, ApiError> {
        let defaults = &model.defaults;
        let temperature = self.temperature.or(defaults.temperature).unwrap_or(1.0);
        let top_k = match self.top_k {
            Some(top_k) if top_k < -1 || top_k > i64::from(u32::MAX) => {
                return Err(ApiError::invalid(
                    "top_k",
                    format!("`top_k` is {top_k}, but must be -1, 0 or positive."),
                ));
            }
            Some(top_k) => top_k.max(0) as u32,
            None => defaults.top_k.unwrap_or(0),
        };
        Ok(SamplingParams {
            temperature: within("temperature", temperature, 0.0..=2.0)?,
            top_p: within("top_p", self.top_p.or(defaults.top_p).unwrap_or(1.0), f32::MIN_POSITIVE..=1.0)?,
            top_k,
            min_p: within("min_p", self.min_p.or(defaults.min_p).unwrap_or(0.0), 0.0..=1.0)?,
            repetition_penalty: within(
                "repetition_penalty",
                self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
                f32::MIN_POSITIVE..=f32::MAX,
            )?,
            presence_penalty: within("presence_penalty", self.presence_penalty.unwrap_or(0.0), -2.0..=2.0)?,
            frequency_penalty: within(
                "frequency_penalty",
                self.frequency_penalty.unwrap_or(0.0),
                -2.0..=2.0,
            )?,
            seed: self.seed.map_or_else(rand::random, |seed| seed as u64),
            logit_bias: self.logit_bias(model.vocab_size)?,
        })
    }

    fn logit_bias(&self, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let biases = self.logit_bias.iter().flatten();
        let parsed = biases.map(|(token, &bias)| {
            let id = token.parse().ok().filter(|&id: &u32| (id as usize) < vocab_size);
            let unknown =
                || format!("`logit_bias` has key `{token}`, but keys must be token ids below {vocab_size}.");
            let id = id.ok_or_else(|| ApiError::invalid("logit_bias", unknown()))?;
            Ok((id, within("logit_bias", bias, -100.0..=100.0)?))
        });
        parsed.collect()
    }

    /// When a sequence ends that may have `max_tokens`.
    pub(super) fn stop_conditions(
        &self,
        model: &ServedModel,
        max_tokens: u32,
    ) -> Result<StopConditions, ApiError> {
        let min_tokens = self.min_tokens.unwrap_or(0);
        if min_tokens > max_tokens {
            let message =
                format!("`min_tokens` is {min_tokens}, but at most {max_tokens} tokens are generated.");
            return Err(ApiError::invalid("min_tokens", message));
        }
        let stop_token_ids = self.stop_token_ids.clone().unwrap_or_default();
        if let Some(token) = stop_token_ids.iter().find(|&&token| token as usize >= model.vocab_size) {
            let message =
                format!("`stop_token_ids` has {token}, but token ids must be below {}.", model.vocab_size);
            return Err(ApiError::invalid("stop_token_ids", message));
        }
        let eos = if self.ignore_eos == Some(true) { &[][..] } else { &model.defaults.eos_token_ids };
        Ok(StopConditions { max_tokens, min_tokens, eos_token_ids: eos.to_vec(), stop_token_ids })
    }

    pub(super) fn text_options(&self) -> Result<TextOptions, ApiError> {
        let stop = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.clone()],
            Some(Stop::Many(stops)) => stops.clone(),
        };
        let problem = if stop.len() > STOPS_MAX {
            Some(format!("`stop` has {} strings, but at most {STOPS_MAX} are allowed.", stop.len()))
        } else if stop.iter().any(String::is_empty) {
            Some("`stop` has an empty string, which would end every text.".to_owned())
        } else if stop.iter().any(|stop| stop.len() > STOP_BYTES_MAX) {
            Some(format!("`stop` has a string of more than {STOP_BYTES_MAX} bytes."))
        } else {
            None
        };
        if let Some(message) = problem {
            return Err(ApiError::invalid("stop", message));
        }
        Ok(TextOptions {
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
            stop,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            min_tokens: self.min_tokens.unwrap_or(0),
        })
    }

    /// Sequences of each prompt, and how many of them the client gets.
    pub(super) fn choices(&self, delivery: Delivery) -> Result<(usize, usize), ApiError> {
        let n = self.n.unwrap_or(1);
        if !(1..=CHOICES_MAX).contains(&n) {
            return Err(ApiError::invalid(
                "n",
                format!("`n` is {n}, but must be between 1 and {CHOICES_MAX}."),
            ));
        }
        let best_of = self.best_of.unwrap_or(n);
        if !(n..=CHOICES_MAX).contains(&best_of) {
            let message = format!("`best_of` is {best_of}, but must be between `n`, {n}, and {CHOICES_MAX}.");
            return Err(ApiError::invalid("best_of", message));
        }
        if best_of > n && delivery != Delivery::Whole {
            let message =
                "`best_of` above `n` is not possible when `stream` is true: the best are known at the end.";
            return Err(ApiError::invalid("best_of", message));
        }
        Ok((best_of as usize, n as usize))
    }

    pub(super) fn delivery(&self) -> Result<Delivery, ApiError> {
        let usage = self.stream_options.as_ref().map(|options| {
            match (options.include_usage == Some(true), options.continuous_usage_stats == Some(true)) {
                (true, true) => ShownUsage::Always,
                (true, false) => ShownUsage::AtEnd,
                // As in vLLM, the one is nothing without the other.
                (false, _) => ShownUsage::Nowhere,
            }
        });
        match (self.stream == Some(true), usage) {
            (true, usage) => Ok(Delivery::Stream { usage: usage.unwrap_or_default() }),
            (false, None) => Ok(Delivery::Whole),
            (false, Some(_)) => {
                let message = "`stream_options` is only allowed when `stream` is true.";
                Err(ApiError::invalid("stream_options", message))
            }
        }
    }

    /// vLLM's prompt log-probabilities, for the answer in one piece.
    pub(super) fn prompt_logprobs(&self, delivery: Delivery) -> Result<Option<u32>, ApiError> {
        let Some(count) = self.prompt_logprobs else { return Ok(None) };
        if delivery != Delivery::Whole {
            let message = "`prompt_logprobs` is not available when `stream` is true.";
            return Err(ApiError::invalid("prompt_logprobs", message));
        }
        top_count("prompt_logprobs", count).map(Some)
    }

    pub(super) fn priority(&self) -> i32 {
        self.priority.unwrap_or(0)
    }
}

/// What the output must look like: by the endpoint's own grammar, or by what the client asked for.
pub(super) fn grammar(
    body: &Body,
    model: &ServedModel,
    own: Option<(&'static str, Grammar)>,
) -> Result<Option<Grammar>, ApiError> {
    let asked = body.fields::<Structured>()?.grammar()?;
    if let (Some((own, _)), Some((asked, _))) = (&own, &asked) {
        let message = format!("Only one grammar is possible, but `{own}` and `{asked}` both ask for one.");
        return Err(ApiError::invalid(*asked, message));
    }
    let Some((param, grammar)) = own.or(asked) else { return Ok(None) };
    structured::check(model, param, &grammar)?;
    Ok(Some(grammar))
}

/// A number of alternatives.
pub(super) fn top_count(param: &str, count: i64) -> Result<u32, ApiError> {
    let count = u32::try_from(count).ok().filter(|&count| count <= TOP_LOGPROBS_MAX);
    let message = || format!("`{param}` must be between 0 and {TOP_LOGPROBS_MAX}.");
    count.ok_or_else(|| ApiError::invalid(param, message()))
}

fn within(param: &str, value: f32, range: std::ops::RangeInclusive<f32>) -> Result<f32, ApiError> {
    if range.contains(&value) {
        return Ok(value);
    }
    let (low, high) = range.into_inner();
    let bounds = match (low == f32::MIN_POSITIVE, high == f32::MAX) {
        (true, true) => "above 0".to_owned(),
        (true, false) => format!("above 0 and at most {high}"),
        (false, _) => format!("between {low} and {high}"),
    };
    Err(ApiError::invalid(param, format!("`{param}` is {value}, but must be {bounds}.")))
}
