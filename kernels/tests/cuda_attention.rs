//! Paged attention on CUDA against the f64 specification; a row's bits do not depend on the batch around it.

mod cuda_support;

use std::sync::LazyLock;

use cuda_support::{assert_close, assert_compiles, device, normal, random_cache, rounded, time_us};
use half::bf16;
use heliostat_kernels::cpu::attention::{GqaShape, KvPages, MlaQuery, MlaShape, Pages, Span};
use heliostat_kernels::cpu::plain;
use heliostat_kernels::cuda::attention::{
    BatchMeta, Gqa, GqaArgs, GqaDims, Limits, Mla, MlaArgs, MlaDims, PAGE,
};
use heliostat_kernels::cuda::{Buffer, CudaError, Device, Priority, Source, Stream};

const LENGTHS: [usize; 9] = [1, 63, 64, 65, 1000, 1024, 1025, 2500, 5200];
const LIMITS: Limits = Limits { rows: 512, positions: 8192 };
/// Rows may have so many chunks that a step takes several launches.
const LONG: Limits = Limits { rows: 512, positions: 1 << 16 };
const IDLE: u32 = u32::MAX;

fn mla_dims(heads: usize, kv_lora: usize, rope: usize) -> MlaDims {
    MlaDims { heads, kv_lora, rope, scale: ((kv_lora + rope) as f32).sqrt().recip() * 2.0 }
}

fn gqa_dims(heads: usize, kv_heads: usize, head_dim: usize) -> GqaDims {
    GqaDims { heads, kv_heads, head_dim, scale: (head_dim as f32).sqrt().recip() * 2.0 }
}

/// Latent attention on wgmma; by the kernel of any shape; grouped-query attention by the same.
const WIDE: &[(usize, usize, usize)] = &[(128, 512, 64), (64, 512, 64), (16, 512, 64)];
const NARROW: &[(usize, usize, usize)] = &[(8, 64, 16), (6, 32, 8), (4, 24, 8), (32, 128, 64), (20, 256, 64)];
const GROUPED: &[(usize, usize, usize)] =
    &[(32, 4, 128), (16, 16, 128), (8, 2, 16), (6, 2, 24), (16, 1, 64), (8, 1, 256)];

/// Normal values rounded to bf16, another run of them for every seed.
fn values(seed: u64, len: usize) -> impl Iterator<Item = f32> {
    static POOL: LazyLock<Vec<f32>> = LazyLock::new(|| rounded(&normal(1, 1_000_003)).1);
    POOL.iter().cycle().skip((seed.wrapping_mul(0x9e37_79b9) % 1_000_003) as usize).copied().take(len)
}

/// Either kind, so that both go through the same tests.
enum Kernel {
    Mla(Mla, MlaDims),
    Gqa(Gqa, GqaDims),
}

impl Kernel {
    fn mla(device: &Device, shapes: &[(usize, usize, usize)], limits: Limits) -> Vec<Self> {
        let kernel = |&(heads, kv_lora, rope): &_| {
            let dims = mla_dims(heads, kv_lora, rope);
            Self::Mla(Mla::new(device, dims, limits).expect("mla"), dims)
        };
        shapes.iter().map(kernel).collect()
    }

    fn gqa(device: &Device, shapes: &[(usize, usize, usize)], limits: Limits) -> Vec<Self> {
        let kernel = |&(heads, kv_heads, head_dim): &_| {
            let dims = gqa_dims(heads, kv_heads, head_dim);
            Self::Gqa(Gqa::new(device, dims, limits).expect("gqa"), dims)
        };
        shapes.iter().map(kernel).collect()
    }

    fn name(&self) -> String {
        match self {
            Self::Mla(_, dims) => format!("{dims:?}"),
            Self::Gqa(_, dims) => format!("{dims:?}"),
        }
    }

    /// Elements of a query row, of an output row, of a cache row; caches.
    fn widths(&self) -> (usize, usize, usize, usize) {
        match self {
            Self::Mla(_, d) => (d.heads * (d.kv_lora + d.rope), d.heads * d.kv_lora, d.kv_lora + d.rope, 1),
            Self::Gqa(_, d) => (d.heads * d.head_dim, d.heads * d.head_dim, d.kv_heads * d.head_dim, 2),
        }
    }

    fn run(&self, stream: &Stream, step: &Step<'_>, plan: bool) -> Result<(), CudaError> {
        let Step { rows, query, caches, meta, out } = *step;
        match self {
            Self::Mla(mla, _) => {
                if plan {
                    mla.plan(stream, &meta, rows)?;
                }
                mla.run(stream, &MlaArgs { rows, query, cache: &caches[0], meta, out })
            }
            Self::Gqa(gqa, _) => {
                if plan {
                    gqa.plan(stream, &meta, rows)?;
                }
                gqa.run(stream, &GqaArgs { rows, query, keys: &caches[0], values: &caches[1], meta, out })
            }
        }
    }

    /// What one row should be, by the specification.
    fn spec(&self, query: &[f32], caches: &[Vec<f32>], span: Span<'_>) -> Vec<f32> {
        let (_, out_width, width, _) = self.widths();
        let mut out = vec![0.0; out_width];
        let pages = |cache: usize| Pages { data: &caches[cache], block_size: PAGE, width };
        match self {
            Self::Mla(_, dims) => {
                let MlaDims { heads, kv_lora, rope, scale } = *dims;
                let part = |from: usize, to: usize| -> Vec<f32> {
                    query.chunks_exact(kv_lora + rope).flat_map(|head| head[from..to].to_vec()).collect()
                };
                let (latent, rotated) = (part(0, kv_lora), part(kv_lora, kv_lora + rope));
                let query = MlaQuery { latent: &latent, rope: &rotated };
                plain::mla_attention(
                    MlaShape { heads, kv_lora, rope, scale },
                    query,
                    pages(0),
                    &[span],
                    &mut out,
                );
            }
            Self::Gqa(_, dims) => {
                let GqaDims { heads, kv_heads, head_dim, scale } = *dims;
                let cache = KvPages { keys: pages(0), values: pages(1) };
                plain::gqa_attention(
                    GqaShape { heads, kv_heads, head_dim, scale },
                    query,
                    cache,
                    &[span],
                    &mut out,
                );
            }
        }
        out
    }
}

#[derive(Clone, Copy)]
struct Step<'a> {
    rows: usize,
    query: &'a Buffer<bf16>,
    caches: &'a [Buffer<bf16>],
    meta: BatchMeta<'a>,
    out: &'a Buffer<bf16>,
}

/// Sequences with their pages in any order; what nobody wrote is NaN.
struct World {
    /// Content seed and length of each.
    sequences: Vec<(u64, usize)>,
    tables: Vec<Vec<u32>>,
    caches: Vec<Vec<f32>>,
}

/// `(sequence, position)`; `None`: idle.
type Row = Option<(usize, usize)>;

impl World {
    fn new(kernel: &Kernel, seed: u64, sequences: &[(u64, usize)]) -> Self {
        let (_, _, width, caches) = kernel.widths();
        let pages: usize = sequences.iter().map(|&(_, len)| len.div_ceil(PAGE)).sum::<usize>() + 3;
        let mut order: Vec<u32> = (0..pages as u32).collect();
        let keys = normal(seed, pages);
        order.sort_by(|&a, &b| keys[a as usize].total_cmp(&keys[b as usize]));
        let mut free = order.into_iter();
        let mut world = Self {
            sequences: sequences.to_vec(),
            tables: Vec::new(),
            caches: vec![vec![f32::NAN; pages * PAGE * width]; caches],
        };
        for &(content, len) in sequences {
            let table: Vec<u32> = free.by_ref().take(len.div_ceil(PAGE)).collect();
            for (index, cache) in world.caches.iter_mut().enumerate() {
                let values: Vec<f32> = values(content * 2 + index as u64, len * width).collect();
                for (position, row) in values.chunks_exact(width).enumerate() {
                    let at = (table[position / PAGE] as usize * PAGE + position % PAGE) * width;
                    cache[at..at + width].copy_from_slice(row);
                }
            }
            world.tables.push(table);
        }
        world
    }

    /// The query of a row depends on what it is, not on where it stands.
    fn query(&self, kernel: &Kernel, row: Row) -> Vec<f32> {
        let width = kernel.widths().0;
        let Some((sequence, position)) = row else { return vec![f32::NAN; width] };
        values(77 + self.sequences[sequence].0 * 10_000 + position as u64, width).collect()
    }

    /// Output rows; idle ones must stay as they were.
    fn run(&self, kernel: &Kernel, device: &Device, stream: &Stream, rows: &[Row]) -> Vec<Vec<bf16>> {
        let bits = |values: &[f32]| -> Vec<bf16> { values.iter().map(|&x| bf16::from_f32(x)).collect() };
        let out_width = kernel.widths().1;
        let blocks_max = self.tables.iter().map(Vec::len).max().expect("sequences") + 2;
        let mut table = vec![u32::MAX; blocks_max * self.tables.len()];
        for (to, from) in table.chunks_exact_mut(blocks_max).zip(&self.tables) {
            to[..from.len()].copy_from_slice(from);
        }
        let query: Vec<f32> = rows.iter().flat_map(|&row| self.query(kernel, row)).collect();
        let positions: Vec<u32> =
            rows.iter().map(|row| row.map_or(IDLE, |(_, position)| position as u32)).collect();
        let seq_of_row: Vec<u32> =
            rows.iter().map(|row| row.map_or(IDLE, |(sequence, _)| sequence as u32)).collect();
        let upload = |values: &[u32]| device.upload(values).expect("upload");
        let (positions, seq_of_row, table) = (upload(&positions), upload(&seq_of_row), upload(&table));
        let query = device.upload(&bits(&query)).expect("upload");
        let caches: Vec<_> =
            self.caches.iter().map(|cache| device.upload(&bits(cache)).expect("upload")).collect();
        let poison = bf16::from_f32(-123.0);
        let out = device.upload(&vec![poison; rows.len() * out_width]).expect("upload");
        let meta =
            BatchMeta { positions: &positions, seq_of_row: &seq_of_row, block_table: &table, blocks_max };
        let step = Step { rows: rows.len(), query: &query, caches: &caches, meta, out: &out };
        kernel.run(stream, &step, true).expect("run");
        let values = out.download(stream).expect("download");
        for (row, values) in rows.iter().zip(values.chunks_exact(out_width)) {
            if row.is_none() {
                assert!(values.iter().all(|&value| value == poison), "an idle row was written");
            }
        }
        values.chunks_exact(out_width).map(<[bf16]>::to_vec).collect()
    }

    fn spec(&self, kernel: &Kernel, row: Row) -> Vec<f32> {
        let (sequence, position) = row.expect("a row that is not idle");
        let span = Span { start: 0, len: 1, context: position, block_table: &self.tables[sequence] };
        kernel.spec(&self.query(kernel, row), &self.caches, span)
    }
}

fn sources() -> Vec<Source> {
    let mla = WIDE
        .iter()
        .chain(NARROW)
        .flat_map(|&(heads, kv_lora, rope)| Mla::sources(&mla_dims(heads, kv_lora, rope)));
    let gqa = GROUPED.iter().flat_map(|&(heads, kv, dim)| Gqa::sources(&gqa_dims(heads, kv, dim)));
    mla.chain(gqa).collect()
}

#[test]
fn compiles() {
    assert_compiles(sources());
}

fn agrees(device: &Device, kernels: Vec<Kernel>) {
    let stream = device.stream(Priority::High).expect("stream");
    for kernel in kernels {
        let sequences: Vec<(u64, usize)> =
            LENGTHS.iter().enumerate().map(|(index, &len)| (index as u64 + 1, len)).collect();
        let world = World::new(&kernel, 5, &sequences);
        // Idle rows between, and a row in the middle of a sequence.
        let mut rows: Vec<Row> = LENGTHS
            .iter()
            .enumerate()
            .flat_map(|(index, &len)| [Some((index, len - 1)), (index % 3 == 0).then_some((7, 200 + index))])
            .collect();
        rows.push(None);
        let got = world.run(&kernel, device, &stream, &rows);
        let mut worst = 0.0f64;
        for (row, got) in rows.iter().zip(&got).filter(|(row, _)| row.is_some()) {
            let got: Vec<f32> = got.iter().map(|value| value.to_f32()).collect();
            let want = world.spec(&kernel, *row);
            worst = worst.max(cuda_support::calc_diff(&got, &want).abs());
            assert_close(&got, &want, 2e-5, &format!("{} row {row:?}", kernel.name()));
        }
        eprintln!("{}: calc_diff at most {worst:.1e}", kernel.name());
    }
}

fn sees_no_batch(device: &Device, kernels: Vec<Kernel>) {
    let stream = device.stream(Priority::High).expect("stream");
    for kernel in kernels {
        let own: Vec<(u64, usize)> =
            [1, 64, 65, 700, 2048, 3100, 5200].iter().map(|&len| (len as u64, len)).collect();
        let alone: Vec<Vec<bf16>> = own
            .iter()
            .map(|&(content, len)| {
                let world = World::new(&kernel, 1, &[(content, len)]);
                world.run(&kernel, device, &stream, &[Some((0, len - 1))]).remove(0)
            })
            .collect();
        for others in [5, 64, 200] {
            // Others first and between, so that slots, pages and the order of work differ.
            let other = |index: usize| (1000 + index as u64, 1 + (index * 7919) % 600);
            let mut sequences: Vec<(u64, usize)> = (0..others).map(other).collect();
            let at: Vec<usize> =
                (0..own.len()).map(|index| (index * 31 + 3) % (sequences.len() + index + 1)).collect();
            for (&sequence, &at) in own.iter().zip(&at) {
                sequences.insert(at, sequence);
            }
            let world = World::new(&kernel, others as u64, &sequences);
            let mut rows: Vec<Row> =
                sequences.iter().enumerate().map(|(index, &(_, len))| Some((index, len - 1))).collect();
            rows.insert(2, None);
            let got = world.run(&kernel, device, &stream, &rows);
            for (&(content, len), alone) in own.iter().zip(&alone) {
                let find = |row: &Row| row.is_some_and(|(index, _)| world.sequences[index] == (content, len));
                let row = rows.iter().position(find).expect("the row is there");
                assert!(got[row] == *alone, "{}: length {len} beside {others}", kernel.name());
            }
        }
    }
}

fn prompts_are_rows(device: &Device, kernels: Vec<Kernel>) {
    let stream = device.stream(Priority::High).expect("stream");

    for kernel in kernels {
        let world = World::new(&kernel, 9, &[(3, 130), (4, 400)]);
        let rows: Vec<Row> =
            (0..130).map(|position| Some((0, position))).chain((60..400).map(|p| Some((1, p)))).collect();
        let at_once = world.run(&kernel, device, &stream, &rows);
        for index in [0, 1, 62, 63, 64, 127, 128, 129, 130, 131, 300, 469] {
            let by_itself = world.run(&kernel, device, &stream, &rows[index..=index]);
            assert!(by_itself[0] == at_once[index], "{}: row {:?}", kernel.name(), rows[index]);
        }
    }
}

macro_rules! tests {
    ($($family:ident: $kernels:expr;)*) => {$(
        mod $family {
            use super::*;

            #[test]
            fn agrees_with_the_specification() {
                let Some(device) = device() else { return };
                agrees(&device, $kernels(&device, LIMITS));
            }

            #[test]
            fn a_row_does_not_see_its_batch() {
                let Some(device) = device() else { return };
                sees_no_batch(&device, $kernels(&device, LIMITS));
            }

            #[test]
            fn a_prompt_at_once_is_a_prompt_by_rows() {
                let Some(device) = device() else { return };
                prompts_are_rows(&device, $kernels(&device, LONG));
            }
        }
    )*};
}

tests! {
    wide: |device, limits| Kernel::mla(device, WIDE, limits);
    narrow: |device, limits| Kernel::mla(device, NARROW, limits);
    grouped: |device, limits| Kernel::gqa(device, GROUPED, limits);
}

struct Timed {
    us: f64,
    plan_us: f64,
}

/// Times a step of rows of these sequences and positions; each call reads other pages where there are enough.
fn time(
    device: &Device,
    stream: &Stream,
    kernel: &Kernel,
    caches: &[Buffer<bf16>],
    rows: &[(u32, u32)],
) -> Timed {
    let (query_width, out_width, width, _) = kernel.widths();
    let pages = caches[0].len() / (PAGE * width);
    let sequences = rows.iter().map(|row| row.0).max().expect("rows") as usize + 1;
    let blocks_max = rows.iter().map(|row| row.1 as usize / PAGE + 1).max().expect("rows");
    let tables: Vec<_> = (0..4)
        .map(|table| {
            // A fixed stride through all pages, so that neighbours in a sequence are none in memory.
            let page = |index: usize| ((table * sequences * blocks_max + index) * 37 % pages) as u32;
            device.upload(&(0..sequences * blocks_max).map(page).collect::<Vec<u32>>()).expect("upload")
        })
        .collect();
    let upload = |values: Vec<u32>| device.upload(&values).expect("upload");
    let positions = upload(rows.iter().map(|row| row.1).collect());
    let seq_of_row = upload(rows.iter().map(|row| row.0).collect());
    let query = rounded(&normal(3, 1 << 20)).0;
    let query: Vec<bf16> = query.into_iter().cycle().take(rows.len() * query_width).collect();
    let query = device.upload(&query).expect("upload");
    let out = device.alloc(rows.len() * out_width).expect("out");
    let step = |table: usize| Step {
        rows: rows.len(),
        query: &query,
        caches,
        meta: BatchMeta {
            positions: &positions,
            seq_of_row: &seq_of_row,
            block_table: &tables[table % 4],
            blocks_max,
        },
        out: &out,
    };
    let us = time_us(stream, (7, 8), |stream, call| kernel.run(stream, &step(call), call == 0));
    let planned = time_us(stream, (7, 8), |stream, call| kernel.run(stream, &step(call), true));
    Timed { us, plan_us: planned - us }
}

/// Lengths between half and one and a half times the context, of this mean.
fn diverse(batch: usize, context: usize) -> Vec<(u32, u32)> {
    (0..batch)
        .map(|row| {
            let spread = (row * 2 + 1) as f64 / batch as f64 - 1.0;
            // Mixed, so that neighbours differ.
            let length = context as f64 * (1.0 + 0.5 * spread);
            ((row * 37 % batch) as u32, length as u32 - 1)
        })
        .collect()
}

fn equal(batch: usize, context: usize) -> Vec<(u32, u32)> {
    (0..batch).map(|row| (row as u32, context as u32 - 1)).collect()
}

fn prompts(count: usize, len: usize) -> Vec<(u32, u32)> {
    (0..count).flat_map(|prompt| (0..len).map(move |position| (prompt as u32, position as u32))).collect()
}

fn report(name: &str, rows: &[(u32, u32)], timed: &Timed, (flop, bytes): (f64, f64), shared: bool) {
    let positions: f64 = rows.iter().map(|row| f64::from(row.1 + 1)).sum();
    let read = if shared { 0.0 } else { positions * bytes };
    let floor = (positions * flop / 790e12).max(read / 4.3e12) * 1e6;
    eprintln!(
        "{name:<34} {:>8.1} us  {:>6.1} TFLOP/s  {:>6.0} GB/s  floor {floor:>7.1} us, {:>5.1}%  plan {:.1} us",
        timed.us,
        positions * flop / timed.us / 1e6,
        read / timed.us / 1e3,
        floor / timed.us * 100.0,
        timed.plan_us,
    );
}

/// Opens a device to measure on.
fn bench() -> Option<(Device, Stream)> {
    let device = device()?;
    eprintln!("{}", device.properties().name);
    let stream = device.stream(Priority::High).expect("stream");
    Some((device, stream))
}

const BENCH_LIMITS: Limits = Limits { rows: 4096, positions: 8192 };

#[test]
#[ignore = "a measurement"]
fn speed_wide() {
    let Some((device, stream)) = bench() else { return };
    let caches = [random_cache(&device, &stream, 20_000, 576)];
    for heads in [128, 64] {
        let dims = mla_dims(heads, 512, 64);
        let kernel = Kernel::Mla(Mla::new(&device, dims, BENCH_LIMITS).expect("mla"), dims);
        let costs = ((heads * 2 * 1088) as f64, 1152.0);
        let sizes = [(1, 2048), (8, 2048), (32, 2048), (64, 2048), (128, 2048), (256, 2048)];
        for (batch, context) in sizes.into_iter().chain([(8, 4096), (64, 4096), (128, 4096), (256, 4096)]) {
            if heads == 64 && (context != 2048 || batch < 64) {
                continue;
            }
            for (kind, rows) in [("equal", equal(batch, context)), ("diverse", diverse(batch, context))] {
                let timed = time(&device, &stream, &kernel, &caches, &rows);
                report(&format!("mla {heads} heads {batch} x {context} {kind}"), &rows, &timed, costs, false);
            }
        }
        let rows = prompts(2, 2048);
        let timed = time(&device, &stream, &kernel, &caches, &rows);
        report(&format!("mla {heads} heads prefill 2 x 2048"), &rows, &timed, costs, true);
    }
}

#[test]
#[ignore = "a measurement"]
fn speed_tiled() {
    let Some((device, stream)) = bench() else { return };
    let dims = gqa_dims(32, 4, 128);
    let kernel = Kernel::Gqa(Gqa::new(&device, dims, BENCH_LIMITS).expect("gqa"), dims);
    let caches = [0, 1].map(|_| random_cache(&device, &stream, 20_000, 512));
    let costs = ((32 * 4 * 128) as f64, 2048.0);
    for (batch, context) in [(1, 2048), (8, 2048), (64, 2048), (128, 2048), (128, 4096), (256, 2048)] {
        for (kind, rows) in [("equal", equal(batch, context)), ("diverse", diverse(batch, context))] {
            let timed = time(&device, &stream, &kernel, &caches, &rows);
            report(&format!("gqa {batch} x {context} {kind}"), &rows, &timed, costs, false);
        }
    }
    let rows = prompts(2, 2048);
    let timed = time(&device, &stream, &kernel, &caches, &rows);
    report("gqa prefill 2 x 2048", &rows, &timed, costs, true);
    let dims = mla_dims(8, 64, 16);
    let kernel = Kernel::Mla(Mla::new(&device, dims, BENCH_LIMITS).expect("mla"), dims);
    let caches = [random_cache(&device, &stream, 20_000, 80)];
    for (batch, context) in [(1, 2048), (64, 2048), (64, 500)] {
        let rows = equal(batch, context);
        let timed = time(&device, &stream, &kernel, &caches, &rows);
        report(
            &format!("small mla {batch} x {context}"),
            &rows,
            &timed,
            ((8 * 2 * 144) as f64, 160.0),
            false,
        );
    }
}
