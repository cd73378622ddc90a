//! Experts that go from one GPU's pool to another's: between two pools of a process, and between two processes, on two GPUs
//! where there are two. Without a GPU these tests say so and pass.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a failed setup is a failed test; one measures")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use heliostat_engine::cuda::{ExpertPool, LentPlace, PoolError, PoolOffer, PoolShape, PooledExpert};
use heliostat_engine::model::Expert;
use heliostat_kernels::cuda::checksum::plain;
use heliostat_kernels::cuda::{CudaError, Device, DeviceOptions, StoredAs};
use heliostat_kernels::weight::{Block, Weight};

const PLACES: usize = 3;

fn open(ordinal: u32) -> Option<Device> {
    let nvrtc = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/nvrtc/nvidia/cu13/lib");
    let options =
        DeviceOptions { library_dirs: vec![nvrtc], kernel_cache: Some(std::env::temp_dir().join("kernels")) };
    match Device::open_with(ordinal, options) {
        Ok(device) => Some(device),
        Err(why @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
            eprintln!("skipped: {why}");
            None
        }
        Err(why) => panic!("a driver is here, but no device can be opened: {why}"),
    }
}

fn pool(device: &Device, stored: StoredAs, (hidden, width): (usize, usize)) -> ExpertPool {
    let shape = PoolShape { places: PLACES, hidden, width, stored };
    ExpertPool::new(device, shape, Duration::from_millis(500)).unwrap()
}

/// An expert without a pattern, and its checksum as the plain version has it.
fn expert(stored: StoredAs, (hidden, width): (usize, usize), seed: u64) -> (Expert, u64) {
    let numbers = |len: usize, seed: u64| -> Vec<u8> {
        // No code is NaN, in neither type.
        (0..len as u64)
            .map(|at| ((at + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 & 0x77)
            .collect()
    };
    let mut raw: Vec<(Vec<u8>, Vec<f32>)> = Vec::new();
    let mut matrix = |rows: usize, cols: usize, seed: u64| match stored {
        StoredAs::Fp8 => {
            let codes = numbers(rows * cols, seed);
            let scales: Vec<f32> =
                (0..rows.div_ceil(128) * cols.div_ceil(128)).map(|at| (seed + at as u64) as f32).collect();
            raw.push((codes.clone(), scales.clone()));
            Weight::from_f8(rows, cols, codes, scales, Block::DEEPSEEK).unwrap()
        }
        StoredAs::Bf16 => {
            let bytes = numbers(2 * rows * cols, seed);
            let bits = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
            raw.push((bytes, Vec::new()));
            Weight::from_bf16(rows, cols, bits).unwrap()
        }
    };
    let expert = Expert {
        gate: matrix(width, hidden, 3 * seed + 1),
        up: matrix(width, hidden, 3 * seed + 2),
        down: matrix(hidden, width, 3 * seed + 3),
    };
    let scales =
        |scales: &[f32]| -> Vec<u8> { scales.iter().flat_map(|scale| scale.to_le_bytes()).collect() };
    let [gate, up, down] = raw.try_into().unwrap();
    let parts = [gate.0, up.0, scales(&gate.1), scales(&up.1), down.0, scales(&down.1)];
    let checksum = plain(&parts.each_ref().map(Vec::as_slice));
    (expert, checksum)
}

fn assert_is(pooled: &PooledExpert, expert: &Expert) {
    assert_eq!(pooled.to_host().unwrap().checksum(), expert.checksum());
}

#[test]
fn an_expert_arrives_as_it_left_or_not_at_all() {
    let Some(device) = open(0) else { return };
    for (stored, shape) in
        [(StoredAs::Bf16, (272, 160)), (StoredAs::Fp8, (272, 128)), (StoredAs::Fp8, (1024, 256))]
    {
        let (owner, borrower) = (pool(&device, stored, shape), pool(&device, stored, shape));
        let experts = [expert(stored, shape, 1), expert(stored, shape, 2)];
        let first = owner.put(&experts[0].0).unwrap();
        let held = owner.put(&experts[1].0).unwrap();
        let lent = held.lent().unwrap();
        assert_eq!(
            (first.lent().unwrap().checksum, lent.checksum),
            (experts[0].1, experts[1].1),
            "{stored:?}"
        );
        assert!(matches!(borrower.borrow(1, lent), Err(PoolError::OutOfReach(1))));
        assert!(borrower.reach(&[None, Some(owner.offer())]).is_empty());
        assert!(borrower.reaches(1) && !borrower.reaches(0) && !borrower.reaches(2));

        let copy = borrower.borrow(1, lent).unwrap();
        assert_is(&copy, &experts[1].0);
        assert_eq!(copy.lent().unwrap().checksum, lent.checksum, "it can be lent on");

        // The owner takes it back and writes another there.
        drop(held);
        let other = owner.put(&experts[0].0).unwrap();
        assert_eq!(other.place(), lent.place, "the place that became free last");
        let damaged = borrower.borrow(1, lent);
        assert!(matches!(damaged, Err(PoolError::Damaged { .. })), "{damaged:?}");
        let nowhere = LentPlace { place: PLACES as u32, ..lent };
        assert!(matches!(borrower.borrow(1, nowhere), Err(PoolError::NoSuchPlace { places: PLACES, .. })));

        // Failures cost no place; a place that becomes free is waited for.
        let rest = other.lent().unwrap();
        let copies = [borrower.borrow(1, rest).unwrap(), borrower.borrow(1, rest).unwrap()];
        assert!(matches!(borrower.borrow(1, rest), Err(PoolError::Full(PLACES))));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| borrower.borrow(1, rest).unwrap());
            std::thread::sleep(Duration::from_millis(20));
            drop(copy);
            assert_is(&waits.join().unwrap(), &experts[0].0);
        });
        copies.iter().for_each(|copy| assert_is(copy, &experts[0].0));
        borrower.let_go();
        assert!(!borrower.reaches(1));

        let narrow = pool(&device, stored, (shape.0 / 2, shape.1));
        let refused = borrower.reach(&[Some(narrow.offer())]);
        assert!(matches!(&refused[..], [(0, CudaError::Other(_))]), "{refused:?}");
    }
}

const LENT: &str = "HELIOSTAT_TEST_LENT";
const SHAPE: (usize, usize) = (7168, 2048);

/// The owner's process of the test below: on the last GPU. It lends until its standard input ends.
#[test]
#[ignore = "a part of another test"]
fn the_owner() {
    let Ok(file) = std::env::var(LENT) else { return };
    let device = open(Device::count().unwrap() - 1).unwrap();
    let owner = pool(&device, StoredAs::Fp8, SHAPE);
    let held = owner.put(&expert(StoredAs::Fp8, SHAPE, 7).0).unwrap();
    let bytes = bincode::encode_to_vec((owner.offer(), held.lent().unwrap()), bincode::config::standard());
    std::fs::write(format!("{file}.part"), bytes.unwrap()).unwrap();
    std::fs::rename(format!("{file}.part"), file).unwrap();
    std::io::stdin().lines().for_each(drop);
    // As a killed process: nothing is closed in good order.
    std::process::abort();
}

#[test]
fn an_expert_comes_from_another_process_and_outlives_it() {
    let Some(device) = open(0) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lent");
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_owner", "--ignored", "--nocapture"])
        .env(LENT, &file)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    let (offer, lent): (PoolOffer, LentPlace) = loop {
        if let Ok(bytes) = std::fs::read(&file) {
            break bincode::decode_from_slice(&bytes, bincode::config::standard()).unwrap().0;
        }
        assert!(owner.try_wait().unwrap().is_none(), "the owner ended early");
        assert!(began.elapsed() < Duration::from_secs(60), "the owner lends nothing");
        std::thread::sleep(Duration::from_millis(5));
    };
    let (wanted, checksum) = expert(StoredAs::Fp8, SHAPE, 7);
    assert_eq!(lent.checksum, checksum);
    let borrower = pool(&device, StoredAs::Fp8, SHAPE);
    let began = Instant::now();
    assert!(borrower.reach(&[Some(offer)]).is_empty());
    let mapped = began.elapsed();
    assert_is(&borrower.borrow(0, lent).unwrap(), &wanted);
    let mut times: Vec<Duration> = (0..20)
        .map(|_| {
            let began = Instant::now();
            borrower.borrow(0, lent).unwrap();
            began.elapsed()
        })
        .collect();
    times.sort();
    let bytes = borrower.borrow(0, lent).unwrap().size_bytes() as f64;
    println!(
        "{} GPUs: mapped in {mapped:?}; {:.1} MB copied and checked in {:?} (median): {:.0} GB/s",
        Device::count().unwrap(),
        bytes / 1e6,
        times[10],
        bytes / times[10].as_secs_f64() / 1e9
    );
    // Its memory stays as long as it is mapped here.
    drop(owner.stdin.take());
    owner.wait().unwrap();
    assert_is(&borrower.borrow(0, lent).unwrap(), &wanted);
    borrower.let_go();
    assert!(matches!(borrower.borrow(0, lent), Err(PoolError::OutOfReach(0))));
}
