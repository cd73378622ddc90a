//! How answers are written: whole, or as server-sent events; and the model list.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use actix_web::{HttpResponse, web};
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::ingress::apps::AppRoute;
use crate::ingress::error::ApiError;
use crate::ingress::model::ServedModel;
use crate::ingress::text::Ending;

use super::params::{Delivery, ShownUsage};
use super::run::{Progress, Run, Usage};

/// What differs between the endpoints.
pub(super) trait Dialect: 'static {
    /// One entry of `choices`.
    type Choice: Serialize;
    /// `object` of an answer in one piece.
    const WHOLE: &'static str;
    /// `object` of an event.
    const CHUNK: &'static str;

    /// The choices of the events that show `progress`.
    fn chunks(&mut self, progress: Progress) -> Vec<Self::Choice>;
    /// A choice of the answer in one piece.
    fn whole(&mut self, progress: Progress) -> Self::Choice;
    /// The usage as this request counts it.
    fn usage(&self, usage: Usage) -> Usage {
        usage
    }
}

/// What all events of an answer share.
#[derive(Clone)]
pub(super) struct Envelope {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

#[derive(Serialize)]
struct Reply<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [C],
    /// Null in all chunks but the last, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

impl Envelope {
    pub(super) fn new(prefix: &str, request_id: &str, model: &ServedModel) -> Self {
        let id = format!("{prefix}-{request_id}");
        Self { id, created: unix_seconds(), model: model.name().to_owned() }
    }

    fn reply<'a, C>(
        &'a self,
        object: &'static str,
        choices: &'a [C],
        usage: Option<Option<Usage>>,
    ) -> Reply<'a, C> {
        Reply { id: &self.id, object, created: self.created, model: &self.model, choices, usage }
    }
}

/// Answers a request that was submitted. The status is known only when the first tokens have come.
pub(super) async fn answer<D: Dialect>(
    mut run: Run,
    dialect: D,
    envelope: Envelope,
    (delivery, best): (Delivery, Option<Best>),
) -> Result<HttpResponse, ApiError> {
    let first = run.next().await?;
    match delivery {
        Delivery::Whole => whole(run, first, (dialect, best), &envelope).await,
        Delivery::Stream { usage } => {
            Ok(Stream { run, dialect, envelope, usage, next: Next::Show(first) }.response())
        }
    }
}

async fn whole<D: Dialect>(
    mut run: Run,
    first: Vec<Progress>,
    (mut dialect, best): (D, Option<Best>),
    envelope: &Envelope,
) -> Result<HttpResponse, ApiError> {
    let mut choices = gather(&mut run, first).await?;
    if let Some(best) = best {
        choices = best.keep(choices);
    }
    let choices: Vec<_> = choices.into_iter().map(|choice| dialect.whole(choice)).collect();
    let usage = dialect.usage(run.usage());
    Ok(HttpResponse::Ok().json(envelope.reply(D::WHOLE, &choices, Some(Some(usage)))))
}

/// All that comes of all sequences, `news` first.
pub(super) async fn gather(run: &mut Run, mut news: Vec<Progress>) -> Result<Vec<Progress>, ApiError> {
    let mut choices: Vec<Progress> = Vec::new();
    while !news.is_empty() {
        for progress in news {
            match choices.binary_search_by_key(&progress.index, |choice| choice.index) {
                Ok(at) => choices[at].merge(progress),
                Err(at) => choices.insert(at, progress),
            }
        }
        news = run.next().await?;
    }
    Ok(choices)
}

/// OpenAI's `best_of`: of the sequences of each prompt the client gets those whose tokens are likeliest on average.
#[derive(Clone, Copy, Debug)]
pub(super) struct Best {
    /// Sequences of each prompt.
    pub(super) choices: usize,
    /// Those that the client gets.
    pub(super) kept: usize,
    /// Whether the client wants to see log-probabilities.
    pub(super) logprobs: bool,
}

impl Best {
    /// The best of each prompt, numbered anew.
    fn keep(&self, mut all: Vec<Progress>) -> Vec<Progress> {
        let mut kept = Vec::new();
        for sequences in all.chunks_mut(self.choices) {
            sequences.sort_by(|a, b| mean_logprob(b).total_cmp(&mean_logprob(a)));
            kept.extend(sequences.iter_mut().take(self.kept).map(std::mem::take));
        }
        for (index, progress) in kept.iter_mut().enumerate() {
            progress.index = index;
            if !self.logprobs {
                progress.delta.pieces.clear();
            }
        }
        kept
    }
}

fn mean_logprob(progress: &Progress) -> f64 {
    let pieces = &progress.delta.pieces;
    let sum: f64 = pieces.iter().map(|piece| f64::from(piece.logprob.logprob)).sum();
    sum / pieces.len().max(1) as f64
}

struct Stream<D> {
    run: Run,
    dialect: D,
    envelope: Envelope,
    usage: ShownUsage,
    next: Next,
}

enum Next {
    /// Send this, which has come already.
    Show(Vec<Progress>),
    Wait,
    /// Nothing more.
    End,
}

impl<D: Dialect> Stream<D> {
    fn response(self) -> HttpResponse {
        let events = futures_util::stream::unfold(self, |mut stream| async move {
            let events = stream.events().await?;
            Some((Ok::<_, std::convert::Infallible>(events), stream))
        });
        HttpResponse::Ok()
            .insert_header((CONTENT_TYPE, "text/event-stream; charset=utf-8"))
            .insert_header((CACHE_CONTROL, "no-cache"))
            .insert_header(("x-accel-buffering", "no"))
            .streaming(events)
    }

    /// All events that can be sent now.
    async fn events(&mut self) -> Option<Bytes> {
        let mut out = Vec::new();
        let progress = match std::mem::replace(&mut self.next, Next::Wait) {
            Next::Show(progress) => Ok(progress),
            Next::Wait => self.run.next().await,
            Next::End => return None,
        };
        match progress {
            Ok(progress) if progress.is_empty() => {
                self.next = Next::End;
                if self.usage != ShownUsage::Nowhere {
                    let usage = self.dialect.usage(self.run.usage());
                    let none: &[D::Choice] = &[];
                    event(&mut out, &self.envelope.reply(D::CHUNK, none, Some(Some(usage))));
                }
                out.extend_from_slice(b"data: [DONE]\n\n");
            }
            Ok(progress) => {
                let usage = match self.usage {
                    ShownUsage::Nowhere => None,
                    ShownUsage::AtEnd => Some(None),
                    ShownUsage::Always => Some(Some(self.dialect.usage(self.run.usage()))),
                };
                for choice in progress.into_iter().flat_map(|progress| self.dialect.chunks(progress)) {
                    event(&mut out, &self.envelope.reply(D::CHUNK, &[choice], usage.clone()));
                }
            }
            Err(failure) => {
                self.next = Next::End;
                event(&mut out, &ApiError::from(failure).to_json());
            }
        }
        Some(out.into())
    }
}

fn event(out: &mut Vec<u8>, data: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, data).expect("answers are plain data");
    out.extend_from_slice(b"\n\n");
}

impl Progress {
    fn merge(&mut self, other: Self) {
        self.delta.text.push_str(&other.delta.text);
        self.delta.pieces.extend(other.delta.pieces);
        self.delta.ending = self.delta.ending.take().or(other.delta.ending);
        self.prompt_logprobs = self.prompt_logprobs.take().or(other.prompt_logprobs);
    }
}

/// OpenAI's `finish_reason`.
pub(super) fn finish_reason(ending: Option<&Ending>) -> Option<&'static str> {
    match ending? {
        Ending::StopString(_) | Ending::StopToken(_) => Some("stop"),
        Ending::Length => Some("length"),
    }
}

/// vLLM's `stop_reason`: the client's stop string or token that ended the text.
pub(super) fn stop_reason(ending: Option<&Ending>, model: &ServedModel) -> Option<Json> {
    match ending? {
        Ending::StopString(stop) => Some(json!(stop)),
        Ending::StopToken(token) if !model.defaults.eos_token_ids.contains(token) => Some(json!(token)),
        Ending::StopToken(_) | Ending::Length => None,
    }
}

/// `GET /v1/models`.
pub(crate) async fn models(route: web::Data<Arc<AppRoute>>) -> HttpResponse {
    let names = |model: &Arc<ServedModel>| {
        model.names.iter().map(|name| model_card(model, name)).collect::<Vec<Json>>()
    };
    let data: Vec<Json> = route.models().flat_map(names).collect();
    HttpResponse::Ok().json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/NAME`.
pub(crate) async fn model(
    route: web::Data<Arc<AppRoute>>,
    model: web::Data<Arc<ServedModel>>,
    name: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    match route.models().find(|model| model.is_called(&name)) {
        Some(model) => Ok(HttpResponse::Ok().json(model_card(model, &name))),
        None => Err(ApiError::no_such_model(&name, model.name())),
    }
}

fn model_card(model: &ServedModel, name: &str) -> Json {
    json!({
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "heliostat",
        "root": model.name(),
        "parent": null,
        "max_model_len": model.context_length,
    })
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
