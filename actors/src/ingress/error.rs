//! Errors as OpenAI's API shapes them: a status, and `{"error": {"message", "type", "param", "code"}}`.

use std::fmt;

use actix_web::http::StatusCode;
use actix_web::http::header::RETRY_AFTER;
use actix_web::{HttpResponse, ResponseError};
use serde_json::{Value as Json, json};

use super::dispatch::{Failure, Refused};
use crate::serve::target::Backpressure;

/// OpenAI's `code` of a refusal because as many wait as may.
const QUEUE_FULL: &str = "queue_full";
/// Seconds after which a client of a full queue should try again.
const RETRY_FULL_SECONDS: u32 = 1;
/// Seconds after which a client of ranks that are not ready should try again.
const RETRY_NOT_READY_SECONDS: u32 = 5;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<u32>,
}

impl ApiError {
    /// An error of `status`, its `type` chosen by the status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::UNAUTHORIZED => "authentication_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        Self { status, message: message.into(), kind, param: None, code: None, retry_after: None }
    }

    /// 400: the field `param` has a wrong value.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 400: the field `param` asks for what is not there.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self::invalid(param, message).with_code("unsupported_parameter")
    }

    /// 404: another model.
    pub fn no_such_model(model: &str, served: &str) -> Self {
        let message = format!("The model `{model}` does not exist; this server serves `{served}`.");
        let error = Self::new(StatusCode::NOT_FOUND, message).with_code("model_not_found");
        Self { param: Some("model".into()), ..error }
    }

    /// Adds OpenAI's `code`.
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// 503: requests cannot be taken yet, or any more.
    pub fn not_ready(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("not_ready");
        Self { retry_after: Some(RETRY_NOT_READY_SECONDS), ..error }
    }

    /// 429: this client has made too many requests.
    pub fn too_many(wait: std::time::Duration) -> Self {
        let seconds = u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1);
        let message = format!("Too many requests; try again in {seconds} s.");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("rate_limit_exceeded");
        Self { retry_after: Some(seconds), ..error }
    }

    /// 503: all that could do it are busy.
    pub(super) fn busy(message: String) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code(QUEUE_FULL);
        Self { retry_after: Some(RETRY_FULL_SECONDS), ..error }
    }

    /// 408: it was not done in the time that the server gives a request.
    pub(super) fn timed_out(message: String) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, message).with_code("request_timeout")
    }

    /// Whether it was refused because as many wait as may.
    pub(super) fn is_queue_full(&self) -> bool {
        self.code == Some(QUEUE_FULL)
    }

    /// The same in the words of a deployment.
    pub(super) fn under(self, terms: Backpressure) -> Self {
        let status = StatusCode::from_u16(terms.status_code).unwrap_or(self.status);
        let Self { kind, .. } = Self::new(status, "");
        Self { status, kind, retry_after: terms.retry_after_s.or(self.retry_after), ..self }
    }

    fn queue_full(message: String) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, message).with_code(QUEUE_FULL);
        Self { retry_after: Some(RETRY_FULL_SECONDS), ..error }
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The body.
    pub fn to_json(&self) -> Json {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        if let Some(seconds) = self.retry_after {
            response.insert_header((RETRY_AFTER, seconds.to_string()));
        }
        response.json(self.to_json())
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let message = refused.to_string();
        match refused {
            Refused::NotReady { .. } | Refused::RankNotReady(_) => Self::not_ready(message),
            Refused::QueueFull | Refused::OverShare => Self::queue_full(message),
            Refused::NeverFits { .. } => Self::invalid("n", message),
            Refused::NoSuchRank { .. } => Self::invalid("X-data-parallel-rank", message),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::QueueFull => Self::queue_full(message),
            Failure::TimedOut(_) => Self::timed_out(message),
            Failure::NoRank(_) | Failure::Stalled { .. } | Failure::Ended | Failure::MovedTooOften(_) => {
                Self::not_ready(message).with_code("rank_lost")
            }
            Failure::Unservable(_) => Self::new(StatusCode::BAD_REQUEST, message).with_code("unservable"),
            Failure::Rank(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, message).with_code("rank_failed")
            }
        }
    }
}
