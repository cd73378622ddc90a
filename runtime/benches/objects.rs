//! Putting and getting objects, beside what the machine does without us.
//!
//! `cargo bench -p heliostat-runtime --bench objects [-- MB]` starts a head and a node in this process, puts and gets through
//! two clients of the node's store, and prints one JSON object per row, as the benchmark of the cluster does. 1000 MB (10^6
//! bytes) unless told otherwise.

#![allow(clippy::print_stdout, reason = "the figures are the purpose of the program")]

mod common;

use std::net::TcpListener;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::head::{self, HeadConfig};
use heliostat_runtime::node::{self, NodeConfig};
use heliostat_runtime::state::StateConfig;
use rustix::fs::{MemfdFlags, memfd_create};

use common::print;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Repetitions of what is quick to repeat.
const ROUNDS: usize = 5;
const GETS: usize = 2000;

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let megabytes = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(1000);
    let bytes: usize = megabytes * 1_000_000;
    let dir = tempfile::tempdir()?;
    let bind = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let state = StateConfig::Embedded { dir: dir.path().join("state") };
    let head = head::run(HeadConfig::new(bind, state)).await?;
    let mut config = NodeConfig::new("n0", bind.to_string(), dir.path().join("n0"));
    config.worker_command = vec!["/bin/false".to_owned()];
    // Twice of what is put, and memory is kept ready while half of it is free.
    config.objects_bytes_max = 10 * bytes as u64;
    config.spill_bytes_max = 0;
    config.objects_ready = vec![bytes];
    let node = node::run(config).await?;
    let (putter, getter) = (connect(&bind.to_string()).await?, connect(&bind.to_string()).await?);
    let source = vec![7; bytes];

    let rate = |took: Duration| bytes as f64 / took.as_secs_f64() / 1e9;
    let mut target = vec![1; bytes];
    let copies: Vec<f64> = (0..ROUNDS).map(|_| rate(timed(|| target.copy_from_slice(&source)))).collect();
    print("memcpy, warm", &copies, "GB/s");
    drop(target);
    let began = Instant::now();
    write_file(&source)?;
    print("write to cold shared memory", &[rate(began.elapsed())], "GB/s");

    let (objects, other) = (putter.objects(), getter.objects());
    objects.put(&[0; 100_000]).await?;
    let cold = &source[..bytes / 10 * 7];
    let began = Instant::now();
    let first = objects.put(cold).await?;
    let took = began.elapsed();
    print("put of a size never put before", &[cold.len() as f64 / took.as_secs_f64() / 1e9], "GB/s");
    drop(first);
    objects.prefault(bytes).await?;
    let mut puts = Vec::new();
    for _ in 0..ROUNDS {
        settled(&putter).await?;
        let began = Instant::now();
        let object = objects.put(&source).await?;
        puts.push(rate(began.elapsed()));
        drop(object);
    }
    print("put 1 GB on a node", &puts, "GB/s");
    // Meanwhile the node makes memory ready again for another process; no event tells when it has.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let began = Instant::now();
    let ready = other.put(&source).await?;
    print("put 1 GB, the first of a process, from memory kept ready", &[rate(began.elapsed())], "GB/s");

    let gets =
        latencies(GETS, async || objects.get(&ready).await.map(|bytes| assert_eq!(bytes[0], 7))).await?;
    print("zero-copy get of it", &gets, "ms");
    let small = other.put(&[1; 100]).await?;
    print(
        "get of 100 bytes of another process",
        &latencies(GETS, async || objects.get(&small).await.map(drop)).await?,
        "ms",
    );
    print("put of 100 bytes", &latencies(GETS, async || objects.put(&[1; 100]).await.map(drop)).await?, "ms");
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

fn timed(run: impl FnOnce()) -> Duration {
    let began = Instant::now();
    run();
    began.elapsed()
}

fn write_file(source: &[u8]) -> Result<(), AnyError> {
    let file = memfd_create("bench", MemfdFlags::CLOEXEC)?;
    let mut written = 0;
    while written < source.len() {
        written += rustix::io::write(file.as_fd(), &source[written..])?;
    }
    Ok(())
}

/// Milliseconds, each.
async fn latencies<T>(
    rounds: usize,
    call: impl AsyncFn() -> Result<T, heliostat_runtime::objects::ObjectError>,
) -> Result<Vec<f64>, AnyError> {
    let mut took = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let began = Instant::now();
        call().await?;
        took.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(took)
}
