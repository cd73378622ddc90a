//! Latency and bandwidth of a link between two processes, beside a plain TCP connection in the same run.
//!
//! `cargo bench -p heliostat-kernels --bench fabric [-- ring KiB, spin us]`. Ping-pong: one round trip is two frames;
//! the figures are of one way, so half of it. Bandwidth: the payload of one way over half a round trip.

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
        Some("echo-tcp") => return echo_tcp(&words[1]),
        _ => {}
    }
    let number = |at: usize, default| words.get(at).map_or(default, |word| word.parse().unwrap());
    let (ring_kib, spin_us) = (number(0, 1024), number(1, 0));
    println!("ring {ring_kib} KiB, spin {spin_us} us; one way");
    println!(
        "{:<14} {:>10} {:>12} {:>12} {:>12} {:>9}",
        "link", "bytes", "p50 us", "p99 us", "min us", "GB/s"
    );
    for transport in ["memory", "tcp"] {
        let (mut child, mut fabric) = pair(transport, ring_kib, spin_us);
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
        child.wait().unwrap();
    }
    plain_tcp();
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
        spin: Duration::from_micros(words[2].parse().unwrap()),
        ..Connect::new(1, rank, endpoints)
    };
    listener.connect(how).unwrap()
}

fn pair(transport: &str, ring_kib: usize, spin_us: usize) -> (Child, Fabric) {
    let settings = format!("{transport},{ring_kib},{spin_us}");
    let mut child = child("echo", &settings);
    let listener = FabricListener::bind(LOOPBACK, None).unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let endpoints = [listener.endpoint(), from_line(&line).remove(0)];
    writeln!(child.stdin.as_mut().unwrap(), "{}", to_line(&endpoints)).unwrap();
    let fabric = connect(&listener, 0, &endpoints, &settings);
    (child, fabric)
}

/// The other process: sends every frame back.
fn echo(settings: &str) {
    let listener = FabricListener::bind(LOOPBACK, None).unwrap();
    println!("{}", to_line(&[listener.endpoint()]));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let mut fabric = connect(&listener, 1, &from_line(&line), settings);
    for step in 0.. {
        let Ok(frame) = fabric.recv(0, tag(step)) else { return };
        fabric.send(0, tag(step), &[frame.payload()]).unwrap();
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
