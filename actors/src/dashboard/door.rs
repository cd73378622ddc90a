//! Who may come in: a key, no browser, and only names of this machine while only this machine can reach it.
//!
//! Errors are plain text, which Ray's clients and `curl` show as they are.

use std::net::IpAddr;

use actix_web::HttpResponse;
use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::StatusCode;
use actix_web::http::header::{AUTHORIZATION, HOST, HeaderMap, ORIGIN};
use actix_web::middleware::Next;
use actix_web::web::Data;

use crate::ingress::server::ApiKey;

/// What a request must show.
pub(super) struct Door {
    /// The key that is asked for, if one is.
    pub(super) key: Option<ApiKey>,
    /// Only this machine can reach it: then only under a name of this machine.
    pub(super) loopback: bool,
}

impl Door {
    fn refuse(&self, headers: &HeaderMap) -> Option<HttpResponse> {
        let text = |status, text: &'static str| Some(HttpResponse::build(status).body(text));
        if self.key.as_ref().is_some_and(|key| !key.matches(headers.get(AUTHORIZATION))) {
            let why = "The header `Authorization: Bearer KEY` is missing or has another key.";
            return text(StatusCode::UNAUTHORIZED, why);
        }
        if headers.contains_key(ORIGIN) || headers.contains_key("sec-fetch-site") {
            return text(StatusCode::FORBIDDEN, "The dashboard cannot be used from a browser.");
        }
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        if self.loopback && !is_local(host) {
            return text(StatusCode::FORBIDDEN, "The dashboard is served under names of this machine only.");
        }
        None
    }
}

/// Whether a `Host` names this machine by a loopback name: another name was made to lead here.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|ip| ip.is_loopback())
}

/// Around every request, of whatever part.
pub(super) async fn guard(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let refused = match request.app_data::<Data<Door>>() {
        Some(door) => door.refuse(request.headers()),
        None => Some(HttpResponse::InternalServerError().finish()),
    };
    match refused {
        None => Ok(next.call(request).await?.map_into_left_body()),
        Some(refused) => Ok(request.into_response(refused).map_into_right_body()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for host in ["127.0.0.1:8265", "localhost:8265", "localhost", "[::1]:8265", "127.0.0.2"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["", "evil.example:8265", "127.0.0.1.evil.example", "10.0.0.1:8265", "localhost.evil:1"] {
            assert!(!is_local(host), "{host}");
        }
    }
}
