//! Products of activations and weights: `y = x w^T`.

pub(super) mod stored;
pub(super) mod tile;

use std::ops::Range;

use self::stored::{Bf16Matrix, F8Matrix, F32Matrix, Stored};
use self::tile::{TILE_COLS, dot_packed, dot_stored, pack_rows, pack_stored};
use super::Cpu;
use super::output::Output;
use super::scratch::Scratch;
use super::simd::{Kernel, Line, Simd};
use crate::weight::{Elements, Weight};

/// Lines of a widened panel of weight rows: a quarter of a megabyte, which stays in the second cache.
const PANEL_LINES: usize = 4096;

impl Cpu {
    /// `y[m][n] = sum_k x[m][k] w[n][k]`; the number of rows is `x.len() / w.cols()`.
    ///
    /// # Panics
    /// If `x` is not whole rows of `w.cols()`, or `y` not as many rows of `w.rows()`.
    pub fn matmul(&self, x: &[f32], w: &Weight, y: &mut [f32]) {
        self.matmul_heads(x, 1, w, y);
    }

    /// A product per head: `y[t][h][n] = sum_k x[t][h][k] w[h * n_per_head + n][k]`, where `w` holds the matrices of
    /// all heads one above the other.
    ///
    /// # Panics
    /// If `heads` does not divide `w.rows()`, or the lengths of `x` and `y` do not fit.
    pub fn matmul_heads(&self, x: &[f32], heads: usize, w: &Weight, y: &mut [f32]) {
        let (n, k) = (w.rows(), w.cols());
        assert!(heads > 0 && n.is_multiple_of(heads), "matmul: {n} rows of w, {heads} heads");
        assert!(k > 0 && x.len().is_multiple_of(heads * k), "matmul: {} values of x, rows of {k}", x.len());
        let m = x.len() / (heads * k);
        assert_eq!(y.len(), m * n, "matmul: length of y");
        if y.is_empty() {
            return;
        }
        match w.elements() {
            Elements::F32(values) => self.matmul_stored(x, heads, F32Matrix(values, k), y),
            Elements::Bf16(bits) => self.matmul_stored(x, heads, Bf16Matrix(bits, k), y),
            Elements::F8(f8) => self.matmul_stored(x, heads, F8Matrix(f8, k), y),
        }
    }

    fn matmul_stored<W: Stored>(&self, x: &[f32], heads: usize, w: W, y: &mut [f32]) {
        let k = w.cols();
        let m = x.len() / (heads * k);
        let n = y.len() / m;
        let steps = k.div_ceil(16);
        let tile_rows = self.level.tile_rows();
        let mut packed = self.scratch.lines(heads * m * steps);
        for head in 0..heads {
            let packed = &mut packed[head * m * steps..(head + 1) * m * steps];
            for (tile, out) in packed.chunks_mut(tile_rows * steps).enumerate() {
                let first = tile * tile_rows;
                let rows = (first..m.min(first + tile_rows)).map(|row| {
                    let at = (row * heads + head) * k;
                    &x[at..at + k]
                });
                pack_rows(rows, out);
            }
        }
        // A few jobs per thread, so that a late thread does not hold up the others.
        let jobs_per_head = (4 * self.threads()).div_ceil(heads).min((n / heads).div_ceil(TILE_COLS));
        let cols_per_job = (n / heads).div_ceil(jobs_per_head).next_multiple_of(TILE_COLS);
        let y = Output::new(y);
        self.for_each(heads * jobs_per_head, m * n * k, |job| {
            let (head, part) = (job / jobs_per_head, job % jobs_per_head);
            let (start, end) = (head * (n / heads), (head + 1) * (n / heads));
            let columns =
                (start + part * cols_per_job).min(end)..(start + (part + 1) * cols_per_job).min(end);
            let x = &packed[head * m * steps..(head + 1) * m * steps];
            self.level.run(Columns { x, m, w, columns, y, y_stride: n, scratch: &self.scratch });
        });
    }
}

/// The product of all rows with some columns of the output (rows of `w`).
struct Columns<'a, W> {
    /// Tiles of `TILE_ROWS` rows, `[step][row]` each.
    x: &'a [Line],
    m: usize,
    w: W,
    columns: Range<usize>,
    y: Output<'a>,
    y_stride: usize,
    scratch: &'a Scratch,
}

impl<W: Stored> Kernel for Columns<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if self.columns.is_empty() {
            return;
        }
        if self.m > S::TILE_ROWS {
            return self.run_panels(simd);
        }
        match self.m {
            1 => self.run_stored::<S, 1>(simd),
            2 => self.run_stored::<S, 2>(simd),
            3 => self.run_stored::<S, 3>(simd),
            4 => self.run_stored::<S, 4>(simd),
            5 => self.run_stored::<S, 5>(simd),
            _ => self.run_stored::<S, 6>(simd),
        }
    }
}

impl<W: Stored> Columns<'_, W> {
    /// Up to a tile of rows: each weight is widened in registers and used at once.
    #[inline(always)]
    fn run_stored<S: Simd, const M: usize>(&self, simd: S) {
        for column in self.columns.clone().step_by(TILE_COLS) {
            let sums = dot_stored::<S, W, M>(simd, self.x, &self.w, self.tile(column));
            self.write(0, column, &sums);
        }
    }

    /// Many rows: a panel of weight rows is widened once and used by all of them.
    #[inline(always)]
    fn run_panels<S: Simd>(&self, simd: S) {
        let steps = self.w.cols().div_ceil(16);
        let group = steps * TILE_COLS;
        let groups = (PANEL_LINES / group).max(1).min(self.columns.len().div_ceil(TILE_COLS));
        let mut panel = self.scratch.lines(groups * group);
        for first in self.columns.clone().step_by(groups * TILE_COLS) {
            let columns = first..self.columns.end.min(first + groups * TILE_COLS);
            for (column, panel) in columns.clone().step_by(TILE_COLS).zip(panel.chunks_exact_mut(group)) {
                pack_stored(simd, &self.w, self.tile(column), panel);
            }
            for (index, x) in self.x.chunks(steps * S::TILE_ROWS).enumerate() {
                let row = index * S::TILE_ROWS;
                for (column, w) in columns.clone().step_by(TILE_COLS).zip(panel.chunks_exact(group)) {
                    match x.len() / steps {
                        1 => self.write(row, column, &dot_packed::<S, 1>(simd, x, w)),
                        2 => self.write(row, column, &dot_packed::<S, 2>(simd, x, w)),
                        3 => self.write(row, column, &dot_packed::<S, 3>(simd, x, w)),
                        4 => self.write(row, column, &dot_packed::<S, 4>(simd, x, w)),
                        5 => self.write(row, column, &dot_packed::<S, 5>(simd, x, w)),
                        _ => self.write(row, column, &dot_packed::<S, 6>(simd, x, w)),
                    }
                }
            }
        }
    }

    /// Rows of `w` of the tile at `column`; behind the end the last one is repeated, and its results dropped.
    #[inline(always)]
    fn tile(&self, column: usize) -> [usize; TILE_COLS] {
        let last = self.columns.end - 1;
        [column, last.min(column + 1), last.min(column + 2), last.min(column + 3)]
    }

    #[inline(always)]
    fn write<const M: usize>(&self, row: usize, column: usize, sums: &[[f32; TILE_COLS]; M]) {
        let count = TILE_COLS.min(self.columns.end - column);
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: only this job writes its columns of `y`.
            unsafe { self.y.write((row + i) * self.y_stride + column, &sums[..count]) }
        }
    }
}

impl Cpu {
    /// Copies rows of `w` as f32: `out[i] = w[ids[i]]`.
    ///
    /// # Panics
    /// If an id is not a row of `w`, or `out` is not `ids.len()` rows.
    pub fn gather(&self, w: &Weight, ids: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), ids.len() * w.cols(), "gather: length of out");
        for (out, &id) in out.chunks_exact_mut(w.cols()).zip(ids) {
            w.read_row(id as usize, out);
        }
    }
}
