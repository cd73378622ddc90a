//! `helio top`: looks once a second and draws, until somebody has seen enough.

use super::print;
use crate::args::Top;
use crate::cluster::Access;
use crate::failure::{FAILED, Failure};
use crate::show::{Terminal, top};
use anyhow::{Context, Result};
use heliostat_actors::eplb::{Eplb, EplbStatus};
use heliostat_actors::messages::GetStatus;
use heliostat_actors::monitor::Watcher;
use heliostat_runtime::cluster::Cluster;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{Event, KeyCode, KeyModifiers, poll, read};
use ratatui::layout::Rect;
use std::io::IsTerminal;
use std::time::Duration;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long an EPLB actor may take to answer.
const DEADLINE: Duration = Duration::from_millis(900);
/// Lines of a look that is printed.
const LINES: u16 = 60;

/// Watches.
pub(crate) async fn run(args: &Top) -> Result<()> {
    let cluster = Access::find(&args.target)?.connect().await?;
    let watcher = Watcher::default();
    watcher.look(&cluster).await;
    if args.once {
        tokio::time::sleep(PERIOD).await;
        watcher.look(&cluster).await;
        let maps = maps(&cluster, &watcher).await;
        return print(&text(&top::frame(&watcher.seen(), &maps), Terminal::of_stdout()));
    }
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return Err(Failure::error(
            FAILED,
            "helio top draws on a terminal; for scripts there is `helio top --once`",
        ));
    }
    let mut terminal = ratatui::try_init().context("cannot draw on this terminal")?;
    let watched = watch(&mut terminal, &cluster, &watcher).await;
    ratatui::restore();
    watched
}

async fn watch(terminal: &mut ratatui::DefaultTerminal, cluster: &Cluster, watcher: &Watcher) -> Result<()> {
    loop {
        let maps = maps(cluster, watcher).await;
        let frame = top::frame(&watcher.seen(), &maps);
        terminal.draw(|f| f.render_widget(&frame, f.area())).context("cannot draw")?;
        // Keys are awaited where they hold up no other thread of the runtime.
        let ended =
            tokio::task::spawn_blocking(move || is_over(PERIOD)).await.context("cannot read keys")??;
        if ended {
            return Ok(());
        }
        watcher.look(cluster).await;
    }
}

/// Waits for a key that ends it.
fn is_over(limit: Duration) -> Result<bool> {
    let until = std::time::Instant::now() + limit;
    while let Some(left) =
        until.checked_duration_since(std::time::Instant::now()).filter(|left| !left.is_zero())
    {
        if !poll(left)? {
            break;
        }
        match read()? {
            Event::Key(key) => {
                let interrupt =
                    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    return Ok(true);
                }
            }
            // Drawn anew at once.
            Event::Resize(..) => break,
            Event::FocusGained | Event::FocusLost | Event::Mouse(_) | Event::Paste(_) => {}
        }
    }
    Ok(false)
}

/// What lies where, of every EPLB actor that answers.
async fn maps(cluster: &Cluster, watcher: &Watcher) -> Vec<(String, EplbStatus)> {
    let names: Vec<String> = watcher.seen().balances.keys().cloned().collect();
    let mut maps = Vec::new();
    for name in names {
        let Ok(eplb) = cluster.handle::<Eplb>(&name).await else { continue };
        let Ok(json) = eplb.with_deadline(DEADLINE).ask(GetStatus).await else { continue };
        if let Ok(status) = serde_json::from_str(&json) {
            maps.push((name, status));
        }
    }
    maps
}

/// A look as lines of text, without what is empty at the end.
fn text(frame: &top::Frame, terminal: Terminal) -> String {
    let area = Rect::new(0, 0, terminal.width.min(200) as u16, LINES);
    let mut buffer = Buffer::empty(area);
    ratatui::widgets::Widget::render(frame, area, &mut buffer);
    let line = |y| (0..area.width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
    let lines: Vec<String> = (0..area.height).map(line).collect();
    let used = lines.iter().rposition(|line| !line.is_empty()).map_or(0, |last| last + 1);
    lines[..used].iter().map(|line| format!("{line}\n")).collect()
}
