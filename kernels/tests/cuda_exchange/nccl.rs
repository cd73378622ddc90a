//! Rounds by NCCL. One device holds one rank of a communicator, so the rank sends to itself.

use std::time::Duration;

use heliostat_kernels::cuda::CudaError;
use heliostat_kernels::cuda::exchange::{RowFormat, Transport};
use heliostat_kernels::cuda::nccl::{Nccl, NcclId};

use super::alone;
use super::cuda_support::device;
use super::protocol::inputs;
use super::reference::Scenario;
use super::world::{Path, Rank};

const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn rounds_by_nccl_match_the_reference() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let id = match NcclId::new(&[]) {
        Err(why @ CudaError::NoLibrary { .. }) => {
            eprintln!("skipped: {why}");
            assert!(why.to_string().contains("pip install nvidia-nccl-cu13"), "{why}");
            return;
        }
        id => id.unwrap(),
    };
    let nccl = Nccl::join(&device, &[], id, (0, 1), TIMEOUT).unwrap();
    for (format, path) in [RowFormat::Fp8, RowFormat::Bf16].into_iter().zip([Path::Pushed, Path::Fused]) {
        let scenario = Scenario::one(40, 3, 160, 9, format);
        let mut rank = Rank::new(&device, &scenario, 0, Transport::Nccl);
        rank.path = path;
        rank.exchange.carry_by(nccl.clone());
        let members = [rank.member()];
        rank.connect(&members, 1, TIMEOUT);
        let check = |rank: &Rank, round: u64| {
            rank.stream.synchronize().unwrap();
            rank.verify(&inputs(&scenario, round), &format!("{format:?} round {round}"));
        };
        for round in 0..3 {
            rank.load(&inputs(&scenario, round));
            rank.round(&rank.stream).unwrap();
            check(&rank, round);
        }
        let graph = rank.stream.capture(|stream| rank.round(stream)).unwrap();
        for round in 3..8 {
            rank.load(&inputs(&scenario, round));
            graph.launch(&rank.stream).unwrap();
            check(&rank, round);
        }
    }
    nccl.status().unwrap();
    nccl.abort();
    assert!(nccl.status().unwrap_err().to_string().contains("aborted"));
}

#[test]
fn a_rank_that_does_not_join_is_an_error_in_time() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let Ok(id) = NcclId::new(&[]) else { return };
    let joined = Nccl::join(&device, &[], id, (0, 2), Duration::from_millis(500));
    let why = joined.unwrap_err().to_string();
    assert!(why.contains("took longer"), "{why}");
}
