//! Rounds of the exchange between GPUs, each a rank in a process of its own: by our own kernels over NVLink, beside NCCL.

use super::exchange::{CALLS, Rank, Seat};
use super::{Bench, OpReport};
use crate::bench::meeting::Meeting;
use crate::bench::slice::SliceError;
use heliostat_kernels::cuda::CudaError;
use heliostat_kernels::cuda::exchange::Transport;
use heliostat_kernels::cuda::nccl::{Nccl, NcclId};

/// A link of 18 lanes, one way, as a copy reaches it.
const NVLINK_BYTES_PER_S: f64 = 397e9;

/// Microseconds of a round by one transport.
struct Times {
    /// Until the rows are where the experts are, and all ranks know it.
    dispatch: f64,
    /// All of it.
    round: f64,
}

/// Measures a round of `rows` tokens per rank on all ranks of `meeting`. Without peers there is nothing to measure.
pub(super) fn measure(bench: &mut Bench<'_>, rows: usize, meeting: &mut Meeting) -> Result<(), SliceError> {
    let ranks = meeting.ranks();
    if ranks == 1 {
        return Ok(());
    }
    let own = times(bench, rows, meeting, Transport::Peer)?;
    let nccl = times(bench, rows, meeting, Transport::Nccl)?;
    // What leaves a GPU: choices of experts that lie elsewhere.
    let away = |bytes: usize| (bytes * (ranks - 1)).div_ceil(ranks);
    let (sent, returned) = (away(rows * Rank::sent_bytes()), away(rows * Rank::returned_bytes()));
    for (name, own, nccl, bytes) in [
        ("dispatch", own.dispatch, nccl.dispatch, sent),
        ("combine and reduce", own.round - own.dispatch, nccl.round - nccl.dispatch, returned),
        ("whole round", own.round, nccl.round, sent + returned),
    ] {
        let name = format!("exchange of {ranks} GPUs: {name}");
        let floor_us = bytes as f64 / NVLINK_BYTES_PER_S * 1e6;
        let report = OpReport {
            gb_per_s: Some(bytes as f64 / own / 1e3),
            floor_us: Some(floor_us),
            floor_share: Some(floor_us / own),
            ..OpReport::new((&name, rows), own, None)
        };
        bench.note(report.beside(Some(nccl)));
    }
    Ok(())
}

fn times(
    bench: &mut Bench<'_>,
    rows: usize,
    meeting: &mut Meeting,
    transport: Transport,
) -> Result<Times, SliceError> {
    let seat = Seat { rank: meeting.rank(), ranks: meeting.ranks(), transport };
    let mut rank = Rank::new(bench, rows, seat)?;
    let by_nccl = transport == Transport::Nccl;
    let id = (by_nccl && seat.rank == 0).then(|| NcclId::new(&bench.library_dirs)).transpose()?;
    let (heaps, id) = meeting.meet(rank.handle(), id)?;
    if by_nccl {
        let id = id.ok_or_else(|| CudaError::Other("the first rank named no communicator".to_owned()))?;
        let place = (seat.rank as u32, seat.ranks as u32);
        rank.carry_by(Nccl::join(&bench.device, &bench.library_dirs, id, place, Rank::TIMEOUT)?);
    }
    rank.connect(&bench.stream, &heaps)?;
    rank.round(&bench.stream)?;
    rank.verify(&bench.stream)?;
    let dispatch = bench.time_us(CALLS, |stream, _| rank.dispatch(stream))?;
    let round = bench.time_us(CALLS, |stream, _| rank.round(stream))?;
    rank.verify(&bench.stream)?;
    // Nobody lets go of its memory before all are through.
    meeting.meet(rank.handle(), None)?;
    Ok(Times { dispatch, round })
}
