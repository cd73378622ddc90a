//! `POST /v1/chat/completions`.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::ingress::error::ApiError;
use crate::ingress::handle::Ingress;
use crate::ingress::model::ServedModel;
use crate::ingress::server::request_id;
use crate::ingress::text::Ending;

use super::body::{Body, Refusal, empty, never};
use super::job::{Job, Prompt, Shape, encode, off_the_loop};
use super::logprobs::{ChatLogprobs, PromptLogprobs};
use super::params::{self, Params, top_count};
use super::reply::{Dialect, Envelope, answer, finish_reason, stop_reason};
use super::run::Progress;

const MESSAGES_MAX: usize = 4096;

const REFUSED: &[Refusal] = &[
    Refusal { field: "tools", neutral: empty, instead: "" },
    Refusal { field: "tool_choice", neutral: no_tool, instead: "" },
    Refusal { field: "functions", neutral: empty, instead: "" },
    Refusal { field: "function_call", neutral: no_tool, instead: "" },
    Refusal { field: "modalities", neutral: text_only, instead: "Only [\"text\"] is." },
    Refusal { field: "audio", neutral: never, instead: "" },
    Refusal { field: "prediction", neutral: never, instead: "" },
    Refusal { field: "web_search_options", neutral: never, instead: "" },
    Refusal { field: "documents", neutral: empty, instead: "Put them into a message." },
    Refusal { field: "chat_template", neutral: never, instead: "The model's own is used." },
    Refusal { field: "continue_final_message", neutral: empty, instead: "Use /v1/completions." },
    Refusal { field: "echo", neutral: empty, instead: "Use /v1/completions." },
];

fn no_tool(value: &Json) -> bool {
    value == "none" || value == "auto"
}

fn text_only(value: &Json) -> bool {
    value.as_array().is_some_and(|kinds| kinds.iter().all(|kind| kind == "text"))
}

#[derive(Debug, Deserialize)]
struct Fields {
    messages: Vec<Map<String, Json>>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    add_generation_prompt: Option<bool>,
    chat_template_kwargs: Option<Map<String, Json>>,
}

/// Handles a request.
pub(crate) async fn chat_completions(
    http: HttpRequest,
    ingress: web::Data<Ingress>,
    model: web::Data<Arc<ServedModel>>,
    body: Result<Bytes, actix_web::Error>,
) -> Result<HttpResponse, ApiError> {
    let model = model.get_ref().clone();
    let job = {
        let body = Body::parse(&http, body)?;
        let model = model.clone();
        off_the_loop(body, move |body| check(&body, &model)).await?
    };
    let delivery = job.delivery;
    let envelope = Envelope::new("chatcmpl", &request_id(&http), &model);
    let dialect = Chat { logprobs: job.wants_logprobs(), model };
    let run = job.submit(&ingress, &dialect.model, &http)?;
    answer(run, dialect, envelope, delivery).await
}

fn check(body: &Body, model: &ServedModel) -> Result<Job, ApiError> {
    let params: Params = body.fields()?;
    params.check_model(model)?;
    body.refuse(REFUSED)?;
    body.refuse(params::REFUSED)?;
    let fields: Fields = body.fields()?;
    let logprobs = match (fields.logprobs == Some(true), fields.top_logprobs) {
        (true, count) => Some(top_count("top_logprobs", count.unwrap_or(0))?),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            let message = "`top_logprobs` is only allowed when `logprobs` is true.";
            return Err(ApiError::invalid("top_logprobs", message));
        }
    };
    let max_tokens = match (fields.max_completion_tokens, fields.max_tokens) {
        (Some(max), _) => Some((max, "max_completion_tokens")),
        (None, max) => max.map(|max| (max, "max_tokens")),
    };
    if let Some((0, param)) = max_tokens {
        return Err(ApiError::invalid(param, format!("`{param}` must be at least 1.")));
    }
    let prompts = vec![prompt(&fields, model)?];
    let shape = Shape { prompts, prompt_param: "messages", max_tokens, logprobs, prompt_logprobs: None };
    Job::new(model, &params, shape)
}

/// The conversation by the model's template. Its control tokens stand in the template.
fn prompt(fields: &Fields, model: &ServedModel) -> Result<Prompt, ApiError> {
    let Some(template) = model.text.chat_template() else {
        let message = "The model has no chat template; use /v1/completions.";
        return Err(ApiError::invalid("messages", message));
    };
    let count = fields.messages.len();
    if !(1..=MESSAGES_MAX).contains(&count) {
        let message = format!("`messages` has {count} messages, but must have between 1 and {MESSAGES_MAX}.");
        return Err(ApiError::invalid("messages", message));
    }
    let messages = fields.messages.iter().enumerate().map(|(index, message)| plain_message(index, message));
    let messages: Vec<Json> = messages.collect::<Result<_, _>>()?;
    let extra = fields.chat_template_kwargs.clone().unwrap_or_default();
    let rendered = template.render(&messages, fields.add_generation_prompt.unwrap_or(true), &extra);
    let text = rendered.map_err(|error| ApiError::invalid("messages", error.to_string()))?;
    Ok(Prompt { ids: encode(model, "messages", &text, false)?, text: None })
}

/// The message as templates expect it: content as one string; OpenAI's newer `developer` is `system`.
fn plain_message(index: usize, message: &Map<String, Json>) -> Result<Json, ApiError> {
    let param = |field: &str| format!("messages[{index}].{field}");
    let role = match message.get("role").and_then(Json::as_str) {
        Some("developer" | "system") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some(role @ ("tool" | "function")) => {
            let param = param("role");
            return Err(ApiError::unsupported(
                &param,
                format!("`{param}`: the role `{role}` is not supported."),
            ));
        }
        other => {
            let param = param("role");
            let found = other.map_or("missing or no string".to_owned(), |role| format!("`{role}`"));
            let message =
                format!("`{param}` is {found}, but must be one of system, developer, user, assistant.");
            return Err(ApiError::invalid(param, message));
        }
    };
    for field in ["tool_calls", "function_call", "audio"] {
        if message.get(field).is_some_and(|value| !empty(value)) {
            let param = param(field);
            return Err(ApiError::unsupported(&param, format!("`{param}` is not supported by this server.")));
        }
    }
    let content = match message.get("content") {
        Some(Json::String(text)) => text.clone(),
        Some(Json::Array(parts)) => {
            let texts = parts
                .iter()
                .enumerate()
                .map(|(part, value)| text_part(&format!("messages[{index}].content[{part}]"), value));
            texts.collect::<Result<Vec<_>, _>>()?.join("\n")
        }
        None | Some(Json::Null) if role == "assistant" => String::new(),
        _ => {
            let param = param("content");
            let message = format!("`{param}` must be a string or an array of text parts.");
            return Err(ApiError::invalid(param, message));
        }
    };
    let mut plain = message.clone();
    plain.insert("role".into(), role.into());
    plain.insert("content".into(), content.into());
    Ok(Json::Object(plain))
}

fn text_part(param: &str, part: &Json) -> Result<String, ApiError> {
    match (part.get("type").and_then(Json::as_str), part.get("text").and_then(Json::as_str)) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        (Some("text") | None, _) => Err(ApiError::invalid(
            param,
            format!("`{param}` must be {{\"type\": \"text\", \"text\": \"...\"}}."),
        )),
        (Some(kind), _) => {
            let message = format!("`{param}` is of type `{kind}`, but only text is supported.");
            Err(ApiError::unsupported(param, message))
        }
    }
}

/// One entry of `choices`.
#[derive(Serialize)]
pub(super) struct Choice {
    index: usize,
    #[serde(flatten)]
    content: Content,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Content {
    Message { role: &'static str, content: String, refusal: Option<()> },
    Delta(Delta),
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

struct Chat {
    model: Arc<ServedModel>,
    logprobs: bool,
}

impl Chat {
    fn choice(&self, index: usize, content: Content, ending: Option<&Ending>) -> Choice {
        Choice {
            index,
            content,
            logprobs: None,
            finish_reason: finish_reason(ending),
            stop_reason: stop_reason(ending, &self.model),
            prompt_logprobs: None,
        }
    }
}

impl Dialect for Chat {
    type Choice = Choice;
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    /// The role first, then text, then an empty delta with the reason for the end.
    fn chunks(&mut self, progress: Progress) -> Vec<Choice> {
        let Progress { index, delta, first, .. } = progress;
        let mut chunks = Vec::new();
        if first {
            let role = Delta { role: Some("assistant"), content: Some(String::new()) };
            chunks.push(self.choice(index, Content::Delta(role), None));
        }
        if !delta.text.is_empty() || !delta.pieces.is_empty() {
            let logprobs = self.logprobs.then(|| ChatLogprobs::new(&self.model.text, &delta.pieces));
            let text = Delta { role: None, content: Some(delta.text) };
            chunks.push(Choice { logprobs, ..self.choice(index, Content::Delta(text), None) });
        }
        if delta.ending.is_some() {
            chunks.push(self.choice(index, Content::Delta(Delta::default()), delta.ending.as_ref()));
        }
        chunks
    }

    fn whole(&mut self, progress: Progress) -> Choice {
        let Progress { index, delta, prompt_logprobs, .. } = progress;
        let text = &self.model.text;
        let logprobs = self.logprobs.then(|| ChatLogprobs::new(text, &delta.pieces));
        let prompt_logprobs = prompt_logprobs.map(|logprobs| PromptLogprobs::new(text, &logprobs));
        let content = Content::Message { role: "assistant", content: delta.text, refusal: None };
        Choice { logprobs, prompt_logprobs, ..self.choice(index, content, delta.ending.as_ref()) }
    }
}
