//! Who may link with whom: epochs, replaced ranks, strangers.

#![allow(clippy::unwrap_used)] // A test may fail.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use heliostat_kernels::fabric::{Connect, Endpoint, FabricError, FabricListener, Kind, Tag, Transport};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn bind(secret: Option<&[u8]>) -> FabricListener {
    FabricListener::bind(LOOPBACK, secret.map(<[u8]>::to_vec)).unwrap()
}

fn endpoints(listeners: &[FabricListener]) -> Vec<Endpoint> {
    listeners.iter().map(FabricListener::endpoint).collect()
}

/// Connects all ranks at `epoch`, each after a random delay, and lets everyone send to everyone.
fn one_epoch(listeners: &[FabricListener], epoch: u64, transport: Transport) {
    let endpoints = endpoints(listeners);
    thread::scope(|scope| {
        for (rank, listener) in listeners.iter().enumerate() {
            let endpoints = &endpoints;
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(epoch * 100 + rank as u64);
                thread::sleep(Duration::from_millis(rng.random_range(0..30)));
                let how = Connect { transport, ..Connect::new(epoch, rank, endpoints) };
                let mut fabric = listener.connect(how).unwrap();
                assert_eq!((fabric.rank(), fabric.world(), fabric.epoch()), (rank, endpoints.len(), epoch));
                let tag = Tag { kind: Kind::Header, step: epoch, layer: 0 };
                for to in 0..endpoints.len() {
                    fabric.send(to, tag, &[&[rank as u8]]).unwrap();
                }
                for from in 0..endpoints.len() {
                    assert_eq!(fabric.recv(from, tag).unwrap().payload(), &[from as u8]);
                }
            });
        }
    });
}

#[test]
fn epochs_follow_one_another_with_survivors_and_replaced_ranks() {
    for transport in [Transport::Auto, Transport::Tcp] {
        let mut listeners: Vec<_> = (0..4).map(|_| bind(None)).collect();
        for epoch in 1..12 {
            one_epoch(&listeners, epoch * 3, transport);
            let replaced = epoch as usize % 5;
            if replaced < 4 {
                listeners[replaced] = bind(None);
            }
        }
    }
}

/// Rank 2 dies while the others are still in epoch 1 or already waiting in epoch 2; some call for epoch 2 long before
/// the others have left epoch 1.
#[test]
fn survivors_may_come_to_the_next_epoch_in_any_order() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]] {
        let mut listeners: Vec<_> = (0..3).map(|_| bind(None)).collect();
        let old = endpoints(&listeners);
        let fabrics = thread::scope(|scope| {
            let connect = |rank: usize| listeners[rank].connect(Connect::new(1, rank, &old)).unwrap();
            let threads: Vec<_> = (0..3).map(|rank| scope.spawn(move || connect(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        let mut fabrics: Vec<_> = fabrics.into_iter().map(Some).collect();
        fabrics[2] = None;
        listeners[2] = bind(None);
        let new = endpoints(&listeners);
        thread::scope(|scope| {
            for (rank, fabric) in fabrics.into_iter().enumerate() {
                let (listener, new, order) = (&listeners[rank], &new, &order);
                scope.spawn(move || {
                    let turn = order.iter().position(|&at| at == rank).unwrap() as u64;
                    thread::sleep(Duration::from_millis(40 * turn));
                    drop(fabric);
                    listener.connect(Connect::new(2, rank, new)).unwrap();
                });
            }
        });
    }
}

/// A rank whose `connect` is tried again at the same epoch, here because of its own timeout, still gets in.
#[test]
fn a_rank_may_try_the_same_epoch_again() {
    let listeners: Vec<_> = (0..3).map(|_| bind(None)).collect();
    let endpoints = endpoints(&listeners);
    thread::scope(|scope| {
        for (rank, listener) in listeners.iter().enumerate() {
            let endpoints = &endpoints;
            scope.spawn(move || match rank {
                1 => {
                    thread::sleep(Duration::from_millis(200));
                    drop(listener.connect(Connect::new(5, 1, endpoints)).unwrap());
                }
                rank => {
                    for _ in 0..3 {
                        let connect_timeout = Duration::from_millis(30);
                        let how = Connect { connect_timeout, ..Connect::new(5, rank, endpoints) };
                        let error = listener.connect(how).unwrap_err();
                        assert!(matches!(error, FabricError::ConnectTimeout { .. }), "{error}");
                    }
                    drop(listener.connect(Connect::new(5, rank, endpoints)).unwrap());
                }
            });
        }
    });
}

#[test]
fn a_newer_epoch_ends_an_older_connect_on_both_sides() {
    let stale = |error: FabricError, other: usize| {
        assert!(
            matches!(error, FabricError::StaleEpoch { epoch: 1, newer: 2, rank } if rank == other),
            "{error}"
        );
    };
    for (newer, older) in [(1, 0), (0, 1)] {
        let listeners: Vec<_> = (0..2).map(|_| bind(None)).collect();
        let endpoints = endpoints(&listeners);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let error = listeners[older].connect(Connect::new(1, older, &endpoints)).unwrap_err();
                // The lower rank is dialed; the higher one dials and is told.
                stale(error, newer);
                drop(listeners[older].connect(Connect::new(2, older, &endpoints)).unwrap());
            });
            thread::sleep(Duration::from_millis(30));
            drop(listeners[newer].connect(Connect::new(2, newer, &endpoints)).unwrap());
            waiting.join().unwrap();
        });
        let error = listeners[older].connect(Connect::new(1, older, &endpoints)).unwrap_err();
        stale(error, older);
        // A rank that comes late with an old view is told by the listener.
        let late = bind(None);
        let endpoints = [listeners[0].endpoint(), late.endpoint()];
        stale(late.connect(Connect::new(1, 1, &endpoints)).unwrap_err(), 0);
    }
}

#[test]
fn only_ranks_with_the_secret_are_let_in() {
    let listeners = [bind(Some(b"one")), bind(Some(b"one")), bind(Some(b"two")), bind(None)];
    let try_pair = |a: usize, b: usize, epoch| {
        let endpoints = [listeners[a].endpoint(), listeners[b].endpoint()];
        let connect = |listener: &FabricListener, rank| {
            let connect_timeout = Duration::from_millis(800);
            listener.connect(Connect { connect_timeout, ..Connect::new(epoch, rank, &endpoints) }).map(drop)
        };
        thread::scope(|scope| {
            let other = scope.spawn(|| connect(&listeners[b], 1));
            (connect(&listeners[a], 0), other.join().unwrap())
        })
    };
    let (a, b) = try_pair(0, 1, 1);
    assert!(a.is_ok() && b.is_ok());
    for (epoch, (a, b)) in [(0, 2), (2, 0), (0, 3), (3, 0)].into_iter().enumerate() {
        let (low, high) = try_pair(a, b, epoch as u64 + 2);
        assert!(matches!(low, Err(FabricError::ConnectTimeout { .. })));
        let error = high.unwrap_err().to_string();
        assert!(error.contains("does not know the secret"), "{error}");
    }
}

/// Garbage, silence, half a greeting, floods: the ranks link all the same.
#[test]
fn strangers_do_not_disturb() {
    let listeners: Vec<_> = (0..3).map(|_| bind(Some(b"secret"))).collect();
    let mut rng = SmallRng::seed_from_u64(1);
    let mut strangers = Vec::new();
    for listener in &listeners {
        for round in 0..60 {
            let mut stream = TcpStream::connect(listener.endpoint().address).unwrap();
            let len = [0, 1, 8, 127, 128, 129, 5000][round % 7];
            let mut bytes: Vec<u8> = (0..len).map(|_| rng.random()).collect();
            if round % 2 == 0 && len >= 128 {
                // A greeting with the right magic and a hostile body.
                bytes[..8].copy_from_slice(b"HELFAB\0\x01");
                bytes[8..12].copy_from_slice(&(round as u32 % 8).to_le_bytes());
            }
            stream.write_all(&bytes).unwrap();
            strangers.push(stream);
        }
    }
    one_epoch(&listeners, 1, Transport::Auto);
    one_epoch(&listeners, 2, Transport::Tcp);
    // Those who spoke nonsense were sent away; nobody was told anything but a challenge.
    for stream in &mut strangers {
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let mut told = Vec::new();
        let _ = stream.read_to_end(&mut told);
        assert!(told.len() <= 256, "{} bytes", told.len());
    }
}
