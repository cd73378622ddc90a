//! Matrix products on a GPU: right against f64 on the same rounded operands, and every row the same bits wherever and
//! with whomever it is computed. `--ignored --nocapture bench` prints times at the shapes of DeepSeek-R1.

// Whatever fails here fails the test.
#![allow(clippy::unwrap_used)]

mod cuda_gemm_bench;
mod cuda_gemm_operands;
mod cuda_support;

use std::path::PathBuf;

use cuda_gemm_bench::{Bench, cases};
use cuda_gemm_operands::{Host, Rows, Stored};
use cuda_support::{assert_close, assert_compiles};
use half::bf16;
use heliostat_kernels::cuda::gemm::{
    Gemm, HeadsView, Kind, Matrix, Output, Plan, Segments, sources, sources_of,
};
use heliostat_kernels::cuda::{
    Compiler, Device, DeviceOptions, Priority, Source, StoredAs, Stream, WeightStack,
};
use rayon::prelude::*;

/// Rows of the largest batch in the tests of correctness.
const ROWS: usize = 300;

/// As `cuda_support::device`, but with a cache of kernels if the environment names one: there are many.
fn open() -> Option<(Device, Stream)> {
    let Some(cache) = cache() else {
        let device = cuda_support::device()?;
        let stream = device.stream(Priority::High).unwrap();
        return Some((device, stream));
    };
    let options = DeviceOptions { library_dirs: Vec::new(), kernel_cache: Some(cache) };
    let device = Device::open_with(0, options).unwrap();
    let stream = device.stream(Priority::High).unwrap();
    Some((device, stream))
}

fn cache() -> Option<PathBuf> {
    std::env::var_os("KERNEL_CACHE").map(PathBuf::from)
}

/// Compares some thousands of elements of `y` `[rows][n]` with f64; `matrix_of` names a row's matrix.
fn assert_right(
    (x, w): (&Rows, &Host),
    y: &[f32],
    rows: &[usize],
    matrix_of: impl Fn(usize) -> usize + Sync,
    what: &str,
) {
    let samples = (6_000_000 / w.k).clamp(200, 4000).min(rows.len() * w.n);
    let total = rows.len() * w.n;
    let picked: Vec<(usize, usize)> = (0..samples)
        .map(|i| ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) as usize % total)
        .chain([0, w.n - 1, total - 1])
        .map(|at| (rows[at / w.n], at % w.n))
        .collect();
    let want: Vec<f32> =
        picked.par_iter().map(|&(row, column)| x.dot(row, w, matrix_of(row), column)).collect();
    let got: Vec<f32> = picked.iter().map(|&(row, column)| y[row * w.n + column]).collect();
    assert_close(&got, &want, 1e-5, what);
    for &row in rows {
        assert!(
            y[row * w.n..][..w.n].iter().all(|value| value.is_finite()),
            "{what}: row {row} is not whole"
        );
    }
}

fn dense_f32(gemm: &Gemm, stream: &Stream, w: &Matrix, x: &Rows, rows: usize) -> Vec<f32> {
    let y = stream.device().alloc::<f32>((rows * w.n()).max(1)).unwrap();
    y.fill(stream, 0xff).unwrap();
    gemm.dense(stream, w, x.operand(), rows, Output::F32 { data: &y, stride: w.n() }).unwrap();
    y.download(stream).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[track_caller]
fn assert_same(got: &[f32], want: &[f32], what: &str) {
    let differ = bits(got).iter().zip(bits(want)).filter(|(a, b)| **a != *b).count();
    assert_eq!(differ, 0, "{what}: {differ} of {} values differ", want.len());
}

fn check_dense(device: &Device, stream: &Stream, stored: StoredAs, n: usize, k: usize) {
    let gemm = Gemm::new(device);
    let host = Host::random(stored, (1, n, k), 5);
    let w = Matrix::new(device, host.upload(device, stream), Kind::Dense).unwrap();
    let what = format!("{stored:?} {n} x {k} {:?}", w.plan());
    let x = Rows::random(device, stored, (ROWS, k), |row| row);
    let y = dense_f32(&gemm, stream, &w, &x, ROWS);
    assert_right((&x, &host), &y, &(0..ROWS).collect::<Vec<_>>(), |_| 0, &what);
    for rows in [1, 7, 64, 65, 100, 128] {
        let some = dense_f32(&gemm, stream, &w, &x, rows);
        assert_same(&some, &y[..rows * n], &format!("{what}: {rows} rows"));
    }
    for always in [true, false] {
        let gemm = Gemm::new(device).in_registers(always);
        assert_same(&dense_f32(&gemm, stream, &w, &x, ROWS), &y, &format!("{what}: in registers {always}"));
    }
    let turned = Rows::random(device, stored, (ROWS, k), |row| ROWS - 1 - row);
    let back: Vec<f32> =
        dense_f32(&gemm, stream, &w, &turned, ROWS).chunks(n).rev().flatten().copied().collect();
    assert_same(&back, &y, &format!("{what}: turned"));
    // Rounded, into a slice of something wider.
    let stride = n + 24;
    let wide = device.alloc::<bf16>(ROWS * stride).unwrap();
    wide.fill(stream, 0xff).unwrap();
    let slice = wide.slice(8..ROWS * stride);
    gemm.dense(stream, &w, x.operand(), ROWS - 1, Output::Bf16 { data: &slice, stride }).unwrap();
    let wide = wide.download(stream).unwrap();
    for (row, values) in wide.chunks(stride).enumerate() {
        let inside = |i: usize| (8..8 + n).contains(&i) && row < ROWS - 1;
        for (i, value) in values.iter().enumerate() {
            let want = if inside(i) { bf16::from_f32(y[row * n + i - 8]).to_bits() } else { 0xffff };
            assert_eq!(value.to_bits(), want, "{what}: rounded, row {row}, element {i}");
        }
    }
}

#[test]
fn dense() {
    let Some((device, stream)) = open() else { return };
    let shapes = [
        (64, 64),
        (24, 24),
        (130, 20),
        (136, 200),
        (2112, 7168),
        (3072, 1536),
        (4096, 7168),
        (7168, 2048),
        (256, 7168),
        (520, 1040),
    ];
    for (n, k) in shapes {
        for stored in [StoredAs::Bf16, StoredAs::Fp8] {
            check_dense(&device, &stream, stored, n, k);
        }
    }
}

#[test]
fn all_plans() {
    let Some((device, stream)) = open() else { return };
    let gemm = Gemm::new(&device);
    for stored in [StoredAs::Bf16, StoredAs::Fp8] {
        let (n, k) = (1200, 4096);
        let host = Host::random(stored, (1, n, k), 5);
        let x = Rows::random(&device, stored, (ROWS, k), |row| row);
        for plan in plans() {
            let w = Matrix::with_plan(&device, host.upload(&device, &stream), Kind::Dense, plan).unwrap();
            let what = format!("{stored:?} {plan:?}");
            let y = dense_f32(&gemm.clone().in_registers(true), &stream, &w, &x, ROWS);
            assert_right((&x, &host), &y, &(0..ROWS).collect::<Vec<_>>(), |_| 0, &what);
            let clusters = dense_f32(&gemm.clone().in_registers(false), &stream, &w, &x, ROWS);
            assert_same(&clusters, &y, &what);
        }
    }
}

fn plans() -> Vec<Plan> {
    [(1, 1, 128), (1, 2, 160), (2, 1, 112), (2, 2, 144), (2, 4, 128), (4, 1, 192), (4, 2, 80), (8, 1, 64)]
        .map(|(splits, pair, columns)| Plan { splits, pair, columns })
        .to_vec()
}

/// Plans to be tried for each of the bench's cases.
fn trials(name: &str) -> &'static [(u32, u32, u32)] {
    match name {
        "qkv_a" => &[(4, 2, 80), (4, 1, 144), (4, 2, 128)],
        "o" => &[(2, 2, 128), (2, 4, 128)],
        "shared gate_up" => &[(4, 1, 144), (2, 2, 128)],
        "experts gate_up" => &[(1, 2, 160), (1, 1, 144)],
        _ => &[],
    }
}

#[test]
fn heads() {
    let Some((device, stream)) = open() else { return };
    let gemm = Gemm::new(&device);
    for (heads, k, n, x_width, y_width) in
        [(128, 128, 512, 192, 576), (16, 512, 128, 512, 128), (4, 16, 24, 24, 32), (6, 12, 18, 20, 26)]
    {
        let host = Host::random(StoredAs::Bf16, (heads, n, k), 9);
        let stack = WeightStack::new(&device, StoredAs::Bf16, 1, (heads * n, k)).unwrap();
        let Stored::Bf16(values) = &host.values else { unreachable!() };
        stack.data().cast().write(&stream, values).unwrap();
        let w = Matrix::new(&device, stack, Kind::Heads(heads)).unwrap();
        // As rows of all heads one after the other.
        let rows = 100;
        let x = Rows::random(&device, StoredAs::Bf16, (rows * heads, x_width), |row| row);
        let run = |first: usize, rows: usize| {
            let y = device.alloc::<bf16>(rows * heads * y_width).unwrap();
            y.fill(&stream, 0xff).unwrap();
            let data = x.bf16.slice(first * heads * x_width..x.bf16.len());
            let view = |data, width| HeadsView { data, row_stride: heads * width, head_stride: width };
            gemm.heads(&stream, &w, view(&data, x_width), rows, view(&y, y_width)).unwrap();
            y.download(&stream).unwrap()
        };
        let y = run(0, rows);
        let flat: Vec<f32> =
            y.chunks(y_width).flat_map(|head| head[..n].iter().map(|value| value.to_f32())).collect();
        let all: Vec<usize> = (0..rows * heads).collect();
        assert_right((&x, &host), &flat, &all, |row| row % heads, &format!("{heads} heads {n} x {k}"));
        let gaps = y.chunks(y_width).all(|head| head[n..].iter().all(|value| value.to_bits() == 0xffff));
        assert!(gaps, "written beyond a head");
        for (first, count) in [(0, 1), (50, 7), (10, 70)] {
            let some = run(first, count);
            let same =
                some.iter().zip(&y[first * heads * y_width..]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{count} rows from {first} of {heads} heads {n} x {k} differ");
        }
    }
}

fn check_grouped(device: &Device, stream: &Stream, stored: StoredAs, (n, k): (usize, usize)) {
    let gemm = Gemm::new(device);
    let (pool, capacity) = (4, 1280);
    let host = Host::random(stored, (pool, n, k), 11);
    let w = Matrix::new(device, host.upload(device, stream), Kind::Pool).unwrap();
    let what = format!("grouped {stored:?} {n} x {k} {:?}", w.plan());
    let run = |gemm: &Gemm, counts: &[u32], table: &[u32], order: &dyn Fn(usize) -> usize| {
        let mut start = vec![0u32];
        counts.iter().for_each(|count| start.push(start.last().unwrap() + count.next_multiple_of(128)));
        let x = Rows::random(device, stored, (capacity, k), order);
        let y = device.alloc::<bf16>(capacity * n).unwrap();
        y.fill(stream, 0xff).unwrap();
        let (starts, rows, table) =
            (device.upload(&start).unwrap(), device.upload(counts).unwrap(), device.upload(table).unwrap());
        let segments = Segments {
            start: &starts,
            rows: &rows,
            pool_of_slot: &table,
            rows_max: capacity,
            rows_typical: 100,
        };
        gemm.grouped(stream, &w, x.operand(), segments, Output::Bf16 { data: &y, stride: n }).unwrap();
        let y = y.download(stream).unwrap();
        if n.is_multiple_of(8) {
            // Scattered, every row to the place of its mirror image, and nothing elsewhere.
            let turned = device.alloc::<bf16>(capacity * n).unwrap();
            turned.fill(stream, 0xff).unwrap();
            let place = |row: usize| turned.address() + ((capacity - 1 - row) * n * 2) as u64;
            let addresses = device.upload(&(0..capacity).map(place).collect::<Vec<_>>()).unwrap();
            let out = Output::Scattered { addresses: &addresses };
            gemm.grouped(stream, &w, x.operand(), segments, out).unwrap();
            let turned = turned.download(stream).unwrap();
            let same = turned.chunks(n).rev().flatten().zip(&y).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{what}: scattered rows");
        }
        let y: Vec<f32> = y.iter().map(|value| value.to_f32()).collect();
        (x, start, y)
    };
    let counts = [114u32, 0, 7, 300, 128, 1];
    let table = [2u32, 0, 3, 1, 0, 2];
    let (x, start, y) = run(&gemm, &counts, &table, &|row| row);
    let rows: Vec<usize> = (0..capacity).collect();
    let slot_of = |row: usize| start.iter().rposition(|&first| first as usize <= row).unwrap();
    let real: Vec<usize> = rows
        .into_iter()
        .filter(|&row| {
            let slot = slot_of(row);
            slot < counts.len() && row < (start[slot] + counts[slot]) as usize
        })
        .collect();
    assert_right((&x, &host), &y, &real, |row| table[slot_of(row)] as usize, &what);
    let registers = run(&gemm.clone().in_registers(true), &counts, &table, &|row| row).2;
    // Elsewhere and with others: slot 3's rows 200.. as slot 0 of another call.
    let (_, _, other) = run(&gemm, &[100, 30], &[1, 0], &|row| (start[3] as usize + 200 + row) % capacity);
    for row in 0..100 {
        let at = (start[3] as usize + 200 + row) * n;
        assert_same(&other[row * n..][..n], &y[at..][..n], &format!("{what}: row {row} elsewhere"));
    }
    for &row in &real {
        let at = row * n..(row + 1) * n;
        assert_same(&registers[at.clone()], &y[at], &format!("{what}: row {row} in registers"));
    }
    // One table of more than 32 slots, most of them empty.
    let mut many = vec![0u32; 70];
    (many[3], many[40], many[69]) = (5, 130, 9);
    let pools: Vec<u32> = (0..70).map(|slot| slot % 4).collect();
    let (x, start, y) = run(&gemm, &many, &pools, &|row| row);
    for slot in [3, 40, 69] {
        let rows: Vec<usize> = (0..many[slot] as usize).map(|row| start[slot] as usize + row).collect();
        assert_right((&x, &host), &y, &rows, |_| slot % 4, &format!("{what}: slot {slot} of 70"));
    }
}

#[test]
fn grouped() {
    let Some((device, stream)) = open() else { return };
    for shape in [(4096, 7168), (7168, 2048), (96, 64), (64, 48), (50, 20)] {
        for stored in [StoredAs::Bf16, StoredAs::Fp8] {
            check_grouped(&device, &stream, stored, shape);
        }
    }
}

#[test]
fn compiles() {
    assert_compiles(sources());
}

/// Fills the cache that `KERNEL_CACHE` names.
#[test]
#[ignore = "only fills a cache"]
fn fill_cache() {
    let dirs = vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/nvrtc/nvidia/cu13/lib")];
    let compiler = Compiler::load("sm_90a", &dirs, cache()).unwrap();
    let trials = cases().into_iter().flat_map(|case| {
        trials(case.name).iter().flat_map(move |&(splits, pair, columns)| {
            sources_of(case.stored, case.kind, case.n, Plan { splits, pair, columns })
        })
    });
    let both = [StoredAs::Bf16, StoredAs::Fp8];
    let tested =
        plans().into_iter().flat_map(|plan| both.map(|stored| sources_of(stored, Kind::Dense, 1200, plan)));
    let all: Vec<Source> = trials.chain(tested.flatten()).chain(sources()).collect();
    all.iter().for_each(|source| drop(compiler.compile(source).unwrap()));
}

#[test]
#[ignore = "takes a while and asserts nothing"]
fn bench() {
    let Some((device, stream)) = open() else { return };
    let gemm = Gemm::new(&device);
    // `BENCH=name:rows` picks one measurement, for a profiler.
    let wanted = std::env::var("BENCH").ok();
    let (name, only) = wanted.as_deref().and_then(|wanted| wanted.split_once(':')).unzip();
    for case in cases().into_iter().filter(|case| name.is_none_or(|name| name == case.name)) {
        let bench = Bench::new(&device, &stream, case, 4096);
        let matrices = bench.matrices(&device, None);
        for rows in [1, 8, 64, 128, 256, 4096] {
            if only.is_none_or(|only| only == rows.to_string()) {
                println!("{}", bench.line(rows, bench.time_us(&gemm, &stream, &matrices, rows)));
            }
        }
    }
}

/// Times of every plan, each in clusters and in registers.
#[test]
#[ignore = "takes a while and asserts nothing"]
fn tune() {
    let Some((device, stream)) = open() else { return };
    for case in cases() {
        let bench = Bench::new(&device, &stream, case, 256);
        for &(splits, pair, columns) in trials(case.name) {
            let plan = Plan { splits, pair, columns };
            let matrices = bench.matrices(&device, Some(plan));
            for always in [false, true] {
                let gemm = Gemm::new(&device).in_registers(always);
                let us = [8, 64, 128, 256].map(|rows| bench.time_us(&gemm, &stream, &matrices, rows));
                println!("{:16} s{splits} p{pair} c{columns} {always:5} {us:6.1?}", case.name);
            }
        }
    }
}
