//! `helio eplb show` as text: balancedness, heat map of load, map of slots, history of remaps.

use super::{Terminal, heat, render, table};
use heliostat_actors::eplb::{EplbStatus, LayerStatus, Remap, Trigger};
use heliostat_actors::messages::PlanEnd;
use std::fmt::Write;

/// Columns before the cells of the heat map.
const MARGIN: usize = 22;
/// Remaps of the history that are shown.
const HISTORY_MAX: usize = 8;

/// Everything on one screen (for a small model).
pub(crate) fn show(status: &EplbStatus, terminal: Terminal) -> String {
    let mut text = summary(status, terminal);
    text.push_str(&heat_map(status, terminal));
    text.push_str(&slot_map(status, terminal));
    text.push_str(&history(status));
    text
}

fn summary(status: &EplbStatus, terminal: Terminal) -> String {
    let pace = match status.enabled {
        true => format!("every {} steps", status.step_interval),
        false => "only when asked".into(),
    };
    let mut text = format!(
        "map epoch {}: {} ranks x {} slots; policy {}, {pace}; {} of {} ranks ready (membership epoch {})\n",
        status.map_epoch,
        status.ranks,
        status.slots_per_rank,
        status.policy,
        status.ready,
        status.size,
        status.membership_epoch
    );
    let b = &status.balancedness;
    let _ = if status.layers.iter().any(|layer| layer.balancedness.is_some()) {
        let avg = terminal.style("1", &format!("{:.3}", b.avg));
        writeln!(
            text,
            "balancedness {avg} (min {:.3}, p50 {:.3}, max {:.3}) over the last {} of {} steps",
            b.min, b.p50, b.max, status.window_steps, status.window_size
        )
    } else {
        writeln!(text, "no load was recorded yet: send requests first")
    };
    if let Some(open) = &status.open {
        let _ = writeln!(
            text,
            "remap {} under way: {} of {} layers committed, {} moves, {} ms",
            open.epoch, open.layers_committed, open.layers, open.moves, open.duration_ms
        );
    }
    text
}

fn heat_map(status: &EplbStatus, terminal: Terminal) -> String {
    let experts = status.layers.first().map_or(0, |layer| layer.expert_loads.len());
    if experts == 0 {
        return String::new();
    }
    let room = terminal.width.saturating_sub(MARGIN).max(16);
    let cell = if terminal.colour && experts * 2 <= room { 2 } else { 1 };
    let mut lines = String::new();
    let mut per_cell = 1;
    for layer in &status.layers {
        let loads: Vec<f64> = layer.expert_loads.iter().map(|&n| n as f64).collect();
        let (cells, folded) = heat::fold(&loads, room / cell);
        per_cell = folded;
        let balance = layer.balancedness.map_or_else(|| "    -".into(), |b| format!("{b:.3}"));
        let _ = writeln!(lines, "{:>5}  {balance:>12}  {}", layer.layer, heat::row(&cells, cell, terminal));
    }
    let unit = if per_cell == 1 { "experts".into() } else { format!("experts, {per_cell} per cell") };
    let title = terminal.style("1", &format!("Load: layers x {experts} {unit}"));
    format!("\n{title}   {}\nLAYER  BALANCEDNESS  EXPERT 0 ...\n{lines}", heat::legend(terminal))
}

fn slot_map(status: &EplbStatus, terminal: Terminal) -> String {
    let slots = status.layers.first().map_or(0, |layer| layer.physical_to_logical.len());
    let digits =
        status.layers.iter().flat_map(|l| &l.physical_to_logical).max().map_or(1, |e| e.to_string().len());
    let width = 7 + slots * (digits + 1) + status.ranks as usize * 2;
    let title = terminal.style("1", "Slots: expert of each slot, by rank");
    if slots == 0 || width > terminal.width.max(180) {
        return format!("\n{title}\n{slots} slots per layer are too many to draw: helio eplb show --json\n");
    }
    let bold = if terminal.colour { "bold: has copies" } else { "*: has copies" };
    let mut text = format!("\n{title}   ({bold})\n");
    for layer in &status.layers {
        let _ = writeln!(text, "{:>5}  {}", layer.layer, slots_of(layer, status, digits, terminal));
    }
    text
}

fn slots_of(layer: &LayerStatus, status: &EplbStatus, digits: usize, terminal: Terminal) -> String {
    let per_rank = (status.slots_per_rank as usize).max(1);
    let slot = |&expert: &u32| {
        let copies = layer.replica_counts.get(expert as usize).copied().unwrap_or(1);
        match (copies > 1, terminal.colour) {
            (true, true) => terminal.style("1;33", &format!("{expert:>digits$}")),
            (true, false) => format!("{:>width$}", format!("{expert}*"), width = digits + 1),
            (false, true) => format!("{expert:>digits$}"),
            (false, false) => format!("{expert:>digits$} "),
        }
    };
    let ranks = layer.physical_to_logical.chunks(per_rank);
    let between = if terminal.colour { " " } else { "" };
    let ranks: Vec<String> =
        ranks.map(|rank| rank.iter().map(slot).collect::<Vec<_>>().join(between)).collect();
    ranks.join(" | ").trim_end().to_string()
}

fn history(status: &EplbStatus) -> String {
    if status.history.is_empty() {
        return "\nNo remap yet: helio eplb rebalance\n".into();
    }
    let mut table = table([
        "remap",
        "by",
        "end",
        "layers",
        "moves",
        "fetched",
        "took",
        "longest step",
        "median",
        "balancedness",
    ]);
    for remap in status.history.iter().take(HISTORY_MAX) {
        let steps = &remap.steps;
        table.add_row([
            remap.epoch.to_string(),
            match remap.trigger {
                Trigger::Interval => "interval".into(),
                Trigger::Request => "request".into(),
            },
            end(remap),
            format!("{}/{}", remap.layers_committed, remap.layers),
            remap.moves.to_string(),
            fetched(remap),
            format!("{} ms", remap.duration_ms),
            match steps.count {
                0 => "idle".into(),
                _ => format!("{:.1} ms", steps.longest_us as f64 / 1e3),
            },
            format!("{:.1} ms", steps.before_median_us as f64 / 1e3),
            format!("{:.3} -> {:.3}", remap.balancedness_before, remap.balancedness_planned),
        ]);
    }
    format!("\n{}", render(&table))
}

/// Bytes by the way they came.
fn fetched(remap: &Remap) -> String {
    let paths = remap.moved.paths().into_iter().filter(|(_, carried)| carried.experts > 0);
    let paths: Vec<String> =
        paths.map(|(path, carried)| format!("{} {path}", indicatif::BinaryBytes(carried.bytes))).collect();
    if paths.is_empty() { "nothing".into() } else { paths.join(", ") }
}

fn end(remap: &Remap) -> String {
    match (remap.end, &remap.error) {
        (None, _) => "under way".into(),
        (Some(PlanEnd::Committed), _) => "committed".into(),
        (Some(PlanEnd::RolledBack), None) => "rolled back".into(),
        (Some(PlanEnd::RolledBack), Some(error)) => format!("rolled back: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use heliostat_actors::eplb::{Balancedness, Totals};
    use heliostat_actors::messages::{Carried, Moved, StepTimes};

    fn status() -> EplbStatus {
        let layer = LayerStatus {
            layer: 0,
            physical_to_logical: vec![0, 1, 2, 3, 2, 0],
            replica_counts: vec![2, 1, 2, 1],
            expert_loads: vec![40, 10, 30, 0],
            rank_loads: vec![45.0, 35.0],
            balancedness: Some(0.889),
        };
        let remap = Remap {
            epoch: 3,
            trigger: Trigger::Request,
            started_at_ms: 0,
            duration_ms: 41,
            end: Some(PlanEnd::RolledBack),
            error: Some("rank 1 was silent".into()),
            layers: 5,
            layers_committed: 2,
            moves: 17,
            moved: Moved {
                nvlink: Carried { experts: 16, bytes: 3 << 20 },
                disk: Carried { experts: 1, bytes: 1 << 10 },
                ..Moved::default()
            },
            balancedness_before: 0.6,
            balancedness_planned: 0.95,
            steps: StepTimes { count: 9, longest_us: 5200, median_us: 4000, before_median_us: 4100 },
        };
        EplbStatus {
            map_epoch: 3,
            membership_epoch: 2,
            enabled: true,
            policy: "deepseek".into(),
            step_interval: 3000,
            window_steps: 80,
            window_size: 1000,
            ranks: 2,
            ready: 2,
            size: 2,
            slots_per_rank: 3,
            layers: vec![layer],
            balancedness: Balancedness::of([0.889]),
            totals: Totals::default(),
            open: None,
            history: vec![remap],
        }
    }

    #[test]
    fn it_can_be_read_without_colours() {
        let text = show(&status(), Terminal { colour: false, width: 100 });
        assert!(!text.contains('\u{1b}'), "{text}");
        assert!(text.contains("    0         0.889  @-*.\n"), "{text}");
        assert!(text.contains("    0  0*1 2* | 3 2*0*\n"), "{text}");
        assert!(text.contains("rolled back: rank 1 was silent"), "{text}");
        assert!(
            text.contains("5.2 ms")
                && text.contains("3.00 MiB nvlink, 1.00 KiB disk")
                && text.contains("0.600 -> 0.950"),
            "{text}"
        );
    }

    #[test]
    fn colours_are_closed_on_every_line() {
        let text = show(&status(), Terminal { colour: true, width: 100 });
        assert!(text.contains("\u{1b}[48;5;"));
        for line in text.lines().filter(|line| line.contains("\u{1b}[")) {
            assert!(line.rfind("\u{1b}[0m") >= line.rfind("\u{1b}[4"), "{line}");
        }
    }
}
