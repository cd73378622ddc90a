//! Who may come in: a key, no web page but the dashboard's own, and only names of this machine while only this machine
//! can reach it.
//!
//! Errors are plain text, which Ray's clients and `curl` show as they are.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use actix_web::HttpResponse;
use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::StatusCode;
use actix_web::http::header::{AUTHORIZATION, HOST, HeaderMap, HeaderValue, ORIGIN, RETRY_AFTER};
use actix_web::middleware::Next;
use actix_web::web::Data;

use crate::http::{self, ApiKeys, BodyTime, Caller, HttpDoor, Rates};
use crate::monitor::page;

/// What a request must show.
pub(super) struct Door {
    /// The keys of which one is asked for, if there are any.
    keys: ApiKeys,
    /// Only this machine can reach it: then only under a name of this machine.
    loopback: bool,
    rates: Option<Mutex<Rates>>,
    pause_max: BodyTime,
    opened: Instant,
}

impl Door {
    pub(super) fn new(door: &HttpDoor, loopback: bool) -> Self {
        let per_s = door.bounds.requests_per_s;
        Self {
            keys: door.keys.clone(),
            loopback,
            rates: (per_s > 0).then(|| Mutex::new(Rates::new(per_s))),
            // Packages may be large: only a pause ends an upload.
            pause_max: BodyTime::Pause(door.bounds.body_timeout),
            opened: Instant::now(),
        }
    }

    /// Lets a request in, or answers it.
    fn admit(&self, request: &mut ServiceRequest) -> Option<HttpResponse> {
        let key = self.keys.find(request.headers().get(AUTHORIZATION));
        // The files of the page hold nothing of the cluster: they come first, and the page asks for the key.
        let is_page = page::is_file(request.path()) && request.method().is_safe();
        if let Some(refused) = self.refuse(key.is_some() || is_page, is_page, request.headers()) {
            return Some(refused);
        }
        if let Some(rates) = &self.rates {
            let from = || request.peer_addr().map_or(Caller::Other, |from| Caller::at(from.ip()));
            let caller = key.map_or_else(from, Caller::Key);
            let mut rates = rates.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(wait) = rates.count(caller, self.opened.elapsed()) {
                let seconds = wait.as_millis().div_ceil(1000).max(1).to_string();
                let mut refused = HttpResponse::TooManyRequests();
                let refused = refused.insert_header((RETRY_AFTER, seconds.clone()));
                return Some(refused.body(format!("Too many requests; try again in {seconds} s.")));
            }
        }
        http::within(request, self.pause_max);
        None
    }

    fn refuse(&self, has_key: bool, is_page: bool, headers: &HeaderMap) -> Option<HttpResponse> {
        let text = |status, text: &'static str| Some(HttpResponse::build(status).body(text));
        if !has_key && !self.keys.is_empty() {
            let why = "The header `Authorization: Bearer KEY` is missing or has another key.";
            return text(StatusCode::UNAUTHORIZED, why);
        }
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        if !is_page && is_foreign(headers, host) {
            return text(StatusCode::FORBIDDEN, "Only the dashboard's own page may use it from a browser.");
        }
        if self.loopback && !is_local(host) {
            return text(StatusCode::FORBIDDEN, "The dashboard is served under names of this machine only.");
        }
        None
    }
}

/// Whether a browser says that another page than the one of this host asks.
fn is_foreign(headers: &HeaderMap, host: &str) -> bool {
    let text = |value: Option<&HeaderValue>| value.map(|value| value.to_str().unwrap_or_default().to_owned());
    let origin = text(headers.get(ORIGIN));
    let site = text(headers.get("sec-fetch-site"));
    let own = |origin: &str| origin.split_once("://").is_some_and(|(_, of)| of.eq_ignore_ascii_case(host));
    // `none` is an address that a person typed.
    origin.is_some_and(|origin| !own(&origin))
        || site.is_some_and(|site| site != "same-origin" && site != "none")
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
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let refused = match request.app_data::<Data<Door>>().cloned() {
        Some(door) => door.admit(&mut request),
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
    fn only_the_own_page_is_not_foreign() {
        let foreign = |pairs: &[(&'static str, &'static str)]| {
            let name = |name| actix_web::http::header::HeaderName::from_static(name);
            let headers = pairs.iter().map(|(key, value)| (name(key), HeaderValue::from_static(value)));
            is_foreign(&headers.collect(), "127.0.0.1:8265")
        };
        assert!(!foreign(&[]), "curl and Ray's clients");
        assert!(!foreign(&[("origin", "http://127.0.0.1:8265"), ("sec-fetch-site", "same-origin")]));
        assert!(!foreign(&[("sec-fetch-site", "none")]));
        for origin in
            ["http://evil.example", "null", "http://127.0.0.1:8000", "http://127.0.0.1:8265.evil.example"]
        {
            assert!(foreign(&[("origin", origin)]), "{origin}");
        }
        for site in ["cross-site", "same-site"] {
            assert!(foreign(&[("sec-fetch-site", site)]), "{site}");
        }
    }

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
