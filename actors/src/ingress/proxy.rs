//! HTTP requests as Ray Serve's proxies count them, under its names: `ray_serve_num_http_requests`,
//! `ray_serve_num_http_error_requests`, `ray_serve_http_request_latency_ms`, `ray_serve_num_ongoing_http_requests`.
//!
//! A request ends with the last byte of its answer, or when its client is gone.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use bytes::Bytes;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::spans::HttpSpan;

/// Ray Serve's default buckets, milliseconds.
const BUCKETS: [f64; 15] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 300.0, 400.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    application: Arc<str>,
    route: String,
    method: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    application: Arc<str>,
    route: String,
    method: String,
    status_code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failed {
    application: Arc<str>,
    route: String,
    method: String,
    error_code: u16,
}

/// The metrics of one application.
#[derive(Clone, Debug)]
pub(super) struct Proxy {
    application: Arc<str>,
    requests: Family<Answered, Counter>,
    errors: Family<Failed, Counter>,
    latency: Family<Answered, Histogram, fn() -> Histogram>,
    ongoing: Gauge,
}

impl Proxy {
    /// Registers the metrics of `application`.
    pub(super) fn new(registry: &mut Registry, application: &str) -> Self {
        let latency: fn() -> Histogram = || Histogram::new(BUCKETS);
        let this = Self {
            application: application.into(),
            requests: Family::default(),
            errors: Family::default(),
            latency: Family::new_with_constructor(latency),
            ongoing: Gauge::default(),
        };
        let name = |name: &str| format!("ray_serve_{name}");
        registry.register(
            name("num_http_requests"),
            "HTTP requests that were answered",
            this.requests.clone(),
        );
        registry.register(name("num_http_error_requests"), "Of them, by 400 or more", this.errors.clone());
        registry.register(
            name("http_request_latency_ms"),
            "From the request to the last byte of its answer",
            this.latency.clone(),
        );
        registry.register(name("num_ongoing_http_requests"), "HTTP requests under way", this.ongoing.clone());
        this
    }

    /// A request came.
    pub(super) fn begin(&self, request: &ServiceRequest) -> Ongoing {
        self.ongoing.inc();
        let asked = Asked {
            application: Arc::clone(&self.application),
            // By pattern, which are few; what matches none is one more.
            route: request.match_pattern().unwrap_or_else(|| "other".to_owned()),
            method: request.method().to_string(),
        };
        Ongoing { proxy: self.clone(), asked, began: Instant::now(), status_code: 499, span: None }
    }
}

/// A request under way; it is counted when this is dropped, by 499 if it was never answered.
#[derive(Debug)]
pub(super) struct Ongoing {
    proxy: Proxy,
    asked: Asked,
    began: Instant,
    status_code: u16,
    /// Ends with it.
    span: Option<HttpSpan>,
}

impl Ongoing {
    /// The request has an answer; one that is streamed takes this along.
    pub(super) fn answer(
        mut self,
        response: ServiceResponse<impl MessageBody + 'static>,
        span: Option<HttpSpan>,
    ) -> ServiceResponse {
        self.span = span;
        self.status_code = response.status().as_u16();
        let response = response.map_into_boxed_body();
        if matches!(response.response().body().size(), BodySize::Stream) {
            return response.map_body(|_, body| BoxBody::new(Counted { body, _ongoing: self }));
        }
        response
    }
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        self.proxy.ongoing.dec();
        let Asked { application, route, method } = self.asked.clone();
        let code = self.status_code;
        if code >= 400 {
            let (application, route, method) = (application.clone(), route.clone(), method.clone());
            self.proxy.errors.get_or_create(&Failed { application, route, method, error_code: code }).inc();
        }
        let answered = Answered { application, route, method, status_code: code };
        self.proxy.requests.get_or_create(&answered).inc();
        let ms = self.began.elapsed().as_secs_f64() * 1e3;
        self.proxy.latency.get_or_create(&answered).observe(ms);
    }
}

/// A streamed answer.
struct Counted {
    body: BoxBody,
    _ongoing: Ongoing,
}

impl MessageBody for Counted {
    type Error = <BoxBody as MessageBody>::Error;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_next(cx)
    }
}

#[cfg(test)]
mod tests {
    use actix_web::HttpResponse;
    use actix_web::test::TestRequest;
    use futures_util::stream;
    use prometheus_client::encoding::text::encode;

    use super::*;

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn a_request_ends_with_its_last_byte() {
        let mut registry = Registry::default();
        let proxy = Proxy::new(&mut registry, "default");
        let request = TestRequest::post().uri("/v1/completions").to_srv_request();
        let ongoing = proxy.begin(&request);
        let body = stream::pending::<Result<Bytes, actix_web::Error>>();
        let streamed = ongoing.answer(request.into_response(HttpResponse::Ok().streaming(body)), None);
        assert!(text(&registry).contains("ray_serve_num_ongoing_http_requests 1"), "{}", text(&registry));
        drop(streamed);
        let request = TestRequest::get().uri("/nowhere").to_srv_request();
        let ongoing = proxy.begin(&request);
        drop(ongoing.answer(request.into_response(HttpResponse::NotFound().body("no")), None));
        let text = text(&registry);
        let labels = r#"application="default",route="other",method="POST",status_code="200""#;
        for line in [
            "ray_serve_num_ongoing_http_requests 0",
            &format!("ray_serve_num_http_requests_total{{{labels}}} 1"),
            &format!("ray_serve_http_request_latency_ms_count{{{labels}}} 1"),
            r#"ray_serve_num_http_error_requests_total{application="default",route="other",method="GET",error_code="404"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
