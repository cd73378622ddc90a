//! TLS between processes: the same door, encrypted; and everybody who must not come in, with the words that both sides hear.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail its test")]

#[path = "support/pki.rs"]
mod pki;
mod support;

use std::sync::Arc;
use std::time::Duration;

use heliostat_runtime::handle::{ActorAddr, AskError, Handle, Refusal};
use heliostat_runtime::system::{Secret, System, SystemConfig, SystemError, TlsFiles};
use heliostat_runtime::wire::tls_crypto;
use pki::{Bears, Ca, NODE};
use rcgen::ExtendedKeyUsagePurpose;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use support::*;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CLIENT: Bears = Bears { hosts: &[], uses: &[ExtendedKeyUsagePurpose::ClientAuth], ..NODE };

/// A system with these certificates.
async fn secure(tls: &TlsFiles) -> System {
    System::start(with(Some(tls))).await.unwrap()
}

fn with(tls: Option<&TlsFiles>) -> SystemConfig {
    SystemConfig { tls: tls.cloned(), ..SystemConfig::loopback() }
}

/// A directory with a CA's certificates in it.
struct Pki {
    dir: TempDir,
    ca: Ca,
}

impl Pki {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), ca: Ca::new() }
    }

    fn make(&self, name: &str, bears: &Bears) -> TlsFiles {
        self.ca.make(&self.dir.path().join(name), bears)
    }
}

/// A probe in a system with a node's certificate.
struct Home {
    system: System,
    addr: ActorAddr,
}

async fn home(tls: &TlsFiles) -> Home {
    let system = secure(tls).await;
    let addr = system.spawn(options("probe", 1, 100_000), Probe::default).unwrap();
    Home { system, addr }
}

impl Home {
    /// A handle in another system.
    fn from(&self, away: &System) -> Handle<Probe> {
        away.handle(self.addr.clone())
    }

    /// Asks from a system with these certificates and returns why that failed.
    async fn refused(&self, tls: Option<&TlsFiles>) -> String {
        let away = System::start(with(tls)).await.unwrap();
        let asked = self.from(&away).ask(Add(1)).await;
        away.shutdown().await;
        match asked {
            Err(AskError::Refused(refused)) => match refused.reason {
                Refusal::Unreachable(why) => why,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ask_and_tell_work_over_tls() {
    let pki = Pki::new();
    let home = home(&pki.make("home", &NODE)).await;
    for bears in [&NODE, &CLIENT] {
        let away = secure(&pki.make("away", bears)).await;
        let probe = home.from(&away);
        let before = probe.ask(Add(0)).await.unwrap();
        assert_eq!(probe.ask(Add(2)).await.unwrap(), before + 2);
        probe.tell(Add(4)).unwrap();
        assert_eq!(probe.ask(Add(0)).await.unwrap(), before + 6);
        away.shutdown().await;
    }
    // SE-1: what goes over the wire is not the message.
    let text = b"a text that would be seen";
    assert!(eavesdrop(&pki, text, true).await.windows(text.len()).all(|part| part != text));
    assert!(eavesdrop(&pki, text, false).await.windows(text.len()).any(|part| part == text));
}

/// What passes through the wire while a text is echoed.
async fn eavesdrop(pki: &Pki, text: &[u8], encrypted: bool) -> Vec<u8> {
    let (near, far) = (pki.make("near", &NODE), pki.make("far", &NODE));
    let [near, far] = [&near, &far].map(|files| with(encrypted.then_some(files)));
    let (home, away) = (System::start(near).await.unwrap(), System::start(far).await.unwrap());
    let addr = home.spawn(options("probe", 1, 16), Probe::default).unwrap();
    let tap = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let handle = away.handle_at::<Probe>(&tap.local_addr().unwrap().to_string(), addr.actor);
    let relay = async {
        let (mut left, _) = tap.accept().await.unwrap();
        let mut right = TcpStream::connect(home.endpoint()).await.unwrap();
        let (mut heard, mut up, mut down) = (Vec::new(), [0; 4096], [0; 4096]);
        loop {
            tokio::select! {
                n = left.read(&mut up) => match n {
                    Ok(0) | Err(_) => return heard,
                    Ok(n) => {
                        heard.extend_from_slice(&up[..n]);
                        right.write_all(&up[..n]).await.unwrap();
                    }
                },
                n = right.read(&mut down) => match n {
                    Ok(0) | Err(_) => return heard,
                    Ok(n) => {
                        heard.extend_from_slice(&down[..n]);
                        left.write_all(&down[..n]).await.unwrap();
                    }
                },
            }
        }
    };
    let echo = async {
        assert_eq!(handle.ask(Echo(text.to_vec())).await.unwrap(), text);
        away.shutdown().await;
    };
    tokio::join!(relay, echo).0
}

/// Order, sizes from nothing to megabytes, both directions at once, and sockets that are full most of the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_and_large_arrives_whole_and_in_order_over_tls() {
    let pki = Pki::new();
    let home = home(&pki.make("home", &NODE)).await;
    let away = secure(&pki.make("away", &NODE)).await;
    let probe = home.from(&away);
    let echoes: Vec<_> = (0..24_usize)
        .map(|i| {
            let probe = probe.clone();
            let bytes: Vec<u8> = (0..i * i * i * 300).map(|at| (at * 31 + i) as u8).collect();
            tokio::spawn(async move { probe.ask(Echo(bytes.clone())).await.unwrap() == bytes })
        })
        .collect();
    let tells = 50_000;
    for i in 0..tells {
        while probe.tell(Note(i)).is_err() {
            tokio::task::yield_now().await;
        }
        if i % 97 == 0 {
            tokio::task::yield_now().await;
        }
    }
    for echo in echoes {
        assert!(echo.await.unwrap());
    }
    let seen = probe.ask(Seen()).await.unwrap();
    assert!(seen.iter().copied().eq(0..tells), "{} of {tells}", seen.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_good_certificate_is_kept_out_and_told_why() {
    let (pki, other) = (Pki::new(), Pki::new());
    let home = home(&pki.make("home", &NODE)).await;
    let why = home.refused(None).await;
    assert!(why.contains("it speaks TLS only"), "{why}");
    // Of another CA: our side sees it first, in the certificate of the home.
    let why = home.refused(Some(&other.make("away", &NODE))).await;
    assert!(why.contains("made by another CA"), "{why}");
    // It trusts our CA and was made by another: the home sees it.
    let mut mixed = other.make("mixed", &NODE);
    mixed.ca = pki.make("good", &NODE).ca;
    let why = home.refused(Some(&mixed)).await;
    assert!(why.contains("refuses our certificate, which another CA made"), "{why}");
    let why = home.refused(Some(&pki.make("old", &Bears { ends_in_days: -1, ..NODE }))).await;
    assert!(why.contains("refuses our certificate, which has expired"), "{why}");
    let away = secure(&pki.make("away", &NODE)).await;
    assert_eq!(home.from(&away).ask(Add(1)).await.unwrap(), 1, "a good one still comes in");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_cannot_prove_who_it_is_is_not_asked() {
    let pki = Pki::new();
    let away = pki.make("away", &NODE);
    for (bears, expected) in [
        (Bears { ends_in_days: -1, ..NODE }, "its certificate has expired"),
        (CLIENT, "its certificate is a client's"),
        (Bears { hosts: &["127.0.0.1"], ..CLIENT }, "its certificate is a client's"),
        (Bears { hosts: &["10.1.2.3", "localhost"], ..NODE }, "its certificate does not name 127.0.0.1"),
    ] {
        let home = home(&pki.make("home", &bears)).await;
        let why = home.refused(Some(&away)).await;
        assert!(why.contains(expected), "{why}");
        home.system.shutdown().await;
    }
    // One name for all nodes takes the place of addresses.
    let named = |files: TlsFiles, name: &str| TlsFiles { server_name: Some(name.into()), ..files };
    let home = home(&pki.make("home", &Bears { hosts: &["helio.internal"], ..NODE })).await;
    let why = home.refused(Some(&named(away.clone(), "other.internal"))).await;
    assert!(why.contains("does not name other.internal"), "{why}");
    let away = secure(&named(away, "helio.internal")).await;
    assert_eq!(home.from(&away).ask(Add(1)).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_does_not_talk_with_a_process_without() {
    let pki = Pki::new();
    let system = system().await;
    let addr = system.spawn(options("probe", 1, 16), Probe::default).unwrap();
    let why = Home { system, addr }.refused(Some(&pki.make("away", &NODE))).await;
    assert!(why.contains("it does not speak TLS and this process does"), "{why}");
}

/// A stranger that trusts the home and shows no certificate, or shows one and then says what it likes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_certificate_tls_ends_before_the_greeting() {
    let pki = Pki::new();
    let files = pki.make("home", &NODE);
    let home = home(&files).await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&files.ca).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(tls_crypto())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(home.system.endpoint()).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(ServerName::try_from("127.0.0.1").unwrap(), tcp).await.unwrap();
    let error = stream.read(&mut [0; 64]).await.unwrap_err().to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_token_is_asked_for_under_tls_too() {
    let pki = Pki::new();
    let files = pki.make("home", &NODE);
    let config = |token: &str| SystemConfig { token: Some(Secret::new(token)), ..with(Some(&files)) };
    let home = System::start(config("sun")).await.unwrap();
    let addr = home.spawn(options("probe", 1, 16), Probe::default).unwrap();
    let away = System::start(config("moon")).await.unwrap();
    assert!(away.handle::<Probe>(addr.clone()).ask(Add(1)).await.is_err());
    let away = System::start(config("sun")).await.unwrap();
    assert_eq!(away.handle::<Probe>(addr).ask(Add(1)).await.unwrap(), 1);
}

/// SE-3: a certificate that ran out is replaced on disk, and nobody is restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewed_certificates_count_without_a_restart() {
    let pki = Pki::new();
    let old = Bears { ends_in_days: -1, ..NODE };
    let home = home(&pki.make("home", &NODE)).await;
    let away = secure(&pki.make("away", &old)).await;
    let probe = home.from(&away);
    assert!(probe.ask(Add(1)).await.is_err());
    // A half-written file changes nothing, and does no harm.
    std::fs::write(pki.dir.path().join("away/tls.crt"), "-----BEGIN").unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(probe.ask(Add(1)).await.is_err());
    pki.make("away", &NODE);
    let renewed = async {
        while probe.ask(Add(1)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), renewed).await.unwrap();
}

#[tokio::test]
async fn unusable_files_are_named() {
    let pki = Pki::new();
    let good = pki.make("good", &NODE);
    let fails = async |files: TlsFiles| match System::start(with(Some(&files))).await {
        Err(SystemError::Tls(error)) => error.to_string(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("started"),
    };
    let why = fails(TlsFiles { cert: "/nowhere/tls.crt".into(), ..good.clone() }).await;
    assert!(why.contains("/nowhere/tls.crt") && why.contains("helio cert"), "{why}");
    let why = fails(TlsFiles { cert: good.key.clone(), ..good.clone() }).await;
    assert!(why.contains("holds no certificate"), "{why}");
    let why = fails(TlsFiles { key: good.cert.clone(), ..good.clone() }).await;
    assert!(why.contains("holds no private key"), "{why}");
    let why = fails(TlsFiles { key: pki.make("other", &NODE).key, ..good.clone() }).await;
    assert!(why.contains("with key"), "{why}");
    let why = fails(TlsFiles { server_name: Some("not a name".into()), ..good }).await;
    assert!(why.contains("not a name"), "{why}");
}
