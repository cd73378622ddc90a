//! vLLM's `POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`; and `POST /v1/embeddings`, which these models do not make.

use std::sync::Arc;

use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use crate::ingress::error::ApiError;
use crate::ingress::model::ServedModel;

use super::body::Body;
use super::job::{self, off_the_loop};
use super::messages::Conversation;
use super::tools::ToolFields;

#[derive(Debug, Deserialize)]
struct Tokenize {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Map<String, Json>>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    chat_template_kwargs: Option<Map<String, Json>>,
    return_token_strs: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Detokenize {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// Token ids of a prompt or a conversation.
pub(crate) async fn tokenize(
    http: HttpRequest,
    model: web::Data<Arc<ServedModel>>,
    body: Result<Bytes, actix_web::Error>,
) -> Result<HttpResponse, ApiError> {
    let model = model.get_ref().clone();
    let answer = off_the_loop(Body::parse(&http, body)?, move |body| {
        let fields: Tokenize = body.fields()?;
        check_model(&model, fields.model.as_deref())?;
        let ids = match (&fields.prompt, &fields.messages) {
            (Some(prompt), None) => {
                job::encode(&model, "prompt", prompt, fields.add_special_tokens.unwrap_or(true))?
            }
            (None, Some(messages)) => {
                let tools = body.fields::<ToolFields>()?.offer()?;
                let conversation = Conversation {
                    messages,
                    param: "messages",
                    add_generation_prompt: fields.add_generation_prompt.unwrap_or(true),
                    extra: fields.chat_template_kwargs.unwrap_or_default(),
                    tools: tools.as_ref(),
                };
                conversation.prompt(&model)?.ids
            }
            _ => {
                return Err(ApiError::invalid(
                    "prompt",
                    "Exactly one of `prompt` and `messages` must be there.",
                ));
            }
        };
        let texts = || ids.iter().map(|&id| model.text.token_text(id)).collect::<Vec<_>>();
        let texts = (fields.return_token_strs == Some(true)).then(texts);
        Ok(json!({
            "count": ids.len(),
            "max_model_len": model.context_length,
            "tokens": ids,
            "token_strs": texts,
        }))
    });
    Ok(HttpResponse::Ok().json(answer.await?))
}

/// Text of token ids.
pub(crate) async fn detokenize(
    http: HttpRequest,
    model: web::Data<Arc<ServedModel>>,
    body: Result<Bytes, actix_web::Error>,
) -> Result<HttpResponse, ApiError> {
    let fields: Detokenize = Body::parse(&http, body)?.fields()?;
    check_model(&model, fields.model.as_deref())?;
    if let Some(token) = fields.tokens.iter().find(|&&token| token as usize >= model.vocab_size) {
        let message = format!("`tokens` has {token}, but token ids must be below {}.", model.vocab_size);
        return Err(ApiError::invalid("tokens", message));
    }
    Ok(HttpResponse::Ok().json(json!({"prompt": model.text.decode(&fields.tokens, false)})))
}

/// What the tokenizer is.
pub(crate) async fn tokenizer_info(model: web::Data<Arc<ServedModel>>) -> HttpResponse {
    HttpResponse::Ok().json(model.text.info())
}

/// Refuses: the models served here generate text.
pub(crate) async fn embeddings(model: web::Data<Arc<ServedModel>>) -> Result<HttpResponse, ApiError> {
    let message = format!("The model `{}` generates text; it makes no embeddings.", model.name());
    Err(ApiError::new(StatusCode::BAD_REQUEST, message).with_code("unsupported_endpoint"))
}

fn check_model(model: &ServedModel, name: Option<&str>) -> Result<(), ApiError> {
    match name {
        Some(name) if !model.is_called(name) => Err(ApiError::no_such_model(name, model.name())),
        _ => Ok(()),
    }
}
