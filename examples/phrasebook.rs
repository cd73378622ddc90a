//! Two deployments in one application: a gateway that answers HTTP, and translators that it asks.
//!
//! `helio package push target/debug/examples/phrasebook`, then `helio serve deploy examples/phrasebook.yaml`, then
//! `curl http://127.0.0.1:8000/phrases/hello`

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use heliostat::prelude::*;
use heliostat::serve::{
    DeploymentHandle, HttpPart, HttpRequest, HttpResponse, Items, Reconfigure, ReplicaArgs, StreamMessage,
};
use serde::Deserialize;

/// A word in the other language, or that there is none.
type Translated = Result<String, String>;

heliostat::messages! {
    /// Translates a word.
    struct Translate { word: String } = "translate" -> Translated;
    /// The number of the replica, and how many words it translates at this moment.
    struct Busy = "busy" -> (u64, u64);
}

/// Translates a word letter by letter.
#[derive(Debug, Clone, Encode, Decode)]
#[bincode(crate = "heliostat::bincode")]
struct Spell {
    word: String,
}

impl heliostat::actix::Message for Spell {
    type Result = Items<char>;
}

impl StreamMessage for Spell {
    type Item = char;
    const NAME: &'static str = "spell";
}

// ---- the deployment that answers HTTP ---------------------------------------------------------------------------------

struct Gateway {
    translator: DeploymentHandle<Translator>,
}

impl Actor for Gateway {
    type Context = Context<Self>;
}

impl RemoteActor for Gateway {
    const TYPE: &'static str = "Gateway";

    fn messages(m: &mut Accepts<Self>) {
        m.accept_stream::<HttpRequest>();
    }
}

impl Spawn for Gateway {
    type Args = ReplicaArgs;

    async fn create(args: ReplicaArgs, cx: ActorCx) -> Result<Self, CreateError> {
        Ok(Self { translator: args.deployment::<Translator>(&cx)? })
    }
}

impl Handler<HttpRequest> for Gateway {
    type Result = Items<HttpPart>;

    fn handle(&mut self, request: HttpRequest, _: &mut Context<Self>) -> Items<HttpPart> {
        let translator = self.translator.clone();
        let path = request.path.trim_start_matches('/').to_owned();
        HttpResponse::later(async move {
            match path.split_once('/') {
                Some(("spell", word)) => spell(&translator, word).await,
                _ if path == "busy" => match translator.ask(Busy).await {
                    Ok(busy) => HttpResponse::json(200, &busy),
                    Err(why) => why.into(),
                },
                _ => match translator.ask(Translate { word: path }).await {
                    Ok(Ok(word)) => HttpResponse::text(200, word),
                    Ok(Err(why)) => HttpResponse::text(404, why),
                    // Which status follows from why there is no answer.
                    Err(why) => why.into(),
                },
            }
        })
    }
}

/// Sends letters on as they come.
async fn spell(translator: &DeploymentHandle<Translator>, word: &str) -> HttpResponse {
    match translator.stream(Spell { word: word.to_owned() }).await {
        Ok(letters) => {
            let line = |letter: Result<char, _>| match letter {
                Ok(letter) => Ok(format!("{letter}\n").into_bytes()),
                Err(why) => Err(format!("{why}")),
            };
            HttpResponse::new(200).header("content-type", "text/plain").chunks(letters.map(line))
        }
        Err(why) => why.into(),
    }
}

// ---- the deployment that it asks --------------------------------------------------------------------------------------

/// `user_config` of the deployment: changes live.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Phrases {
    words: BTreeMap<String, String>,
    /// How long a translation takes.
    #[serde(default)]
    pause_ms: u64,
}

struct Translator {
    replica: u64,
    phrases: Phrases,
    busy: Rc<Cell<u64>>,
}

impl Actor for Translator {
    type Context = Context<Self>;
}

impl RemoteActor for Translator {
    const TYPE: &'static str = "Translator";

    fn messages(m: &mut Accepts<Self>) {
        // When the gateway's client goes away its translation ends.
        m.accept_cancellable::<Translate>().accept_stream::<Spell>();
        m.accept::<Busy>().accept::<Reconfigure>();
    }
}

impl Spawn for Translator {
    type Args = ReplicaArgs;

    async fn create(args: ReplicaArgs, _: ActorCx) -> Result<Self, CreateError> {
        Ok(Self { replica: args.replica, phrases: Phrases::default(), busy: Rc::default() })
    }
}

impl Handler<Reconfigure> for Translator {
    type Result = Result<(), String>;

    fn handle(&mut self, settings: Reconfigure, _: &mut Context<Self>) -> Result<(), String> {
        self.phrases = settings.parse()?;
        Ok(())
    }
}

impl Handler<Translate> for Translator {
    type Result = ResponseFuture<Translated>;

    fn handle(&mut self, Translate { word }: Translate, _: &mut Context<Self>) -> Self::Result {
        let known = self.phrases.words.get(&word).cloned();
        let pause = Duration::from_millis(self.phrases.pause_ms);
        let working = Working::begin(&self.busy);
        Box::pin(async move {
            tokio::time::sleep(pause).await;
            drop(working);
            known.ok_or_else(|| format!("{word:?} is not in the phrasebook"))
        })
    }
}

impl Handler<Spell> for Translator {
    type Result = Items<char>;

    fn handle(&mut self, Spell { word }: Spell, _: &mut Context<Self>) -> Items<char> {
        let letters: Vec<char> =
            self.phrases.words.get(&word).map_or_else(Vec::new, |word| word.chars().collect());
        let (pause, working) = (Duration::from_millis(self.phrases.pause_ms), Working::begin(&self.busy));
        Items::new(stream::iter(letters).then(move |letter| {
            // Held by the stream: it counts as busy until its end.
            let _ = &working;
            async move {
                tokio::time::sleep(pause).await;
                letter
            }
        }))
    }
}

impl Handler<Busy> for Translator {
    type Result = MessageResult<Busy>;

    fn handle(&mut self, _: Busy, _: &mut Context<Self>) -> Self::Result {
        MessageResult((self.replica, self.busy.get()))
    }
}

/// A translation under way.
struct Working(Rc<Cell<u64>>);

impl Working {
    fn begin(busy: &Rc<Cell<u64>>) -> Self {
        busy.set(busy.get() + 1);
        Self(busy.clone())
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

fn main() -> std::process::ExitCode {
    Program::new("phrasebook", env!("CARGO_PKG_VERSION")).actor::<Gateway>().actor::<Translator>().run(driver)
}

/// Replicas are started by the cluster. Nothing is left to do for a driver.
async fn driver(_: Driver) -> Result<(), BoxError> {
    Ok(())
}
