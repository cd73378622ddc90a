//! An HTTP server on a free port, over ranks that are threads with the real model and scheduler.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use heliostat_actors::ingress::Ingress;
use heliostat_actors::ingress::apps::Apps;
use heliostat_actors::ingress::dispatch::DispatchConfig;
use heliostat_actors::ingress::engine::{EngineLink, RankCommand, Ranks, Refusal, Unavailable};
use heliostat_actors::ingress::model::ServedModel;
use heliostat_actors::ingress::server::{HttpConfig, serve};
use heliostat_actors::ingress::text::TextModel;
use heliostat_actors::telemetry::Provenance;
use heliostat_engine::batch::PrefillAttention;
use heliostat_engine::checkpoint::Checkpoint;
use heliostat_engine::config::{GenerationDefaults, ModelConfig};
use heliostat_engine::grammar::Vocabulary;
use heliostat_engine::model::{KvPages, LocalExperts, Model};
use heliostat_engine::request::RankStats;
use heliostat_engine::scheduler::{Scheduler, SchedulerConfig};
use heliostat_kernels::cpu::Cpu;
use serde_json::{Value as Json, json};

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 512;
const CONTEXT: usize = 2048;

pub(crate) fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/sundial-20m")
}

/// transformers' prompts and greedy continuations.
pub(crate) fn reference(kind: &str) -> Vec<Json> {
    let text = std::fs::read_to_string(model_dir().join("reference.json")).unwrap();
    let reference: Json = serde_json::from_str(&text).unwrap();
    let prompts = reference["prompts"].as_array().unwrap();
    prompts.iter().filter(|prompt| prompt["kind"] == kind).cloned().collect()
}

/// The model's tokens as grammars see them.
fn vocabulary() -> &'static Vocabulary {
    static TEXT: OnceLock<Arc<TextModel>> = OnceLock::new();
    TEXT.get_or_init(|| TextModel::load(&model_dir()).unwrap()).vocabulary(&[1]).unwrap()
}

/// A rank's thread as others see it.
struct Rank {
    commands: Sender<RankCommand>,
    incarnation: u64,
    stats: Arc<Mutex<RankStats>>,
    dead: Arc<AtomicBool>,
}

type Ranks_ = Arc<Mutex<BTreeMap<u32, Rank>>>;

struct Link {
    ranks: Ranks_,
    mailbox_full: Arc<AtomicBool>,
}

impl EngineLink for Link {
    fn send(&self, rank: u32, command: RankCommand, _: Provenance) -> Result<(), Unavailable> {
        let unavailable = |command, cause| Unavailable { rank, command: Box::new(command), cause };
        if self.mailbox_full.load(Ordering::Relaxed) {
            return Err(unavailable(command, Refusal::Full));
        }
        match self.ranks.lock().unwrap().get(&rank) {
            None => Err(unavailable(command, Refusal::Gone)),
            Some(rank) => rank.commands.send(command).map_err(|back| unavailable(back.0, Refusal::Gone)),
        }
    }
}

/// The whole of it.
pub(crate) struct Rig {
    pub(crate) ingress: Ingress,
    pub(crate) url: String,
    pub(crate) http: reqwest::Client,
    /// While set, ranks take no more commands.
    pub(crate) mailbox_full: Arc<AtomicBool>,
    /// While set, ranks take no step.
    pub(crate) paused: Arc<AtomicBool>,
    ranks: Ranks_,
    size: u32,
    incarnations: AtomicU64,
    stop: Mutex<Option<tokio::sync::oneshot::Sender<()>>>,
    server: Option<std::thread::JoinHandle<()>>,
}

/// A client that trusts no server of HTTPS.
fn client(with: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder) -> reqwest::Client {
    let tls = rustls::ClientConfig::builder_with_provider(heliostat_runtime::wire::tls_crypto())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    with(reqwest::Client::builder().tls_backend_preconfigured(tls)).build().unwrap()
}

/// What a test may change.
pub(crate) struct Options {
    pub(crate) ranks: u32,
    pub(crate) dispatch: DispatchConfig,
    pub(crate) http: HttpConfig,
}

impl Default for Options {
    fn default() -> Self {
        let http =
            HttpConfig { bind: ([127, 0, 0, 1], 0).into(), body_max: 256 << 10, ..HttpConfig::default() };
        Self {
            ranks: 1,
            dispatch: DispatchConfig { block_size: BLOCK_SIZE, ..DispatchConfig::default() },
            http,
        }
    }
}

/// The rig that tests share which disturb nothing: two ranks.
pub(crate) fn shared() -> &'static Rig {
    static RIG: OnceLock<Rig> = OnceLock::new();
    RIG.get_or_init(|| Rig::start(Options { ranks: 2, ..Options::default() }))
}

impl Rig {
    /// Starts ranks and server, and returns when they are ready.
    pub(crate) fn start(options: Options) -> Self {
        let size = options.ranks;
        let rig = Self::start_without_ranks(options);
        (0..size).for_each(|rank| rig.start_rank(rank));
        rig
    }

    pub(crate) fn start_without_ranks(options: Options) -> Self {
        let ranks: Ranks_ = Arc::default();
        let mailbox_full: Arc<AtomicBool> = Arc::default();
        let link = Link { ranks: ranks.clone(), mailbox_full: mailbox_full.clone() };
        let ingress = Ingress::new("sundial", options.dispatch, link);
        let model = ServedModel {
            names: vec!["sundial".into(), "sundial/20m".into()],
            context_length: CONTEXT,
            vocab_size: 4096,
            text: TextModel::load(&model_dir()).unwrap(),
            defaults: GenerationDefaults::from_dir(&model_dir()).unwrap(),
            created: 1,
        };
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (bound, listening) = channel();
        let server = {
            let (ingress, http) = (ingress.clone(), options.http);
            std::thread::spawn(move || {
                actix_web::rt::System::new().block_on(async move {
                    let apps = Apps::single(ingress, model);
                    let service = serve(&http, apps, |app| {
                        app.route("/extra", actix_web::web::get().to(|| async { "extra" }));
                    });
                    let service = service.unwrap();
                    bound.send(service.bound()).unwrap();
                    let _ = stopped.await;
                    service.stop().await;
                });
            })
        };
        let rig = Self {
            ingress,
            url: format!("http://{}", listening.recv().unwrap()),
            // Each test has a runtime of its own, and a connection dies with the runtime that opened it.
            http: client(|builder| builder.pool_max_idle_per_host(0)),
            mailbox_full,
            paused: Arc::default(),
            ranks,
            size: options.ranks,
            incarnations: AtomicU64::new(1),
            stop: Mutex::new(Some(stop)),
            server: Some(server),
        };
        rig.tell_ranks();
        rig
    }

    /// Starts a rank, or its next incarnation.
    pub(crate) fn start_rank(&self, rank: u32) {
        let (commands, receiver) = channel();
        let incarnation = self.incarnations.fetch_add(1, Ordering::Relaxed);
        let (stats, dead) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let engine = Engine {
            rank,
            commands: receiver,
            ingress: self.ingress.clone(),
            stats: Arc::clone(&stats),
            dead: dead.clone(),
            paused: self.paused.clone(),
        };
        std::thread::spawn(move || engine.run());
        self.ranks.lock().unwrap().insert(rank, Rank { commands, incarnation, stats, dead });
        self.tell_ranks();
    }

    /// Kills a rank: what it had is lost, and its last outputs may or may not arrive.
    pub(crate) fn kill_rank(&self, rank: u32) {
        let killed = self.ranks.lock().unwrap().remove(&rank).unwrap();
        killed.dead.store(true, Ordering::SeqCst);
        self.tell_ranks();
    }

    fn tell_ranks(&self) {
        let ranks = self.ranks.lock().unwrap();
        let ready: BTreeMap<u32, u64> =
            ranks.iter().map(|(&rank, state)| (rank, state.incarnation)).collect();
        let missing = (0..self.size).filter(|rank| !ready.contains_key(rank));
        let missing = missing.map(|rank| format!("rank {rank} is starting")).collect();
        drop(ranks);
        self.ingress.on_ranks(Ranks { size: self.size, ready, missing, ..Ranks::default() });
    }

    /// The last report of a rank.
    pub(crate) fn stats(&self, rank: u32) -> RankStats {
        self.ranks.lock().unwrap()[&rank].stats.lock().unwrap().clone()
    }

    pub(crate) async fn post(&self, path: &str, body: Json) -> reqwest::Response {
        self.http.post(format!("{}{path}", self.url)).json(&body).send().await.unwrap()
    }

    /// A successful answer.
    pub(crate) async fn ask(&self, path: &str, body: Json) -> Json {
        let response = self.post(path, body).await;
        let status = response.status();
        let answer: Json = response.json().await.unwrap();
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// The events of a streamed answer, without the closing `[DONE]`, which must be there.
    pub(crate) async fn stream(&self, path: &str, mut body: Json) -> Vec<Json> {
        body["stream"] = json!(true);
        let response = self.post(path, body).await;
        assert_eq!(response.status(), 200);
        assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
        events(&response.text().await.unwrap())
    }

    /// Waits until nothing runs or waits anywhere.
    pub(crate) async fn idle(&self, within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            let busy: Vec<RankStats> = {
                let ranks = self.ranks.lock().unwrap();
                let stats = ranks.values().map(|rank| rank.stats.lock().unwrap().clone());
                stats.filter(|stats| stats.running + stats.waiting + stats.kv_blocks_used > 0).collect()
            };
            if busy.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "still busy: {busy:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops the server; returns once it has drained.
    pub(crate) fn stop(&self) {
        if let Some(stop) = self.stop.lock().unwrap().take() {
            let _ = stop.send(());
        }
    }

    pub(crate) fn join(mut self) {
        self.stop();
        self.server.take().unwrap().join().unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop();
        self.ranks.lock().unwrap().values().for_each(|rank| rank.dead.store(true, Ordering::SeqCst));
    }
}

/// Parses server-sent events and checks that they end in `[DONE]`.
pub(crate) fn events(text: &str) -> Vec<Json> {
    let mut events: Vec<&str> =
        text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
    assert_eq!(events.pop(), Some("[DONE]"), "{text}");
    events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

struct Engine {
    rank: u32,
    commands: Receiver<RankCommand>,
    ingress: Ingress,
    stats: Arc<Mutex<RankStats>>,
    dead: Arc<AtomicBool>,
    paused: Arc<AtomicBool>,
}

impl Engine {
    fn run(self) {
        let dir = model_dir();
        let config = Arc::new(ModelConfig::from_dir(&dir).unwrap());
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let cpu = Cpu::single_threaded();
        let mut experts = LocalExperts::load(&checkpoint, &config, cpu.clone()).unwrap();
        let mut model = Model::load(&checkpoint, &config, cpu, &mut |_, _| ()).unwrap();
        let mut kv = KvPages::new(&config, NUM_BLOCKS, BLOCK_SIZE);
        let mut scheduler = Scheduler::new(SchedulerConfig {
            block_size: BLOCK_SIZE,
            num_blocks: NUM_BLOCKS,
            max_num_seqs: 16,
            max_num_batched_tokens: 256,
            max_model_len: CONTEXT,
            enable_prefix_caching: true,
            prefill_attention: PrefillAttention::Absorbed,
            max_waiting: 64,
            vocab_size: 4096,
        })
        .unwrap();
        while self.take_commands(&mut scheduler) {
            if !scheduler.has_work() || self.paused.load(Ordering::Relaxed) {
                self.report(&scheduler);
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let batch = scheduler.schedule();
            let logits = model.forward(&batch, &mut kv, &mut experts).unwrap();
            let outputs = scheduler.complete(&logits);
            if self.dead.load(Ordering::SeqCst) {
                return;
            }
            self.ingress.on_outputs(self.rank, outputs);
            self.report(&scheduler);
        }
    }

    fn report(&self, scheduler: &Scheduler) {
        let stats = scheduler.stats();
        if *self.stats.lock().unwrap() != stats {
            // Not told under the lock: the ingress calls back into the link, which takes others.
            self.ingress.on_stats(self.rank, stats.clone());
            *self.stats.lock().unwrap() = stats;
        }
    }

    /// False when the rank is dead.
    fn take_commands(&self, scheduler: &mut Scheduler) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(RankCommand::Submit(request) | RankCommand::Continue(request, _)) => {
                    let id = request.id;
                    let constraint =
                        request.grammar.as_ref().map(|grammar| vocabulary().compile(grammar).unwrap());
                    let added = match constraint {
                        Some(constraint) => scheduler.add_constrained(*request, constraint),
                        None => scheduler.add(*request),
                    };
                    if let Err(refused) = added {
                        let refusal = if refused.reason.is_retryable() {
                            Refusal::Full
                        } else {
                            Refusal::Unservable(refused.reason.to_string())
                        };
                        self.ingress.on_refused(self.rank, id, refusal);
                    }
                }
                Ok(RankCommand::Abort(id)) => drop(scheduler.abort(id)),
                Err(TryRecvError::Empty) => return !self.dead.load(Ordering::SeqCst),
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }
}
