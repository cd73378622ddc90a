//! What the tests of CUDA kernels share. Without a GPU they say so and pass: compiling the sources is then the test.
#![allow(dead_code)]

use std::path::PathBuf;

use half::bf16;
use heliostat_kernels::cuda::attention::PAGE;
use heliostat_kernels::cuda::{Buffer, Compiler, CudaError, Device, DeviceOptions, Source, Stream};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The first GPU, or `None` with a word about why there is none.
pub(crate) fn device() -> Option<Device> {
    match Device::open_with(0, DeviceOptions { library_dirs: library_dirs(), kernel_cache: None }) {
        Ok(device) => Some(device),
        Err(why @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
            eprintln!("skipped: {why}");
            None
        }
        Err(why) => panic!("a driver is here, but no device can be opened: {why}"),
    }
}

/// Where `scripts/setup` puts NVRTC.
fn library_dirs() -> Vec<PathBuf> {
    vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/nvrtc/nvidia/cu13/lib")]
}

/// Compiles every source for the chip and fails on spills and on warpgroup products that do not overlap. Needs NVRTC but no GPU.
pub(crate) fn assert_compiles(sources: impl IntoIterator<Item = Source>) {
    let compiler = match Compiler::load("sm_90a", &library_dirs(), None) {
        Ok(compiler) => compiler,
        Err(why) => {
            assert!(std::env::var_os("CI").is_none(), "CI compiles the kernels: {why}");
            eprintln!("skipped: {why}");
            return;
        }
    };
    for source in sources {
        let (cubin, log) = compiler.compile_with_log(&source).unwrap_or_else(|why| panic!("{why}"));
        assert!(!cubin.is_empty());
        let spilled =
            log.lines().find(|line| line.contains("spill") && !line.contains("0 bytes spill stores"));
        assert!(spilled.is_none(), "{} {:?} spills:\n{log}", source.name, source.defines);
        // Products that wait for each other.
        assert!(!log.contains("serialized"), "{} {:?}:\n{log}", source.name, source.defines);
    }
}

/// Normally distributed values (mean 0, standard deviation 1).
pub(crate) fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut uniform = move || -> f64 { rng.random_range(f64::MIN_POSITIVE..1.0) };
    (0..len)
        .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect()
}

/// The values rounded to bf16, and the same as f32.
pub(crate) fn rounded(values: &[f32]) -> (Vec<half::bf16>, Vec<f32>) {
    let bits: Vec<half::bf16> = values.iter().map(|&value| half::bf16::from_f32(value)).collect();
    let back = bits.iter().map(|value| value.to_f32()).collect();
    (bits, back)
}

/// `1 - 2<x, y> / (|x|^2 + |y|^2)`: 0 for equal vectors; NaN where either holds one.
pub(crate) fn calc_diff(x: &[f32], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len());
    let dot =
        |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum() };
    let norms = dot(x, x) + dot(y, y);
    if norms == 0.0 { 0.0 } else { 1.0 - 2.0 * dot(x, y) / norms }
}

/// Fails unless `calc_diff` is below `max`; NaN never passes.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f32], max: f64, what: &str) {
    let diff = calc_diff(got, want);
    assert!(diff.abs() < max, "{what}: calc_diff {diff:e}, at most {max:e}");
}

/// Median microseconds of one call of `work`, over `rounds` replays of a graph of `per_round` calls; `work` is told its number.
pub(crate) fn time_us(
    stream: &Stream,
    (rounds, per_round): (usize, usize),
    mut work: impl FnMut(&Stream, usize) -> Result<(), CudaError>,
) -> f64 {
    // Once outside, so that lazy set-up is not recorded.
    work(stream, 0).expect("the work runs");
    stream.synchronize().expect("the work ends");
    let record = |stream: &Stream| (0..per_round).try_for_each(|call| work(stream, call));
    let graph = stream.capture(record).expect("the work can be recorded");
    let mut times: Vec<f64> = (0..rounds + 2)
        .map(|_| {
            let before = stream.record().expect("event");
            graph.launch(stream).expect("replay");
            let after = stream.record().expect("event");
            after.synchronize().expect("replay ends");
            f64::from(after.elapsed_ms(&before).expect("time")) * 1e3 / per_round as f64
        })
        .skip(2)
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// KV pages of random content, as many as wanted, by copies of a few: `[pages][PAGE][width]`.
pub(crate) fn random_cache(device: &Device, stream: &Stream, pages: usize, width: usize) -> Buffer<bf16> {
    const DISTINCT: usize = 32;
    let some = device.upload(&rounded(&normal(1, DISTINCT * PAGE * width)).0).expect("upload");
    let all = device.alloc::<bf16>(pages.next_multiple_of(DISTINCT) * PAGE * width).expect("cache");
    for at in (0..all.len()).step_by(some.len()) {
        all.slice(at..at + some.len()).copy_from(stream, &some).expect("copy");
    }
    all.slice(0..pages * PAGE * width)
}
