//! HTTP requests of one application as Ray Serve's proxies count them, under its names: `ray_serve_num_http_requests`,
//! `ray_serve_num_http_error_requests`, `ray_serve_num_deployment_http_error_requests`, `ray_serve_http_request_latency_ms`,
//! `ray_serve_num_ongoing_http_requests`. Labels have few values: a path is known by its pattern, or its application's prefix.
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
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::spans::HttpSpan;
use crate::serve::calls::counts::BUCKETS_MS;

/// Methods that are told by name; every other one is `OTHER`.
const METHODS: [&str; 7] = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    application: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    application: Arc<str>,
    route: String,
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailedAt {
    application: Arc<str>,
    deployment: String,
    method: &'static str,
    error_code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    application: Arc<str>,
    route: String,
    method: &'static str,
    status_code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failed {
    application: Arc<str>,
    route: String,
    method: &'static str,
    error_code: u16,
}

/// The metrics of one application. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Proxy {
    application: Arc<str>,
    registry: Arc<Registry>,
    requests: Family<Answered, Counter>,
    errors: Family<Failed, Counter>,
    errors_at: Family<FailedAt, Counter>,
    latency: Family<Answered, Histogram, fn() -> Histogram>,
    ongoing: Gauge,
}

impl Proxy {
    /// Of `application`, which has had no request.
    pub(super) fn new(application: &str) -> Self {
        let mut registry = Registry::default();
        let latency: Family<_, _, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(BUCKETS_MS));
        let (requests, errors, errors_at) = (Family::default(), Family::default(), Family::default());
        let (application, gauges) = (Arc::<str>::from(application), Family::<Of, Gauge>::default());
        let ongoing = gauges.get_or_create_owned(&Of { application: Arc::clone(&application) });
        let name = |name: &str| format!("ray_serve_{name}");
        let answered = "HTTP requests that were answered";
        registry.register(name("num_http_requests"), answered, Family::clone(&requests));
        registry.register(name("num_http_error_requests"), "Of them, by 400 or more", Family::clone(&errors));
        registry.register(
            name("num_deployment_http_error_requests"),
            "The same, by the deployment that HTTP goes to",
            Family::clone(&errors_at),
        );
        registry.register(
            name("http_request_latency_ms"),
            "From the request to the last byte of its answer",
            latency.clone(),
        );
        registry.register(name("num_ongoing_http_requests"), "HTTP requests under way", gauges);
        Self { application, registry: Arc::new(registry), requests, errors, errors_at, latency, ongoing }
    }

    /// The text of them.
    pub(super) fn render(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }

    /// A request came, for that deployment where it is one of users' actors. `route` is one of few.
    pub(super) fn begin(
        &self,
        request: &ServiceRequest,
        route: String,
        deployment: Option<String>,
    ) -> Ongoing {
        self.ongoing.inc();
        let asked = Asked {
            application: Arc::clone(&self.application),
            route,
            method: METHODS.into_iter().find(|it| request.method() == *it).unwrap_or("OTHER"),
        };
        let began = Instant::now();
        Ongoing { proxy: self.clone(), asked, deployment, began, status_code: 499, span: None }
    }
}

/// A request under way; it is counted when this is dropped, by 499 if it was never answered.
#[derive(Debug)]
pub(super) struct Ongoing {
    proxy: Proxy,
    asked: Asked,
    deployment: Option<String>,
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
            if let Some(deployment) = self.deployment.take() {
                let at = FailedAt { application: application.clone(), deployment, method, error_code: code };
                self.proxy.errors_at.get_or_create(&at).inc();
            }
            let (application, route) = (application.clone(), route.clone());
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

    use super::*;

    #[test]
    fn a_request_ends_with_its_last_byte() {
        let proxy = Proxy::new("default");
        let begin = |request: &ServiceRequest| proxy.begin(request, "/it".to_owned(), Some("It".to_owned()));
        let request = TestRequest::post().uri("/v1/completions").to_srv_request();
        let ongoing = begin(&request);
        let body = stream::pending::<Result<Bytes, actix_web::Error>>();
        let streamed = ongoing.answer(request.into_response(HttpResponse::Ok().streaming(body)), None);
        assert!(
            proxy.render().contains(r#"ray_serve_num_ongoing_http_requests{application="default"} 1"#),
            "{}",
            proxy.render()
        );
        drop(streamed);
        let request = TestRequest::with_uri("/nowhere").method("BREW".parse().unwrap()).to_srv_request();
        let ongoing = begin(&request);
        drop(ongoing.answer(request.into_response(HttpResponse::NotFound().body("no")), None));
        let text = proxy.render();
        let labels = r#"application="default",route="/it",method="POST",status_code="200""#;
        for line in [
            r#"ray_serve_num_ongoing_http_requests{application="default"} 0"#,
            &format!("ray_serve_num_http_requests_total{{{labels}}} 1"),
            &format!("ray_serve_http_request_latency_ms_count{{{labels}}} 1"),
            r#"ray_serve_num_http_error_requests_total{application="default",route="/it",method="OTHER",error_code="404"} 1"#,
            r#"ray_serve_num_deployment_http_error_requests_total{application="default",deployment="It",method="OTHER",error_code="404"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
