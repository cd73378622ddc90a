//! Messages that were told and did not arrive come back to a handler of their sender.

use std::sync::mpsc as blocking;
use std::time::Duration;

use actix::{Actor, AsyncContext, Context, Handler, Message};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, RemoteActor, WireMessage};
use heliostat_runtime::handle::{
    ActorAddr, ActorId, Handle, Incarnation, Refusal, Undeliverable, Undelivered,
};
use heliostat_runtime::system::{SpawnOptions, System, SystemConfig};
use tokio::sync::mpsc;

use super::{Rig, soon};

struct Sink {
    seen: mpsc::UnboundedSender<u32>,
    hold: blocking::Receiver<()>,
}

impl Actor for Sink {
    type Context = Context<Self>;
}

impl RemoteActor for Sink {
    const TYPE: &'static str = "sink";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Note>().accept::<Hold>();
    }
}

#[derive(Debug, Clone, PartialEq, Message, Encode, Decode)]
#[rtype(result = "()")]
struct Note(u32);

/// Blocks the actor; then panics, if it is told to.
#[derive(Message, Encode, Decode)]
#[rtype(result = "()")]
struct Hold {
    panics: bool,
}

impl WireMessage for Note {
    const NAME: &'static str = "note";
}

impl WireMessage for Hold {
    const NAME: &'static str = "hold";
}

impl Handler<Note> for Sink {
    type Result = ();
    fn handle(&mut self, Note(number): Note, _: &mut Context<Self>) {
        self.seen.send(number).unwrap();
    }
}

impl Handler<Hold> for Sink {
    type Result = ();
    fn handle(&mut self, Hold { panics }: Hold, _: &mut Context<Self>) {
        self.seen.send(0).unwrap();
        self.hold.recv().unwrap();
        assert!(!panics, "dropped it");
    }
}

/// Sends notes and passes on what comes back.
struct Sender {
    to: Handle<Sink>,
    back: mpsc::UnboundedSender<Undelivered<Note>>,
}

impl Actor for Sender {
    type Context = Context<Self>;
}

impl RemoteActor for Sender {
    const TYPE: &'static str = "sender";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Send>();
    }
}

#[derive(Debug, Message, Encode, Decode)]
#[rtype(result = "bool")]
struct Send(u32);

impl WireMessage for Send {
    const NAME: &'static str = "send";
}

impl Handler<Send> for Sender {
    type Result = bool;
    fn handle(&mut self, Send(number): Send, ctx: &mut Context<Self>) -> bool {
        self.to.tell_or_return(Note(number), ctx.address().recipient()).is_ok()
    }
}

impl Handler<Undelivered<Note>> for Sender {
    type Result = ();
    fn handle(&mut self, undelivered: Undelivered<Note>, _: &mut Context<Self>) {
        self.back.send(undelivered).unwrap();
    }
}

struct Stage {
    rig: Rig,
    sender: Handle<Sender>,
    seen: mpsc::UnboundedReceiver<u32>,
    back: mpsc::UnboundedReceiver<Undelivered<Note>>,
    unhold: blocking::Sender<()>,
}

/// A sender in the sink's process, or in another one.
async fn stage(remote: bool, capacity: usize, change: impl FnOnce(Handle<Sink>) -> Handle<Sink>) -> Stage {
    let (told, seen) = mpsc::unbounded_channel();
    let (unhold, hold) = blocking::channel();
    let rig = Rig::start(capacity, move || Sink { seen: told, hold }).await;
    let (back_to, back) = mpsc::unbounded_channel();
    let system = if remote { &rig.away } else { &rig.home };
    let to = change(system.handle(rig.addr.clone()));
    let sender = spawn_sender(system, Sender { to, back: back_to });
    Stage { rig, sender, seen, back, unhold }
}

fn spawn_sender(system: &System, sender: Sender) -> Handle<Sender> {
    let options =
        SpawnOptions { id: ActorId::named("sender"), incarnation: Incarnation(1), mailbox_capacity: 100 };
    system.handle(system.spawn(options, move || sender).unwrap())
}

impl Stage {
    async fn send(&self, number: u32) -> bool {
        soon(self.sender.ask(Send(number))).await.unwrap()
    }

    async fn comes_back(&mut self, number: u32) -> Undeliverable {
        let undelivered = soon(self.back.recv()).await.unwrap();
        assert_eq!((&undelivered.message, &undelivered.to), (&Note(number), &self.rig.addr));
        undelivered.why
    }

    /// Blocks the sink with `waiting` notes in its mailbox.
    async fn hold(&mut self, panics: bool, waiting: &[u32]) {
        let handle: Handle<Sink> = self.rig.home.handle(self.rig.addr.clone());
        handle.tell(Hold { panics }).unwrap();
        assert_eq!(soon(self.seen.recv()).await, Some(0));
        for &number in waiting {
            assert!(self.send(number).await);
        }
        self.rig.pass().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_handled_does_not_come_back_and_what_is_not_does() {
    for remote in [false, true] {
        let mut stage = stage(remote, 16, |handle| handle).await;
        assert!(stage.send(1).await);
        assert_eq!(soon(stage.seen.recv()).await, Some(1));
        // Stopped with two in the mailbox.
        stage.hold(false, &[2, 3]).await;
        stage.rig.home.stop_actor(stage.rig.addr.actor, stage.rig.addr.incarnation);
        stage.unhold.send(()).unwrap();
        // In no particular order.
        let mut back = [soon(stage.back.recv()).await.unwrap(), soon(stage.back.recv()).await.unwrap()];
        back.sort_by_key(|undelivered| undelivered.message.0);
        let expected = [2, 3].map(|number| Undelivered {
            message: Note(number),
            to: stage.rig.addr.clone(),
            why: Undeliverable::Stopped,
        });
        assert_eq!(back, expected);
        assert!(stage.back.try_recv().is_err(), "the first one came back");
        // Gone: in this process it is known at once.
        match remote {
            false => assert!(!stage.send(4).await),
            true => {
                assert!(stage.send(4).await);
                assert_eq!(stage.comes_back(4).await, Undeliverable::Refused(Refusal::NoSuchActor));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_gives_back_what_it_leaves_behind() {
    for remote in [false, true] {
        let mut stage = stage(remote, 16, |handle| handle).await;
        stage.hold(true, &[1]).await;
        stage.unhold.send(()).unwrap();
        assert_eq!(stage.comes_back(1).await, Undeliverable::Panicked("dropped it".into()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_mailbox_and_a_deadline_give_back() {
    let mut full = stage(true, 1, |handle| handle).await;
    full.hold(false, &[1, 2]).await;
    assert_eq!(full.comes_back(2).await, Undeliverable::Refused(Refusal::MailboxFull));
    for remote in [false, true] {
        let hasty = |handle: Handle<Sink>| handle.with_deadline(Duration::from_millis(1));
        let mut late = stage(remote, 16, hasty).await;
        late.hold(false, &[1]).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        late.unhold.send(()).unwrap();
        assert_eq!(late.comes_back(1).await, Undeliverable::Expired);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_or_unreachable_process_gives_back() {
    let mut lost = stage(true, 16, |handle| handle).await;
    lost.hold(false, &[1]).await;
    lost.rig.home.shutdown().await;
    assert!(matches!(lost.comes_back(1).await, Undeliverable::PeerLost(_) | Undeliverable::Stopped));
    // Nobody listens there any more. While the connection closes, a message is refused at once.
    soon(async { while !lost.send(2).await {} }).await;
    assert!(matches!(lost.comes_back(2).await, Undeliverable::Refused(Refusal::Unreachable(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_without_a_receipt_are_bounded() {
    let config = SystemConfig { returnable_max: 2, ..SystemConfig::loopback() };
    let away = System::start(config).await.unwrap();
    let mut stage = stage(false, 16, |handle| handle).await;
    let (back_to, mut back) = mpsc::unbounded_channel();
    let addr = ActorAddr { ..stage.rig.addr.clone() };
    let sender = spawn_sender(&away, Sender { to: away.handle(addr), back: back_to });
    stage.hold(false, &[]).await;
    let mut sent = Vec::new();
    for number in 1..=3 {
        sent.push(soon(sender.ask(Send(number))).await.unwrap());
    }
    assert_eq!(sent, [true, true, false]);
    stage.unhold.send(()).unwrap();
    assert_eq!(soon(stage.seen.recv()).await, Some(1));
    assert_eq!(soon(stage.seen.recv()).await, Some(2));
    // Receipts make room.
    let again = async { while !sender.ask(Send(4)).await.unwrap() {} };
    soon(again).await;
    assert_eq!(soon(stage.seen.recv()).await, Some(4));
    assert!(back.try_recv().is_err());
}
