//! The fabric as the engine uses it: all ranks as threads of one process, over shared memory and over TCP.

use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use heliostat_kernels::fabric::{
    Abort, Connect, Endpoint, Event, Fabric, FabricError, FabricListener, Kind, LinkKind, Tag, Transport,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const TRANSPORTS: [Transport; 2] = [Transport::Auto, Transport::Tcp];

fn tag(kind: Kind, step: u64, layer: u32) -> Tag {
    Tag { kind, step, layer }
}

fn listeners(world: usize) -> (Vec<FabricListener>, Vec<Endpoint>) {
    let listeners: Vec<_> = (0..world).map(|_| FabricListener::bind(LOOPBACK, None).unwrap()).collect();
    let endpoints = listeners.iter().map(FabricListener::endpoint).collect();
    (listeners, endpoints)
}

/// Runs `rank` as one thread per rank, each with its fabric, and returns what they return.
fn with_ranks<T: Send>(
    world: usize,
    tune: impl Fn(&mut Connect<'_>) + Sync,
    rank: impl Fn(Fabric) -> T + Sync,
) -> Vec<T> {
    let (listeners, endpoints) = listeners(world);
    thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .iter()
            .enumerate()
            .map(|(at, listener)| {
                let (endpoints, tune, rank) = (&endpoints, &tune, &rank);
                scope.spawn(move || {
                    let mut how = Connect::new(1, at, endpoints);
                    tune(&mut how);
                    rank(listener.connect(how).unwrap())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The payload of a frame, the same at both ends.
fn payload(step: u64, from: usize, to: usize, max: usize) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(step * 10_000 + from as u64 * 100 + to as u64);
    let len = match rng.random_range(0..4) {
        0 => 0,
        1 => rng.random_range(1..100),
        2 => rng.random_range(1..5000),
        _ => rng.random_range(1..max),
    };
    (0..len).map(|_| rng.random()).collect()
}

#[test]
fn everyone_sends_to_everyone() {
    for transport in TRANSPORTS {
        for world in [1, 2, 4, 5] {
            let tune = |how: &mut Connect<'_>| (how.transport, how.ring_bytes) = (transport, 16 << 10);
            with_ranks(world, tune, |mut fabric| {
                let me = fabric.rank();
                for step in 0..40 {
                    for to in 0..world {
                        let bytes = payload(step, me, to, 300_000);
                        let (a, b) = bytes.split_at(bytes.len() / 3);
                        fabric.send(to, tag(Kind::Dispatch, step, 2), &[a, b"", b]).unwrap();
                    }
                    for from in 0..world {
                        let frame = fabric.recv(from, tag(Kind::Dispatch, step, 2)).unwrap();
                        assert!(
                            frame.payload() == payload(step, from, me, 300_000),
                            "step {step} from {from}"
                        );
                        assert!(frame.payload().as_ptr().addr().is_multiple_of(8));
                    }
                }
                for rank in (0..world).filter(|&rank| rank != me) {
                    let tcp = fabric.link(rank) == LinkKind::Tcp;
                    assert_eq!(tcp, transport == Transport::Tcp);
                }
            });
        }
    }
}
