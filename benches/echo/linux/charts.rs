//! A chart of several panels, each with a bar for each server.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// The bars of one figure: server, value, and the value as text.
pub(crate) struct Panel {
    pub(crate) title: &'static str,
    pub(crate) bars: Vec<(&'static str, f64, String)>,
}

/// All sizes are in pixels.
const COLUMNS: usize = 2;
const PANEL: (i32, i32) = (460, 170);
const HEADER: i32 = 84;
const MARGIN: i32 = 20;
/// From the left edge of a panel to its bars, and the longest bar.
const LABEL: i32 = 84;
const BAR: i32 = 250;
const ROW: i32 = 24;

/// The same color for a server in every chart: this one stands out, the reference is dark.
fn color(server: &str) -> RGBColor {
    match server {
        "echoserver" => RGBColor(0xd1, 0x49, 0x5b),
        "epoll" => RGBColor(0x4a, 0x4a, 0x4a),
        "tokio-64k" => RGBColor(0x2e, 0x86, 0xab),
        "tokio-16k" => RGBColor(0x8f, 0xc1, 0xd9),
        _ => RGBColor(0xb8, 0xb0, 0xa0),
    }
}

/// Returns the chart as SVG.
pub(crate) fn draw(title: &str, notes: &[&str], panels: &[Panel]) -> String {
    let mut svg = String::new();
    let width = MARGIN * 2 + PANEL.0 * COLUMNS as i32;
    let height = HEADER + PANEL.1 * panels.len().div_ceil(COLUMNS) as i32;
    {
        let area =
            SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
        let text = |text: &str, at: (i32, i32), size: i32, align| {
            let style = ("sans-serif", size).into_text_style(&area);
            area.draw(&Text::new(
                text.to_owned(),
                at,
                style.pos(Pos::new(align, VPos::Center)),
            ))
        };
        let drawn = area.fill(&WHITE).and_then(|()| {
            text(title, (MARGIN, 22), 20, HPos::Left)?;
            for (line, note) in (0..).zip(notes) {
                text(note, (MARGIN, 45 + 17 * line), 12, HPos::Left)?;
            }
            for (index, panel) in panels.iter().enumerate() {
                let (column, line) = (index % COLUMNS, index / COLUMNS);
                let x = MARGIN + PANEL.0 * column as i32;
                let y = HEADER + PANEL.1 * line as i32;
                text(panel.title, (x, y + 10), 15, HPos::Left)?;
                let longest = panel
                    .bars
                    .iter()
                    .map(|(_, value, _)| *value)
                    .fold(1e-9, f64::max);
                for (row, (server, value, figure)) in panel.bars.iter().enumerate() {
                    let top = y + 26 + ROW * row as i32;
                    let (left, middle) = (x + LABEL, top + ROW / 2 - 2);
                    let right = left + ((value / longest * f64::from(BAR)) as i32).max(1);
                    text(server, (left - 8, middle), 13, HPos::Right)?;
                    let bar = [(left, top), (right, top + ROW - 5)];
                    area.draw(&Rectangle::new(bar, color(server).filled()))?;
                    text(figure, (right + 6, middle), 13, HPos::Left)?;
                }
            }
            area.present()
        });
        drawn.expect("a string can be written to");
    }
    svg
}
