//! A bar for each algorithm: the bytes that it loads and stores, by step and tensor, from the top down as they move.
use super::measure::Run;
use super::picture::{GRID, INK, QUIET};
use super::svg::{Anchor, Style, Svg};
use crate::cli::units::bytes;
use ferroflash::traffic::Step;

const LEFT: f64 = 40.0;
const RIGHT: f64 = 960.0;
const TOP: f64 = 196.0;
const BOTTOM: f64 = 576.0;
const BAR: f64 = 150.0;
/// A segment, or a step, that is lower than this has no room for its name.
const LOWEST_NAMED: f64 = 16.0;

const LEGEND: Style = Style::new(13.0, QUIET);
const STEP: Style = Style::new(13.0, INK).anchor(Anchor::End);
const TOTAL: Style = Style::new(15.0, INK).bold().anchor(Anchor::Middle);
const ON_DARK: Style = Style::new(13.0, "#ffffff").bold().anchor(Anchor::Middle);
const ON_LIGHT: Style = Style { colour: INK, ..ON_DARK };

/// The colour of a tensor: inputs blue, the matrices of N² elements orange, the output green.
fn colour(tensor: &str) -> &'static str {
    match tensor {
        "Q" => "#08519c",
        "K" => "#3182bd",
        "V" => "#9ecae1",
        "S" => "#c2410c",
        "P" => "#fdae6b",
        "O" => "#00796b",
        _ => "#8a8f98",
    }
}

/// Draws the bars of all algorithms, at one scale.
pub fn draw(svg: &mut Svg, runs: &[Run; 3]) {
    legend(svg);
    let most = runs.iter().map(Run::bytes).max().unwrap_or(0).max(1);
    let scale = (BOTTOM - TOP) / most as f64;
    let width = (RIGHT - LEFT) / runs.len() as f64;
    svg.line((LEFT, BOTTOM), (RIGHT, BOTTOM), GRID);
    for (i, run) in runs.iter().enumerate() {
        let x = LEFT + (i + 1) as f64 * width - BAR;
        let mut y = BOTTOM - run.bytes() as f64 * scale;
        svg.text(x + BAR / 2.0, y - 9.0, TOTAL, bytes(run.bytes()));
        for step in &run.steps {
            y = draw_step(svg, x, y, scale, step);
        }
        svg.text(x + BAR / 2.0, BOTTOM + 22.0, TOTAL, run.name());
    }
}

/// Draws what a step moves, loads first, from `top` down, and its name to the left. Returns where it ends.
fn draw_step(svg: &mut Svg, x: f64, top: f64, scale: f64, step: &Step) -> f64 {
    let loads = step.tensors.iter().map(|moved| ("load", moved.tensor, moved.loaded));
    let stores = step.tensors.iter().map(|moved| ("store", moved.tensor, moved.stored));
    let mut y = top;
    for (verb, tensor, count) in loads.chain(stores) {
        let height = count as f64 * scale;
        // A hair of white separates neighbours.
        let drawn = (height - 1.0).max(0.0);
        svg.rectangle(x, y, BAR, drawn, colour(tensor));
        if verb == "store" {
            svg.stripes(x, y, BAR, drawn);
        }
        if height >= LOWEST_NAMED {
            let style = if matches!(tensor, "V" | "P") { ON_LIGHT } else { ON_DARK };
            let text = format!("{verb} {tensor} {}", bytes(count));
            svg.text(x + BAR / 2.0, y + height / 2.0 + 4.5, style, text);
        }
        y += height;
    }
    if y - top >= LOWEST_NAMED {
        svg.line((x - 8.0, top), (x - 8.0, y - 2.0), QUIET);
        svg.text(x - 15.0, (top + y) / 2.0 + 4.5, STEP, step.name);
    }
    y
}

fn legend(svg: &mut Svg) {
    const Y: f64 = 144.0;
    let mut x = LEFT;
    for tensor in ["Q", "K", "V", "S", "P", "O"] {
        svg.rectangle(x, Y, 12.0, 12.0, colour(tensor));
        svg.text(x + 18.0, Y + 11.0, LEGEND, tensor);
        x += 50.0;
    }
    svg.rectangle(x, Y, 12.0, 12.0, colour("LSE"));
    svg.text(x + 18.0, Y + 11.0, LEGEND, "l, m, LSE");
    x += 110.0;
    svg.rectangle(x, Y, 12.0, 12.0, QUIET);
    svg.text(x + 18.0, Y + 11.0, LEGEND, "loaded from HBM");
    x += 150.0;
    svg.rectangle(x, Y, 12.0, 12.0, QUIET);
    svg.stripes(x, Y, 12.0, 12.0);
    svg.text(x + 18.0, Y + 11.0, LEGEND, "stored to HBM");
}
