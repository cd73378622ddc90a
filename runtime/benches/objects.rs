//! Putting and getting objects, beside what the machine does without us.
//!
//! `cargo bench -p heliostat-runtime --bench objects [-- MIB]` starts a head and a node in this process, puts and gets through
//! two clients of the node's store, and prints GB/s and latencies. 1024 MiB unless told otherwise.

#![allow(clippy::print_stdout, reason = "the figures are the purpose of the program")]

use std::net::TcpListener;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::head::{self, HeadConfig};
use heliostat_runtime::node::{self, NodeConfig};
use heliostat_runtime::state::StateConfig;
use rustix::fs::{MemfdFlags, memfd_create};

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Repetitions of what is quick to repeat.
const ROUNDS: usize = 5;
const GETS: usize = 2000;

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let mib = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(1024);
    let bytes: usize = mib << 20;
    let dir = tempfile::tempdir()?;
    let bind = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let state = StateConfig::Embedded { dir: dir.path().join("state") };
    let head = head::run(HeadConfig::new(bind, state)).await?;
    let mut config = NodeConfig::new("n0", bind.to_string(), dir.path().join("n0"));
    config.worker_command = vec!["/bin/false".to_owned()];
    config.objects_bytes_max = 4 * bytes as u64;
    config.spill_bytes_max = 0;
    let node = node::run(config).await?;
    let (putter, getter) = (connect(&bind.to_string()).await?, connect(&bind.to_string()).await?);
    let source = vec![7; bytes];

    let mut target = vec![1; bytes];
    report("memcpy, warm", bytes, best(|| target.copy_from_slice(&source)));
    drop(target);
    let started = Instant::now();
    write_file(&source)?;
    report("write to cold shared memory", bytes, started.elapsed());

    let (objects, other) = (putter.objects(), getter.objects());
    objects.put(&[0; 100_000]).await?;
    let started = Instant::now();
    let first = objects.put(&source).await?;
    report("put, first of its size", bytes, started.elapsed());
    drop(first);
    for n in 0..ROUNDS {
        settled(&putter).await?;
        let started = Instant::now();
        let object = objects.put(&source).await?;
        report(&format!("put, again {n}"), bytes, started.elapsed());
        drop(object);
    }
    // Another process's first one, with its memory made ready.
    other.prefault(bytes).await?;
    let started = Instant::now();
    let ready = other.put(&source).await?;
    report("put, first after prefault", bytes, started.elapsed());

    let large =
        latencies(GETS, async || objects.get(&ready).await.map(|bytes| assert_eq!(bytes[0], 7))).await?;
    println!("get of that by another process, mapped, p50 {:?}, p99 {:?}", large.0, large.1);
    let started = Instant::now();
    let mapped = objects.get(&ready).await?;
    let sum: u64 = mapped.chunks(4096).map(|page| u64::from(page[0])).sum();
    println!("  and every page of it touched: {:?} (sum {sum})", started.elapsed());
    drop(mapped);
    let small = other.put(&[1; 100]).await?;
    let small = latencies(GETS, async || objects.get(&small).await.map(drop)).await?;
    println!("get of 100 bytes of another process, p50 {:?}, p99 {:?}", small.0, small.1);
    let puts = latencies(GETS, async || objects.put(&[1; 100]).await.map(drop)).await?;
    println!("put of 100 bytes, p50 {:?}, p99 {:?}", puts.0, puts.1);
    drop(ready);
    putter.shutdown().await?;
    node.stopped().await;
    head.stop().await;
    Ok(())
}

/// A client with a system of its own, which is another process to the store.
async fn connect(head: &str) -> Result<Cluster, AnyError> {
    let cluster = Cluster::connect(head, None).await?;
    let ready = cluster.wait_until(Duration::from_secs(10), |status| status.nodes.len() == 1).await;
    ready.ok_or("the node has not joined")?;
    Ok(cluster)
}

/// Waits until the store has given the memory of freed objects back to their owner.
async fn settled(cluster: &Cluster) -> Result<(), AnyError> {
    while cluster.object_stores().await?.iter().any(|store| !store.objects.is_empty()) {}
    Ok(())
}

fn best(mut run: impl FnMut()) -> Duration {
    let timed = (0..ROUNDS).map(|_| {
        let started = Instant::now();
        run();
        started.elapsed()
    });
    timed.min().unwrap_or_default()
}

fn write_file(source: &[u8]) -> Result<(), AnyError> {
    let file = memfd_create("bench", MemfdFlags::CLOEXEC)?;
    let mut written = 0;
    while written < source.len() {
        written += rustix::io::write(file.as_fd(), &source[written..])?;
    }
    Ok(())
}

async fn latencies<T>(
    rounds: usize,
    call: impl AsyncFn() -> Result<T, heliostat_runtime::objects::ObjectError>,
) -> Result<(Duration, Duration), AnyError> {
    let mut took = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let started = Instant::now();
        call().await?;
        took.push(started.elapsed());
    }
    took.sort_unstable();
    Ok((took[rounds / 2], took[rounds * 99 / 100]))
}

fn report(what: &str, bytes: usize, took: Duration) {
    println!("{what}: {:.2} GB/s ({took:?})", bytes as f64 / took.as_secs_f64() / 1e9);
}
