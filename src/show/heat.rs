//! Numbers as cells of a heat map: colours where the terminal has them, characters elsewhere.

use super::Terminal;

/// Background colours of the xterm palette, cold to hot.
const COLOURS: [u8; 9] = [17, 18, 25, 31, 37, 71, 178, 208, 196];
/// The same as characters.
const SHADES: [char; 9] = ['.', ':', '-', '=', '+', 'o', '*', '%', '@'];

/// The step of the scale for a value relative to the mean: the mean is in the middle, twice the mean is hottest.
pub(crate) fn level(relative: f64) -> usize {
    let top = COLOURS.len() - 1;
    if relative.is_finite() { ((relative * 0.5 * top as f64).round().max(0.0) as usize).min(top) } else { 0 }
}

/// Its colour of the xterm palette.
pub(crate) fn colour(level: usize) -> u8 {
    COLOURS[level]
}

/// Its character, where there are no colours.
pub(crate) fn shade(level: usize) -> char {
    SHADES[level]
}

/// One row of cells, `width` columns each, for values relative to their mean.
pub(crate) fn row(values: &[f64], cell: usize, terminal: Terminal) -> String {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let cells = values.iter().map(|value| {
        let level = if mean > 0.0 { level(value / mean) } else { 0 };
        if terminal.colour {
            format!("\u{1b}[48;5;{}m{:cell$}\u{1b}[0m", COLOURS[level], "")
        } else {
            SHADES[level].to_string()
        }
    });
    cells.collect()
}

/// What the cells mean.
pub(crate) fn legend(terminal: Terminal) -> String {
    let cells: String = (0..COLOURS.len())
        .map(|i| match terminal.colour {
            true => format!("\u{1b}[48;5;{}m  \u{1b}[0m", COLOURS[i]),
            false => SHADES[i].to_string(),
        })
        .collect();
    format!("0 {cells} 2x the mean or more")
}

/// Sums neighbours so that at most `cells` values are left.
pub(crate) fn fold(values: &[f64], cells: usize) -> (Vec<f64>, usize) {
    let per_cell = values.len().div_ceil(cells.max(1)).max(1);
    (values.chunks(per_cell).map(|chunk| chunk.iter().sum::<f64>() / chunk.len() as f64).collect(), per_cell)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_in_the_middle_and_the_ends_do_not_overflow() {
        assert_eq!(level(1.0), 4);
        assert_eq!((level(0.0), level(2.0), level(99.0)), (0, 8, 8));
        assert_eq!((level(f64::NAN), level(-1.0)), (0, 0));
        let plain = Terminal { colour: false, width: 80 };
        assert_eq!(row(&[0.0, 1.0, 2.0], 2, plain), ".+@");
        assert_eq!(row(&[0.0, 0.0], 2, plain), "..");
    }

    #[test]
    fn wide_layers_are_folded() {
        assert_eq!(fold(&[1.0, 3.0, 5.0, 7.0, 9.0], 3), (vec![2.0, 6.0, 9.0], 2));
        assert_eq!(fold(&[1.0, 2.0], 80), (vec![1.0, 2.0], 1));
    }
}
