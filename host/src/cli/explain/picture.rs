//! The comparison as a picture: which step moves which tensor, and how that and the memory grow with the length.
use super::bars;
use super::curves::{self, Axes, Curve};
use super::measure::{ALGORITHMS, Comparison, Run};
use super::svg::{Style, Svg};
use ferroflash::Kernel;
use ferroflash::traffic;

pub const INK: &str = "#1a1a1a";
pub const QUIET: &str = "#5f6368";
pub const GRID: &str = "#e4e6e9";

const TITLE: Style = Style::new(26.0, INK).bold();
const SUBTITLE: Style = Style::new(15.0, QUIET);
const HEADING: Style = Style::new(17.0, INK).bold();
const NOTE: Style = Style::new(13.0, QUIET);

/// The picture, as SVG.
pub fn draw(comparison: &Comparison) -> String {
    let mut svg = Svg::new(1000.0, 1080.0);
    let problem = &comparison.detail[0].problem;
    let (n, d) = (problem.seqlen_q, problem.headdim);
    svg.text(40.0, 52.0, TITLE, "What attention moves between HBM and SRAM");
    let subtitle = format!("The forward pass of one head, head dimension d = {d}, f16; counted by the simulated GPU");
    svg.text(40.0, 80.0, SUBTITLE, subtitle);

    svg.text(40.0, 128.0, HEADING, format_args!("Bytes moved, N = {n} tokens"));
    bars::draw(&mut svg, &comparison.detail);

    svg.text(40.0, 668.0, HEADING, "Bytes moved, by length N");
    let moved = ALGORITHMS.map(|kernel| traffic_curve(comparison, kernel));
    curves::draw(&mut svg, Axes { left: 110.0, right: 410.0, top: 698.0, bottom: 978.0 }, &moved);

    svg.text(530.0, 668.0, HEADING, "Memory besides Q, K, V and O, by length N");
    let memory = ALGORITHMS.map(|kernel| memory_curve(comparison, kernel));
    curves::draw(&mut svg, Axes { left: 600.0, right: 880.0, top: 698.0, bottom: 978.0 }, &memory);

    svg.text(40.0, 1038.0, NOTE, "Points: counted. Lines on the left: the exact formulas of ferroflash::traffic.");
    let dotted = "Dotted: what the paper says they grow like, N d + N² for standard and N² d² / M for flash, for elements of 2 bytes.";
    svg.text(40.0, 1058.0, NOTE, dotted);
    svg.finish()
}

/// The bytes that an algorithm moves at each length.
fn traffic_curve(comparison: &Comparison, kernel: Kernel) -> Curve {
    Curve {
        name: kernel.name(),
        points: points(comparison, kernel, |run| run.bytes() as f64),
        line: points(comparison, kernel, |run| traffic::total(&run.formula) as f64),
        dotted: points(comparison, kernel, Run::paper_bytes),
    }
}

/// The memory that an algorithm takes at each length.
fn memory_curve(comparison: &Comparison, kernel: Kernel) -> Curve {
    let points = points(comparison, kernel, |run| run.extra_bytes as f64);
    Curve { name: kernel.name(), line: points.clone(), points, dotted: Vec::new() }
}

fn points(comparison: &Comparison, kernel: Kernel, quantity: impl Fn(&Run) -> f64) -> Vec<(f64, f64)> {
    let runs = comparison.growth.iter().flatten().filter(|run| run.kernel == kernel);
    runs.map(|run| (run.problem.seqlen_q as f64, quantity(run))).collect()
}
