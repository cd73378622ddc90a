//! Who comes in over HTTP, how often, and what slow, idle or curious clients cost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use heliostat_actors::http::{ApiKeys, Bounds, CertFiles};
use heliostat_actors::ingress::server::HttpConfig;
use heliostat_runtime::wire::tls_crypto;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::rig::{Options, Rig};

/// Longer than anything here takes, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn rig(http: HttpConfig) -> Rig {
    Rig::start(Options { http, ..Options::default() })
}

fn config() -> HttpConfig {
    Options::default().http
}

async fn connect(rig: &Rig) -> TcpStream {
    TcpStream::connect(rig.url.trim_start_matches("http://")).await.unwrap()
}

/// Sends a request and returns the answer's head, in small letters, and what came of its body.
async fn say(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    String::from_utf8_lossy(&answer).to_lowercase()
}

const MODELS: &str = "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn each_of_several_keys_opens() {
    let rig = rig(HttpConfig { keys: ApiKeys::new(["first key", "second key"]), ..config() });
    let status = async |key: &str| {
        rig.http.get(format!("{}/v1/models", rig.url)).bearer_auth(key).send().await.unwrap().status()
    };
    assert_eq!([status("first key").await, status("second key").await], [200, 200]);
    assert_eq!([status("third key").await, status("").await], [401, 401]);
}

#[tokio::test]
async fn a_client_that_asks_too_often_is_told_when_to_come_again() {
    let bounds = Bounds { requests_per_s: 3, ..Bounds::default() };
    let rig = rig(HttpConfig { keys: ApiKeys::new(["eager", "calm"]), bounds, ..config() });
    let get = |path: &str, key: &str| rig.http.get(format!("{}{path}", rig.url)).bearer_auth(key).send();
    let mut refused = None;
    for _ in 0..20 {
        let answer = get("/v1/models", "eager").await.unwrap();
        if answer.status() == 429 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("20 requests at once are more than 3 per second");
    assert_eq!(refused.headers()["retry-after"], "1");
    assert!(refused.text().await.unwrap().contains("rate_limit_exceeded"));
    assert_eq!(get("/v1/models", "calm").await.unwrap().status(), 200, "the other key has its own");
    assert_eq!(get("/health", "eager").await.unwrap().status(), 200, "probes are not counted");
    tokio::time::sleep(Duration::from_millis(1000)).await;
    assert_eq!(get("/v1/models", "eager").await.unwrap().status(), 200);
}

#[tokio::test]
async fn web_pages_of_named_origins_may_ask() {
    let origins = vec!["https://chat.example.com".to_owned()];
    let rig = rig(HttpConfig { keys: ApiKeys::new(["sesame"]), cors_origins: origins, ..config() });
    let preflight = async |rig: &Rig, origin: &str, method: &str| {
        let request = rig.http.request(reqwest::Method::OPTIONS, format!("{}/v1/chat/completions", rig.url));
        let request = request.header("origin", origin).header("access-control-request-method", method);
        let request =
            request.header("access-control-request-headers", "authorization, content-type, x-stainless-os");
        let answer = request.send().await.unwrap();
        let allowed = answer.headers().get("access-control-allow-origin").cloned();
        (answer.status().as_u16(), allowed.map(|origin| origin.to_str().unwrap().to_owned()))
    };
    let named = preflight(&rig, "https://chat.example.com", "POST").await;
    assert_eq!(named, (200, Some("https://chat.example.com".into())), "without a key");
    assert_eq!(preflight(&rig, "https://evil.example.com", "POST").await, (400, None));
    for method in ["PUT", "PATCH", "DELETE"] {
        assert_eq!(
            preflight(&rig, "https://chat.example.com", method).await,
            named,
            "users' actors may take it"
        );
    }
    assert_eq!(preflight(&rig, "https://chat.example.com", "TRACE").await.0, 400);
    let models = rig.http.get(format!("{}/v1/models", rig.url)).header("origin", "https://chat.example.com");
    assert_eq!(models.send().await.unwrap().status(), 401, "a key is asked of the request itself");
    // Where no origin is named, no page is told that it may.
    let closed = self::rig(config());
    assert_eq!(preflight(&closed, "https://chat.example.com", "POST").await.1, None);
}

#[tokio::test]
async fn a_head_that_trickles_is_cut_off() {
    let bounds = Bounds { header_timeout: Duration::from_millis(500), ..Bounds::default() };
    let rig = rig(HttpConfig { bounds, ..config() });
    let (mut slow, started) = (connect(&rig).await, Instant::now());
    let trickle = async {
        for byte in MODELS.bytes().cycle() {
            // Never ends its head: the line ends are left out.
            if !matches!(byte, b'\r' | b'\n') && slow.write_all(&[byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            let mut answer = [0; 64];
            match timeout(Duration::from_millis(1), slow.read(&mut answer)).await {
                Ok(Ok(n)) => {
                    assert!(n == 0 || answer.starts_with(b"HTTP/1.1 408"), "{answer:?}");
                    return;
                }
                Ok(Err(_)) => return,
                Err(_) => {}
            }
        }
    };
    timeout(PATIENCE, trickle).await.expect("it is cut off");
    assert!(started.elapsed() >= Duration::from_millis(400));
}

#[tokio::test]
async fn a_body_that_trickles_is_refused() {
    let bounds = Bounds { body_timeout: Duration::from_millis(500), ..Bounds::default() };
    let rig = rig(HttpConfig { bounds, ..config() });
    let mut slow = connect(&rig).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                connection: close\r\ncontent-length: 1000\r\n\r\n{";
    let answer = say(&mut slow, head).await;
    assert!(answer.starts_with("http/1.1 408"), "{answer}");
    assert!(answer.contains("nothing more of it came within 0.5 s"), "{answer}");
    // One that comes in parts, but in time, is taken.
    let mut parts = connect(&rig).await;
    let body = json!({"model": "sundial", "prompt": "The", "max_tokens": 1}).to_string();
    let head = head.replace("1000", &body.len().to_string()).trim_end_matches('{').to_owned();
    parts.write_all(head.as_bytes()).await.unwrap();
    let (first, rest) = body.split_at(9);
    parts.write_all(first.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(say(&mut parts, rest).await.starts_with("http/1.1 200"));
}

#[tokio::test]
async fn idle_connections_beyond_the_bound_wait_and_do_not_shut_others_out() {
    let bounds =
        Bounds { connections_max: 2, header_timeout: Duration::from_millis(1500), ..Bounds::default() };
    let rig = rig(HttpConfig { bounds, threads: 1, ..config() });
    let mut idle = Vec::new();
    for _ in 0..8 {
        idle.push(connect(&rig).await);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut late = connect(&rig).await;
    late.write_all(MODELS.as_bytes()).await.unwrap();
    let early = timeout(Duration::from_millis(300), late.read(&mut [0; 16])).await;
    assert!(early.is_err(), "it waits while two others are served");
    assert!(say(&mut late, "").await.starts_with("http/1.1 200"), "its turn comes");
}

#[tokio::test]
async fn https_is_served_and_http_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let files = CertFiles { cert: dir.path().join("tls.crt"), key: dir.path().join("tls.key") };
    std::fs::write(&files.cert, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    let rig = rig(HttpConfig { tls: Some(files.clone()), ..config() });
    let handshake = async |rig: &Rig, pem: &[u8]| {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(pem).unwrap()).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(tls_crypto())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        connector.connect(ServerName::try_from("localhost").unwrap(), connect(rig).await).await
    };
    let mut secure = handshake(&rig, made.cert.pem().as_bytes()).await.unwrap();
    assert!(say(&mut secure, MODELS).await.starts_with("http/1.1 200"));
    let mut plain = connect(&rig).await;
    let answer = say(&mut plain, MODELS).await;
    assert!(!answer.contains("200 ok"), "{answer}");
    // Renewed on disk: the next connection sees the new one.
    let renewed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(&files.key, renewed.signing_key.serialize_pem()).unwrap();
    std::fs::write(&files.cert, renewed.cert.pem()).unwrap();
    let seen = async {
        while handshake(&rig, renewed.cert.pem().as_bytes()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, seen).await.expect("the renewed certificate");
}
