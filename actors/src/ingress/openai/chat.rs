//! `POST /v1/chat/completions`.

use std::collections::BTreeMap;
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
use super::job::{Job, Shape, off_the_loop};
use super::logprobs::{ChatLogprobs, PromptLogprobs};
use super::messages::Conversation;
use super::params::{self, Params, top_count};
use super::reply::{Dialect, Envelope, answer, finish_reason, stop_reason};
use super::run::Progress;
use super::tools::{CallParser, Piece, ToolFields, Tools};

const REFUSED: &[Refusal] = &[
    Refusal { field: "functions", neutral: empty, instead: "Use `tools`." },
    Refusal { field: "function_call", neutral: no_tool, instead: "Use `tool_choice`." },
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
    let (job, tools) = {
        let body = Body::parse(&http, body)?;
        let model = model.clone();
        off_the_loop(body, move |body| check(&body, &model)).await?
    };
    let how = (job.delivery, job.best());
    let envelope = Envelope::new("chatcmpl", &request_id(&http), &model);
    let dialect = Chat { logprobs: job.wants_logprobs(), tools, calls: BTreeMap::new(), model };
    let run = job.submit(&ingress, &dialect.model, &http)?;
    answer(run, dialect, envelope, how).await
}

fn check(body: &Body, model: &ServedModel) -> Result<(Job, Option<Tools>), ApiError> {
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
    let tools = body.fields::<ToolFields>()?.offer()?;
    if let Some(tools) = &tools {
        tools.check_template(model)?;
    }
    let conversation = Conversation {
        messages: &fields.messages,
        param: "messages",
        add_generation_prompt: fields.add_generation_prompt.unwrap_or(true),
        extra: fields.chat_template_kwargs.unwrap_or_default(),
        tools: tools.as_ref(),
    };
    let prompts = vec![conversation.prompt(model)?];
    let called = tools.as_ref().map(Tools::grammar).transpose()?.flatten();
    let grammar = params::grammar(body, model, called.map(|grammar| ("tool_choice", grammar)))?;
    let shape =
        Shape { prompts, prompt_param: "messages", max_tokens, logprobs, prompt_logprobs: None, grammar };
    let mut job = Job::new(model, &params, shape)?;
    if tools.as_ref().is_some_and(|tools| tools.marks_are_control(model)) {
        job.show_special_tokens();
    }
    Ok((job, tools))
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
    Message(Message),
    Delta(Delta),
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: Option<String>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A call, or what a chunk adds to it.
#[derive(Default, Serialize)]
struct ToolCall {
    /// In chunks only.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: CalledFunction,
}

#[derive(Default, Serialize)]
struct CalledFunction {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

impl ToolCall {
    fn begin(name: String) -> Self {
        let function = CalledFunction { name: Some(name), arguments: String::new() };
        let id = format!("call_{:024x}", rand::random::<u128>() >> 32);
        Self { index: None, id: Some(id), kind: Some("function"), function }
    }
}

struct Chat {
    model: Arc<ServedModel>,
    logprobs: bool,
    tools: Option<Tools>,
    /// Of each choice.
    calls: BTreeMap<usize, CallParser>,
}

impl Chat {
    /// Text and calls in what came of a choice.
    fn pieces(&mut self, index: usize, text: &str, ends: bool) -> Vec<Piece> {
        let Some(tools) = &self.tools else {
            return if text.is_empty() { Vec::new() } else { vec![Piece::Text(text.to_owned())] };
        };
        let parser = self.calls.entry(index).or_insert_with(|| tools.parser(&self.model));
        let mut pieces = parser.push(text);
        if ends {
            pieces.extend(parser.finish());
        }
        pieces
    }

    fn delta(piece: Piece) -> Delta {
        let (index, call) = match piece {
            Piece::Text(text) => return Delta { content: Some(text), ..Delta::default() },
            Piece::Begin(index, name) => (index, ToolCall::begin(name)),
            Piece::Arguments(index, arguments) => (
                index,
                ToolCall { function: CalledFunction { name: None, arguments }, ..ToolCall::default() },
            ),
        };
        Delta { tool_calls: vec![ToolCall { index: Some(index), ..call }], ..Delta::default() }
    }

    /// OpenAI's `finish_reason`: a text that ends by itself and has calls ends for these.
    fn finish_reason(&self, index: usize, ending: Option<&Ending>) -> Option<&'static str> {
        let called = self.calls.get(&index).is_some_and(|parser| parser.calls() > 0);
        let decided = self.tools.as_ref().is_some_and(Tools::ends_with_calls);
        match finish_reason(ending) {
            Some("stop") if called && decided => Some("tool_calls"),
            reason => reason,
        }
    }

    fn choice(&self, index: usize, content: Content, ending: Option<&Ending>) -> Choice {
        Choice {
            index,
            content,
            logprobs: None,
            finish_reason: self.finish_reason(index, ending),
            stop_reason: stop_reason(ending, &self.model),
            prompt_logprobs: None,
        }
    }
}

impl Dialect for Chat {
    type Choice = Choice;
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    /// The role first, then text and calls, then an empty delta with the reason for the end.
    fn chunks(&mut self, progress: Progress) -> Vec<Choice> {
        let Progress { index, mut delta, first, .. } = progress;
        let mut chunks = Vec::new();
        if first {
            let role = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
            chunks.push(self.choice(index, Content::Delta(role), None));
        }
        let mut logprobs = (self.logprobs && !delta.pieces.is_empty())
            .then(|| ChatLogprobs::new(&self.model.text, &delta.pieces));
        let text = std::mem::take(&mut delta.text);
        for piece in self.pieces(index, &text, delta.ending.is_some()) {
            let content = Content::Delta(Self::delta(piece));
            chunks.push(Choice { logprobs: logprobs.take(), ..self.choice(index, content, None) });
        }
        if logprobs.is_some() {
            // Their text is held back, or there is none.
            let content = Content::Delta(Delta { content: Some(String::new()), ..Delta::default() });
            chunks.push(Choice { logprobs, ..self.choice(index, content, None) });
        }
        if delta.ending.is_some() {
            chunks.push(self.choice(index, Content::Delta(Delta::default()), delta.ending.as_ref()));
        }
        chunks
    }

    fn whole(&mut self, progress: Progress) -> Choice {
        let Progress { index, delta, prompt_logprobs, .. } = progress;
        let mut content = String::new();
        let mut calls: Vec<ToolCall> = Vec::new();
        for piece in self.pieces(index, &delta.text, true) {
            match (piece, calls.last_mut()) {
                (Piece::Text(text), _) => content.push_str(&text),
                (Piece::Begin(_, name), _) => calls.push(ToolCall::begin(name)),
                (Piece::Arguments(_, more), Some(call)) => call.function.arguments.push_str(&more),
                (Piece::Arguments(..), None) => {}
            }
        }
        let text = &self.model.text;
        let logprobs = self.logprobs.then(|| ChatLogprobs::new(text, &delta.pieces));
        let prompt_logprobs = prompt_logprobs.map(|logprobs| PromptLogprobs::new(text, &logprobs));
        let none = !calls.is_empty() && content.trim().is_empty();
        let message = Message {
            role: "assistant",
            content: (!none).then_some(content),
            refusal: None,
            tool_calls: calls,
        };
        let choice = self.choice(index, Content::Message(message), delta.ending.as_ref());
        Choice { logprobs, prompt_logprobs, ..choice }
    }
}
