//! Latency and bandwidth of a link between two processes, beside a plain TCP connection in the same run.
//!
//! `cargo bench -p heliostat-kernels --bench fabric [-- ring KiB, spin us]`. Ping-pong: one round trip is two frames;
//! the figures are of one way, so half of it. Bandwidth: the payload of one way over half a round trip.
//! Exchange: four processes, each sends a frame to each other one and receives theirs, twice, as in one MoE layer.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // A bench may fail, and prints.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use heliostat_kernels::fabric::{Connect, Endpoint, Fabric, FabricListener, Kind, Tag, Transport};

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const SIZES: [usize; 6] = [0, 1 << 10, 16 << 10, 64 << 10, 1 << 20, 16 << 20];
const CODEC: bincode::config::Configuration = bincode::config::standard();

fn rounds(size: usize) -> usize {
    (32usize << 20).checked_div(size).unwrap_or(20_000).clamp(40, 20_000)
}

fn tag(step: usize) -> Tag {
    Tag { kind: Kind::Dispatch, step: step as u64, layer: 0 }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    match words.first().map(String::as_str) {
        Some("echo") => return echo(&words[1]),
        Some("exchange") => return exchange(&mut join(&words[1]), |_, _| {}),
        Some("echo-tcp") => return echo_tcp(&words[1]),
        _ => {}
    }
    let number = |at: usize, default| words.get(at).map_or(default, |word| word.parse().unwrap());
    let (ring_kib, spin_us) = (number(0, 2048), number(1, 0));
    println!("ring {ring_kib} KiB, spin {spin_us} us; one way");
    println!(
        "{:<14} {:>10} {:>12} {:>12} {:>12} {:>9}",
        "link", "bytes", "p50 us", "p99 us", "min us", "GB/s"
    );
    for transport in ["memory", "tcp"] {
        let settings = format!("{transport},{ring_kib},{spin_us}");
        let (mut children, mut fabric) = gather("echo", 1, &settings);
        let mut step = 0;
        for size in SIZES {
            let bytes = vec![7; size];
            measure(transport, size, || {
                fabric.send(1, tag(step), &[&bytes]).unwrap();
                assert_eq!(fabric.recv(1, tag(step)).unwrap().payload().len(), size);
                step += 1;
            });
        }
        drop(fabric);
        children[0].wait().unwrap();
    }
    plain_tcp();
    for transport in ["memory", "tcp"] {
        let settings = format!("{transport},{ring_kib},{spin_us}");
        let (mut children, mut fabric) = gather("exchange", 3, &settings);
        let name = format!("4x {transport}");
        exchange(&mut fabric, |size, round| {
            // The time of a round, not half of it.
            measure(&name, size, || {
                round();
                round();
            });
        });
        drop(fabric);
        for child in &mut children {
            child.wait().unwrap();
        }
    }
}

fn measure(link: &str, size: usize, mut round_trip: impl FnMut()) {
    let rounds = rounds(size);
    (0..rounds / 10 + 2).for_each(|_| round_trip());
    let mut times: Vec<Duration> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            round_trip();
            start.elapsed() / 2
        })
        .collect();
    times.sort_unstable();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let (p50, p99) = (times[rounds / 2], times[rounds * 99 / 100]);
    println!(
        "{link:<14} {size:>10} {:>12.1} {:>12.1} {:>12.1} {:>9.2}",
        micros(p50),
        micros(p99),
        micros(times[0]),
        size as f64 / p50.as_secs_f64() / 1e9
    );
}

fn child(role: &str, argument: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([role, argument]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn to_line(endpoints: &[Endpoint]) -> String {
    let bytes = bincode::encode_to_vec(endpoints, CODEC).unwrap();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_line(line: &str) -> Vec<Endpoint> {
    let digits = line.trim();
    let byte = |at: usize| u8::from_str_radix(&digits[at * 2..][..2], 16).unwrap();
    let bytes: Vec<u8> = (0..digits.len() / 2).map(byte).collect();
    bincode::decode_from_slice(&bytes, CODEC).unwrap().0
}

/// How both ends link; `settings` is transport, ring in KiB, spin in us.
fn connect(listener: &FabricListener, rank: usize, endpoints: &[Endpoint], settings: &str) -> Fabric {
    let words: Vec<&str> = settings.split(',').collect();
    let how = Connect {
        transport: if words[0] == "tcp" { Transport::Tcp } else { Transport::Auto },
        ring_bytes: words[1].parse::<usize>().unwrap() << 10,
        spin: Some(Duration::from_micros(words[2].parse().unwrap())),
        ..Connect::new(1, rank, endpoints)
    };
    listener.connect(how).unwrap()
}

/// Starts `count` processes in this role and links with them as rank 0.
fn gather(role: &str, count: usize, settings: &str) -> (Vec<Child>, Fabric) {
    let listener = FabricListener::bind(LOOPBACK, None).unwrap();
    let mut endpoints = vec![listener.endpoint()];
    let mut children: Vec<Child> = (0..count).map(|_| child(role, settings)).collect();
    for child in &mut children {
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        endpoints.extend(from_line(&line));
    }
    for child in &mut children {
        writeln!(child.stdin.as_mut().unwrap(), "{}", to_line(&endpoints)).unwrap();
    }
    let fabric = connect(&listener, 0, &endpoints, settings);
    (children, fabric)
}

/// The other processes: link with the rest.
fn join(settings: &str) -> Fabric {
    let listener = FabricListener::bind(LOOPBACK, None).unwrap();
    println!("{}", to_line(&[listener.endpoint()]));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let endpoints = from_line(&line);
    let rank = endpoints.iter().position(|endpoint| *endpoint == listener.endpoint()).unwrap();
    let fabric = connect(&listener, rank, &endpoints, settings);
    // The process ends with its rank.
    std::mem::forget(listener);
    fabric
}

/// Sends every frame back.
fn echo(settings: &str) {
    let mut fabric = join(settings);
    for step in 0.. {
        let Ok(frame) = fabric.recv(0, tag(step)) else { return };
        fabric.send(0, tag(step), &[frame.payload()]).unwrap();
    }
}

/// Runs rounds of dispatch and combine of several sizes; all ranks run the same number.
fn exchange(fabric: &mut Fabric, mut run: impl FnMut(usize, &mut dyn FnMut())) {
    let (rank, world) = (fabric.rank(), fabric.world());
    for size in [0, 4 << 10, 64 << 10, 1 << 20] {
        let bytes = vec![7; size];
        let rounds = rounds(size);
        let calls = 2 * (rounds / 10 + 2 + rounds);
        let mut step = 0;
        let mut round = || {
            for _ in 0..2 {
                (0..world)
                    .filter(|&to| to != rank)
                    .for_each(|to| fabric.send(to, tag(step), &[&bytes]).unwrap());
                for from in (0..world).filter(|&from| from != rank) {
                    fabric.recv(from, tag(step)).unwrap();
                }
                step += 1;
            }
        };
        if rank == 0 {
            run(size, &mut round);
        } else {
            (0..calls).for_each(|_| round());
        }
    }
}

/// What the fabric is compared with: blocking reads and writes of a known size.
fn plain_tcp() {
    for size in SIZES {
        let size = size.max(1);
        let listener = TcpListener::bind(LOOPBACK).unwrap();
        let mut child = child("echo-tcp", &format!("{},{size}", listener.local_addr().unwrap()));
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let mut bytes = vec![7; size];
        measure("plain tcp", size, || {
            stream.write_all(&bytes).unwrap();
            stream.read_exact(&mut bytes).unwrap();
        });
        drop(stream);
        child.wait().unwrap();
    }
}

fn echo_tcp(argument: &str) {
    let (address, size) = argument.split_once(',').unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut bytes = vec![0; size.parse().unwrap()];
    while stream.read_exact(&mut bytes).is_ok() {
        stream.write_all(&bytes).unwrap();
    }
}
