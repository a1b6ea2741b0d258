//! Charts of several panels, each with a bar for each server.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{MAIN, rows};
use super::results::Results;

/// What a reader of a chart must know besides.
const NOTES: [&str; 2] = [
    "Medians (quartiles); each panel has a scale of its own. Loopback, one worker, two CPUs shared by clients and server.",
    "epoll: a raw event loop. tokio-64k, tokio-16k: buffers of 64 and 16 KiB. threads: one for each connection.",
];

/// All sizes are in pixels.
const COLUMNS: usize = 2;
const PANEL: (i32, i32) = (460, 170);
const HEADER: i32 = 84;
const MARGIN: i32 = 20;
/// From the left edge of a panel to its bars, and the longest bar.
const LABEL: i32 = 84;
const BAR: f64 = 250.0;
const ROW: i32 = 24;

/// The charts, by file name.
pub(crate) fn all(results: &Results) -> [(&'static str, String); 2] {
    let ratios = "Throughput as a ratio to a raw epoll loop: higher is better";
    [
        ("throughput.svg", ratios),
        ("latency.svg", "Latency and memory: lower is better"),
    ]
    .map(|(name, title)| (name, draw(name, title, results)))
}

fn draw(name: &str, title: &str, results: &Results) -> String {
    let rows = rows(name);
    let mut svg = String::new();
    let width = MARGIN * 2 + PANEL.0 * COLUMNS as i32;
    let height = HEADER + PANEL.1 * rows.len().div_ceil(COLUMNS) as i32;
    {
        let area = SVGBackend::with_string(&mut svg, (width as u32, height as u32));
        let area = area.into_drawing_area();
        let text = |text: &str, at: (i32, i32), size: i32, align| {
            let style = ("sans-serif", size).into_text_style(&area);
            let style = style.pos(Pos::new(align, VPos::Center));
            area.draw(&Text::new(text.to_owned(), at, style))
        };
        let drawn = area.fill(&WHITE).and_then(|()| {
            text(title, (MARGIN, 22), 20, HPos::Left)?;
            for (line, note) in (0..).zip(NOTES) {
                text(note, (MARGIN, 45 + 17 * line), 12, HPos::Left)?;
            }
            for (index, row) in rows.iter().enumerate() {
                let x = MARGIN + PANEL.0 * (index % COLUMNS) as i32;
                let y = HEADER + PANEL.1 * (index / COLUMNS) as i32;
                text(row.name, (x, y + 10), 15, HPos::Left)?;
                let bar = |(server, color)| {
                    let spread = results.spread(row.case, server, row.figure)?;
                    Some((server, color, spread))
                };
                let bars: Vec<_> = MAIN.into_iter().filter_map(bar).collect();
                let medians = bars.iter().map(|(_, _, spread)| spread.median);
                let longest = medians.fold(1e-9, f64::max);
                for (line, (server, color, spread)) in (0..).zip(bars) {
                    let top = y + 26 + ROW * line;
                    let (left, middle) = (x + LABEL, top + ROW / 2 - 2);
                    let right = left + ((spread.median / longest * BAR) as i32).max(1);
                    let problem = results.problem(row.case, server);
                    let value = row.show(spread) + problem.map_or("", |_| " (incomplete)");
                    text(server, (left - 8, middle), 13, HPos::Right)?;
                    let bar = [(left, top), (right, top + ROW - 5)];
                    area.draw(&Rectangle::new(bar, color.filled()))?;
                    text(&value, (right + 6, middle), 13, HPos::Left)?;
                }
            }
            area.present()
        });
        drawn.expect("a string can be written to");
    }
    svg
}
