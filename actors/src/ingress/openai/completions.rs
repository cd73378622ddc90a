//! `POST /v1/completions`.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use heliostat_engine::request::TokenLogprob;
use serde::Deserialize;
use serde_json::Value as Json;

use crate::ingress::error::ApiError;
use crate::ingress::handle::Ingress;
use crate::ingress::model::ServedModel;
use crate::ingress::server::request_id;
use crate::ingress::text::{Detokenizer, TextModel};

use super::body::{Body, Refusal, empty, never};
use super::job::{self, Job, Prompt, Shape, off_the_loop};
use super::logprobs::{CompletionLogprobs, PromptLogprobs};
use super::params::{self, Params, top_count};
use super::reply::{Dialect, Envelope, answer, finish_reason, stop_reason};
use super::run::{Progress, Usage};

/// OpenAI's default.
const MAX_TOKENS_DEFAULT: u32 = 16;
const PROMPTS_MAX: usize = 256;

const REFUSED: &[Refusal] = &[
    Refusal { field: "suffix", neutral: empty, instead: "" },
    Refusal { field: "prompt_embeds", neutral: never, instead: "Use `prompt`." },
];

#[derive(Debug, Deserialize)]
struct Fields {
    prompt: Json,
    max_tokens: Option<u32>,
    logprobs: Option<i64>,
    echo: Option<bool>,
    add_special_tokens: Option<bool>,
}

/// Handles a request.
pub(crate) async fn completions(
    http: HttpRequest,
    ingress: web::Data<Ingress>,
    model: web::Data<Arc<ServedModel>>,
    body: Result<Bytes, actix_web::Error>,
) -> Result<HttpResponse, ApiError> {
    let model = model.get_ref().clone();
    let (job, echo) = {
        let body = Body::parse(&http, body)?;
        let model = model.clone();
        off_the_loop(body, move |body| check(&body, &model)).await?
    };
    let how = (job.delivery, job.best());
    let envelope = Envelope::new("cmpl", &request_id(&http), &model);
    let dialect =
        Completion { echo: echo.map(|echo| Echo::new(echo, &job, &model)), choices: job.kept(), model };
    let run = job.submit(&ingress, &dialect.model, &http)?;
    answer(run, dialect, envelope, how).await
}

/// What `echo` asks for.
#[derive(Clone, Copy)]
struct EchoKind {
    /// The prompt is all that the client wants.
    alone: bool,
}

fn check(body: &Body, model: &ServedModel) -> Result<(Job, Option<EchoKind>), ApiError> {
    let params: Params = body.fields()?;
    params.check_model(model)?;
    body.refuse(REFUSED)?;
    body.refuse(params::REFUSED)?;
    let fields: Fields = body.fields()?;
    let logprobs = fields.logprobs.map(|count| top_count("logprobs", count)).transpose()?;
    let max_tokens = fields.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT);
    let echo = (fields.echo == Some(true)).then_some(EchoKind { alone: max_tokens == 0 });
    if max_tokens == 0 && echo.is_none() {
        return Err(ApiError::invalid(
            "max_tokens",
            "`max_tokens` must be at least 1, unless `echo` is true.",
        ));
    }
    let shape = Shape {
        prompts: prompts(&fields.prompt, model, fields.add_special_tokens.unwrap_or(true))?,
        prompt_param: "prompt",
        // The ranks need a token to generate; it is not shown.
        max_tokens: Some((max_tokens.max(1), "max_tokens")),
        logprobs,
        prompt_logprobs: logprobs.filter(|_| echo.is_some()),
        grammar: params::grammar(body, model, None)?,
    };
    Ok((Job::new(model, &params, shape)?, echo))
}

/// A string, token ids, or an array of either.
fn prompts(prompt: &Json, model: &ServedModel, special: bool) -> Result<Vec<Prompt>, ApiError> {
    let shape = "`prompt` must be a string, an array of token ids, or an array of either.";
    let wrong = || ApiError::invalid("prompt", shape);
    let encode = |prompt: &str| {
        let ids = job::encode(model, "prompt", prompt, special)?;
        Ok(Prompt { ids, text: Some(prompt.to_owned()) })
    };
    let tokens = |ids: &[Json]| {
        let ids = ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
        Ok(Prompt { ids: ids.collect::<Option<_>>().ok_or_else(wrong)?, text: None })
    };
    match prompt {
        Json::String(prompt) => Ok(vec![encode(prompt)?]),
        Json::Array(prompts) if prompts.len() > PROMPTS_MAX && !prompts[0].is_number() => {
            let message =
                format!("`prompt` has {} prompts, but at most {PROMPTS_MAX} are allowed.", prompts.len());
            Err(ApiError::invalid("prompt", message))
        }
        Json::Array(prompts) => match prompts.first() {
            None => Err(ApiError::invalid("prompt", "`prompt` is an empty array.")),
            Some(Json::Number(_)) => Ok(vec![tokens(prompts)?]),
            Some(_) => prompts
                .iter()
                .map(|prompt| match prompt {
                    Json::String(prompt) => encode(prompt),
                    Json::Array(ids) => tokens(ids),
                    _ => Err(wrong()),
                })
                .collect(),
        },
        _ => Err(wrong()),
    }
}

/// The prompts, to be put before what is generated.
struct Echo {
    kind: EchoKind,
    prompts: Vec<EchoedPrompt>,
}

struct EchoedPrompt {
    ids: Vec<u32>,
    text: String,
}

impl Echo {
    fn new(kind: EchoKind, job: &Job, model: &ServedModel) -> Self {
        let prompt = |prompt: &Prompt| EchoedPrompt {
            text: prompt.text.clone().unwrap_or_else(|| model.text.decode(&prompt.ids, true)),
            ids: prompt.ids.clone(),
        };
        Self { kind, prompts: job.prompts.iter().map(prompt).collect() }
    }
}

/// One entry of `choices`.
#[derive(serde::Serialize)]
pub(super) struct Choice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

struct Completion {
    model: Arc<ServedModel>,
    choices: usize,
    echo: Option<Echo>,
}

impl Completion {
    fn choice(&mut self, mut progress: Progress) -> Choice {
        let text = &self.model.text;
        let ending = progress.delta.ending.as_ref();
        let mut choice = Choice {
            index: progress.index,
            text: String::new(),
            logprobs: None,
            finish_reason: finish_reason(ending),
            stop_reason: stop_reason(ending, &self.model),
            prompt_logprobs: None,
        };
        let mut offset = 0;
        let prompt_logprobs = progress.prompt_logprobs.take();
        match &self.echo {
            Some(echo) => {
                let prompt = &echo.prompts[progress.index / self.choices];
                offset = prompt.text.chars().count();
                if progress.first {
                    choice.text.push_str(&prompt.text);
                    choice.logprobs =
                        prompt_logprobs.map(|logprobs| echoed(&self.model.text, prompt, &logprobs));
                }
                if echo.kind.alone {
                    progress.delta.text.clear();
                    progress.delta.pieces.clear();
                    choice.finish_reason = choice.finish_reason.map(|_| "length");
                }
            }
            None => {
                choice.prompt_logprobs = prompt_logprobs.map(|logprobs| PromptLogprobs::new(text, &logprobs));
            }
        }
        choice.text.push_str(&progress.delta.text);
        if !progress.delta.pieces.is_empty() {
            let logprobs = choice.logprobs.get_or_insert_default();
            for piece in &progress.delta.pieces {
                logprobs.push(text, &piece.logprob, offset + piece.offset);
            }
        }
        choice
    }
}

/// Log-probabilities of an echoed prompt.
fn echoed(model: &Arc<TextModel>, prompt: &EchoedPrompt, logprobs: &[TokenLogprob]) -> CompletionLogprobs {
    let mut shown = CompletionLogprobs::default();
    let mut detokenizer = Detokenizer::new(model.clone(), true);
    let mut text = String::new();
    for (index, &token) in prompt.ids.iter().enumerate() {
        match index.checked_sub(1).and_then(|before| logprobs.get(before)) {
            Some(logprob) => shown.push(model, logprob, text.chars().count()),
            None => shown.push_first(model, token),
        }
        detokenizer.push(token, &mut text);
    }
    shown
}

impl Dialect for Completion {
    type Choice = Choice;
    const WHOLE: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";

    fn chunks(&mut self, progress: Progress) -> Vec<Choice> {
        vec![self.choice(progress)]
    }

    fn whole(&mut self, progress: Progress) -> Choice {
        self.choice(progress)
    }

    fn usage(&self, usage: Usage) -> Usage {
        match &self.echo {
            Some(echo) if echo.kind.alone => usage.without_output(),
            _ => usage,
        }
    }
}
