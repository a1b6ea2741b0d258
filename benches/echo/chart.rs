//! The chart: ratios to the reference as bars, and throughput by connections as a curve, in one SVG.

use std::fmt::Write;

use crate::measures::{Measure, Shape};
use crate::report::{Results, Spread};

const WIDTH: f64 = 1000.0;
const MARGIN: f64 = 60.0;
const PANEL: f64 = 260.0;
const TOP: f64 = 70.0;
const SECOND: f64 = TOP + PANEL + 100.0;
const HEIGHT: f64 = SECOND + PANEL + 50.0;

/// Bars end here; beyond it only the figure tells.
const RATIO_MAX: f64 = 2.5;

/// The reference is grey, this server stands out.
const COLORS: [&str; 8] = [
    "#8c8c8c", "#d1495b", "#2e86ab", "#7fb7d6", "#66a182", "#edae49", "#8d6a9f", "#30343f",
];

pub(crate) fn draw(measures: &[Measure], all: &[Results]) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    if let Some(results) = all.first() {
        legend(&mut svg, &results.servers);
    }
    let rated: Vec<_> = measures
        .iter()
        .zip(all)
        .filter(|(measure, _)| measure.shape == Shape::Rate)
        .map(|(_, results)| results)
        .collect();
    if !rated.is_empty() {
        bars(&mut svg, &rated);
    }
    let by_connections = measures
        .iter()
        .zip(all)
        .find(|(measure, _)| measure.name == "by-connections");
    if let Some((measure, results)) = by_connections {
        curves(&mut svg, measure, results);
    }
    svg + "</svg>\n"
}

fn color(server: usize) -> &'static str {
    COLORS[server % COLORS.len()]
}

fn legend(svg: &mut String, servers: &[String]) {
    for (server, name) in servers.iter().enumerate() {
        let x = MARGIN + server as f64 * 110.0;
        rect(svg, x, 12.0, 12.0, 12.0, color(server));
        text(svg, x + 17.0, 22.0, "start", name);
    }
}

/// A group of bars per measure; the line across is the reference.
fn bars(svg: &mut String, all: &[&Results]) {
    text(
        svg,
        MARGIN,
        TOP - 18.0,
        "start",
        "throughput, as a ratio to the first server in the same round; whiskers: min-max",
    );
    let y = |ratio: f64| TOP + PANEL * (1.0 - ratio.min(RATIO_MAX) / RATIO_MAX);
    for tick in 0..=5 {
        let shade = if tick == 2 { "#444" } else { "#ddd" };
        let tick = f64::from(tick) / 2.0;
        line(svg, (MARGIN, y(tick)), (WIDTH - 20.0, y(tick)), shade);
        text(
            svg,
            MARGIN - 6.0,
            y(tick) + 4.0,
            "end",
            &format!("{tick:.1}"),
        );
    }
    let group = (WIDTH - MARGIN - 20.0) / all.len() as f64;
    for (index, results) in all.iter().enumerate() {
        let left = MARGIN + index as f64 * group;
        text(
            svg,
            left + group / 2.0,
            TOP + PANEL + 18.0,
            "middle",
            results.name,
        );
        let width = (group - 16.0) / results.servers.len() as f64;
        for server in 0..results.servers.len() {
            let Some(Spread { median, min, max }) = results.ratio(0, server) else {
                continue;
            };
            let x = left + 8.0 + server as f64 * width;
            rect(
                svg,
                x,
                y(median),
                width - 2.0,
                y(0.0) - y(median),
                color(server),
            );
            let middle = x + width / 2.0 - 1.0;
            line(svg, (middle, y(min)), (middle, y(max)), "black");
            if median > RATIO_MAX {
                text(svg, middle, TOP - 3.0, "middle", &format!("{median:.1}"));
            }
        }
    }
}

/// Rate against connections, both on logarithmic scales: equal factors are equal distances.
fn curves(svg: &mut String, measure: &Measure, results: &Results) {
    let cases = 0..measure.cases.len();
    let rates: Vec<f64> = cases
        .clone()
        .flat_map(|case| {
            (0..results.servers.len()).filter_map(move |server| results.value(case, server))
        })
        .map(|spread| spread.median)
        .collect();
    let highest = rates.iter().copied().fold(10.0, f64::max).log10().ceil();
    let lowest = rates
        .iter()
        .copied()
        .fold(1e9, f64::min)
        .log10()
        .floor()
        .min(highest - 1.0);
    let y = |rate: f64| SECOND + PANEL * (1.0 - (rate.log10() - lowest) / (highest - lowest));
    let step = (WIDTH - MARGIN - 60.0) / (cases.len().max(2) - 1) as f64;
    let x = |case: usize| MARGIN + 20.0 + case as f64 * step;

    text(
        svg,
        MARGIN,
        SECOND - 18.0,
        "start",
        "messages/s of 64 B, by the number of active connections",
    );
    for exponent in lowest as i32..=highest as i32 {
        for factor in [1.0, 2.0, 5.0] {
            let rate = factor * 10_f64.powi(exponent);
            if rate.log10() <= highest {
                line(svg, (MARGIN, y(rate)), (WIDTH - 20.0, y(rate)), "#ddd");
                text(
                    svg,
                    MARGIN - 6.0,
                    y(rate) + 4.0,
                    "end",
                    &format!("{rate:.0}"),
                );
            }
        }
    }
    for case in cases.clone() {
        text(
            svg,
            x(case),
            SECOND + PANEL + 18.0,
            "middle",
            &measure.cases[case].label,
        );
    }
    for server in 0..results.servers.len() {
        let point = |case: usize| Some((x(case), y(results.value(case, server)?.median)));
        let points: Vec<_> = cases.clone().filter_map(point).collect();
        for pair in points.windows(2) {
            line(svg, pair[0], pair[1], color(server));
        }
        for (x, y) in points {
            rect(svg, x - 3.0, y - 3.0, 6.0, 6.0, color(server));
        }
    }
}

fn rect(svg: &mut String, x: f64, y: f64, width: f64, height: f64, fill: &str) {
    let _infallible = writeln!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>"
    );
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), stroke: &str) {
    let _infallible = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{stroke}\" stroke-width=\"1.5\"/>",
        from.0, from.1, to.0, to.1
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _infallible = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>"
    );
}
