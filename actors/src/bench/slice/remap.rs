//! Decode while experts move: another thread copies weights to free places, and between two steps a slot is pointed at
//! them, as in a remap. They come from the next rank's GPU, or from the host where a rank is alone or NCCL carries rows.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use heliostat_engine::config::ModelConfig;
use heliostat_engine::cuda::{CudaRank, ExpertPool, LentPlace, PoolError, PoolOffer, PooledExpert};
use heliostat_engine::model::Expert;
use heliostat_kernels::weight::{Block, Weight};
use serde::Serialize;

use super::super::meeting::Meeting;
use super::{SLOTS, SliceArgs, SliceError, SliceRow, decode_run};

/// Decode while experts are replaced one after the other, as fast as they come.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RemapReport {
    /// Whether they came from the next rank's GPU, else from the host.
    pub from_peer: bool,
    /// Sequences.
    pub batch: usize,
    /// Tokens before the first measured one.
    pub context: usize,
    /// Experts replaced.
    pub moves: usize,
    /// Weights that came in, gigabytes per second.
    pub gb_per_s: f64,
    /// Median milliseconds of a step without moves, right before.
    pub before_ms: f64,
    /// Median milliseconds of a step.
    pub step_ms: f64,
    /// The longest step, milliseconds.
    pub longest_ms: f64,
}

/// Where experts come from.
enum Source {
    Host(Box<Expert>),
    /// A place that the next rank keeps as it is.
    Peer {
        rank: usize,
        lent: LentPlace,
    },
}

/// What a rank says of an expert that it lends: its pool, the place, the checksum.
type Loan = (Vec<u8>, u32, u64);

/// Steps without moves, and then with.
pub(super) fn remap(
    rank: &mut CudaRank,
    args: &SliceArgs,
    (batch, context): (usize, usize),
    meeting: &mut Meeting,
) -> Result<SliceRow, SliceError> {
    let (before, _) = decode_run(rank, args, (batch, context), &mut |_| Ok(()))?;
    let (pool, expert) = (rank.pool().expect("the rank has experts").clone(), made_up(rank.config()));
    let bytes = expert.size_bytes() as u64;
    let from_peer = meeting.ranks() > 1 && !rank.is_by_nccl();
    // Lent until all are through.
    let kept = from_peer.then(|| pool.put(&expert)).transpose()?;
    let source = match kept.as_ref().and_then(PooledExpert::lent) {
        Some(mine) => borrow_from_next(&pool, mine, meeting)?,
        None => Source::Host(Box::new(expert)),
    };
    let stop = AtomicBool::new(false);
    let (sender, moved) = sync_channel(1);
    let (during, moves) = std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let Some(pooled) = bring(&pool, &source)? else { continue };
                // The other end is gone when the steps are over.
                if sender.send(pooled).is_err() {
                    break;
                }
            }
            Ok(())
        });
        let mut moves = 0;
        let during = decode_run(rank, args, (batch, context), &mut |rank| take(rank, &moved, &mut moves));
        stop.store(true, Ordering::Relaxed);
        drop(moved);
        let ended = mover.join().expect("the mover does not panic");
        ended.map_err(SliceError::Pool)?;
        during.map(|(during, _)| (during, moves))
    })?;
    meeting.tell_all(())?;
    pool.let_go();
    drop(kept);
    let longest = during.steps.last().copied().unwrap_or_default();
    let seconds: f64 = during.steps.iter().map(Duration::as_secs_f64).sum();
    Ok(SliceRow::Remap(RemapReport {
        from_peer,
        batch,
        context,
        moves,
        gb_per_s: (moves as u64 * bytes) as f64 / seconds / 1e9,
        before_ms: before.median_ms(),
        step_ms: during.median_ms(),
        longest_ms: longest.as_secs_f64() * 1e3,
    }))
}

/// Maps the other ranks' pools, and takes what the next rank lends.
fn borrow_from_next(pool: &ExpertPool, mine: LentPlace, meeting: &mut Meeting) -> Result<Source, SliceError> {
    let offer = bincode::encode_to_vec(pool.offer(), bincode::config::standard());
    let offer = offer.map_err(std::io::Error::other)?;
    let own = meeting.rank();
    let loans: Vec<Loan> = meeting.tell_all((offer, mine.place, mine.checksum))?;
    let decode = |(rank, (bytes, ..)): (usize, &Loan)| {
        let decoded = bincode::decode_from_slice::<PoolOffer, _>(bytes, bincode::config::standard());
        (rank != own).then(|| decoded.map(|(offer, _)| offer).map_err(std::io::Error::other)).transpose()
    };
    let offers = loans.iter().enumerate().map(decode).collect::<Result<Vec<_>, _>>()?;
    if let Some((_, why)) = pool.reach(&offers).into_iter().next() {
        return Err(why.into());
    }
    let rank = (own + 1) % loans.len();
    let (_, place, checksum) = loans[rank];
    Ok(Source::Peer { rank, lent: LentPlace { place, checksum } })
}

/// Copies an expert to a free place; `None` when all wait for their turn.
fn bring(pool: &ExpertPool, source: &Source) -> Result<Option<PooledExpert>, PoolError> {
    let brought = match source {
        Source::Host(expert) => pool.put(expert),
        Source::Peer { rank, lent } => pool.borrow(*rank, *lent),
    };
    match brought {
        Ok(pooled) => Ok(Some(pooled)),
        Err(PoolError::Full(_)) => {
            std::thread::yield_now();
            Ok(None)
        }
        Err(why) => Err(why),
    }
}

/// Points the next slot at an expert that has arrived, if one has.
fn take(rank: &mut CudaRank, moved: &Receiver<PooledExpert>, moves: &mut usize) -> Result<(), SliceError> {
    let Ok(pooled) = moved.try_recv() else { return Ok(()) };
    let (moe_layer, slot) = (*moves / SLOTS % rank.config().moe_layers(), *moves % SLOTS);
    *moves += 1;
    Ok(rank.swap(moe_layer, slot, pooled)?)
}

/// An expert of the model's shape in FP8.
fn made_up(config: &ModelConfig) -> Expert {
    let (hidden, width) = (config.hidden_size, config.moe.intermediate_size);
    let matrix = |rows: usize, cols: usize, seed: u64| {
        let code = |at: u64| {
            let mixed = (at + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            // Any code but NaN.
            (mixed as u8) & 0xf7
        };
        let codes = (0..(rows * cols) as u64).map(code).collect();
        let scales = vec![2e-4; rows.div_ceil(128) * cols.div_ceil(128)];
        Weight::from_f8(rows, cols, codes, scales, Block::DEEPSEEK).expect("no code is NaN")
    };
    Expert { gate: matrix(width, hidden, 1), up: matrix(width, hidden, 2), down: matrix(hidden, width, 3) }
}
