//! What `helio bench` measured, as tables.

use super::{render, table};
use comfy_table::{CellAlignment, Table};
use heliostat_actors::bench::{DecodeReport, OpReport, OpsReport, PartReport, RemapReport, SliceReport};

/// Every operation.
pub(crate) fn ops(report: &OpsReport) -> String {
    let mut table = table([
        "operation",
        "rows",
        "us",
        "tflop/s",
        "gb/s",
        "floor us",
        "% of floor",
        "library us",
        "ratio",
    ]);
    for op in &report.ops {
        let OpReport { us, tflop_per_s, gb_per_s, floor_us, floor_share, .. } = *op;
        table.add_row([
            op.op.clone(),
            op.rows.to_string(),
            format!("{us:.1}"),
            number(tflop_per_s, 0),
            number(gb_per_s, 0),
            number(floor_us, 1),
            percent(floor_share),
            number(op.library_us, 1),
            number(op.library_ratio, 2),
        ]);
    }
    let library = match &report.no_library {
        Some(why) => format!("No times of cuBLASLt: {why}.\n"),
        None => {
            "Ratio: cuBLASLt's time (between GPUs NCCL's) by ours, above 1 where ours is faster. \"-\": it has none.\n"
                .into()
        }
    };
    format!(
        "{}: single operations at the shapes of DeepSeek-R1 with 9 experts per GPU.\n\
         Times are medians over replays of a recording. Weights and KV cache come from memory, activations mostly from the\n\
         second-level cache, so that small operations can beat a floor that counts their bytes at the speed of memory.\n\
         {library}\n{}",
        report.gpu,
        right(table)
    )
}

/// One rank's steps.
pub(crate) fn slice(report: &SliceReport) -> String {
    let SliceReport { measured, gpu, layers, slots, steps, chunk_tokens, prefill_attention, .. } = report;
    let graphs = if report.graphs { "recorded" } else { "launched kernel by kernel" };
    let mut text = format!(
        "{gpu}: {measured}.\n\
         {layers} layers, {slots} expert slots; {steps} decode steps timed, {graphs}; prefill in steps of {chunk_tokens} tokens, \
         {prefill_attention}.\n"
    );
    if !report.decode.is_empty() {
        text.push_str("\nDecode\n");
        text.push_str(&decode(&report.decode));
    }
    if let Some(remap) = &report.remap {
        text.push_str(&self::remap(remap));
    }
    if !report.prefill.is_empty() {
        let mut table = table(["prompt", "tokens/s/gpu"]);
        for prefill in &report.prefill {
            table.add_row([prefill.prompt.to_string(), format!("{:.0}", prefill.tokens_per_s)]);
        }
        text.push_str(&format!("\nPrefill\n{}", right(table)));
    }
    for decode in &report.decode {
        let (batch, context, step_ms) = (decode.batch, decode.context, decode.step_ms);
        let what = format!("{batch} x {context} goes, {step_ms:.2} ms when kernels overlap");
        text.push_str(&parts(&what, &decode.parts));
    }
    for prefill in &report.prefill {
        text.push_str(&parts(&format!("prefill of {} goes", prefill.prompt), &prefill.parts));
    }
    text
}

fn remap(report: &RemapReport) -> String {
    let RemapReport { from_peer, batch, context, moves, gb_per_s, before_ms, step_ms, longest_ms } = *report;
    let from = if from_peer { "the next GPU" } else { "the host" };
    format!(
        "\nWhile {moves} experts were replaced ({gb_per_s:.1} GB/s from {from}), {batch} x {context}: \
         {step_ms:.2} ms/step and {longest_ms:.2} ms the longest, {before_ms:.2} ms/step before\n"
    )
}

fn decode(reports: &[DecodeReport]) -> String {
    let mut table =
        table(["batch", "context", "ms/step", "p99 ms", "tokens/s/gpu", "host", "floor ms", "% of roofline"]);
    for decode in reports {
        table.add_row([
            decode.batch.to_string(),
            decode.context.to_string(),
            format!("{:.2}", decode.step_ms),
            format!("{:.2}", decode.step_p99_ms),
            format!("{:.0}", decode.tokens_per_s),
            percent(Some(decode.host_share)),
            format!("{:.2}", decode.floor_ms),
            percent(Some(decode.roofline_share)),
        ]);
    }
    right(table)
}

fn parts(what: &str, parts: &[PartReport]) -> String {
    let mut table =
        table(["part", "us/step", "layers", "us/layer", "% of sum", "floor us/layer", "% of floor"]);
    for part in parts {
        let PartReport { us, layers, layer_us, share, floor_layer_us, .. } = *part;
        let of_floor = floor_layer_us.zip(layer_us).map(|(floor, us)| floor / us);
        table.add_row([
            part.part.to_owned(),
            format!("{us:.0}"),
            super::or_dash(layers),
            number(layer_us, 1),
            percent(Some(share)),
            number(floor_layer_us, 1),
            percent(of_floor),
        ]);
    }
    let sum_ms = parts.iter().map(|part| part.us).sum::<f64>() / 1e3;
    format!(
        "\nWhere a step of {what}; {sum_ms:.2} ms in all, every kernel timed on its own\n{}",
        right(table)
    )
}

fn number(value: Option<f64>, digits: usize) -> String {
    super::or_dash(value.map(|value| format!("{value:.digits$}")))
}

fn percent(share: Option<f64>) -> String {
    super::or_dash(share.map(|share| format!("{:.0}%", share * 100.0)))
}

/// Numbers to the right; the first column is a name, or a number that may as well stand on the left.
fn right(mut table: Table) -> String {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    render(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use heliostat_actors::bench::PrefillReport;

    fn op(name: &str, library_us: Option<f64>) -> OpReport {
        OpReport {
            op: name.into(),
            rows: 128,
            us: 30.0,
            tflop_per_s: Some(1000.4),
            gb_per_s: Some(4046.0),
            floor_us: Some(28.23),
            floor_share: Some(0.941),
            library_us,
            library_ratio: library_us.map(|us| us / 30.0),
        }
    }

    #[test]
    fn operations_stand_in_a_table() {
        let ops = vec![op("o_proj FP8", Some(45.0)), op("experts down FP8", None)];
        let report = OpsReport { gpu: "a GPU".into(), no_library: None, ops };
        let text = super::ops(&report);
        assert!(text.starts_with("a GPU: single operations"), "{text}");
        let line = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).expect("a line");
            line[name.len()..].split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line("o_proj FP8"), "128 30.0 1000 4046 28.2 94% 45.0 1.50");
        assert_eq!(line("experts down FP8"), "128 30.0 1000 4046 28.2 94% - -");
        let report = OpsReport { no_library: Some("libcublasLt.so.13 was not found".into()), ..report };
        assert!(super::ops(&report).contains("No times of cuBLASLt: libcublasLt.so.13 was not found"));
    }

    #[test]
    fn a_slice_says_what_it_is() {
        let part = PartReport {
            part: "MLA",
            us: 13_420.0,
            layers: Some(61),
            layer_us: Some(220.0),
            share: 0.4,
            floor_layer_us: Some(184.8),
        };
        let report = SliceReport {
            measured: "one rank".into(),
            ranks: 1,
            gpu: "a GPU".into(),
            layers: 61,
            slots: 9,
            graphs: true,
            chunk_tokens: 4096,
            prefill_attention: "expanded",
            steps: 100,
            decode: vec![DecodeReport {
                batch: 128,
                context: 4096,
                step_ms: 31.0,
                step_p99_ms: 31.5,
                tokens_per_s: 4129.0,
                host_share: 0.02,
                floor_ms: 23.1,
                roofline_share: 0.745,
                parts: vec![part],
            }],
            remap: Some(RemapReport {
                from_peer: false,
                batch: 128,
                context: 4096,
                moves: 12,
                gb_per_s: 5.25,
                before_ms: 31.0,
                step_ms: 31.5,
                longest_ms: 33.0,
            }),
            prefill: vec![PrefillReport { prompt: 2048, tokens_per_s: 12_345.6, parts: Vec::new() }],
        };
        let text = slice(&report);
        let lines: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for wanted in [
            "a GPU: one rank.",
            "61 layers, 9 expert slots; 100 decode steps timed, recorded; prefill in steps of 4096 tokens, expanded.",
            "128 4096 31.00 31.50 4129 2% 23.10 74%",
            "2048 12346",
            "MLA 13420 61 220.0 40% 184.8 84%",
            "While 12 experts were replaced (5.2 GB/s from the host), 128 x 4096: 31.50 ms/step and 33.00 ms the longest, 31.00 ms/step before",
        ] {
            assert!(lines.iter().any(|line| line == wanted), "{wanted:?} is missing:\n{text}");
        }
    }
}
