//! From the bytes of a request to typed fields, with errors that name the field.

use actix_web::error::PayloadError;
use actix_web::http::StatusCode;
use actix_web::http::header::CONTENT_TYPE;
use actix_web::{HttpRequest, mime};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::ingress::error::ApiError;

/// A request's JSON object.
pub(super) struct Body {
    /// An object.
    json: Json,
    /// Length of its text.
    pub(super) bytes: usize,
}

/// A documented field that is not supported, and the values by which it asks for nothing.
pub(super) struct Refusal {
    pub(super) field: &'static str,
    pub(super) neutral: fn(&Json) -> bool,
    pub(super) instead: &'static str,
}

impl Body {
    /// Parses a body that must be a JSON object and say so.
    pub(super) fn parse(
        http: &HttpRequest,
        bytes: Result<Bytes, actix_web::Error>,
    ) -> Result<Self, ApiError> {
        let bytes = bytes.map_err(|error| not_whole(&error))?;
        let is_json = |mime: mime::Mime| mime.subtype() == mime::JSON || mime.suffix() == Some(mime::JSON);
        let declared = http.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if !declared.and_then(|declared| declared.parse().ok()).is_some_and(is_json) {
            let message = "The header `Content-Type` must be `application/json`.";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        match serde_json::from_slice(&bytes) {
            Ok(json @ Json::Object(_)) => Ok(Self { json, bytes: bytes.len() }),
            Ok(_) => Err(ApiError::new(StatusCode::BAD_REQUEST, "The body must be a JSON object.")),
            Err(error) => {
                let message = format!("The body is not JSON: {error}.");
                Err(ApiError::new(StatusCode::BAD_REQUEST, message))
            }
        }
    }

    /// Refuses the first field of `table` that asks for something.
    pub(super) fn refuse(&self, table: &[Refusal]) -> Result<(), ApiError> {
        let asked = |refusal: &&Refusal| {
            let value = self.json.get(refusal.field);
            value.is_some_and(|value| !value.is_null() && !(refusal.neutral)(value))
        };
        let Some(Refusal { field, instead, .. }) = table.iter().find(asked) else { return Ok(()) };
        let space = if instead.is_empty() { "" } else { " " };
        Err(ApiError::unsupported(
            field,
            format!("`{field}` is not supported by this server.{space}{instead}"),
        ))
    }

    /// Whether any of these fields says something.
    pub(super) fn has_any(&self, fields: &[&str]) -> bool {
        fields.iter().any(|&field| self.json.get(field).is_some_and(|value| !value.is_null()))
    }

    /// Reads the fields of `T`, ignoring others.
    pub(super) fn fields<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        serde_path_to_error::deserialize(&self.json).map_err(|error| {
            let path = error.path().to_string();
            let field = if path == "." { missing_field(&error.inner().to_string()) } else { path };
            ApiError::invalid(field.clone(), format!("Invalid `{field}`: {}.", error.inner()))
        })
    }
}

/// A body that did not come in.
pub(crate) fn not_whole(error: &actix_web::Error) -> ApiError {
    if error.as_response_error().status_code() == StatusCode::PAYLOAD_TOO_LARGE {
        let message = "The body is larger than this server accepts.";
        return ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message);
    }
    let late = matches!(
        error.as_error::<PayloadError>(),
        Some(PayloadError::Io(cause)) if cause.kind() == std::io::ErrorKind::TimedOut
    );
    let status = if late { StatusCode::REQUEST_TIMEOUT } else { StatusCode::BAD_REQUEST };
    ApiError::new(status, format!("The body did not arrive whole: {error}."))
}

/// The name in serde's "missing field `x`".
fn missing_field(message: &str) -> String {
    message.split('`').nth(1).unwrap_or("body").to_owned()
}

/// Null is always neutral; nothing else is.
pub(super) fn never(_: &Json) -> bool {
    false
}

/// `false`, `0`, `""`, `[]`, `{}`.
pub(super) fn empty(value: &Json) -> bool {
    match value {
        Json::Null => true,
        Json::Bool(value) => !value,
        Json::Number(value) => value.as_f64() == Some(0.0),
        Json::String(value) => value.is_empty(),
        Json::Array(value) => value.is_empty(),
        Json::Object(value) => value.is_empty(),
    }
}
