//! How benchmarks say what they measured, for `scripts/bench_ray`.

/// One JSON object: the median of the values, with the smallest and the largest.
pub(crate) fn print(row: &str, values: &[f64], unit: &str) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (min, value, max) = (sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]);
    println!(
        "{}",
        serde_json::json!({"row": row, "value": value, "min": min, "max": max, "n": sorted.len(), "unit": unit})
    );
}
