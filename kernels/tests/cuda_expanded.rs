//! Attention of prompts on expanded keys and values, on CUDA, against the specification; a row's bits depend neither on
//! how its prompt is cut nor on what else is in the step.

mod cuda_support;

use std::sync::LazyLock;

use cuda_support::{
    assert_close, assert_compiles, calc_diff, device, normal, random_cache, rounded, time_us,
};
use half::bf16;
use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cpu::attention::{ExpandedShape, Pages, Span};
use heliostat_kernels::cuda::attention::{
    Chunk, Expanded, ExpandedArgs, ExpandedDims, PAGE, PromptLimits, PromptPlan,
};
use heliostat_kernels::cuda::gemm::{Gemm, Kind, Matrix};
use heliostat_kernels::cuda::{Buffer, Device, Priority, StoredAs, Stream, WeightStack};
use heliostat_kernels::weight::Weight;

const LIMITS: PromptLimits = PromptLimits { rows: 1024, chunks: 16, positions: 2048 };

/// Heads, latent, key without position, rotated, value: DeepSeek's, with few heads; those of small models; odd ones.
const SHAPES: [[usize; 5]; 6] = [
    [4, 512, 128, 64, 128],
    [1, 512, 128, 64, 128],
    [8, 64, 32, 16, 32],
    [6, 32, 16, 8, 24],
    [20, 256, 64, 64, 64],
    [3, 128, 72, 40, 104],
];

fn dims([heads, kv_lora, nope, rope, v]: [usize; 5]) -> ExpandedDims {
    ExpandedDims { heads, kv_lora, nope, rope, v, scale: ((nope + rope) as f32).sqrt().recip() * 2.0 }
}

/// Normal values rounded to bf16, another run of them for every seed.
fn values(seed: u64, len: usize) -> impl Iterator<Item = f32> {
    static POOL: LazyLock<Vec<f32>> = LazyLock::new(|| rounded(&normal(1, 1_000_003)).1);
    POOL.iter().cycle().skip((seed.wrapping_mul(0x9e37_79b9) % 1_000_003) as usize).copied().take(len)
}

fn bits(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&x| bf16::from_f32(x)).collect()
}

fn matrix(device: &Device, stream: &Stream, weight: &Weight) -> Matrix {
    let stack = WeightStack::new(device, StoredAs::Bf16, 1, (weight.rows(), weight.cols())).expect("stack");
    stack.write(stream, 0, &[weight]).expect("weights");
    Matrix::new(device, stack, Kind::Dense).expect("matrix")
}

/// The operation with its weights, on the device and as the specification takes them.
struct Op {
    dims: ExpandedDims,
    expanded: Expanded,
    gemm: Gemm,
    key_up: Matrix,
    value_up: Matrix,
    /// `[heads][nope + v][kv_lora]`.
    up: Weight,
}

impl Op {
    fn new(device: &Device, stream: &Stream, dims: ExpandedDims, limits: PromptLimits) -> Self {
        let ExpandedDims { heads, kv_lora, nope, v, .. } = dims;
        let scale = (kv_lora as f32).sqrt().recip();
        let rows: Vec<Vec<u16>> = (0..(heads * (nope + v)) as u64)
            .map(|row| values(row + 5, kv_lora).map(|x| bf16::from_f32(x * scale).to_bits()).collect())
            .collect();
        let part = |from: usize, to: usize| {
            let picked: Vec<u16> =
                rows.chunks_exact(nope + v).flat_map(|head| head[from..to].concat()).collect();
            Weight::from_bf16(heads * (to - from), kv_lora, picked).expect("weights")
        };
        Self {
            dims,
            expanded: Expanded::new(device, dims, limits).expect("expanded"),
            gemm: Gemm::new(device),
            key_up: matrix(device, stream, &part(0, nope)),
            value_up: matrix(device, stream, &part(nope, nope + v)),
            up: part(0, nope + v),
        }
    }

    fn width(&self) -> usize {
        self.dims.kv_lora + self.dims.rope
    }

    fn args<'a>(&'a self, step: &'a DeviceStep, cache: &'a Buffer<bf16>) -> ExpandedArgs<'a> {
        ExpandedArgs {
            rows: step.rows,
            query: &step.query,
            absorbed: &step.absorbed,
            cache,
            key_up: &self.key_up,
            value_up: &self.value_up,
            plan: &step.plan,
            words: &step.words,
            out: &step.out,
        }
    }
}

/// The buffers of one step.
struct DeviceStep {
    rows: usize,
    query: Buffer<bf16>,
    absorbed: Buffer<bf16>,
    plan: PromptPlan,
    words: Buffer<u32>,
    out: Buffer<bf16>,
}

/// A run of rows of a step: those of a prompt (sequence, first position, rows), or rows that other kernels do.
#[derive(Clone, Copy, Debug)]
enum Run {
    Prompt(usize, usize, usize),
    Others(usize),
}

/// Sequences with their pages in any order; what nobody wrote is NaN.
struct World {
    /// Content of each.
    seeds: Vec<u64>,
    tables: Vec<Vec<u32>>,
    cache: Vec<f32>,
}

impl World {
    fn new(op: &Op, order: u64, sequences: &[(u64, usize)]) -> Self {
        let width = op.width();
        let pages: usize = sequences.iter().map(|&(_, len)| len.div_ceil(PAGE)).sum::<usize>() + 3;
        let keys = normal(order, pages);
        let mut free: Vec<u32> = (0..pages as u32).collect();
        free.sort_by(|&a, &b| keys[a as usize].total_cmp(&keys[b as usize]));
        let mut free = free.into_iter();
        let mut world = Self {
            seeds: sequences.iter().map(|&(seed, _)| seed).collect(),
            tables: Vec::new(),
            cache: vec![f32::NAN; pages * PAGE * width],
        };
        for &(seed, len) in sequences {
            let table: Vec<u32> = free.by_ref().take(len.div_ceil(PAGE)).collect();
            let content: Vec<f32> = values(seed * 2, len * width).collect();
            for (position, row) in content.chunks_exact(width).enumerate() {
                let at = (table[position / PAGE] as usize * PAGE + position % PAGE) * width;
                world.cache[at..at + width].copy_from_slice(row);
            }
            world.tables.push(table);
        }
        world
    }

    /// Queries `[heads][nope + rope]` of a row: they depend on what it is, not on where it stands.
    fn query(&self, op: &Op, sequence: usize, position: usize) -> Vec<f32> {
        let ExpandedDims { heads, nope, rope, .. } = op.dims;
        values(77 + self.seeds[sequence] * 10_000 + position as u64, heads * (nope + rope)).collect()
    }

    fn upload(&self, op: &Op, device: &Device, runs: &[Run]) -> DeviceStep {
        let ExpandedDims { heads, kv_lora, nope, rope, v, .. } = op.dims;
        let (mut query, mut absorbed, mut rows, mut chunks) = (Vec::new(), Vec::new(), 0, Vec::new());
        for run in runs {
            match *run {
                Run::Prompt(sequence, position0, len) => {
                    let block_table = &self.tables[sequence];
                    chunks.push(Chunk { row0: rows, rows: len, position0, block_table });
                    for position in position0..position0 + len {
                        for head in self.query(op, sequence, position).chunks_exact(nope + rope) {
                            query.extend_from_slice(&head[..nope]);
                            query.extend(std::iter::repeat_n(f32::NAN, rope));
                            absorbed.extend(std::iter::repeat_n(f32::NAN, kv_lora));
                            absorbed.extend_from_slice(&head[nope..]);
                        }
                    }
                    rows += len;
                }
                Run::Others(len) => {
                    query.extend(std::iter::repeat_n(f32::NAN, len * heads * (nope + rope)));
                    absorbed.extend(std::iter::repeat_n(f32::NAN, len * heads * (kv_lora + rope)));
                    rows += len;
                }
            }
        }
        let plan = op.expanded.plan(&chunks);
        assert!(plan.words().len() <= op.expanded.words_max());
        let upload = |values: &[f32]| device.upload(&bits(values)).expect("upload");
        DeviceStep {
            rows,
            query: upload(&query),
            absorbed: upload(&absorbed),
            words: device.upload(plan.words()).expect("upload"),
            plan,
            out: upload(&vec![POISON; rows * heads * v]),
        }
    }

    /// Output rows of the prompts' rows; the others must stay as they were.
    fn run(&self, op: &Op, device: &Device, stream: &Stream, runs: &[Run]) -> Vec<Vec<bf16>> {
        let step = self.upload(op, device, runs);
        let cache = device.upload(&bits(&self.cache)).expect("upload");
        op.expanded.run(stream, &op.gemm, &op.args(&step, &cache)).expect("run");
        let out = step.out.download(stream).expect("download");
        let mut rows = out.chunks_exact(op.dims.heads * op.dims.v).map(<[bf16]>::to_vec);
        let mut prompts = Vec::new();
        for run in runs {
            match *run {
                Run::Prompt(_, _, len) => prompts.extend(rows.by_ref().take(len)),
                Run::Others(len) => {
                    let untouched = rows.by_ref().take(len).flatten().all(|x| x == bf16::from_f32(POISON));
                    assert!(untouched, "a row of no prompt was written");
                }
            }
        }
        prompts
    }

    /// What the rows of a run of a prompt should be.
    fn spec(&self, op: &Op, cpu: &Cpu, (sequence, position0, len): (usize, usize, usize)) -> Vec<f32> {
        let ExpandedDims { heads, kv_lora, nope, rope, v, scale } = op.dims;
        let query: Vec<f32> =
            (position0..position0 + len).flat_map(|position| self.query(op, sequence, position)).collect();
        let pages = Pages { data: &self.cache, block_size: PAGE, width: op.width() };
        let span = Span { start: 0, len, context: position0, block_table: &self.tables[sequence] };
        let mut out = vec![f32::NAN; len * heads * v];
        let shape = ExpandedShape { heads, kv_lora, nope, rope, v, scale };
        cpu.expanded_attention(shape, (&query, &op.up), pages, &[span], &mut out);
        out
    }
}

const POISON: f32 = -123.0;

#[test]
fn compiles() {
    assert_compiles(SHAPES.into_iter().flat_map(|shape| Expanded::sources(&dims(shape))));
}

#[test]
fn sizes_that_do_not_fit_are_refused_by_name() {
    assert!(SHAPES.into_iter().all(|shape| dims(shape).unsupported().is_none()));
    for shape in [[4, 512, 192, 64, 128], [4, 512, 128, 64, 256], [4, 512, 100, 64, 128], [0, 64, 64, 64, 64]]
    {
        let why = dims(shape).unsupported().expect("unsupported");
        assert!(why.contains("multiples of 8") && why.contains(&shape[4].to_string()), "{why}");
    }
}

#[test]
fn agrees_with_the_specification() {
    let Some(device) = device() else { return };
    let stream = device.stream(Priority::High).expect("stream");
    let cpu = Cpu::single_threaded();
    let runs = [
        Run::Others(3),
        Run::Prompt(0, 0, 1),
        Run::Prompt(1, 0, 64),
        Run::Prompt(2, 0, 65),
        Run::Prompt(3, 0, 300),
        Run::Others(1),
        Run::Prompt(4, 100, 28),
        Run::Prompt(5, 1000, 129),
        Run::Prompt(6, 63, 200),
        Run::Prompt(7, 1499, 1),
        Run::Others(2),
    ];
    let sequences: Vec<(u64, usize)> =
        [1, 64, 65, 300, 128, 1129, 263, 1500].map(|len| (len as u64, len)).into();
    for shape in SHAPES {
        let op = Op::new(&device, &stream, dims(shape), LIMITS);
        let world = World::new(&op, 5, &sequences);
        let mut got = world.run(&op, &device, &stream, &runs).into_iter();
        let mut worst = 0.0f64;
        for run in runs {
            let Run::Prompt(sequence, position0, len) = run else { continue };
            let want = world.spec(&op, &cpu, (sequence, position0, len));
            let row = want.len() / len;
            for (index, (got, want)) in got.by_ref().take(len).zip(want.chunks_exact(row)).enumerate() {
                let got: Vec<f32> = got.iter().map(|x| x.to_f32()).collect();
                worst = worst.max(calc_diff(&got, want).abs());
                assert_close(&got, want, 5e-5, &format!("{shape:?} {run:?} row {index}"));
            }
        }
        eprintln!("{shape:?}: calc_diff at most {worst:.1e}");
    }
}

#[test]
fn a_prompt_at_once_is_a_prompt_in_pieces() {
    let Some(device) = device() else { return };
    let stream = device.stream(Priority::High).expect("stream");
    const LEN: usize = 700;
    for shape in SHAPES {
        let op = Op::new(&device, &stream, dims(shape), LIMITS);
        let alone = World::new(&op, 1, &[(7, LEN)]);
        let want = alone.run(&op, &device, &stream, &[Run::Prompt(0, 0, LEN)]);
        // Other pages, other neighbours, other places in the step.
        let world = World::new(&op, 2, &[(3, 400), (7, LEN), (4, 90)]);
        let mut got = Vec::new();
        for piece in [1, 63, 64, 128, 129, 1, 314] {
            let runs = [
                Run::Prompt(0, 17, piece),
                Run::Others(piece % 5),
                Run::Prompt(1, got.len(), piece),
                Run::Prompt(2, 0, 90),
            ];
            let rows = world.run(&op, &device, &stream, &runs);
            got.extend_from_slice(&rows[piece..2 * piece]);
        }
        let differs = want.iter().zip(&got).position(|(want, got)| want != got);
        assert!(got.len() == LEN && differs.is_none(), "{shape:?}: row {differs:?}");
    }
}

#[test]
fn passes_change_no_bit() {
    let Some(device) = device() else { return };
    let stream = device.stream(Priority::High).expect("stream");
    let sequences: Vec<(u64, usize)> = [300, 128, 513, 40].map(|len| (len as u64, len)).into();
    let runs: Vec<Run> =
        sequences.iter().enumerate().map(|(index, &(_, len))| Run::Prompt(index, 0, len)).collect();
    for shape in SHAPES {
        let limits = PromptLimits { positions: 520, ..LIMITS };
        let mut op = Op::new(&device, &stream, dims(shape), limits);
        let world = World::new(&op, 3, &sequences);
        let want = world.run(&op, &device, &stream, &runs);
        // Room for the longest only, and for one head of it.
        op.expanded = Expanded::bounded(&device, op.dims, limits, (640, 640)).expect("expanded");
        let got = world.run(&op, &device, &stream, &runs);
        assert!(got == want, "{shape:?}");
    }
}

/// Prints the times of one step of chunks (position of the first row, rows) with DeepSeek-R1's sizes.
fn report(op: &Op, (device, stream): (&Device, &Stream), cache: &Buffer<bf16>, chunks: &[(usize, usize)]) {
    let ExpandedDims { heads, kv_lora, nope, rope, v, .. } = op.dims;
    let pages = cache.len() / (PAGE * op.width());
    let tables: Vec<Vec<u32>> = (0..chunks.len())
        .map(|chunk| (0..64).map(|index| ((chunk * 64 + index) * 37 % pages) as u32).collect())
        .collect();
    let mut rows = 0;
    let planned: Vec<Chunk<'_>> = chunks
        .iter()
        .zip(&tables)
        .map(|(&(position0, len), block_table)| {
            rows += len;
            Chunk { row0: rows - len, rows: len, position0, block_table }
        })
        .collect();
    let plan = op.expanded.plan(&planned);
    let random = |width: usize| {
        let some = rounded(&normal(3, 1 << 20)).0;
        let all: Vec<bf16> = some.into_iter().cycle().take(rows * heads * width).collect();
        device.upload(&all).expect("upload")
    };
    let step = DeviceStep {
        rows,
        query: random(nope + rope),
        absorbed: random(kv_lora + rope),
        words: device.upload(plan.words()).expect("upload"),
        plan,
        out: device.alloc(rows * heads * v).expect("out"),
    };
    let run = |stream: &Stream| op.expanded.run(stream, &op.gemm, &op.args(&step, cache));
    let whole = time_us(stream, (7, 4), |stream, _| run(stream));
    let kernels = stream.profile(run).expect("profile");
    let part =
        |label: &str| kernels.iter().filter(|time| time.label == label).map(|time| time.us).sum::<f64>();
    let seen: usize = chunks.iter().map(|&(from, len)| (from + 1..=from + len).sum::<usize>()).sum();
    let flop = (seen * heads * 2 * (nope + rope + v)) as f64;
    let expanded: usize = chunks.iter().map(|&(from, len)| from + len).sum();
    let expand_flop = (expanded * heads * 2 * (nope + v) * kv_lora) as f64;
    let (gather, expand, attend) =
        (part("gather latents"), part("expand keys and values"), part("MLA of prompts"));
    eprintln!(
        "{:<28} whole {whole:>7.1} us  gather {gather:>6.1}  expand {expand:>7.1} ({:>5.0} TFLOP/s)  attend {attend:>7.1} ({:>5.0} TFLOP/s)",
        format!("{chunks:?}").chars().take(28).collect::<String>(),
        expand_flop / expand / 1e6,
        flop / attend / 1e6,
    );
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    let Some(device) = device() else { return };
    eprintln!("{}", device.properties().name);
    let stream = device.stream(Priority::High).expect("stream");
    let limits = PromptLimits { rows: 8192, chunks: 16, positions: 8192 };
    let op = Op::new(&device, &stream, dims([128, 512, 128, 64, 128]), limits);
    let cache = random_cache(&device, &stream, 2048, op.width());
    for chunks in [
        vec![(0, 2048), (0, 2048)],
        vec![(0, 4096)],
        vec![(0, 512); 8],
        vec![(1536, 512), (0, 2048), (0, 1536)],
        vec![(3584, 512)],
        vec![(0, 100)],
    ] {
        report(&op, (&device, &stream), &cache, &chunks);
    }
}
