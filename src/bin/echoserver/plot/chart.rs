//! The chart: a legend, and panels below each other.

use std::io;
use std::ops::Range;
use std::time::Duration;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;

use super::record::{Lines, Run};
use crate::output::shorten;

/// The height of a line of the legend, in pixels.
const LINE: i32 = 18;
/// The longest line of the legend, in characters.
const MAX_NOTE: usize = 130;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<io::Error>>;
/// Returns the label of a value.
type Label = fn(&f64) -> String;

/// Draws all runs over each other. Returns an SVG file.
pub(crate) fn draw(runs: &[Run]) -> String {
    let notes: usize = runs.iter().map(|run| run.notes.len()).sum();
    let legend = 20 + LINE * notes as i32;
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (960, legend as u32 + 820)).into_drawing_area();
    draw_on(&area, runs, legend).expect("a string can be written to");
    drop(area);
    svg
}

fn draw_on(area: &Area, runs: &[Run], legend: i32) -> Drawn {
    area.fill(&WHITE)?;
    draw_legend(area, runs)?;
    let areas = area.split_by_breakpoints([0; 0], [legend, legend + 380, legend + 600]);
    let lines = |panel: fn(&Run) -> &Lines| runs.iter().map(panel).collect::<Vec<_>>();

    let title = "Round-trip time by percentile; at 99 %: what 99 of 100 messages took at most";
    let times = lines(|run| &run.times);
    let (end, y) = extent(&times);
    let (x, y) = ((1.0..end.max(10.0)).log_scale(), decades(&y).log_scale());
    draw_panel(&areas[1], title, &times, (x, percentile), (y, time))?;

    let title = "Messages per second, over time in seconds";
    let rates = lines(|run| &run.rates);
    let (end, y) = extent(&rates);
    let y = 0.0..y.end * 1.1;
    draw_panel(&areas[2], title, &rates, (0.0..end, number), (y, number))?;

    let title = "p99 of the messages that came back in each interval, over time in seconds; a gap: none did";
    let p99s = lines(|run| &run.p99s);
    let y = decades(&extent(&p99s).1).log_scale();
    draw_panel(&areas[3], title, &p99s, (0.0..end, number), (y, time))
}

fn draw_legend(area: &Area, runs: &[Run]) -> Drawn {
    let mut y = 12;
    for (index, run) in runs.iter().enumerate() {
        area.draw(&Rectangle::new(
            [(20, y + 1), (34, y + 13)],
            color(index).filled(),
        ))?;
        for (note, size) in run.notes.iter().zip([15, 12, 12, 12, 12]) {
            let style = ("sans-serif", size).into_text_style(area);
            area.draw_text(&shorten(note, MAX_NOTE), &style, (42, y))?;
            y += LINE;
        }
    }
    Ok(())
}

/// Returns the color of a run: blue, red, green, purple, brown, teal, pink.
fn color(index: usize) -> HSLColor {
    HSLColor((0.58 + 0.38 * index as f64).fract(), 0.9, 0.4)
}

/// Draws the lines of each run. An axis is its range, and the function for its labels.
fn draw_panel<X, Y>(
    area: &Area,
    title: &str,
    runs: &[&Lines],
    (x, x_label): (X, Label),
    (y, y_label): (Y, Label),
) -> Drawn
where
    X: AsRangedCoord<Value = f64, CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>>,
{
    let mut chart = ChartBuilder::on(area);
    let chart = chart.margin(20).caption(title, ("sans-serif", 15));
    let chart = chart.x_label_area_size(20).y_label_area_size(60);
    let mut chart = chart.build_cartesian_2d(x, y)?;
    let mut mesh = chart.configure_mesh();
    // With more labels, there would be some between the decades.
    mesh.max_light_lines(0).x_labels(9).y_labels(9);
    mesh.bold_line_style(RGBColor(0xdd, 0xdd, 0xdd));
    mesh.x_label_formatter(&x_label)
        .y_label_formatter(&y_label)
        .draw()?;
    for (index, lines) in runs.iter().enumerate() {
        let style = color(index).mix(0.8).stroke_width(2);
        let paths = lines
            .iter()
            .map(|line| PathElement::new(line.clone(), style));
        chart.draw_series(paths)?;
    }
    Ok(())
}

/// Returns how far the lines of all runs reach to the right, and from the lowest to the highest value.
fn extent(runs: &[&Lines]) -> (f64, Range<f64>) {
    let points = runs.iter().copied().flatten().flatten();
    points.fold((1e-3, f64::MAX..1e-3), |(end, range), (x, y)| {
        (end.max(*x), range.start.min(*y)..range.end.max(*y))
    })
}

/// Widens the range of a logarithmic axis to whole decades, so that both of its ends have a label.
fn decades(range: &Range<f64>) -> Range<f64> {
    // Without a point, the range ends before it starts.
    let start = range.start.min(range.end).max(1.0).log10().floor();
    let end = range.end.log10().ceil().max(start + 1.0);
    10_f64.powf(start)..10_f64.powf(end)
}

/// Returns the percentile that all messages but one of so many reach.
fn percentile(messages: &f64) -> String {
    let decimals = (messages.log10() - 2.0).max(0.0).round() as usize;
    format!("{:.decimals$} %", 100.0 - 100.0 / messages)
}

fn time(nanos: &f64) -> String {
    format!("{:?}", Duration::from_nanos(nanos.round() as u64))
}

fn number(number: &f64) -> String {
    ((number * 1e3).round() / 1e3).to_string()
}
