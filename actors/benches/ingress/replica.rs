//! A rank without a model: an actor and its step thread, like the real one's, where a step draws the last token of the
//! prompt again for every sequence.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use actix::{Actor, Context, Handler};
use heliostat_actors::ingress_actor::IngressActor;
use heliostat_actors::messages::{Abort, AttachIngress, RankOutputs, Submit};
use heliostat_actors::telemetry::SpanCounts;
use heliostat_engine::request::{FinishReason, Output, RankStats, Request};
use heliostat_runtime::actor::{Accepts, RemoteActor};
use heliostat_runtime::handle::{ActorAddr, ActorId, Handle, Incarnation};
use heliostat_runtime::system::{SpawnOptions, System, SystemConfig};

use crate::AnyError;

pub(crate) const REPLICA: ActorId = ActorId::named("replica");
const MAILBOX: usize = 65_536;

enum Told {
    Submit(Box<Submit>),
    Abort(Abort),
}

struct Replica(Sender<Told>);

impl Actor for Replica {
    type Context = Context<Self>;
}

impl RemoteActor for Replica {
    const TYPE: &'static str = "replica";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Submit>().accept::<Abort>().accept::<AttachIngress>();
    }
}

impl Handler<Submit> for Replica {
    type Result = ();

    fn handle(&mut self, message: Submit, _: &mut Self::Context) {
        // The thread lives as long as the process.
        let _ = self.0.send(Told::Submit(Box::new(message)));
    }
}

impl Handler<Abort> for Replica {
    type Result = ();

    fn handle(&mut self, message: Abort, _: &mut Self::Context) {
        let _ = self.0.send(Told::Abort(message));
    }
}

impl Handler<AttachIngress> for Replica {
    type Result = ();

    fn handle(&mut self, _: AttachIngress, _: &mut Self::Context) {}
}

/// Runs until its standard input ends; prints where it listens. `log` gets a line for every token: seed of its
/// sequence, index, and when its step ended.
pub(crate) fn run(step: Duration, log: Option<PathBuf>) -> Result<(), AnyError> {
    crate::runtime()?.block_on(async {
        let system = System::start(SystemConfig::loopback()).await?;
        let (sender, inbox) = channel();
        let options = SpawnOptions { id: REPLICA, incarnation: Incarnation(1), mailbox_capacity: MAILBOX };
        system.spawn(options, move || Replica(sender))?;
        let log = log.map(File::create).transpose()?.map(BufWriter::new);
        let mut steps = Steps {
            system: system.clone(),
            inbox,
            step,
            log,
            running: Vec::new(),
            ingress: HashMap::new(),
            count: 0,
        };
        std::thread::spawn(move || steps.run());
        println!("{}", system.endpoint());
        tokio::task::spawn_blocking(|| std::io::read_to_string(std::io::stdin())).await??;
        Ok(())
    })
}

struct Steps {
    system: System,
    inbox: Receiver<Told>,
    step: Duration,
    log: Option<BufWriter<File>>,
    running: Vec<(Request, ActorAddr)>,
    ingress: HashMap<ActorAddr, Ingress>,
    count: u64,
}

struct Ingress {
    handle: Handle<IngressActor>,
    waiting: Vec<Output>,
}

impl Steps {
    /// Steps while there is work.
    fn run(&mut self) {
        let mut due = Instant::now();
        loop {
            if self.running.is_empty() {
                if self.log.as_mut().is_some_and(|log| log.flush().is_err()) {
                    return;
                }
                let Ok(told) = self.inbox.recv() else { return };
                self.hear(told);
                due = Instant::now() + self.step;
            }
            loop {
                match self.inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
                    Ok(told) => self.hear(told),
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            due += self.step;
            self.step();
        }
    }

    fn hear(&mut self, told: Told) {
        match told {
            Told::Submit(submit) => {
                let Submit { request, reply_to, .. } = *submit;
                let system = &self.system;
                self.ingress.entry(reply_to.clone()).or_insert_with(|| Ingress {
                    handle: system.handle(reply_to.clone()),
                    waiting: Vec::new(),
                });
                self.running.push((request, reply_to));
            }
            Told::Abort(abort) => self.running.retain(|(request, _)| request.id != abort.id),
        }
    }

    fn step(&mut self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        for (request, reply_to) in &mut self.running {
            let token = *request.prompt.last().expect("a prompt has a token");
            let index = request.generated.len() as u32;
            request.generated.push(token);
            if let Some(log) = &mut self.log {
                // What cannot be written is missed by the reader.
                let _ = writeln!(log, "{} {index} {now}", request.sampling.seed);
            }
            let ended = request.generated.len() >= request.stop.max_tokens as usize;
            let output = Output {
                id: request.id,
                first_index: index,
                tokens: vec![token],
                logprobs: Vec::new(),
                prompt_logprobs: None,
                cached_tokens: 0,
                finish: ended.then_some(FinishReason::Length),
            };
            self.ingress.get_mut(reply_to).expect("it submitted").waiting.push(output);
        }
        self.running.retain(|(request, _)| request.generated.len() < request.stop.max_tokens as usize);
        self.count += 1;
        let stats = RankStats {
            kv_blocks: 1 << 20,
            running: self.running.len() as u32,
            steps: self.count,
            ..RankStats::default()
        };
        for ingress in self.ingress.values_mut().filter(|ingress| !ingress.waiting.is_empty()) {
            let outputs = std::mem::take(&mut ingress.waiting);
            let message = RankOutputs { dp: 0, outputs, stats: stats.clone(), spans: SpanCounts::default() };
            if let Err(refused) = ingress.handle.tell(message) {
                ingress.waiting = refused.message.outputs;
            }
        }
    }
}
