//! A checked request: prompts as token ids, and everything that its sequences need.

use std::sync::Arc;
use std::time::Instant;

use actix_web::{HttpRequest, web};
use heliostat_engine::grammar::Grammar;
use heliostat_engine::request::{Request, SamplingParams, StopConditions};

use crate::ingress::dispatch::Origin;
use crate::ingress::error::ApiError;
use crate::ingress::handle::{Arrival, Ingress};
use crate::ingress::model::ServedModel;
use crate::ingress::server::{client, request_id, request_limit, request_trace};
use crate::ingress::spans::Asked;
use crate::ingress::text::{SequenceText, TextOptions};

use super::body::Body;
use super::params::{Delivery, Params};
use super::reply::Best;
use super::run::Run;
use super::structured;

/// A body from this size on is checked on another thread.
const LONG_BODY_BYTES: usize = 32 * 1024;

/// A prompt's tokens, and its text if the client gave it so.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    pub(super) text: Option<String>,
}

/// What the endpoint's own fields say, for [`Job::new`].
pub(super) struct Shape {
    pub(super) prompts: Vec<Prompt>,
    /// The field that the prompts came from.
    pub(super) prompt_param: &'static str,
    /// The client's limit, and the field that holds it.
    pub(super) max_tokens: Option<(u32, &'static str)>,
    pub(super) logprobs: Option<u32>,
    /// The endpoint needs log-probabilities of the prompt (echo).
    pub(super) prompt_logprobs: Option<u32>,
    /// What the output must look like.
    pub(super) grammar: Option<Grammar>,
}

/// A request that is ready to be submitted.
pub(super) struct Job {
    pub(super) prompts: Vec<Prompt>,
    /// Sequences of each prompt, and how many of them the client gets.
    pub(super) choices: usize,
    kept: usize,
    pub(super) delivery: Delivery,
    sampling: SamplingParams,
    /// Of each prompt.
    stop: Vec<StopConditions>,
    text: TextOptions,
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    grammar: Option<Grammar>,
    priority: i32,
}

impl Job {
    /// Checks everything against the model's limits.
    pub(super) fn new(model: &ServedModel, params: &Params, shape: Shape) -> Result<Self, ApiError> {
        let delivery = params.delivery()?;
        let (choices, kept) = params.choices(delivery)?;
        let stop = shape.prompts.iter().map(|prompt| {
            let max_tokens = output_limit(model, prompt, &shape)?;
            params.stop_conditions(model, max_tokens)
        });
        Ok(Self {
            choices,
            kept,
            delivery,
            sampling: params.sampling(model)?,
            stop: stop.collect::<Result<_, _>>()?,
            text: params.text_options()?,
            logprobs: shape.logprobs,
            prompt_logprobs: shape.prompt_logprobs.max(params.prompt_logprobs(delivery)?),
            grammar: shape.grammar,
            priority: params.priority(),
            prompts: shape.prompts,
        })
    }

    pub(super) fn wants_logprobs(&self) -> bool {
        self.logprobs.is_some()
    }

    /// Choices of each prompt that the client gets.
    pub(super) fn kept(&self) -> usize {
        self.kept
    }

    /// Which of the sequences of a prompt the client gets, where it gets not all.
    pub(super) fn best(&self) -> Option<Best> {
        let Self { choices, kept, .. } = *self;
        (kept < choices).then(|| Best { choices, kept, logprobs: self.wants_logprobs() })
    }

    /// Leaves control tokens in the text.
    pub(super) fn show_special_tokens(&mut self) {
        self.text.skip_special_tokens = false;
    }

    /// Submits all sequences: choice `i` of prompt `p` has index `p * choices + i`.
    pub(super) fn submit(
        self,
        ingress: &Ingress,
        model: &Arc<ServedModel>,
        http: &HttpRequest,
    ) -> Result<Run, ApiError> {
        let arrived = Instant::now();
        if ingress.is_stopping() {
            return Err(ApiError::not_ready("The server is stopping."));
        }
        let origin = Origin { client: client(http), pinned: pinned_rank(http)? };
        let requests = self.requests(ingress);
        let texts =
            requests.iter().map(|_| SequenceText::new(model.text.clone(), self.text.clone())).collect();
        let trace = request_trace(http).map(|trace| {
            let chats = http.path().ends_with("/chat/completions") || http.path().ends_with("/responses");
            let operation = if chats { "chat" } else { "text_completion" };
            trace.with(Asked { operation, model: model.name().to_owned(), choices: self.choices })
        });
        let generation = ingress.submit(
            requests,
            origin,
            Arrival { at: arrived, request_id: request_id(http).into(), trace },
        )?;
        let prompt_tokens = self.prompts.iter().map(|prompt| prompt.ids.len()).sum();
        Ok(Run::new(generation, texts, (self.choices, prompt_tokens), request_limit(http)))
    }

    fn requests(&self, ingress: &Ingress) -> Vec<Request> {
        let prompts = self.prompts.iter().zip(&self.stop);
        let choices =
            prompts.flat_map(|(prompt, stop)| (0..self.choices).map(move |choice| (prompt, stop, choice)));
        let request = |(prompt, stop, choice): (&Prompt, &StopConditions, usize)| Request {
            id: ingress.next_id(),
            prompt: prompt.ids.clone(),
            generated: Vec::new(),
            sampling: SamplingParams {
                // Choices of one prompt must differ, and be the same again for the same seed.
                seed: self.sampling.seed.wrapping_add(choice as u64),
                ..self.sampling.clone()
            },
            stop: stop.clone(),
            // The best are those with the most likely tokens.
            logprobs: self.logprobs.or((self.kept < self.choices).then_some(0)),
            prompt_logprobs: self.prompt_logprobs,
            grammar: self.grammar.clone().map(Box::new),
            priority: self.priority,
            // The dispatch knows whose turn it is.
            turn: 0,
        };
        choices.map(request).collect()
    }
}

/// Runs `check` on `body`: a long prompt takes long to encode, a grammar to compile, and other connections of this
/// thread must not wait for it.
pub(super) async fn off_the_loop<R: Send + 'static>(
    body: Body,
    check: impl FnOnce(Body) -> Result<R, ApiError> + Send + 'static,
) -> Result<R, ApiError> {
    if body.bytes < LONG_BODY_BYTES && !body.has_any(structured::FIELDS) && !body.has_any(&["tools", "text"])
    {
        return check(body);
    }
    let checked = web::block(move || check(body)).await;
    checked.unwrap_or_else(|_| Err(ApiError::not_ready("The server is stopping.")))
}

/// Token ids of a prompt's text. A text that is far too long is refused before the work of encoding it.
pub(super) fn encode(
    model: &ServedModel,
    param: &str,
    text: &str,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ApiError> {
    let (context, least) = (model.context_length, model.text.tokens_min(text));
    if least > context {
        let request = format!("your {param} has at least {least} tokens");
        return Err(context_exceeded(context, &request, param));
    }
    model.text.encode(text, add_special_tokens).map_err(|error| ApiError::invalid(param, error))
}

fn context_exceeded(context: usize, request: &str, param: &str) -> ApiError {
    let message = format!("This model's maximum context length is {context} tokens. However, {request}.");
    ApiError::invalid(param, message).with_code("context_length_exceeded")
}

/// Tokens that may be generated after `prompt`.
fn output_limit(model: &ServedModel, prompt: &Prompt, shape: &Shape) -> Result<u32, ApiError> {
    let (context, tokens) = (model.context_length, prompt.ids.len());
    let param = shape.prompt_param;
    if tokens == 0 {
        return Err(ApiError::invalid(param, format!("`{param}` is empty: there is nothing to continue.")));
    }
    if let Some(token) = prompt.ids.iter().find(|&&token| token as usize >= model.vocab_size) {
        let message =
            format!("`{param}` has token {token}, but token ids must be below {}.", model.vocab_size);
        return Err(ApiError::invalid(param, message));
    }
    let room = context.saturating_sub(tokens);
    let exceeded = |request: String, param| Err(context_exceeded(context, &request, param));
    match shape.max_tokens {
        _ if room == 0 => exceeded(
            format!("your {param} has {tokens} tokens, and at least one must be left for the output"),
            param,
        ),
        Some((wanted, limit_param)) if wanted as usize > room => exceeded(
            format!(
                "you requested {} tokens ({tokens} in the {param}, {wanted} for the output)",
                tokens + wanted as usize
            ),
            limit_param,
        ),
        Some((wanted, _)) => Ok(wanted),
        None => Ok(model.defaults.max_new_tokens.map_or(room as u32, |tokens| tokens.clamp(1, room as u32))),
    }
}

/// `X-data-parallel-rank`.
fn pinned_rank(http: &HttpRequest) -> Result<Option<u32>, ApiError> {
    const NAME: &str = "X-data-parallel-rank";
    let Some(value) = http.headers().get(NAME) else { return Ok(None) };
    let rank = value.to_str().ok().and_then(|value| value.trim().parse().ok());
    rank.map(Some)
        .ok_or_else(|| ApiError::invalid(NAME, format!("The header `{NAME}` must be a rank's number.")))
}
