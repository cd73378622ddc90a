//! The system's door: what askers see, here and over TCP, when all goes well and when it does not.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail its test")]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use heliostat_runtime::actor::{ActorCx, ActorTypes, CxParts, Reports};
use heliostat_runtime::handle::{ActorAddr, ActorId, AskError, Handle, Incarnation, ProcessId, Refusal};
use heliostat_runtime::system::{ActorEnd, PeerEvent, Secret, SpawnError, System, SystemConfig, SystemError};
use heliostat_runtime::wire::to_bytes;
use rustix::process::{Pid, Signal, kill_process};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A probe in a system of its own, with a handle in the same system and one over TCP.
struct Rig {
    home: System,
    away: System,
    addr: ActorAddr,
    local: Handle<Probe>,
    remote: Handle<Probe>,
}

async fn rig(capacity: usize) -> Rig {
    let (home, away) = (system().await, system().await);
    let addr = home.spawn(options("probe", 1, capacity), Probe::default).unwrap();
    let (local, remote) = (home.handle(addr.clone()), away.handle(addr.clone()));
    Rig { home, away, addr, local, remote }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ask_and_tell_work_here_and_over_tcp() {
    let rig = rig(16).await;
    assert_eq!(rig.local.ask(Add(1)).await.unwrap(), 1);
    assert_eq!(rig.remote.ask(Add(2)).await.unwrap(), 3);
    rig.local.tell(Add(4)).unwrap();
    rig.remote.tell(Add(8)).unwrap();
    assert_eq!(rig.remote.ask(Later(5)).await.unwrap(), 5);
    assert_eq!(rig.remote.ask(Add(0)).await.unwrap(), 15);
    let big: Vec<u8> = (0..8 << 20).map(|i: u32| i as u8).collect();
    assert!(rig.remote.ask(Echo(big.clone())).await.unwrap() == big);
    let at = rig.away.handle_at::<Probe>(rig.home.endpoint(), rig.addr.actor);
    assert_eq!(at.ask(Add(0)).await.unwrap(), 15);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_mailbox_gives_the_message_back() {
    let rig = rig(2).await;
    for handle in [&rig.local, &rig.remote] {
        let blocked = tokio::spawn({
            let handle = handle.clone();
            async move { handle.ask(Block(300)).await }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        let waiting: Vec<_> = (0..2)
            .map(|i| {
                let handle = handle.clone();
                tokio::spawn(async move { handle.ask(Add(i)).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(50)).await;
        match handle.ask(Echo(vec![7; 3])).await {
            Err(AskError::Refused(refused)) => {
                assert_eq!(refused.reason, Refusal::MailboxFull);
                assert_eq!(refused.message, Echo(vec![7; 3]));
            }
            other => panic!("{other:?}"),
        }
        blocked.await.unwrap().unwrap();
        for waiting in waiting {
            waiting.await.unwrap().unwrap();
        }
    }
    let refused = {
        rig.local.tell(Block(100)).unwrap();
        (0..9).find_map(|i| rig.local.tell(Add(i)).err()).unwrap()
    };
    assert_eq!(refused.reason, Refusal::MailboxFull);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_to_a_peer_gives_the_message_back() {
    // A peer that accepts the connection and never reads.
    let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = deaf.local_addr().unwrap().to_string();
    let config = SystemConfig { queue_bytes_max: 4096, ..SystemConfig::loopback() };
    let away = System::start(config).await.unwrap();
    let handle = away.handle_at::<Probe>(&endpoint, ActorId::named("probe"));
    let refused = (0..10).find_map(|i| handle.tell(Echo(vec![i; 1000])).err()).unwrap();
    assert_eq!(refused.reason, Refusal::QueueFull);
    assert_eq!(refused.message.0.len(), 1000);
    away.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_one_sender_arrive_in_order() {
    let rig = rig(100_000).await;
    let tells = 50_000;
    for i in 0..tells {
        rig.remote.tell(Note(i)).unwrap();
        if i % 97 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let seen = rig.remote.ask(Seen()).await.unwrap();
    assert_eq!(seen.len() as u64, tells);
    assert!(seen.iter().copied().eq(0..tells));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_ends_the_wait_and_drops_the_message() {
    let rig = rig(16).await;
    for handle in [&rig.local, &rig.remote] {
        let before = handle.ask(Add(0)).await.unwrap();
        handle.tell(Block(300)).unwrap();
        let asked = Instant::now();
        let hasty = handle.with_deadline(Duration::from_millis(50));
        assert!(matches!(hasty.ask(Add(100)).await, Err(AskError::Deadline)));
        assert!(asked.elapsed() < Duration::from_millis(250), "{:?}", asked.elapsed());
        assert_eq!(handle.ask(Add(0)).await.unwrap(), before, "the expired message was handled");
        assert_eq!(handle.with_deadline(Duration::from_secs(10)).ask(Later(10)).await.unwrap(), 10);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_ends_one_actor_and_every_asker_hears_it() {
    let rig = rig(16).await;
    let bystander = rig.home.spawn(options("bystander", 1, 16), Probe::default).unwrap();
    let end = rig.home.watch_local(rig.addr.actor, rig.addr.incarnation);
    match rig.remote.ask(Panic("out of cheese".into())).await {
        Err(AskError::Panicked(message)) => assert_eq!(message, "out of cheese"),
        other => panic!("{other:?}"),
    }
    assert_eq!(end.await, Some(ActorEnd::Panicked("out of cheese".into())));
    for handle in [&rig.local, &rig.remote] {
        match handle.ask(Add(1)).await {
            Err(AskError::Refused(refused)) => assert_eq!(refused.reason, Refusal::NoSuchActor),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(rig.away.handle::<Probe>(bystander).ask(Add(1)).await.unwrap(), 1);
}

fn cx(system: &System, name: &str, reports: Reports) -> ActorCx {
    ActorCx::new(CxParts {
        system: system.clone(),
        name: name.to_owned(),
        actor: ActorId::named(name),
        incarnation: Incarnation(1),
        device: None,
        group: None,
        reports,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_type_is_created_from_encoded_arguments() {
    let (home, away) = (system().await, system().await);
    let types = ActorTypes::new().with::<Probe>();
    let reports = Reports::new();
    let create =
        |type_name, args: Vec<u8>| types.create(type_name, args, 16, cx(&home, "made", reports.clone()));
    let args = |total: u64| to_bytes(&total).unwrap();
    let why = create("prob", args(1)).await.unwrap_err().to_string();
    assert!(why.contains("no actor type \"prob\" in this binary; it has probe"), "{why}");
    let why = create("probe", vec![1]).await.unwrap_err().to_string();
    assert!(why.contains("arguments of actor type \"probe\""), "{why}");
    assert_eq!(create("probe", args(404)).await.unwrap_err().to_string(), "not found");
    assert_eq!(create("probe", args(500)).await.unwrap_err().to_string(), "panicked: internal");
    let addr = create("probe", args(41)).await.unwrap();
    assert_eq!(reports.next().await.progress.unwrap().total, 41);
    let handle = away.handle::<Probe>(addr.clone());
    assert_eq!(handle.ask(Add(1)).await.unwrap(), 42);
    // Its thread ends with it, and what was under way there with the thread.
    let under_way = tokio::spawn({
        let handle = handle.clone();
        async move { handle.ask(Later(60_000)).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    handle.tell(Panic("enough".into())).unwrap();
    assert!(matches!(under_way.await.unwrap(), Err(AskError::Panicked(m)) if m == "enough"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn askers_in_the_mailbox_hear_of_a_stop() {
    let rig = rig(16).await;
    rig.local.tell(Block(200)).unwrap();
    let asks: Vec<_> = [&rig.local, &rig.remote]
        .map(|handle| {
            let handle = handle.clone();
            tokio::spawn(async move { handle.ask(Add(1)).await })
        })
        .into();
    tokio::time::sleep(Duration::from_millis(80)).await;
    assert!(rig.home.stop_actor(rig.addr.actor, rig.addr.incarnation));
    for ask in asks {
        assert!(matches!(ask.await.unwrap(), Err(AskError::Stopped)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_incarnation_is_fenced() {
    let rig = rig(16).await;
    let end = rig.home.watch_local(rig.addr.actor, Incarnation(1));
    let new = rig.home.spawn(options("probe", 2, 16), Probe::default).unwrap();
    assert_eq!(end.await, Some(ActorEnd::Stopped));
    for handle in [&rig.local, &rig.remote] {
        let error = handle.ask(Add(5)).await.unwrap_err();
        match error {
            AskError::Refused(refused) => {
                assert_eq!((refused.reason, refused.message), (Refusal::WrongIncarnation, Add(5)));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(rig.away.handle::<Probe>(new.clone()).ask(Add(5)).await.unwrap(), 5);
    assert!(rig.home.spawn(options("probe", 1, 16), Probe::default).is_err(), "an old one came back");
    let elsewhere = ActorAddr { process: ProcessId(99), ..new };
    match rig.away.handle::<Probe>(elsewhere).ask(Add(5)).await {
        Err(AskError::Refused(refused)) => assert_eq!(refused.reason, Refusal::WrongProcess),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_actor_of_an_incarnation_is_refused_and_the_first_stays() {
    let rig = rig(4).await;
    let again = rig.home.spawn(options("probe", 1, 4), Probe::default);
    assert!(matches!(again, Err(SpawnError::AlreadyHere { present: Incarnation(1), .. })), "{again:?}");
    assert_eq!(rig.remote.ask(Add(1)).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_in_the_table_is_refused() {
    let rig = rig(16).await;
    for handle in [&rig.local, &rig.remote] {
        match handle.ask(Unlisted(3)).await {
            Err(AskError::Refused(refused)) => assert_eq!(refused.reason, Refusal::UnknownMessage),
            other => panic!("{other:?}"),
        }
    }
    match rig.away.handle::<Probe>(rig.addr).ask(Echo(vec![0; 64 << 20])).await {
        Err(AskError::Refused(refused)) => {
            assert!(refused.reason.to_string().contains("are allowed"), "{}", refused.reason);
        }
        other => panic!("{other:?}"),
    }
}

fn with_token(token: Option<&str>) -> SystemConfig {
    SystemConfig { token: token.map(Secret::new), ..SystemConfig::loopback() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_holders_of_the_token_talk() {
    let home = System::start(with_token(Some("sun"))).await.unwrap();
    let addr = home.spawn(options("probe", 1, 16), Probe::default).unwrap();
    let refused = async |token: Option<&str>| {
        let away = System::start(with_token(token)).await.unwrap();
        match away.handle::<Probe>(addr.clone()).ask(Add(1)).await {
            Err(AskError::Refused(refused)) => refused.reason.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let why = refused(Some("moon")).await;
    assert!(why.contains("differs from ours"), "{why}");
    let why = refused(None).await;
    assert!(why.contains("has a cluster token and this process has none"), "{why}");
    let away = System::start(with_token(Some("sun"))).await.unwrap();
    assert_eq!(away.handle::<Probe>(addr.clone()).ask(Add(1)).await.unwrap(), 1);
}

#[tokio::test]
async fn without_a_token_only_loopback_is_bound() {
    let open = SystemConfig::new("0.0.0.0:0".parse().unwrap());
    let error = System::start(open.clone()).await.err().unwrap();
    assert!(matches!(error, SystemError::TokenRequired { .. }));
    assert!(error.to_string().contains("set one, or bind to 127.0.0.1"), "{error}");
    let error = System::start(SystemConfig { token: Some(Secret::new("t")), ..open }).await.err().unwrap();
    assert!(matches!(error, SystemError::AdvertiseRequired { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_protocol_version_is_named_on_both_sides() {
    // As the side that connects: a peer of version 9 answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let peer = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"heliowir\x09\x00\x00\x00\x00\x00").await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let home = system().await;
    let why = match home.handle_at::<Probe>(&endpoint, ActorId::HEAD).ask(Add(1)).await {
        Err(AskError::Refused(refused)) => refused.reason.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(why.contains("speaks protocol version 9, this process speaks 4"), "{why}");
    peer.abort();
    // As the side that accepts: the peer gets our version, so that it can say the same.
    let mut stream = TcpStream::connect(home.endpoint()).await.unwrap();
    stream.write_all(b"heliowir\x09\x00\x00\x00\x00\x00").await.unwrap();
    let mut answer = [0; 10];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"heliowir\x04\x00");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_peer_refuses_at_once() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let home = system().await;
    match home.handle_at::<Probe>(&free, ActorId::HEAD).ask(Add(1)).await {
        Err(AskError::Refused(refused)) => {
            assert_eq!(refused.message, Add(1));
            assert!(refused.reason.is_transient());
            assert!(refused.reason.to_string().contains(&free), "{}", refused.reason);
        }
        other => panic!("{other:?}"),
    }
}

/// Connects and speaks the handshake by hand.
async fn greet(home: &System) -> TcpStream {
    let mut stream = TcpStream::connect(home.endpoint()).await.unwrap();
    let mut hello = Vec::new();
    hello.extend(7u64.to_le_bytes());
    hello.extend(1u64.to_le_bytes());
    hello.extend(b"x\x00");
    hello.extend([0; 32]);
    stream.write_all(b"heliowir\x04\x00").await.unwrap();
    stream.write_all(&(hello.len() as u32).to_le_bytes()).await.unwrap();
    stream.write_all(&hello).await.unwrap();
    let mut fixed = [0; 14];
    stream.read_exact(&mut fixed).await.unwrap();
    let mut body = vec![0; u32::from_le_bytes(fixed[10..].try_into().unwrap()) as usize];
    stream.read_exact(&mut body).await.unwrap();
    stream
}

/// Sends `bytes` after the handshake; true if the system closes the connection.
async fn closes_after(home: &System, bytes: &[u8]) -> bool {
    let mut stream = greet(home).await;
    stream.write_all(bytes).await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_frames_close_their_connection_only() {
    let rig = rig(16).await;
    assert!(!closes_after(&rig.home, b"\x01\x00\x00\x00\x05").await, "a ping is fine");
    assert!(closes_after(&rig.home, b"\xff\xff\xff\xff").await, "a length beyond the limit");
    assert!(closes_after(&rig.home, b"\x01\x00\x00\x00\x63").await, "an unknown kind");
    assert!(closes_after(&rig.home, b"\x00\x00\x00\x00").await, "an empty frame");
    assert!(closes_after(&rig.home, b"\x03\x00\x00\x00\x01\x02\x03").await, "a call cut short");
    let mut stranger = TcpStream::connect(rig.home.endpoint()).await.unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _ = stranger.read_to_end(&mut Vec::new()).await;
    // A payload that does not decode fails its call, not the connection.
    assert_eq!(rig.remote.ask(Add(1)).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_says_goodbye() {
    let rig = rig(16).await;
    let mut events = rig.away.peer_events();
    rig.remote.ask(Add(1)).await.unwrap();
    let process = rig.home.process();
    assert!(matches!(events.next().await, Some(PeerEvent::Connected { process: p, .. }) if p == process));
    let pending = tokio::spawn({
        let remote = rig.remote.clone();
        async move { remote.ask(Later(60_000)).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    rig.home.shutdown().await;
    match events.next().await {
        Some(PeerEvent::Lost { process: p, why, .. }) => {
            assert_eq!(p, process);
            assert!(why.contains("goodbye"), "{why}");
        }
        other => panic!("{other:?}"),
    }
    assert!(pending.await.unwrap().is_err());
    assert!(rig.remote.ask(Add(1)).await.is_err());
}

/// This test binary as another process with a probe; killed when dropped.
struct ChildProcess {
    child: Child,
    endpoint: String,
}

impl ChildProcess {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_process", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let line = stdout.lines().map(Result::unwrap).find(|line| line.contains("endpoint=")).unwrap();
        let endpoint = line.split("endpoint=").nth(1).unwrap().trim().to_owned();
        Self { child, endpoint }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Asks that a child never answers, and what becomes of them and of the peer after `signal`; and how fast.
async fn lose(config: SystemConfig, signal: Signal) -> (Duration, String) {
    let child = ChildProcess::start();
    let home = System::start(config).await.unwrap();
    let mut events = home.peer_events();
    let handle = home.handle_at::<Probe>(&child.endpoint, ActorId::named("probe"));
    assert_eq!(handle.ask(Add(1)).await.unwrap(), 1);
    let asks: Vec<_> = (0..3)
        .map(|_| {
            let handle = handle.clone();
            tokio::spawn(async move { handle.ask(Later(60_000)).await })
        })
        .collect();
    let Some(PeerEvent::Connected { process, .. }) = events.next().await else { panic!("not connected") };
    assert!(home.is_connected(process));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let lost_at = Instant::now();
    child.signal(signal);
    for ask in asks {
        assert!(matches!(ask.await.unwrap(), Err(AskError::PeerLost(_))));
    }
    let Some(PeerEvent::Lost { process: lost, why, .. }) = events.next().await else { panic!("not lost") };
    assert_eq!(lost, process);
    assert!(!home.is_connected(process));
    (lost_at.elapsed(), why)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_peer_fails_its_askers_at_once() {
    let (took, _) = lose(SystemConfig::loopback(), Signal::KILL).await;
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_peer_is_lost() {
    let config = SystemConfig { silence_max: Duration::from_secs(1), ..SystemConfig::loopback() };
    let (took, why) = lose(config, Signal::STOP).await;
    assert!(took > Duration::from_millis(500) && took < Duration::from_secs(4), "{took:?}");
    assert!(why.contains("nothing heard for"), "{why}");
}

/// A peer that sends and never reads is not served beyond the bound of its queue; others are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_read_its_answers_is_served_no_more() {
    let config = SystemConfig { queue_bytes_max: 1 << 20, ..SystemConfig::loopback() };
    let home = System::start(config).await.unwrap();
    let addr = home.spawn(options("probe", 1, 100_000), Probe::default).unwrap();
    let mut greedy = greet(&home).await;
    let mut call = Vec::new();
    let payload = to_bytes(&Echo(vec![7; 10_000])).unwrap();
    call.extend((1 + 6 * 8 + payload.len() as u32).to_le_bytes());
    call.push(1);
    // FNV-1a, as the wire names messages; an actor id is made the same way.
    let echo = ActorId::named("echo").0;
    for field in [1, addr.actor.0, 1, 0, echo, 0] {
        call.extend(field.to_le_bytes());
    }
    call.extend(&payload);
    let sent = Arc::new(AtomicUsize::new(0));
    let sending = tokio::spawn({
        let sent = sent.clone();
        async move {
            while greedy.write_all(&call).await.is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let sent_after = async |ms| {
        tokio::time::sleep(Duration::from_millis(ms)).await;
        sent.load(Ordering::Relaxed)
    };
    // What fits into buffers is taken; then nothing more.
    let served_no_more = async {
        let mut seen = 0;
        loop {
            let now = sent_after(1000).await;
            if now > 0 && now == std::mem::replace(&mut seen, now) {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), served_no_more).await.expect("it is still served");
    assert!(!sending.is_finished());
    sending.abort();
    let away = system().await;
    assert_eq!(away.handle::<Probe>(addr).ask(Add(1)).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_actor_may_refuse_to_stop() {
    let home = system().await;
    let addr = home.spawn(options("probe", 1, 16), || Probe { stubborn: true, ..Probe::default() }).unwrap();
    assert!(home.stop_actor(addr.actor, addr.incarnation));
    assert_eq!(home.handle::<Probe>(addr).ask(Add(1)).await.unwrap(), 1);
}

/// Not a test: the process that `ChildProcess` starts. Ends with its stdin.
#[test]
#[ignore = "a child process of another test"]
fn child_process() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let home = runtime.block_on(async {
        let home = system().await;
        home.spawn(options("probe", 1, 16), Probe::default).unwrap();
        home
    });
    println!("endpoint={}", home.endpoint());
    let _ = std::io::read_to_string(std::io::stdin());
}

/// SE-5: connections that say nothing are bounded, in number and in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_who_say_nothing_are_bounded_and_sent_away() {
    let config = SystemConfig { connect_timeout: Duration::from_secs(8), ..SystemConfig::loopback() };
    let home = System::start(config).await.unwrap();
    let addr = home.spawn(options("probe", 1, 16), Probe::default).unwrap();
    let mut strangers = Vec::new();
    for _ in 0..300 {
        strangers.push(TcpStream::connect(home.endpoint()).await.unwrap());
    }
    let mut closed_at_once = 0;
    for stranger in &mut strangers {
        let read = tokio::time::timeout(Duration::from_millis(2), stranger.read(&mut [0; 1])).await;
        closed_at_once += usize::from(read.is_ok());
    }
    // Those of one address that are too many; the others have until the time-out.
    assert!((30..=44).contains(&closed_at_once), "{closed_at_once}");
    let away = system().await;
    let probe = away.handle::<Probe>(addr);
    let let_in = async {
        while probe.ask(Add(1)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), let_in).await.expect("strangers are sent away");
}

/// SE-5: and so are peers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_peer_too_many_is_refused_and_the_others_stay() {
    let home = System::start(SystemConfig { connections_max: 2, ..SystemConfig::loopback() }).await.unwrap();
    let addr = home.spawn(options("probe", 1, 16), Probe::default).unwrap();
    let (one, two, three) = (system().await, system().await, system().await);
    let [first, second, third] = [&one, &two, &three].map(|system| system.handle::<Probe>(addr.clone()));
    assert_eq!((first.ask(Add(1)).await.unwrap(), second.ask(Add(1)).await.unwrap()), (1, 2));
    assert!(third.ask(Add(1)).await.is_err());
    assert_eq!(first.ask(Add(1)).await.unwrap(), 3);
    two.shutdown().await;
    let let_in = async {
        while third.ask(Add(1)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), let_in).await.expect("a place is free again");
}
