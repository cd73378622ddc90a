//! The fabric between real processes: kill -9, idle CPU, network namespaces.
//!
//! A test starts this binary again with the name of one of the roles below; the roles do nothing when run as tests.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // A test may fail.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use heliostat_kernels::fabric::{
    Connect, Endpoint, Event, Fabric, FabricError, FabricListener, Kind, LinkKind, Tag, Transport,
};

const ROLE: &str = "FABRIC_TEST_ADDRESS";
const CODEC: bincode::config::Configuration = bincode::config::standard();
const TAG: Tag = Tag { kind: Kind::Dispatch, step: 1, layer: 0 };

fn to_line(endpoints: &[Endpoint]) -> String {
    let bytes = bincode::encode_to_vec(endpoints, CODEC).unwrap();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_line(line: &str) -> Vec<Endpoint> {
    let line = line.trim();
    let bytes: Vec<u8> =
        (0..line.len() / 2).map(|at| u8::from_str_radix(&line[at * 2..][..2], 16).unwrap()).collect();
    bincode::decode_from_slice(&bytes, CODEC).unwrap().0
}

/// A rank in a process of its own. Killed when dropped.
struct Rank {
    child: Child,
    lines: BufReader<ChildStdout>,
    endpoint: Endpoint,
}

impl Rank {
    /// Starts a role through `command`, a prefix such as `ip netns exec`, listening on `address`.
    fn start(prefix: &[&str], role: &str, address: IpAddr) -> Self {
        let exe = std::env::current_exe().unwrap();
        let mut words: Vec<_> = prefix.iter().map(|word| (*word).into()).collect();
        words.push(exe.into_os_string());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["--exact", role, "--nocapture", "--test-threads=1"]);
        command.env(ROLE, address.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let endpoint = from_line(&read_line(&mut lines, "endpoint ")).remove(0);
        Self { child, lines, endpoint }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// The rest of the next line that starts with `key`.
    fn hear(&mut self, key: &str) -> String {
        read_line(&mut self.lines, key)
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_line(from: &mut impl BufRead, key: &str) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        assert!(from.read_line(&mut line).unwrap() > 0, "the process ended before it said {key:?}");
        // The test harness may have begun the line.
        if let Some((_, rest)) = line.split_once(key) {
            return rest.trim().to_owned();
        }
    }
}

/// In the child: announces the endpoint and connects with what the parent answers, as rank 1 of 2 or more. `None` when
/// this is no child.
fn join() -> Option<Fabric> {
    let address: IpAddr = std::env::var(ROLE).ok()?.parse().unwrap();
    let listener = FabricListener::bind(SocketAddr::new(address, 0), Some(b"secret".to_vec())).unwrap();
    println!("\nendpoint {}", to_line(&[listener.endpoint()]));
    let mut input = std::io::stdin().lock();
    let mut line = String::new();
    input.read_line(&mut line).unwrap();
    let (transport, endpoints) = line.split_once(' ').unwrap();
    let endpoints = from_line(endpoints);
    let rank = endpoints.iter().position(|endpoint| *endpoint == listener.endpoint()).unwrap();
    let transport = if transport == "tcp" { Transport::Tcp } else { Transport::Auto };
    let fabric = listener.connect(Connect { transport, ..Connect::new(1, rank, &endpoints) }).unwrap();
    // It greets nobody any more, and the process ends with its rank.
    std::mem::forget(listener);
    println!("\nlinked");
    Some(fabric)
}

/// In the parent: rank 0, linked with these children.
fn meet(address: IpAddr, children: &mut [Rank], transport: Transport) -> Fabric {
    let listener = FabricListener::bind(SocketAddr::new(address, 0), Some(b"secret".to_vec())).unwrap();
    let mut endpoints = vec![listener.endpoint()];
    endpoints.extend(children.iter().map(|child| child.endpoint.clone()));
    let name = if transport == Transport::Tcp { "tcp" } else { "auto" };
    for child in children.iter_mut() {
        child.tell(&format!("{name} {}", to_line(&endpoints)));
    }
    listener.connect(Connect { transport, ..Connect::new(1, 0, &endpoints) }).unwrap()
}

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Waits for a frame of rank 0, and says when it lost a rank.
#[test]
fn role_receives() {
    let Some(mut fabric) = join() else { return };
    let error = fabric.recv(0, TAG).unwrap_err();
    println!("\nerror {error}");
    // Stays, so that only the killed rank is lost.
    std::thread::sleep(Duration::from_secs(60));
}

/// Does nothing, like a rank that computes.
#[test]
fn role_computes() {
    let Some(_fabric) = join() else { return };
    std::thread::sleep(Duration::from_secs(60));
}

/// Answers frames of rank 0 until it leaves.
#[test]
fn role_echoes() {
    let Some(mut fabric) = join() else { return };
    while let Ok(frame) = fabric.recv(0, TAG) {
        fabric.send(0, TAG, &[frame.payload()]).unwrap();
    }
}

/// Waits for a header, and says how much CPU the whole process used meanwhile.
#[test]
fn role_waits() {
    let Some(mut fabric) = join() else { return };
    // Lets the harness and the handshake settle.
    let settled = fabric.wait(Kind::Header, Some(Duration::from_millis(300))).unwrap();
    assert_eq!(settled, Event::Deadline);
    println!("\nwaiting");
    let before = cpu_time();
    assert_eq!(fabric.wait(Kind::Header, None).unwrap(), Event::Frame { from: 0 });
    println!("\ncpu {}", (cpu_time() - before).as_micros());
}

/// CPU time of all threads of this process.
fn cpu_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let nanos = tasks.map(|task| {
        let text = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
        text.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    });
    Duration::from_nanos(nanos.sum())
}

/// (FB-2, FB-5)
#[test]
fn a_killed_process_is_noticed_by_all_blocked_ranks() {
    type Call = fn(&mut Fabric) -> Result<(), FabricError>;
    let calls: [(&str, Call); 4] = [
        ("recv from it", |fabric| fabric.recv(1, TAG).map(drop)),
        ("recv from another", |fabric| fabric.recv(2, TAG).map(drop)),
        ("wait", |fabric| fabric.wait(Kind::Header, None).map(drop)),
        ("send to it", |fabric| fabric.send(1, TAG, &[&vec![0; 64 << 20]])),
    ];
    let mut times = Vec::new();
    for transport in [Transport::Auto, Transport::Tcp] {
        for (name, call) in calls {
            let mut children =
                [Rank::start(&[], "role_computes", LOCAL), Rank::start(&[], "role_receives", LOCAL)];
            let mut fabric = meet(LOCAL, &mut children, transport);
            for child in &mut children {
                child.hear("linked");
            }
            let [mut victim, mut other] = children;
            let killer = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                let start = Instant::now();
                victim.child.kill().unwrap();
                (start, victim)
            });
            let error = call(&mut fabric).unwrap_err();
            let end = Instant::now();
            let (start, _victim) = killer.join().unwrap();
            assert!(matches!(error, FabricError::PeerLost { rank: 1 }), "{error}");
            assert!(other.hear("error ").contains("rank 1 is lost"));
            let took = end - start;
            println!(
                "{transport:?}, {name}: noticed {took:?} after the kill, by all after {:?}",
                start.elapsed()
            );
            times.push(took);
        }
    }
    // A busy machine may delay one of them.
    times.sort_unstable();
    assert!(times[times.len() / 2] < Duration::from_millis(100), "{times:?}");
    assert!(times[times.len() - 1] < Duration::from_secs(2), "{times:?}");
}

#[test]
fn a_parked_rank_uses_no_cpu() {
    for transport in [Transport::Auto, Transport::Tcp] {
        let mut children = [Rank::start(&[], "role_waits", LOCAL), Rank::start(&[], "role_computes", LOCAL)];
        let mut fabric = meet(LOCAL, &mut children, transport);
        children[0].hear("waiting");
        std::thread::sleep(Duration::from_secs(1));
        fabric.send(1, Tag { kind: Kind::Header, step: 1, layer: 0 }, &[]).unwrap();
        let micros: u64 = children[0].hear("cpu ").parse().unwrap();
        println!("{transport:?}: {micros} us of CPU in 1 s of waiting");
        assert!(micros < 2000, "{micros} us");
    }
}

/// (FB-5) A rank that frees nothing itself leaves nothing behind: its memory has no name.
#[test]
fn a_killed_process_leaves_nothing_behind() {
    let names = || {
        let list = |path| std::fs::read_dir(path).map_or(0, |entries| entries.count());
        (list("/dev/shm"), list("/dev/mqueue"))
    };
    let before = names();
    let mut children = [Rank::start(&[], "role_computes", LOCAL)];
    let fabric = meet(LOCAL, &mut children, Transport::Auto);
    assert_eq!(fabric.link(1), LinkKind::SharedMemory);
    children[0].child.kill().unwrap();
    children[0].child.wait().unwrap();
    drop(fabric);
    assert_eq!(names(), before);
}

fn ip(words: &str) -> bool {
    Command::new("ip")
        .args(words.split(' '))
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Two network namespaces joined by a virtual cable. Removed when dropped.
struct Namespaces {
    names: [String; 2],
}

impl Namespaces {
    fn new() -> Option<Self> {
        let id = std::process::id();
        let names = [format!("fabric-a-{id}"), format!("fabric-b-{id}")];
        let [a, b] = &names;
        if !ip(&format!("netns add {a}")) {
            return None;
        }
        let made = Self { names: names.clone() };
        let ok = ip(&format!("netns add {b}"))
            && ip(&format!("-n {a} link add veth0 type veth peer name veth0 netns {b}"))
            && ip(&format!("-n {a} addr add 10.87.0.1/24 dev veth0"))
            && ip(&format!("-n {b} addr add 10.87.0.2/24 dev veth0"))
            && [a, b].iter().all(|name| {
                ip(&format!("-n {name} link set veth0 up")) && ip(&format!("-n {name} link set lo up"))
            });
        ok.then_some(made)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&format!("netns del {name}"));
        }
    }
}

#[test]
fn ranks_of_different_network_namespaces_link_by_tcp() {
    let Some(namespaces) = Namespaces::new() else {
        println!("skipped: network namespaces need root and the ip command");
        return;
    };
    let [a, b] = &namespaces.names;
    let inside = |name: &str, role: &str, last: u8| {
        Rank::start(&["ip", "netns", "exec", name], role, IpAddr::V4(Ipv4Addr::new(10, 87, 0, last)))
    };
    let mut ranks = [inside(a, "role_leads", 1), inside(a, "role_echoes", 1), inside(b, "role_echoes", 2)];
    let endpoints: Vec<_> = ranks.iter().map(|rank| rank.endpoint.clone()).collect();
    for rank in &mut ranks {
        rank.tell(&format!("auto {}", to_line(&endpoints)));
    }
    assert_eq!(ranks[0].hear("links "), "[Own, SharedMemory, Tcp]");
    assert_eq!(ranks[0].hear("echoes "), "300");
}

/// Rank 0: says how it is linked and lets everyone echo, through both transports at once.
#[test]
fn role_leads() {
    let Some(mut fabric) = join() else { return };
    println!("\nlinks {:?}", (0..fabric.world()).map(|rank| fabric.link(rank)).collect::<Vec<_>>());
    let mut echoes = 0;
    for step in 0..100u32 {
        let bytes = vec![step as u8; step as usize * 30_000];
        for to in 1..fabric.world() {
            fabric.send(to, TAG, &[&bytes]).unwrap();
        }
        for from in 1..fabric.world() {
            assert!(fabric.recv(from, TAG).unwrap().payload() == bytes);
            echoes += 1;
        }
        fabric.send(0, TAG, &[&bytes]).unwrap();
        echoes += usize::from(fabric.recv(0, TAG).unwrap().payload() == bytes);
    }
    println!("\nechoes {echoes}");
}
