//! The store in etcd. Every call has a time limit; a lost connection is made again by the channel below, and a broken
//! watch goes on from where it was.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, EventType, GetOptions, Identity,
    PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchStream,
};
use tokio::time::timeout;

use super::{Entry, EtcdTls, Event, Expect, FORMAT_VERSION, LeaseId, Op, Revision, Snapshot, StateError};

/// Limit of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// Delay before a broken watch is set up again.
const WATCH_RETRY: Duration = Duration::from_millis(100);
/// etcd answers with this code when the revision asked for is gone or the lease is unknown.
const NOT_FOUND: i32 = 5;

/// A store in etcd.
#[derive(Clone)]
pub struct Etcd {
    /// Shared, because a client is large.
    client: Arc<Client>,
    prefix: Arc<str>,
}

impl Etcd {
    pub(super) async fn connect(
        endpoints: &[String],
        prefix: &str,
        tls: Option<&EtcdTls>,
    ) -> Result<Self, StateError> {
        if endpoints.is_empty() {
            return Err(StateError::Invalid("no etcd endpoint is given".into()));
        }
        let options = ConnectOptions::new()
            .with_connect_timeout(CALL_TIMEOUT)
            .with_keep_alive(Duration::from_secs(2), CALL_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let options = match tls {
            Some(tls) => options.with_tls(tls_options(tls)?),
            None => options,
        };
        let at = endpoints.join(", ");
        let unavailable = |why: String| StateError::Unavailable(format!("etcd at {at}: {why}"));
        let client = timeout(CALL_TIMEOUT, Client::connect(endpoints, Some(options)))
            .await
            .map_err(|_| unavailable(format!("no answer within {CALL_TIMEOUT:?}")))?
            .map_err(|e| unavailable(e.to_string()))?;
        let prefix = match prefix.is_empty() || prefix.ends_with('/') {
            true => prefix.to_owned(),
            false => format!("{prefix}/"),
        };
        let store = Self { client: Arc::new(client), prefix: prefix.into() };
        // Connecting succeeds without a server; asking does not.
        within(store.client.maintenance_client().status()).await.map_err(|e| match e {
            StateError::Unavailable(why) => unavailable(why),
            other => other,
        })?;
        store.check_format().await?;
        Ok(store)
    }

    /// Marks what is below the prefix with the format of this version, if nothing is there yet, and refuses another.
    async fn check_format(&self) -> Result<(), StateError> {
        let refuse = |found: String| {
            let place = format!("etcd under {}", self.prefix);
            Err(StateError::Format { place, found, other: "prefix" })
        };
        match self.format().await? {
            Some(found) if found == FORMAT_VERSION.to_string() => return Ok(()),
            Some(found) => return refuse(found),
            // What has no mark was written before there were any, in the first format, or is not there.
            None if self.holds_any().await? => return refuse("1".to_owned()),
            None => {}
        }
        let key = self.format_key();
        let absent = Compare::version(key.as_str(), CompareOp::Equal, 0);
        let mark = TxnOp::put(key.as_str(), FORMAT_VERSION.to_string(), None);
        within(self.client.kv_client().txn(Txn::new().when([absent]).and_then([mark]))).await?;
        // Another head may have marked it before.
        match self.format().await? {
            Some(found) if found != FORMAT_VERSION.to_string() => refuse(found),
            Some(_) | None => Ok(()),
        }
    }

    /// Where the format stands: beside the keys, so that who reads all of them does not find it.
    fn format_key(&self) -> String {
        format!("{}.format", self.prefix.trim_end_matches('/'))
    }

    async fn format(&self) -> Result<Option<String>, StateError> {
        let mut response = within(self.client.kv_client().get(self.format_key(), None)).await?;
        Ok(response.take_kvs().pop().map(|found| String::from_utf8_lossy(found.value()).into_owned()))
    }

    async fn holds_any(&self) -> Result<bool, StateError> {
        let options = Self::all_below(&self.prefix).with_limit(1).with_keys_only();
        let mut response = within(self.client.kv_client().get(&*self.prefix, Some(options))).await?;
        Ok(!response.take_kvs().is_empty())
    }

    /// An empty prefix is all keys, which etcd spells differently.
    fn all_below(prefix: &str) -> GetOptions {
        match prefix.is_empty() {
            true => GetOptions::new().with_all_keys(),
            false => GetOptions::new().with_prefix(),
        }
    }

    pub(super) async fn get(&self, key: &str) -> Result<Option<Entry>, StateError> {
        let mut response = within(self.client.kv_client().get(self.key(key), None)).await?;
        response.take_kvs().pop().map(|kv| self.entry(kv)).transpose()
    }

    pub(super) async fn range(&self, prefix: &str) -> Result<Snapshot, StateError> {
        let prefix = self.key(prefix);
        let options = Self::all_below(&prefix);
        let mut response = within(self.client.kv_client().get(prefix, Some(options))).await?;
        let revision = revision(response.header().map_or(0, |header| header.revision()));
        let entries = response.take_kvs().into_iter().map(|kv| self.entry(kv)).collect::<Result<_, _>>()?;
        Ok(Snapshot { entries, revision })
    }

    pub(super) async fn txn(&self, ops: Vec<Op>) -> Result<Revision, StateError> {
        let conditions: Vec<(String, Expect)> = ops
            .iter()
            .map(|op| (self.key(op.parts().0), op.parts().1))
            .filter(|(_, expect)| *expect != Expect::Any)
            .collect();
        let compares: Vec<Compare> = conditions
            .iter()
            .map(|(key, expect)| {
                let revision = match expect {
                    Expect::Any | Expect::Absent => 0,
                    Expect::Revision(revision) => i64::try_from(revision.0).unwrap_or(i64::MAX),
                };
                Compare::mod_revision(key.as_str(), CompareOp::Equal, revision)
            })
            .collect();
        let otherwise: Vec<TxnOp> =
            conditions.iter().map(|(key, _)| TxnOp::get(key.as_str(), None)).collect();
        let then: Vec<TxnOp> = ops.into_iter().filter_map(|op| self.txn_op(op)).collect();
        let txn = Txn::new().when(compares).and_then(then).or_else(otherwise);
        let response = within(self.client.kv_client().txn(txn)).await?;
        if response.succeeded() {
            return Ok(revision(response.header().map_or(0, |header| header.revision())));
        }
        Err(self.conflict(&conditions, response.op_responses()))
    }

    fn txn_op(&self, op: Op) -> Option<TxnOp> {
        match op {
            Op::Put { key, value, lease, .. } => {
                let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
                Some(TxnOp::put(self.key(&key), value, options))
            }
            Op::Delete { key, .. } => Some(TxnOp::delete(self.key(&key), None)),
            Op::Check { .. } => None,
        }
    }

    /// The first condition that does not hold in what etcd answered.
    fn conflict(&self, conditions: &[(String, Expect)], found: Vec<TxnOpResponse>) -> StateError {
        let present = found.into_iter().map(|response| match response {
            TxnOpResponse::Get(mut get) => get.take_kvs().pop().map(|kv| revision(kv.mod_revision())),
            _ => None,
        });
        for ((key, expect), present) in conditions.iter().zip(present) {
            let holds = match expect {
                Expect::Any => true,
                Expect::Absent => present.is_none(),
                Expect::Revision(revision) => present == Some(*revision),
            };
            if !holds {
                let key = key.strip_prefix(&*self.prefix).unwrap_or(key).to_owned();
                return StateError::Conflict { key, present };
            }
        }
        StateError::Unavailable("etcd refused a transaction whose conditions hold".into())
    }

    pub(super) fn watch(&self, prefix: &str, from: Revision) -> EtcdWatch {
        EtcdWatch {
            store: self.clone(),
            prefix: self.key(prefix),
            next: from.0.max(1),
            ready: Vec::new(),
            stream: None,
        }
    }

    pub(super) async fn grant(&self, ttl: Duration) -> Result<LeaseId, StateError> {
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000).max(1)).unwrap_or(i64::MAX);
        Ok(LeaseId(within(self.client.lease_client().grant(seconds, None)).await?.id()))
    }

    pub(super) async fn keep_alive(&self, lease: LeaseId) -> Result<(), StateError> {
        // Opening the stream renews once and waits for the answer; it is not needed further.
        within(self.client.lease_client().keep_alive(lease.0)).await.map(drop)
    }

    pub(super) async fn revoke(&self, lease: LeaseId) -> Result<(), StateError> {
        match within(self.client.lease_client().revoke(lease.0)).await {
            Ok(_) | Err(StateError::LeaseExpired) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn entry(&self, kv: etcd_client::KeyValue) -> Result<Entry, StateError> {
        let revision = revision(kv.mod_revision());
        let (key, value) = kv.into_key_value();
        Ok(Entry { key: self.own_key(&key)?, value, revision })
    }

    fn own_key(&self, key: &[u8]) -> Result<String, StateError> {
        let key = std::str::from_utf8(key).map_err(|_| {
            StateError::Invalid(format!("etcd has a key that is not text under {:?}", self.prefix))
        })?;
        Ok(key.strip_prefix(&*self.prefix).unwrap_or(key).to_owned())
    }
}

fn tls_options(tls: &EtcdTls) -> Result<TlsOptions, StateError> {
    let read = |path: &Path| {
        let failed = |e| StateError::Invalid(format!("certificates for etcd: {}: {e}", path.display()));
        std::fs::read(path).map_err(failed)
    };
    let options = TlsOptions::new().ca_certificate(Certificate::from_pem(read(&tls.ca)?));
    Ok(match &tls.identity {
        Some((cert, key)) => options.identity(Identity::from_pem(read(cert)?, read(key)?)),
        None => options,
    })
}

/// Runs one call with the time limit.
async fn within<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, StateError> {
    match timeout(CALL_TIMEOUT, call).await {
        Ok(result) => result.map_err(failed),
        Err(_) => Err(StateError::Unavailable(format!("etcd gave no answer within {CALL_TIMEOUT:?}"))),
    }
}

fn failed(error: Error) -> StateError {
    match error {
        Error::GRpcStatus(status) if status.code() as i32 == NOT_FOUND => StateError::LeaseExpired,
        Error::LeaseKeepAliveError(_) => StateError::LeaseExpired,
        other => StateError::Unavailable(other.to_string()),
    }
}

fn revision(number: i64) -> Revision {
    Revision(u64::try_from(number).unwrap_or(0))
}

/// Follows a prefix in etcd.
pub(super) struct EtcdWatch {
    store: Etcd,
    prefix: String,
    next: u64,
    /// Events received and not yet given out, in reverse.
    ready: Vec<Event>,
    stream: Option<WatchStream>,
}

impl EtcdWatch {
    pub(super) async fn next(&mut self) -> Result<Event, StateError> {
        loop {
            if let Some(event) = self.ready.pop() {
                return Ok(event);
            }
            match self.receive().await {
                Ok(()) => {}
                Err(error @ StateError::Compacted { .. }) => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, "a watch is set up again");
                    self.stream = None;
                    tokio::time::sleep(WATCH_RETRY).await;
                }
            }
        }
    }

    async fn receive(&mut self) -> Result<(), StateError> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let from = i64::try_from(self.next).unwrap_or(i64::MAX);
                let options = WatchOptions::new().with_start_revision(from);
                let options = match self.prefix.is_empty() {
                    true => options.with_all_keys(),
                    false => options.with_prefix(),
                };
                let mut watches = self.store.client.watch_client();
                let stream = within(watches.watch(self.prefix.as_str(), Some(options))).await?;
                self.stream.insert(stream)
            }
        };
        let message = stream.message().await.map_err(failed)?;
        let Some(response) = message else { return Err(StateError::Unavailable("the watch ended".into())) };
        if response.compact_revision() > 0 {
            return Err(StateError::Compacted { oldest: revision(response.compact_revision()) });
        }
        if response.canceled() {
            return Err(StateError::Unavailable(response.cancel_reason().to_owned()));
        }
        for event in response.events().iter().rev() {
            let Some(kv) = event.kv() else { continue };
            let value = match event.event_type() {
                EventType::Put => Some(kv.value().to_vec()),
                EventType::Delete => None,
            };
            let revision = revision(kv.mod_revision());
            self.ready.push(Event { key: self.store.own_key(kv.key())?, value, revision });
            self.next = self.next.max(revision.0 + 1);
        }
        Ok(())
    }
}
