//! The inner loops: a register tile of up to six rows of `x` by four rows of `w`.
//!
//! Each pair of rows has an accumulator of sixteen lanes, which takes the columns in ascending steps of sixteen, the
//! last padded with zeros. Which tile a pair falls into changes nothing about its sum.
//!
//! Loops rather than closures: a closure has no target features of its own, so it would have to be inlined first.

use super::stored::Stored;
use crate::cpu::simd::math::padded;
use crate::cpu::simd::{Line, Simd};

/// Rows of `w` in a tile.
pub(in crate::cpu) const TILE_COLS: usize = 4;

type Tile<S, const M: usize> = [[<S as Simd>::V; TILE_COLS]; M];

/// Products of `M` packed rows with four rows of a stored matrix. `x` is `[step][M]`.
#[inline(always)]
pub(in crate::cpu) fn dot_stored<S: Simd, W: Stored, const M: usize>(
    simd: S,
    x: &[Line],
    w: &W,
    rows: [usize; TILE_COLS],
) -> [[f32; TILE_COLS]; M] {
    let mut acc: Tile<S, M> = [[simd.zero(); TILE_COLS]; M];
    let (mut x, _) = x.as_chunks::<M>();
    let mut rest = rows.map(|row| w.row(row));
    for run in 0.. {
        let cols = rest[0].len().min(w.run_cols());
        if cols == 0 {
            break;
        }
        let mut factors = [simd.zero(); TILE_COLS];
        for (factor, row) in factors.iter_mut().zip(rows) {
            *factor = simd.splat(w.factor(row, run));
        }
        let steps = cols / 16;
        let w4 = rest.map(|row| &row.as_chunks::<16>().0[..steps]);
        for (step, x) in x[..steps].iter().enumerate() {
            let mut wide = factors;
            for (wide, w) in wide.iter_mut().zip(w4) {
                *wide = W::widen(simd, &w[step], *wide);
            }
            accumulate(simd, &mut acc, x, wide);
        }
        if cols % 16 != 0 {
            let mut wide = factors;
            for (wide, row) in wide.iter_mut().zip(rest) {
                let tail = padded(&row[steps * 16..cols], W::Element::default());
                *wide = W::widen(simd, &tail, *wide);
            }
            accumulate(simd, &mut acc, &x[steps], wide);
        }
        rest = rest.map(|row| &row[cols..]);
        x = &x[cols.div_ceil(16)..];
    }
    sums(simd, acc)
}

/// Products of `M` packed rows with four packed rows. `x` is `[step][M]`, `w` is `[step][4]`.
#[inline(always)]
pub(in crate::cpu) fn dot_packed<S: Simd, const M: usize>(
    simd: S,
    x: &[Line],
    w: &[Line],
) -> [[f32; TILE_COLS]; M] {
    let mut acc: Tile<S, M> = [[simd.zero(); TILE_COLS]; M];
    for (x, w) in x.as_chunks::<M>().0.iter().zip(w.as_chunks::<TILE_COLS>().0) {
        let mut wide = [simd.zero(); TILE_COLS];
        for (wide, w) in wide.iter_mut().zip(w) {
            *wide = simd.load(&w.0);
        }
        accumulate(simd, &mut acc, x, wide);
    }
    sums(simd, acc)
}

#[inline(always)]
fn accumulate<S: Simd, const M: usize>(simd: S, acc: &mut Tile<S, M>, x: &[Line; M], w: [S::V; TILE_COLS]) {
    for (acc, x) in acc.iter_mut().zip(x) {
        let x = simd.load(&x.0);
        for (acc, w) in acc.iter_mut().zip(w) {
            *acc = simd.fma(x, w, *acc);
        }
    }
}

#[inline(always)]
fn sums<S: Simd, const M: usize>(simd: S, acc: Tile<S, M>) -> [[f32; TILE_COLS]; M] {
    let mut sums = [[0.0; TILE_COLS]; M];
    let ((acc, acc_last), (out, out_last)) = (acc.as_chunks::<2>(), sums.as_chunks_mut::<2>());
    for (out, [a, b]) in out.iter_mut().zip(acc) {
        *out = simd.sum8(*a, *b);
    }
    for (out, acc) in out_last.iter_mut().zip(acc_last) {
        *out = simd.sum4(*acc);
    }
    sums
}

/// Widens four rows of a stored matrix to `[step][4]`.
#[inline(always)]
pub(in crate::cpu) fn pack_stored<S: Simd, W: Stored>(
    simd: S,
    w: &W,
    rows: [usize; TILE_COLS],
    out: &mut [Line],
) {
    for (j, row) in rows.into_iter().enumerate() {
        let mut lines = out.iter_mut().skip(j).step_by(TILE_COLS);
        let runs = w.row(row).chunks(w.run_cols().min(w.cols()).max(1));
        for (run, cols) in runs.enumerate() {
            let factor = simd.splat(w.factor(row, run));
            let (steps, tail) = cols.as_chunks::<16>();
            for (step, line) in steps.iter().zip(&mut lines) {
                simd.store(W::widen(simd, step, factor), &mut line.0);
            }
            if !tail.is_empty()
                && let Some(line) = lines.next()
            {
                let step = padded(tail, W::Element::default());
                simd.store(W::widen(simd, &step, factor), &mut line.0);
            }
        }
    }
}

/// Packs rows of `cols` that begin at `starts` to `[step][rows]`, padded with zeros.
pub(in crate::cpu) fn pack_rows<'a>(rows: impl ExactSizeIterator<Item = &'a [f32]>, out: &mut [Line]) {
    let count = rows.len();
    for (i, row) in rows.enumerate() {
        let mut lines = out.iter_mut().skip(i).step_by(count);
        let (steps, tail) = row.as_chunks::<16>();
        for (step, line) in steps.iter().zip(&mut lines) {
            line.0 = *step;
        }
        if !tail.is_empty()
            && let Some(line) = lines.next()
        {
            line.0 = padded(tail, 0.0);
        }
    }
}
