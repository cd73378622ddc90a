//! `POST /v1/responses`: the text part of OpenAI's newer API. Nothing is stored: a conversation comes whole.

use std::collections::VecDeque;
use std::sync::Arc;

use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use crate::ingress::error::ApiError;
use crate::ingress::handle::Ingress;
use crate::ingress::model::ServedModel;
use crate::ingress::server::request_id;
use crate::ingress::text::Ending;

use super::body::{Body, Refusal, empty, never};
use super::job::{Job, Shape, off_the_loop};
use super::messages::Conversation;
use super::params::{self, Delivery, Params};
use super::reply::{gather, unix_seconds};
use super::run::{Progress, Run};
use super::structured::{self, Format};

const REFUSED: &[Refusal] = &[
    Refusal {
        field: "previous_response_id",
        neutral: never,
        instead: "Send the whole conversation as `input`.",
    },
    Refusal { field: "conversation", neutral: never, instead: "Send the whole conversation as `input`." },
    Refusal { field: "background", neutral: empty, instead: "" },
    Refusal { field: "tools", neutral: empty, instead: "Use /v1/chat/completions." },
    Refusal { field: "prompt", neutral: never, instead: "Send the text as `input`." },
    Refusal { field: "max_tool_calls", neutral: never, instead: "" },
    Refusal { field: "include", neutral: empty, instead: "" },
    Refusal { field: "truncation", neutral: disabled, instead: "Shorten the input." },
    Refusal { field: "n", neutral: one, instead: "Use /v1/chat/completions." },
    Refusal { field: "best_of", neutral: one, instead: "Use /v1/completions." },
    Refusal { field: "top_logprobs", neutral: empty, instead: "Use /v1/chat/completions." },
];

fn disabled(value: &Json) -> bool {
    value == "disabled"
}

fn one(value: &Json) -> bool {
    value == 1
}

#[derive(Debug, Deserialize)]
struct Fields {
    input: Json,
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    text: Option<TextField>,
    metadata: Option<Map<String, Json>>,
    temperature: Option<f64>,
    top_p: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct TextField {
    format: Option<Format>,
}

/// Handles a request.
pub(crate) async fn responses(
    http: HttpRequest,
    ingress: web::Data<Ingress>,
    model: web::Data<Arc<ServedModel>>,
    body: Result<Bytes, actix_web::Error>,
) -> Result<HttpResponse, ApiError> {
    let model = model.get_ref().clone();
    let (job, frame) = {
        let body = Body::parse(&http, body)?;
        let (model, id) = (model.clone(), request_id(&http));
        off_the_loop(body, move |body| check(&body, &model, &id)).await?
    };
    let delivery = job.delivery;
    let mut run = job.submit(&ingress, &model, &http)?;
    let first = run.next().await?;
    match delivery {
        Delivery::Whole => {
            let sequence = gather(&mut run, first).await?.pop().unwrap_or_default();
            let response = frame.response(&run, &sequence.delta.text, sequence.delta.ending.as_ref());
            Ok(HttpResponse::Ok().json(response))
        }
        Delivery::Stream { .. } => Ok(Stream::new(run, frame, first).response()),
    }
}

fn check(body: &Body, model: &ServedModel, id: &str) -> Result<(Job, Frame), ApiError> {
    let params: Params = body.fields()?;
    params.check_model(model)?;
    body.refuse(REFUSED)?;
    body.refuse(params::REFUSED)?;
    let fields: Fields = body.fields()?;
    let messages = messages(&fields)?;
    let conversation = Conversation {
        messages: &messages,
        param: "input",
        add_generation_prompt: true,
        extra: Map::new(),
        tools: None,
    };
    let format = fields.text.as_ref().and_then(|text| text.format.clone());
    let grammar = format.map(|format| format.grammar("text.format")).transpose()?.flatten();
    if let Some(grammar) = &grammar {
        structured::check(model, "text.format", grammar)?;
    }
    let shape = Shape {
        prompts: vec![conversation.prompt(model)?],
        prompt_param: "input",
        max_tokens: fields.max_output_tokens.map(|max| (max, "max_output_tokens")),
        logprobs: None,
        prompt_logprobs: None,
        grammar,
    };
    if fields.max_output_tokens == Some(0) {
        return Err(ApiError::invalid("max_output_tokens", "`max_output_tokens` must be at least 1."));
    }
    let job = Job::new(model, &params, shape)?;
    let frame = Frame { id: id.to_owned(), created: unix_seconds(), model: model.name().to_owned(), fields };
    Ok((job, frame))
}

/// The instructions, then the input: a text, or messages.
fn messages(fields: &Fields) -> Result<Vec<Map<String, Json>>, ApiError> {
    let message = |role: &str, content: &Json| {
        Map::from_iter([("role".to_owned(), Json::from(role)), ("content".to_owned(), content.clone())])
    };
    let mut messages = Vec::new();
    messages.extend(fields.instructions.as_ref().map(|text| message("system", &text.as_str().into())));
    let items = match &fields.input {
        Json::String(_) => {
            messages.push(message("user", &fields.input));
            return Ok(messages);
        }
        Json::Array(items) => items,
        _ => return Err(ApiError::invalid("input", "`input` must be a string or an array of messages.")),
    };
    for (index, item) in items.iter().enumerate() {
        match (item.get("type").and_then(Json::as_str), item.as_object()) {
            (None | Some("message"), Some(item)) => {
                let mut item = item.clone();
                for own in ["type", "id", "status"] {
                    item.shift_remove(own);
                }
                messages.push(item);
            }
            (kind, _) => {
                let param = format!("input[{index}]");
                let message = format!(
                    "`{param}` is of type `{}`, but only messages are supported.",
                    kind.unwrap_or("?")
                );
                return Err(ApiError::unsupported(&param, message));
            }
        }
    }
    Ok(messages)
}

/// What all events of a response share.
struct Frame {
    id: String,
    created: u64,
    model: String,
    fields: Fields,
}

impl Frame {
    fn message_id(&self) -> String {
        format!("msg_{}", self.id)
    }

    fn part(text: &str) -> Json {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
    }

    fn message(&self, status: &str, content: &[Json]) -> Json {
        json!({
            "id": self.message_id(),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        })
    }

    /// The response as it begins.
    fn begun(&self) -> Json {
        let fields = &self.fields;
        json!({
            "id": format!("resp_{}", self.id),
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "background": false,
            "error": null,
            "incomplete_details": null,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "metadata": fields.metadata.clone().unwrap_or_default(),
            "model": self.model,
            "output": [],
            "parallel_tool_calls": false,
            "previous_response_id": null,
            "store": false,
            "temperature": fields.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": fields.top_p,
            "truncation": "disabled",
            "usage": null,
        })
    }

    /// The response at its end.
    fn response(&self, run: &Run, text: &str, ending: Option<&Ending>) -> Json {
        let mut response = self.begun();
        let status = status(ending);
        response["status"] = status.into();
        if status == "incomplete" {
            response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        response["output"] = json!([self.message(status, &[Self::part(text)])]);
        let usage = run.usage();
        response["usage"] = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        });
        response
    }
}

fn status(ending: Option<&Ending>) -> &'static str {
    match ending {
        Some(Ending::Length) => "incomplete",
        Some(Ending::StopString(_) | Ending::StopToken(_)) | None => "completed",
    }
}

/// A response as server-sent events.
struct Stream {
    run: Run,
    frame: Frame,
    /// What has come and was not shown.
    news: VecDeque<Vec<Progress>>,
    text: String,
    sequence_number: u64,
    begun: bool,
    ended: bool,
}

impl Stream {
    fn new(run: Run, frame: Frame, first: Vec<Progress>) -> Self {
        let news = VecDeque::from([first]);
        Self { run, frame, news, text: String::new(), sequence_number: 0, begun: false, ended: false }
    }

    fn response(self) -> HttpResponse {
        let events = futures_util::stream::unfold(self, |mut stream| async move {
            let events = stream.events().await?;
            Some((Ok::<_, std::convert::Infallible>(Bytes::from(events)), stream))
        });
        HttpResponse::Ok()
            .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
            .insert_header((CACHE_CONTROL, "no-cache"))
            .insert_header(("x-accel-buffering", "no"))
            .streaming(events)
    }

    /// All events that can be sent now.
    async fn events(&mut self) -> Option<Vec<u8>> {
        if self.ended {
            return None;
        }
        let mut out = Vec::new();
        if !std::mem::replace(&mut self.begun, true) {
            self.begin(&mut out);
        }
        let news = match self.news.pop_front() {
            Some(news) => Ok(news),
            None => self.run.next().await,
        };
        match news {
            Ok(news) => news.into_iter().for_each(|progress| self.show(progress, &mut out)),
            Err(failure) => {
                self.ended = true;
                let error = ApiError::from(failure).to_json();
                let message = error["error"]["message"].clone();
                self.event(
                    &mut out,
                    "error",
                    json!({"code": error["error"]["code"], "message": message, "param": null}),
                );
            }
        }
        Some(out)
    }

    fn begin(&mut self, out: &mut Vec<u8>) {
        let response = self.frame.begun();
        self.event(out, "response.created", json!({"response": response}));
        self.event(out, "response.in_progress", json!({"response": response}));
        let item = self.frame.message("in_progress", &[]);
        self.event(out, "response.output_item.added", json!({"output_index": 0, "item": item}));
        let part = Frame::part("");
        self.content_event(out, "response.content_part.added", json!({"part": part}));
    }

    fn show(&mut self, progress: Progress, out: &mut Vec<u8>) {
        let delta = progress.delta;
        if !delta.text.is_empty() {
            self.text.push_str(&delta.text);
            self.content_event(
                out,
                "response.output_text.delta",
                json!({"delta": delta.text, "logprobs": []}),
            );
        }
        let Some(ending) = &delta.ending else { return };
        self.ended = true;
        let text = std::mem::take(&mut self.text);
        self.content_event(out, "response.output_text.done", json!({"text": text, "logprobs": []}));
        let part = Frame::part(&text);
        self.content_event(out, "response.content_part.done", json!({"part": part}));
        let item = self.frame.message(status(Some(ending)), &[part]);
        self.event(out, "response.output_item.done", json!({"output_index": 0, "item": item}));
        let response = self.frame.response(&self.run, &text, Some(ending));
        let name = format!("response.{}", status(Some(ending)));
        self.event(out, &name, json!({"response": response}));
    }

    /// An event about the text.
    fn content_event(&mut self, out: &mut Vec<u8>, name: &str, mut data: Json) {
        data["item_id"] = self.frame.message_id().into();
        data["output_index"] = json!(0);
        data["content_index"] = json!(0);
        self.event(out, name, data);
    }

    fn event(&mut self, out: &mut Vec<u8>, name: &str, mut data: Json) {
        data["type"] = name.into();
        data["sequence_number"] = self.sequence_number.into();
        self.sequence_number += 1;
        out.extend_from_slice(format!("event: {name}\ndata: {data}\n\n").as_bytes());
    }
}
