//! The fabric as the engine uses it: all ranks as threads of one process, over shared memory and over TCP.

#![allow(clippy::unwrap_used)] // A test may fail.

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

/// (FB-1)
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

/// (FB-3) Frames far larger than the rings, from everyone to everyone, and nobody receives before all is sent.
#[test]
fn ranks_that_all_send_large_frames_at_once_do_not_deadlock() {
    for transport in TRANSPORTS {
        let tune = |how: &mut Connect<'_>| (how.transport, how.ring_bytes) = (transport, 4096);
        with_ranks(4, tune, |mut fabric| {
            let me = fabric.rank();
            let bytes = vec![me as u8; 12 << 20];
            for to in 0..4 {
                fabric.send(to, tag(Kind::Combine, 1, 0), &[&bytes]).unwrap();
            }
            // In another order on every rank.
            for from in (0..4).map(|at| (at * 3 + me) % 4) {
                let frame = fabric.recv(from, tag(Kind::Combine, 1, 0)).unwrap();
                assert_eq!(frame.payload().len(), bytes.len());
                assert!(frame.payload().iter().all(|&byte| byte == from as u8));
            }
        });
    }
}

/// (FB-3) Rank 1 sleeps until 2 sends, 2 until 0 sends, and 0 is stuck sending to 1: only 1 can resolve it, by taking in what
/// it has not asked for.
#[test]
fn a_rank_that_waits_for_one_takes_in_from_all() {
    for transport in TRANSPORTS {
        let tune = |how: &mut Connect<'_>| {
            (how.transport, how.ring_bytes) = (transport, 4096);
            how.call_timeout = Duration::from_secs(10);
        };
        let large = vec![0; 16 << 20];
        with_ranks(3, tune, |mut fabric| {
            let data = tag(Kind::Dispatch, 0, 0);
            match fabric.rank() {
                0 => {
                    thread::sleep(Duration::from_millis(30));
                    fabric.send(1, data, &[&large]).unwrap();
                    fabric.send(2, data, &[]).unwrap();
                }
                1 => {
                    fabric.recv(2, data).unwrap();
                    assert_eq!(fabric.recv(0, data).unwrap().payload().len(), large.len());
                }
                _ => {
                    fabric.recv(0, data).unwrap();
                    fabric.send(1, data, &[]).unwrap();
                }
            }
        });
    }
}

/// (FB-1)
#[test]
fn a_header_overtakes_data_and_a_wrong_tag_names_both() {
    for transport in TRANSPORTS {
        let tune = |how: &mut Connect<'_>| {
            (how.transport, how.call_timeout) = (transport, Duration::from_secs(1));
        };
        with_ranks(2, tune, |mut fabric| {
            if fabric.rank() == 0 {
                fabric.send(1, tag(Kind::Combine, 7, 3), &[b"rows"]).unwrap();
                fabric.send(1, tag(Kind::Header, 8, 0), &[b"head"]).unwrap();
                assert_eq!(fabric.wait(Kind::Header, None).unwrap(), Event::Frame { from: 1 });
                return;
            }
            assert_eq!(fabric.recv(0, tag(Kind::Header, 8, 0)).unwrap().payload(), b"head");
            let error = fabric.recv(0, tag(Kind::Dispatch, 7, 4)).unwrap_err().to_string();
            assert!(error.contains("rank 0 broke the protocol"), "{error}");
            assert!(error.contains("Combine of step 7, layer 3"), "{error}");
            assert!(error.contains("Dispatch of step 7, layer 4"), "{error}");
            assert_eq!(fabric.recv_any(Kind::Combine).unwrap().1.payload(), b"rows");
            assert!(fabric.try_recv(0, tag(Kind::Combine, 9, 9)).unwrap().is_none());
            let error = fabric.recv(0, tag(Kind::Combine, 9, 9)).unwrap_err();
            assert!(matches!(error, FabricError::Timeout { rank: Some(0), .. }), "{error}");
            assert!(error.to_string().contains("rank 0 (Combine of step 9, layer 9)"), "{error}");
            fabric.send(0, tag(Kind::Header, 9, 0), &[]).unwrap();
        });
    }
}

/// Runs a call that blocks, aborts it and returns what it failed with.
fn aborted<T>(abort: &Abort, call: impl FnOnce() -> Result<T, FabricError>) -> FabricError {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            thread::sleep(Duration::from_millis(30));
            let start = Instant::now();
            abort.abort(77);
            start
        });
        let error = call().err().unwrap();
        let took = thread.join().unwrap().elapsed();
        assert!(took < Duration::from_secs(2), "the call returned {took:?} after the abort");
        error
    })
}

/// (FB-2)
#[test]
fn an_abort_ends_every_blocked_call() {
    type Call = fn(&mut Fabric) -> Result<(), FabricError>;
    let calls: [Call; 4] = [
        |fabric| fabric.recv(1, tag(Kind::Dispatch, 0, 0)).map(drop),
        |fabric| fabric.recv_any(Kind::Header).map(drop),
        |fabric| fabric.wait(Kind::Header, None).map(drop),
        |fabric| fabric.send(1, tag(Kind::Dispatch, 0, 0), &[&vec![0; 64 << 20]]),
    ];
    for transport in TRANSPORTS {
        for call in calls {
            let tune = |how: &mut Connect<'_>| how.transport = transport;
            let done = std::sync::Barrier::new(2);
            with_ranks(2, tune, |mut fabric| {
                if fabric.rank() == 0 {
                    let error = aborted(&fabric.abort_handle(), || call(&mut fabric));
                    assert!(matches!(error, FabricError::Aborted { reason: 77 }), "{error}");
                    let again = fabric.try_recv(1, tag(Kind::Header, 0, 0)).unwrap_err();
                    assert!(matches!(again, FabricError::Aborted { reason: 77 }), "{again}");
                }
                done.wait();
            });
        }
    }
}

#[test]
fn an_abort_or_the_timeout_ends_connect() {
    let (listeners, endpoints) = listeners(3);
    for rank in [0, 2] {
        let how = Connect::new(1, rank, &endpoints);
        let abort = how.abort.clone();
        let error = aborted(&abort, || listeners[rank].connect(how));
        assert!(matches!(error, FabricError::Aborted { reason: 77 }), "{error}");
    }
    let how = Connect { connect_timeout: Duration::from_millis(100), ..Connect::new(1, 1, &endpoints) };
    let error = listeners[1].connect(how).unwrap_err().to_string();
    assert!(error.contains("ranks [0, 2] were not linked for epoch 1"), "{error}");
}

#[test]
fn a_waker_ends_the_present_or_the_next_wait() {
    for transport in TRANSPORTS {
        with_ranks(
            2,
            |how| how.transport = transport,
            |mut fabric| {
                if fabric.rank() == 0 {
                    let waker = fabric.waker();
                    waker.wake();
                    waker.wake();
                    assert_eq!(fabric.wait(Kind::Header, None).unwrap(), Event::Woken);
                    let deadline = Some(Duration::from_millis(20));
                    assert_eq!(fabric.wait(Kind::Header, deadline).unwrap(), Event::Deadline);
                    let thread = thread::spawn(move || {
                        thread::sleep(Duration::from_millis(30));
                        waker.wake();
                    });
                    assert_eq!(fabric.wait(Kind::Header, None).unwrap(), Event::Woken);
                    thread.join().unwrap();
                    fabric.send(1, tag(Kind::Header, 1, 0), &[]).unwrap();
                } else {
                    assert_eq!(fabric.wait(Kind::Header, None).unwrap(), Event::Frame { from: 0 });
                }
            },
        );
    }
}

/// (FB-1, FB-5) A rank that drops its fabric after its last frame fails nobody who does not need it any more.
#[test]
fn a_rank_that_leaves_is_no_loss_to_the_others() {
    for transport in TRANSPORTS {
        with_ranks(
            3,
            |how| how.transport = transport,
            |mut fabric| {
                let last = tag(Kind::Combine, 9, 0);
                match fabric.rank() {
                    0 => {
                        fabric.send(1, last, &[&vec![1; 50_000]]).unwrap();
                        fabric.send(2, last, &[b"bye"]).unwrap();
                    }
                    1 => {
                        // Rank 0 is gone by now.
                        thread::sleep(Duration::from_millis(50));
                        assert_eq!(fabric.recv(2, last).unwrap().payload(), b"late");
                        assert_eq!(fabric.recv(0, last).unwrap().payload().len(), 50_000);
                        let error = fabric.recv(0, last).unwrap_err();
                        assert!(matches!(error, FabricError::PeerLost { rank: 0 }), "{error}");
                        let error = fabric.send(0, last, &[]).unwrap_err();
                        assert!(matches!(error, FabricError::PeerLost { rank: 0 }), "{error}");
                    }
                    _ => {
                        thread::sleep(Duration::from_millis(100));
                        fabric.send(1, last, &[b"late"]).unwrap();
                        assert_eq!(fabric.recv(0, last).unwrap().payload(), b"bye");
                        let error = fabric.wait(Kind::Header, None).unwrap_err();
                        assert!(matches!(error, FabricError::PeerLost { .. }), "{error}");
                    }
                }
            },
        );
    }
}

#[test]
fn more_pending_bytes_than_allowed_are_a_protocol_error() {
    for transport in TRANSPORTS {
        let tune = |how: &mut Connect<'_>| {
            (how.transport, how.pending_bytes_max, how.frame_bytes_max) = (transport, 1 << 20, 1 << 20);
        };
        with_ranks(2, tune, |mut fabric| {
            if fabric.rank() == 0 {
                let error =
                    fabric.send(1, tag(Kind::Dispatch, 0, 0), &[&vec![0; (1 << 20) + 1]]).unwrap_err();
                assert!(matches!(error, FabricError::Argument(_)), "{error}");
                while fabric.send(1, tag(Kind::Dispatch, 0, 0), &[&[0; 4096]]).is_ok() {}
            } else {
                let error = fabric.recv(0, tag(Kind::Header, 0, 0)).unwrap_err().to_string();
                assert!(error.contains("rank 0 broke the protocol"), "{error}");
                assert!(error.contains("over the limit of 1048576"), "{error}");
            }
        });
    }
}
