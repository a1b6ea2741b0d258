//! Charts of several panels, each with a bar for each server.

use std::{io, iter};

use plotters::coord::Shift;
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{MAIN, Row, rows};
use super::results::Results;

/// All sizes are in pixels.
const COLUMNS: usize = 2;
const PANEL: (i32, i32) = (460, 184);
const HEADER: i32 = 102;
const MARGIN: i32 = 20;
/// From the left edge of a panel to its bars, and the longest bar.
const LABEL: i32 = 84;
const BAR: f64 = 250.0;
const ROW: i32 = 24;

const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<io::Error>>;

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
    // What a reader of a chart must know besides.
    let notes = [
        "Medians (quartiles); each panel has a scale of its own, with an axis below it if it is logarithmic.",
        &format!(
            "Loopback, {} worker(s); {}.",
            results.workers,
            results.placement()
        ),
        "epoll: a raw event loop. tokio-64k, tokio-16k: buffers of 64 and 16 KiB. threads: one for each connection.",
    ];
    let rows = rows(name);
    let mut svg = String::new();
    let width = MARGIN * 2 + PANEL.0 * COLUMNS as i32;
    let height = HEADER + PANEL.1 * rows.len().div_ceil(COLUMNS) as i32;
    {
        let area = SVGBackend::with_string(&mut svg, (width as u32, height as u32));
        let area = area.into_drawing_area();
        let drawn = area.fill(&WHITE).and_then(|()| {
            text(&area, title, (MARGIN, 22), 20, HPos::Left)?;
            for (line, note) in (0..).zip(notes) {
                text(&area, note, (MARGIN, 45 + 17 * line), 12, HPos::Left)?;
            }
            for (index, row) in rows.iter().enumerate() {
                let x = MARGIN + PANEL.0 * (index % COLUMNS) as i32;
                let y = HEADER + PANEL.1 * (index / COLUMNS) as i32;
                draw_panel(&area, (x, y), row, results)?;
            }
            area.present()
        });
        drawn.expect("a string can be written to");
    }
    svg
}

fn draw_panel(area: &Area, (x, y): (i32, i32), row: &Row, results: &Results) -> Drawn {
    text(area, row.name, (x, y + 10), 15, HPos::Left)?;
    let bar = |(server, color)| {
        let spread = results.spread(row.case, server, row.figure)?;
        Some((server, color, spread))
    };
    let bars: Vec<_> = MAIN.into_iter().filter_map(bar).collect();
    let scale = Scale::of(bars.iter().map(|(_, _, spread)| spread.median));
    let (left, top) = (x + LABEL, y + 26);
    let bottom = top + ROW * bars.len() as i32;
    for tick in scale.ticks() {
        let x = left + scale.length(tick);
        area.draw(&PathElement::new([(x, top), (x, bottom)], GRID))?;
        text(
            area,
            &row.show_tick(tick),
            (x, bottom + 8),
            11,
            HPos::Center,
        )?;
    }
    if scale.is_logarithmic() {
        text(
            area,
            "logarithmic",
            (left - 24, bottom + 8),
            11,
            HPos::Right,
        )?;
    }
    for (line, (server, color, spread)) in (0..).zip(bars) {
        let top = top + ROW * line;
        let middle = top + ROW / 2 - 2;
        let right = left + scale.length(spread.median).max(1);
        let problem = results.problem(row.case, server);
        let value = row.show(spread) + problem.map_or("", |_| " (incomplete)");
        text(area, server, (left - 8, middle), 13, HPos::Right)?;
        let bar = [(left, top), (right, top + ROW - 5)];
        area.draw(&Rectangle::new(bar, color.filled()))?;
        text(area, &value, (right + 6, middle), 13, HPos::Left)?;
    }
    Ok(())
}

fn text(area: &Area, text: &str, at: (i32, i32), size: i32, align: HPos) -> Drawn {
    let style = ("sans-serif", size).into_text_style(area);
    let style = style.pos(Pos::new(align, VPos::Center));
    area.draw(&Text::new(text.to_owned(), at, style))
}

/// The values at the start and at the end of the longest bar. A start other than 0 makes the scale logarithmic.
struct Scale {
    start: f64,
    end: f64,
}

impl Scale {
    /// The scale is logarithmic if the values differ by a factor of a hundred or more. It then starts at a power of ten that
    /// is at most half of the shortest value.
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let shortest = values.clone().fold(f64::MAX, f64::min);
        let end = values.fold(1e-9, f64::max);
        let start = match shortest > 0.0 && end / shortest >= 100.0 {
            true => 10f64.powi((shortest / 2.0).log10().floor() as i32),
            false => 0.0,
        };
        Self { start, end }
    }

    fn is_logarithmic(&self) -> bool {
        self.start > 0.0
    }

    fn length(&self, value: f64) -> i32 {
        let share = match self.is_logarithmic() {
            true => (value / self.start).ln() / (self.end / self.start).ln(),
            false => value / self.end,
        };
        (share * BAR) as i32
    }

    /// The powers of ten on a logarithmic scale.
    fn ticks(&self) -> impl Iterator<Item = f64> {
        let powers = iter::successors(Some(self.start), |tick| Some(tick * 10.0));
        powers.take_while(|tick| self.is_logarithmic() && *tick <= self.end)
    }
}
