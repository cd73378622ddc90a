//! Who may talk to the cluster, and where: secrets, listeners, the state store.

use super::super::raw::{Raw, Store};
use super::super::{Node, State, Token};
use super::{Check, Facts};
use heliostat_actors::http::{ApiKeys, CertFiles};
use heliostat_runtime::state::EtcdTls;
use heliostat_runtime::system::TlsFiles;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Shortest token that is accepted.
const TOKEN_CHARS_MIN: usize = 16;
/// etcd raises shorter leases to this.
const LEASE_S_MIN: u32 = 2;

/// The first key of a file with keys.
pub(super) fn first_key(file: Option<&Result<String, String>>) -> Option<Token> {
    let text = file?.as_ref().ok()?;
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.next().map(|key| Token(key.to_owned()))
}

/// The certificates that the file names, absolute; None where it names none, or not all.
pub(in super::super) fn tls_files(raw: &Raw, dir: &Path) -> Option<TlsFiles> {
    let security = &raw.security;
    let files = match (&security.dir, &security.ca, &security.cert, &security.key) {
        (Some(own), ..) => TlsFiles::in_dir(&dir.join(own)),
        (None, Some(ca), Some(cert), Some(key)) => {
            TlsFiles { ca: dir.join(ca), cert: dir.join(cert), key: dir.join(key), server_name: None }
        }
        (None, ..) => return None,
    };
    Some(TlsFiles { server_name: security.server_name.clone(), ..files })
}

impl Check<'_> {
    /// Certificates for the connections between processes.
    pub(super) fn security(&mut self, raw: &Raw, facts: &Facts) -> Option<TlsFiles> {
        let security = &raw.security;
        let single = [("ca", &security.ca), ("cert", &security.cert), ("key", &security.key)];
        let named: Vec<&str> =
            single.iter().filter(|(_, path)| path.is_some()).map(|(name, _)| *name).collect();
        if let (Some(_), Some(first)) = (&security.dir, named.first()) {
            let message = format!("`dir` names all three files, and `{first}` is set, too");
            self.require(false, &format!("security.{first}"), message, "keep one of them");
        }
        if security.dir.is_none() && (named.len() < 3) {
            let any = named.first().copied().or(security.server_name.as_ref().map(|_| "server_name"));
            if let Some(any) = any {
                let help = "set `dir`, or all of `ca`, `cert` and `key`; `helio cert` makes them";
                self.require(
                    false,
                    &format!("security.{any}"),
                    "no TLS without certificate, key and CA",
                    help,
                );
            }
        }
        if let Some(Err(why)) = &facts.tls {
            let key = if security.dir.is_some() { "security.dir" } else { "security.cert" };
            let help = "make them: helio cert ca; helio cert node NAME --host ADDRESS";
            self.require(false, key, why.trim_end_matches("; `helio cert` makes one"), help);
        }
        tls_files(raw, &facts.dir)
    }

    pub(super) fn token(&mut self, raw: &Raw, facts: &Facts) -> Option<Token> {
        let cluster = &raw.cluster;
        let both = cluster.token.is_some() && cluster.token_file.is_some();
        self.require(
            !both,
            "cluster.token_file",
            "`token` and `token_file` are both set",
            "keep one of them",
        );
        match &cluster.token {
            Some(token) => self.secret("cluster.token", token),
            None => self.secret_file("cluster.token_file", facts.token_file.as_ref()),
        }
    }

    /// What a file with a secret holds.
    pub(super) fn secret_file(&mut self, path: &str, file: Option<&Result<String, String>>) -> Option<Token> {
        match file? {
            Ok(text) => self.secret(path, text),
            Err(e) => {
                let message = format!("cannot read the file: {e}");
                self.require(false, path, message, "create it: openssl rand -hex 32 > FILE");
                None
            }
        }
    }

    /// The keys in a file, one per line.
    pub(super) fn keys_file(&mut self, path: &str, file: Option<&Result<String, String>>) -> ApiKeys {
        let keys = match file {
            None => return ApiKeys::default(),
            Some(Ok(text)) => ApiKeys::parse(text).map_err(|e| e.to_string()),
            Some(Err(e)) => Err(format!("cannot read the file: {e}")),
        };
        keys.unwrap_or_else(|why| {
            self.require(false, path, why, "one key per line; make one with: openssl rand -hex 32 >> FILE");
            ApiKeys::default()
        })
    }

    /// The certificate of an HTTP server. It may lie on another machine only, so its files are not looked at.
    pub(super) fn https(
        &mut self,
        section: &str,
        (cert, key): (&Option<PathBuf>, &Option<PathBuf>),
        dir: &Path,
    ) -> Option<CertFiles> {
        match (cert, key) {
            (Some(cert), Some(key)) => Some(CertFiles { cert: dir.join(cert), key: dir.join(key) }),
            (None, None) => None,
            (Some(_), None) => {
                let path = format!("{section}.tls_cert");
                self.require(false, &path, "a certificate without its key", "set `tls_key`");
                None
            }
            (None, Some(_)) => {
                let path = format!("{section}.tls_key");
                self.require(false, &path, "a key without its certificate", "set `tls_cert`");
                None
            }
        }
    }

    /// What clients of the HTTP server may cost.
    pub(super) fn serve_bounds(&mut self, raw: &Raw) {
        for (key, value) in [
            ("serve.max_connections", f64::from(raw.serve.max_connections)),
            ("serve.header_timeout_s", raw.serve.header_timeout_s),
            ("serve.body_timeout_s", raw.serve.body_timeout_s),
        ] {
            self.positive(key, value);
        }
        let time = raw.serve.request_timeout_s;
        let message = format!("`request_timeout_s` is {time}");
        let help = "a number of seconds, or 0 for no limit";
        self.require(time == 0.0 || time.is_finite() && time > 0.0, "serve.request_timeout_s", message, help);
        let bare = |origin: &String| {
            let host = origin.strip_prefix("https://").or(origin.strip_prefix("http://"));
            origin == "*" || host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '*', ' ']))
        };
        if let Some(origin) = raw.serve.cors_origins.iter().find(|origin| !bare(origin)) {
            let message = format!("`{origin}` is no origin of web pages");
            let help = "scheme and host, as in \"https://chat.example.com\", or \"*\" for all";
            self.require(false, "serve.cors_origins", message, help);
        }
    }

    pub(super) fn secret(&mut self, path: &str, text: &str) -> Option<Token> {
        let text = text.trim();
        let long = text.chars().count() >= TOKEN_CHARS_MIN;
        let message = format!("the secret is shorter than {TOKEN_CHARS_MIN} characters");
        self.require(long, path, message, "make one with: openssl rand -hex 32");
        Some(Token(text.to_string()))
    }

    pub(super) fn listeners(&mut self, raw: &Raw, has_token: bool) {
        let bind = raw.head.bind;
        self.require(
            bind.ip().is_loopback() || has_token,
            "head.bind",
            format!("the head would listen on {bind}, beyond loopback, without a cluster token"),
            "set `token_file` in [cluster]",
        );
        self.require(
            !bind.ip().is_unspecified() || raw.head.advertise.is_some(),
            "head.bind",
            format!("nobody can connect to the wildcard address {bind}"),
            "set `advertise` to the address by which others reach this machine",
        );
        self.require(
            raw.serve.host.is_loopback() || raw.serve.api_key_file.is_some(),
            "serve.host",
            format!("HTTP would listen on {}, beyond loopback, without authentication", raw.serve.host),
            "set `api_key_file`",
        );
        let clash = bind.port() == raw.serve.port && bind.port() != 0;
        self.require(
            !(clash && same_interface(bind.ip(), raw.serve.host)),
            "serve.port",
            format!("head and HTTP would both listen on port {}", bind.port()),
            "choose another port",
        );
        self.dashboard_listener(raw);
        let remote = raw.nodes.iter().position(|n| n.host.is_some()).filter(|_| bind.ip().is_loopback());
        if let Some(i) = remote {
            let message = format!("a node on another host cannot reach the head at {bind}");
            self.require(
                false,
                &format!("nodes.{i}.host"),
                message,
                "set `bind` in [head] to this machine's address",
            );
        }
    }

    pub(super) fn heads(&mut self, raw: &Raw) {
        let head = &raw.head;
        self.require(
            head.peers.is_empty() || raw.state.store == Store::Etcd,
            "head.peers",
            "the embedded store has one head",
            "set store = \"etcd\" in [state], or leave `peers` out",
        );
        let named = |peer: &String| !peer.trim().is_empty() && !peer.contains(',');
        self.require(
            head.peers.iter().all(named),
            "head.peers",
            "every peer is one HOST:PORT",
            "peers = [\"10.0.0.2:6379\"]",
        );
        self.require(
            head.lease_s >= LEASE_S_MIN,
            "head.lease_s",
            format!("`lease_s` = {} is shorter than etcd's shortest lease", head.lease_s),
            format!("write {LEASE_S_MIN} or more"),
        );
    }

    fn dashboard_listener(&mut self, raw: &Raw) {
        let (host, port) = (raw.dashboard.host, raw.dashboard.port);
        self.require(
            host.is_loopback() || raw.dashboard.api_key_file.is_some(),
            "dashboard.host",
            format!("anybody who reaches {host} could run commands: the dashboard has no authentication"),
            "set `api_key_file` in [dashboard]",
        );
        let others = [
            ("the head", raw.head.bind.ip(), raw.head.bind.port()),
            ("HTTP", raw.serve.host, raw.serve.port),
        ];
        for (who, ip, other) in others.into_iter().filter(|_| raw.dashboard.enabled && port != 0) {
            self.require(
                !(other == port && same_interface(ip, host)),
                "dashboard.port",
                format!("{who} and the dashboard would both listen on port {port}"),
                "choose another port",
            );
        }
    }

    /// Where jobs run, and their limits.
    pub(super) fn dashboard(&mut self, raw: &Raw, nodes: &[Node]) {
        let dashboard = &raw.dashboard;
        self.known_node("dashboard.node", dashboard.node.as_deref(), nodes);
        for (key, value) in [
            ("dashboard.stop_grace_s", dashboard.stop_grace_s),
            ("dashboard.orphan_grace_s", dashboard.orphan_grace_s),
            ("dashboard.max_connections", f64::from(dashboard.max_connections)),
            ("dashboard.max_jobs_running", f64::from(dashboard.max_jobs_running)),
            ("dashboard.max_jobs_queued", f64::from(dashboard.max_jobs_queued)),
            ("dashboard.max_jobs_kept", f64::from(dashboard.max_jobs_kept)),
            ("dashboard.max_log_bytes", dashboard.max_log_bytes.0 as f64),
            ("dashboard.max_package_bytes", dashboard.max_package_bytes.0 as f64),
        ] {
            self.positive(key, value);
        }
        self.require(
            dashboard.max_package_bytes.0 <= dashboard.max_packages_bytes.0,
            "dashboard.max_packages_bytes",
            "`max_packages_bytes` is below `max_package_bytes`: no such package could be kept",
            "raise it",
        );
    }

    pub(super) fn state(&mut self, raw: &Raw, dir: &Path) -> State {
        let state = &raw.state;
        match state.store {
            Store::Embedded => State::Embedded {
                dir: match &state.dir {
                    Some(path) => dir.join(path),
                    None => dir.join(&raw.cluster.run_dir).join("state"),
                },
            },
            Store::Etcd => {
                let none = state.dir.is_none();
                self.require(
                    none,
                    "state.dir",
                    "`dir` belongs to store = \"embedded\"",
                    "leave it out with etcd",
                );
                let any = state.endpoints.iter().any(|e| !e.trim().is_empty());
                self.require(
                    any,
                    "state.endpoints",
                    "no etcd server is named",
                    "endpoints = [\"http://127.0.0.1:2379\"]",
                );
                let rooted = state.prefix.starts_with('/') && !state.prefix.ends_with('/');
                self.require(
                    rooted,
                    "state.prefix",
                    "a prefix starts with `/` and does not end with it",
                    "prefix = \"/heliostat\"",
                );
                let prefix = format!("{}/{}", state.prefix, raw.cluster.name);
                State::Etcd { endpoints: state.endpoints.clone(), prefix, tls: self.etcd_tls(raw, dir) }
            }
        }
    }
}

impl Check<'_> {
    fn etcd_tls(&mut self, raw: &Raw, dir: &Path) -> Option<EtcdTls> {
        let state = &raw.state;
        let https = state.endpoints.iter().filter(|e| e.starts_with("https://")).count();
        let all = https == state.endpoints.len();
        self.require(
            (https > 0) == state.ca.is_some() && (https == 0 || all),
            "state.endpoints",
            "endpoints with `https://` and a CA's certificate go together",
            "write https:// for all endpoints and set `ca`, or neither",
        );
        let identity = match (&state.cert, &state.key) {
            (Some(cert), Some(key)) => Some((dir.join(cert), dir.join(key))),
            (None, None) => None,
            (Some(_), None) => {
                self.require(false, "state.cert", "a certificate without its key", "set `key`");
                None
            }
            (None, Some(_)) => {
                self.require(false, "state.key", "a key without its certificate", "set `cert`");
                None
            }
        };
        Some(EtcdTls { ca: dir.join(state.ca.as_ref()?), identity })
    }
}

/// Whether a listener on `a` and one on `b` would meet.
fn same_interface(a: IpAddr, b: IpAddr) -> bool {
    a == b || a.is_unspecified() || b.is_unspecified()
}
