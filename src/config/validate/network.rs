//! Who may talk to the cluster, and where: secrets, listeners, the state store.

use super::super::raw::{Raw, Store};
use super::super::{Node, State, Token};
use super::{Check, Facts};
use std::net::IpAddr;
use std::path::Path;

/// Shortest token that is accepted.
const TOKEN_CHARS_MIN: usize = 16;
/// etcd raises shorter leases to this.
const LEASE_S_MIN: u32 = 2;

impl Check<'_> {
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
                State::Etcd { endpoints: state.endpoints.clone(), prefix }
            }
        }
    }
}

/// Whether a listener on `a` and one on `b` would meet.
fn same_interface(a: IpAddr, b: IpAddr) -> bool {
    a == b || a.is_unspecified() || b.is_unspecified()
}
