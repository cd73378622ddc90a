//! Rounds by NCCL: rows go to mirrors of the DP ranks' heaps, and results come back from there.
//!
//! The kernels are those of the other transports. On an EP rank they see the mirrors as the DP ranks' heaps, on a DP
//! rank results arrive in one region per EP rank. NCCL's order on the stream stands in for the flags.

use super::shape::HEADER_AT;
use super::{Exchange, Member, Membership, OwnResults, Transport};
use crate::cuda::nccl::{Nccl, Transfer};
use crate::cuda::{CudaError, Stream};

impl Membership {
    /// Ids of all members, ascending. The NCCL rank of a member is its place among them.
    pub fn ranks(&self) -> Vec<u32> {
        let mut ranks: Vec<u32> =
            self.dp.iter().chain(&self.ep).flatten().map(|member| member.rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }
}

/// One end of a pair's transfers.
struct Peer {
    /// Index among the DP or EP ranks.
    index: usize,
    /// Rank of the communicator.
    nccl: u32,
}

impl Exchange {
    /// Carries rows and results by `nccl` from now on; it holds the ranks of the next [`Exchange::connect`].
    ///
    /// # Panics
    /// If the transport is another.
    pub fn carry_by(&mut self, nccl: Nccl) {
        assert_eq!(self.transport, Transport::Nccl, "the transport carries by itself");
        self.nccl = Some(nccl);
    }

    /// All ranks, between [`Exchange::signal`] and [`Exchange::layout`]: carries the first `rows` rows of each DP rank
    /// to the EP ranks, the same number on all ranks, none with more tokens. Nothing to do unless by NCCL.
    ///
    /// # Errors
    /// The communicator failed.
    pub fn carry_rows(&self, stream: &Stream, rows: usize) -> Result<(), CudaError> {
        let Some(nccl) = &self.nccl else { return Ok(()) };
        let own = self.heap.memory().address();
        let sent = self.peers_if(self.outgoing.is_some(), |members| &members.ep);
        let received = self.peers_if(self.permuted.is_some(), |members| &members.dp);
        let pieces = self.pieces(rows);
        let mut transfers = Vec::new();
        for peer in sent {
            let send = |&(at, bytes)| Transfer::Send { peer: peer.nccl, address: own + at, bytes };
            transfers.extend(pieces.iter().map(send));
        }
        for peer in received {
            let mirror = self.mirror(peer.index);
            let receive = |&(at, bytes)| Transfer::Receive { peer: peer.nccl, address: mirror + at, bytes };
            transfers.extend(pieces.iter().map(receive));
        }
        nccl.transfer(stream, &transfers)
    }

    /// All ranks, after [`Exchange::combine`] or [`Exchange::finish`]: carries the results of the first `rows` rows of
    /// each DP rank back, as [`Exchange::carry_rows`]. `own` is what combine was told; results that stayed are not sent.
    ///
    /// # Errors
    /// The communicator failed.
    pub fn carry_results(&self, stream: &Stream, rows: usize, own: OwnResults) -> Result<(), CudaError> {
        let Some(nccl) = &self.nccl else { return Ok(()) };
        let me = self.membership.as_ref().map_or(u32::MAX, |members| {
            members.ranks().binary_search(&members.rank).map_or(u32::MAX, |place| place as u32)
        });
        let travels = |peer: &&Peer| own == OwnResults::Pushed || peer.nccl != me;
        let bytes = rows * self.shape.top_k * self.shape.hidden * 2;
        let combined = |heap: u64| heap + self.geometry.combined_at;
        let mut transfers = Vec::new();
        for peer in self.peers_if(self.permuted.is_some(), |members| &members.dp).iter().filter(travels) {
            let address = combined(self.mirror(peer.index));
            transfers.push(Transfer::Send { peer: peer.nccl, address, bytes });
        }
        for peer in self.peers_if(self.outgoing.is_some(), |members| &members.ep).iter().filter(travels) {
            let region = peer.index as u64 * self.geometry.combined_stride;
            let address = combined(self.heap.memory().address()) + region;
            transfers.push(Transfer::Receive { peer: peer.nccl, address, bytes });
        }
        nccl.transfer(stream, &transfers)
    }

    /// Where DP rank `index` is mirrored.
    pub(super) fn mirror(&self, index: usize) -> u64 {
        let mirrors = self.mirrors.as_ref().map_or(0, |mirrors| mirrors.address());
        mirrors + (index * self.shape.mirror_bytes()) as u64
    }

    /// Offsets and lengths of what a DP rank sends.
    fn pieces(&self, rows: usize) -> Vec<(u64, usize)> {
        let g = &self.geometry;
        let front = g.slots_at as usize - HEADER_AT + rows * self.shape.top_k * 4;
        // Scales lie K block by K block: all of them travel.
        let scales = self.shape.tokens_max * self.shape.scale_blocks() * 4;
        let pieces =
            [(HEADER_AT as u64, front), (g.rows_at, rows * self.shape.row_bytes()), (g.scales_at, scales)];
        pieces.into_iter().filter(|&(_, bytes)| bytes > 0).collect()
    }

    /// The members of one role, if this rank deals with them.
    fn peers_if(&self, deals: bool, role: fn(&Membership) -> &Vec<Option<Member>>) -> Vec<Peer> {
        let Some(members) = self.membership.as_ref().filter(|_| deals) else { return Vec::new() };
        let ranks = members.ranks();
        let peer = |(index, member): (usize, &Option<Member>)| {
            let nccl = ranks.binary_search(&member.as_ref()?.rank).ok()? as u32;
            Some(Peer { index, nccl })
        };
        role(members).iter().enumerate().filter_map(peer).collect()
    }
}
