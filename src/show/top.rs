//! What `helio top` shows: the cluster in a few lines, the served models, the ranks, the load of the experts.
//!
//! Pure: what was seen becomes lines; how many of them fit is the terminal's business. Heat is told by characters and by
//! colours, so that a copy of the screen still says it.

use super::{heat, seconds};
use heliostat_actors::eplb::EplbStatus;
use heliostat_actors::monitor::{Balance, Sample, Seen, Served};
use heliostat_engine::request::StepPhases;
use heliostat_runtime::cluster::status::{ActorState, ClusterStatus, NodeState};
use heliostat_runtime::group::MemberState;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Widget};

/// Bars of a sparkline, low to high.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Moments in a sparkline.
const SPARK: usize = 48;
/// Ranks that are listed.
const RANKS_MAX: usize = 16;
/// Layers whose experts are drawn.
const LAYERS_MAX: usize = 24;
/// Cells of a layer.
const CELLS_MAX: usize = 64;

/// Lines to draw.
pub(crate) struct Frame(Vec<Line<'static>>);

impl Widget for &Frame {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        Paragraph::new(self.0.clone()).render(area, buffer);
    }
}

/// Everything that was seen, most important first.
pub(crate) fn frame(seen: &Seen, maps: &[(String, EplbStatus)]) -> Frame {
    let mut lines = Vec::new();
    match &seen.status {
        Some(status) => cluster(status, &mut lines),
        None => lines.push(Line::styled("the head does not answer", bad())),
    }
    for served in seen.models.values() {
        serving(served, &mut lines);
    }
    for (name, map) in maps {
        experts(name, map, seen.balances.get(name), &mut lines);
    }
    Frame(lines)
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

fn dim() -> Style {
    Style::new().fg(Color::DarkGray)
}

fn bad() -> Style {
    Style::new().fg(Color::Red)
}

/// `name value`, and red where it is not as it should be.
fn count(name: &str, ready: usize, all: usize) -> [Span<'static>; 2] {
    let style = if ready == all { bold() } else { bad() };
    [Span::styled(format!("  {name} "), dim()), Span::styled(format!("{ready}/{all}"), style)]
}

fn cluster(status: &ClusterStatus, lines: &mut Vec<Line<'static>>) {
    let ready = |state: &ActorState| matches!(state, ActorState::Ready);
    let nodes = status.nodes.iter().filter(|node| node.state == NodeState::Ready).count();
    let devices: Vec<_> = status.nodes.iter().flat_map(|node| &node.devices).collect();
    let mut head = vec![
        Span::styled("heliostat", bold()),
        Span::styled(format!("  head {} up {}", status.head.endpoint, seconds(status.head.uptime_s)), dim()),
    ];
    head.extend(count("nodes", nodes, status.nodes.len()));
    let owned = devices.iter().filter(|device| device.owner.is_some()).count();
    head.extend([
        Span::styled("  devices ", dim()),
        Span::styled(format!("{owned}/{} used", devices.len()), bold()),
    ]);
    let actors = status.actors.iter().filter(|actor| ready(&actor.state)).count();
    head.extend(count("actors", actors, status.actors.len()));
    lines.push(Line::from(head));
    let mut groups = Vec::new();
    for group in &status.groups {
        let ready = group.members.iter().filter(|member| member.state == MemberState::Ready).count();
        groups.extend(count(&format!("group {}", group.name), ready, group.members.len()));
        groups.push(Span::styled(format!(" membership epoch {}", group.epoch), dim()));
    }
    if !groups.is_empty() {
        lines.push(Line::from(groups));
    }
    for actor in status.actors.iter().filter(|actor| !ready(&actor.state)).take(4) {
        let state = match &actor.state {
            ActorState::Pending { reason } => format!("pending: {reason}"),
            ActorState::Starting { .. } => "starting".to_owned(),
            ActorState::Ready => "ready".to_owned(),
            ActorState::Restarting { attempt, .. } => format!("restarting, attempt {attempt}"),
            ActorState::Stopping => "stopping".to_owned(),
            ActorState::Dead { cause } => format!("dead: {cause}"),
        };
        lines.push(Line::styled(format!("  {} is {state}", actor.name), bad()));
    }
}

fn serving(served: &Served, lines: &mut Vec<Line<'static>>) {
    let Some(report) = served.line.report() else { return };
    let samples: Vec<&Sample> = served.line.since(0).collect();
    let now = samples.last().copied().cloned().unwrap_or_default();
    lines.push(Line::default());
    lines.push(Line::from(vec![
        Span::styled(report.model.clone(), bold()),
        Span::styled(
            format!(
                "  {}, {} sequences in flight, {} ended, {} moved",
                served.ingresses(),
                report.in_flight,
                report.ended,
                report.moves
            ),
            dim(),
        ),
    ]));
    let tokens: Vec<f64> = samples.iter().map(|sample| sample.tokens_per_s).collect();
    lines.push(Line::from(vec![
        Span::styled(format!("{:>9.0}", now.tokens_per_s), bold()),
        Span::raw(" tokens/s "),
        Span::styled(spark(&tokens), Style::new().fg(Color::Cyan)),
        Span::styled(
            format!("  {:.0} prompt tokens/s, {:.1} requests/s", now.prompt_tokens_per_s, now.requests_per_s),
            dim(),
        ),
    ]));
    let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}"));
    lines.push(Line::from(vec![
        Span::raw(format!("{:>9} ms to first token (p99 {})", ms(now.ttft_p50_ms), ms(now.ttft_p99_ms))),
        Span::raw(format!("   {} ms between tokens (p99 {})", ms(now.itl_p50_ms), ms(now.itl_p99_ms))),
    ]));
    if let Some(phases) = now.phases_ms {
        let total: f64 = phases.iter().sum();
        let mut step = vec![Span::raw(format!("{total:>9.2} ms a step: "))];
        for (name, ms) in StepPhases::NAMES.iter().zip(phases).filter(|(_, ms)| *ms > 0.0) {
            step.push(Span::styled(format!("{name} "), dim()));
            step.push(Span::raw(format!("{:.0} %  ", 100.0 * ms / total.max(f64::MIN_POSITIVE))));
        }
        lines.push(Line::from(step));
    }
    lines.push(Line::styled(
        "     RANK  RUNNING  WAITING  KV CACHE                  LAST STEP    STEPS",
        dim(),
    ));
    for (rank, stats) in report.ranks.iter().take(RANKS_MAX) {
        let used = f64::from(stats.kv_blocks_used) / f64::from(stats.kv_blocks.max(1));
        let style = if used > 0.9 { bad() } else { Style::new().fg(Color::Green) };
        lines.push(Line::from(vec![
            Span::raw(format!("{rank:>9}{:>9}{:>9}  ", stats.running, stats.waiting)),
            Span::styled(gauge(used, 16), style),
            Span::raw(format!(
                " {:>4.0} %{:>12.1} ms{:>9}",
                100.0 * used,
                stats.step_us as f64 / 1e3,
                stats.steps
            )),
        ]));
    }
    if report.ranks.len() > RANKS_MAX {
        lines.push(Line::styled(
            format!("          and {} more ranks", report.ranks.len() - RANKS_MAX),
            dim(),
        ));
    }
}

fn experts(name: &str, map: &EplbStatus, balance: Option<&Balance>, lines: &mut Vec<Line<'static>>) {
    let over_time: Vec<f64> = balance
        .iter()
        .flat_map(|balance| balance.since(0))
        .map(|(_, pulse)| pulse.balancedness.avg)
        .collect();
    lines.push(Line::default());
    lines.push(Line::from(vec![
        Span::styled(name.to_owned(), bold()),
        Span::styled(
            format!(
                "  map epoch {}, {} of {} ranks, {} slots a rank, {}",
                map.map_epoch, map.ready, map.size, map.slots_per_rank, map.policy
            ),
            dim(),
        ),
        Span::raw(if map.open.is_some() { "  remapping" } else { "" }),
    ]));
    lines.push(Line::from(vec![
        Span::styled(format!("{:>9.3}", map.balancedness.avg), bold()),
        Span::raw(" balancedness "),
        Span::styled(spark(&over_time), Style::new().fg(Color::Green)),
        Span::styled(format!("  worst layer {:.3}", map.balancedness.min), dim()),
    ]));
    if let Some(last) = map.history.first() {
        lines.push(Line::styled(
            format!(
                "          remap {}: {} moves, {} ms, {:.3} -> {:.3}",
                last.epoch, last.moves, last.duration_ms, last.balancedness_before, last.balancedness_planned
            ),
            dim(),
        ));
    }
    let widest = map.layers.iter().map(|layer| layer.expert_loads.len()).max().unwrap_or_default();
    lines.push(Line::styled(
        format!("    LAYER  LOAD OF {widest} EXPERTS   . is none, @ twice the mean or more"),
        dim(),
    ));
    for layer in map.layers.iter().take(LAYERS_MAX) {
        let loads: Vec<f64> = layer.expert_loads.iter().map(|&load| load as f64).collect();
        let (cells, _) = heat::fold(&loads, CELLS_MAX);
        let mean = cells.iter().sum::<f64>() / cells.len().max(1) as f64;
        let mut spans = vec![Span::styled(format!("{:>9}  ", layer.layer), dim())];
        spans.extend(cells.into_iter().map(|load| {
            let level = heat::level(if mean > 0.0 { load / mean } else { 0.0 });
            let style = Style::new().bg(Color::Indexed(heat::colour(level))).fg(Color::White);
            Span::styled(heat::shade(level).to_string(), style)
        }));
        let balanced = layer.balancedness.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        spans.push(Span::raw(format!("  {balanced}")));
        lines.push(Line::from(spans));
    }
    if map.layers.len() > LAYERS_MAX {
        lines.push(Line::styled(
            format!("          and {} more layers", map.layers.len() - LAYERS_MAX),
            dim(),
        ));
    }
}

/// The last moments as bars, the highest full.
fn spark(values: &[f64]) -> String {
    let values = &values[values.len().saturating_sub(SPARK)..];
    let top = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let bar = |value: &f64| BARS[((value / top * 7.0).round().max(0.0) as usize).min(7)];
    values.iter().map(bar).collect()
}

/// A share of one as a bar of so many cells.
fn gauge(share: f64, cells: usize) -> String {
    let full = ((share * cells as f64).round().max(0.0) as usize).min(cells);
    format!("{}{}", "█".repeat(full), "░".repeat(cells - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_do_not_overflow() {
        assert_eq!(spark(&[]), "");
        assert_eq!(spark(&[0.0, 0.0]), "▁▁");
        assert_eq!(spark(&[0.0, 5.0, 10.0]), "▁▅█");
        assert_eq!((gauge(0.5, 4), gauge(7.0, 2), gauge(-1.0, 2)), ("██░░".into(), "██".into(), "░░".into()));
    }

    #[test]
    fn a_cluster_that_says_nothing_is_shown_as_that() {
        let Frame(lines) = frame(&Seen::default(), &[]);
        assert_eq!(lines.len(), 1);
        assert!(lines[0].to_string().contains("does not answer"));
    }
}
