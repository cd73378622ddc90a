//! Messages in JSON, from callers that do not know the actor's type.

use actix::{Actor, Context, Handler, Message, ResponseFuture};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, RemoteActor, WireMessage};
use heliostat_runtime::handle::{AskError, JsonHandle, JsonMessage, Refusal};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Rig;

#[derive(Default)]
struct Till {
    cents: i64,
}

impl Actor for Till {
    type Context = Context<Self>;
}

impl RemoteActor for Till {
    const TYPE: &'static str = "till";

    fn messages(m: &mut Accepts<Self>) {
        m.accept_json::<Book>().accept_json_result::<Pay>().accept::<Secret>();
    }
}

#[derive(Message, Encode, Decode, Deserialize)]
#[rtype(result = "Booked")]
struct Book {
    what: String,
    cents: i64,
}

#[derive(Debug, Encode, Decode, Serialize)]
struct Booked {
    what: String,
    total: i64,
}

impl actix::dev::MessageResponse<Till, Book> for Booked {
    fn handle(self, _: &mut Context<Till>, to: Option<actix::dev::OneshotSender<Booked>>) {
        if let Some(to) = to {
            let _ = to.send(self);
        }
    }
}

#[derive(Message, Encode, Decode, Deserialize)]
#[rtype(result = "Result<i64, String>")]
struct Pay(i64);

#[derive(Message, Encode, Decode, Deserialize)]
#[rtype(result = "()")]
struct Secret;

impl WireMessage for Book {
    const NAME: &'static str = "book";
}

impl WireMessage for Pay {
    const NAME: &'static str = "pay";
}

impl WireMessage for Secret {
    const NAME: &'static str = "secret";
}

impl Handler<Book> for Till {
    type Result = Booked;
    fn handle(&mut self, book: Book, _: &mut Context<Self>) -> Booked {
        self.cents += book.cents;
        Booked { what: book.what, total: self.cents }
    }
}

impl Handler<Pay> for Till {
    type Result = ResponseFuture<Result<i64, String>>;
    fn handle(&mut self, Pay(cents): Pay, _: &mut Context<Self>) -> Self::Result {
        let left = self.cents - cents;
        Box::pin(async move { if left < 0 { Err(format!("{cents} are not there")) } else { Ok(left) } })
    }
}

impl Handler<Secret> for Till {
    type Result = ();
    fn handle(&mut self, _: Secret, _: &mut Context<Self>) {}
}

/// Why the message was refused; it came back whole.
async fn refused(handle: &JsonHandle, message: &str, value: Value) -> String {
    match handle.ask(message, value.clone()).await {
        Err(AskError::Refused(refused)) => {
            assert_eq!(refused.message, JsonMessage { message: message.to_owned(), value: Box::new(value) });
            assert!(matches!(refused.reason, Refusal::Malformed(_)), "{}", refused.reason);
            refused.reason.to_string()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_callers_need_no_types() {
    let rig = Rig::start(16, Till::default).await;
    let mut total = 0;
    for system in [&rig.home, &rig.away] {
        let handle = system.json_handle(rig.addr.clone());
        total += 250;
        let booked = handle.ask("book", json!({ "what": "tea", "cents": 250 })).await.unwrap();
        assert_eq!(booked, json!({ "what": "tea", "total": total }));
        handle.tell("book", json!({ "what": "tip", "cents": 0 })).unwrap();
        // A `Result` is its value, or fails the call in the error's own words.
        assert_eq!(handle.ask("pay", json!(total)).await.unwrap(), json!(0));
        match handle.ask("pay", json!(1000)).await {
            Err(AskError::Handler(why)) => assert_eq!(why, "1000 are not there"),
            other => panic!("{other:?}"),
        }
        let why = refused(&handle, "bok", json!({})).await;
        assert!(why.contains("no message \"bok\" in JSON; there are book, pay"), "{why}");
        let why = refused(&handle, "secret", json!(null)).await;
        assert!(why.contains("no message \"secret\" in JSON"), "accepted, but not in JSON: {why}");
        let why = refused(&handle, "book", json!({ "what": "tea" })).await;
        assert!(why.contains("missing field `cents`"), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_message_may_come_typed() {
    let rig = Rig::start(16, Till::default).await;
    for handle in rig.handles::<Till>() {
        let booked = handle.ask(Book { what: "tea".into(), cents: 1 }).await.unwrap();
        assert_eq!(booked.what, "tea");
    }
}
