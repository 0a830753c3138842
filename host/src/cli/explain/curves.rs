//! Curves over the sequence length, both axes logarithmic: a slope is an exponent.
use super::picture::{GRID, INK, QUIET};
use super::svg::{Anchor, Style, Svg};
use crate::cli::units::bytes;

const TICK: Style = Style::new(13.0, QUIET);
const NAME: Style = Style::new(14.0, INK).bold();
/// A legend's line: names at the ends of curves may not come closer.
const LINE_HEIGHT: f64 = 17.0;

/// One algorithm: pairs of a length and bytes.
pub struct Curve {
    pub name: &'static str,
    /// What was counted.
    pub points: Vec<(f64, f64)>,
    /// What the formula says.
    pub line: Vec<(f64, f64)>,
    /// The paper's leading term.
    pub dotted: Vec<(f64, f64)>,
}

/// Where curves are drawn.
pub struct Axes {
    pub left: f64,
    pub right: f64,
    pub top: f64,
    pub bottom: f64,
}

fn colour(name: &str) -> &'static str {
    match name {
        "standard" => "#c2410c",
        "flash1" => "#6a51a3",
        _ => "#00796b",
    }
}

/// Draws curves with axes, ticks and names.
pub fn draw(svg: &mut Svg, axes: Axes, curves: &[Curve]) {
    let all = || curves.iter().flat_map(|curve| curve.points.iter().chain(&curve.line).chain(&curve.dotted));
    let x = Scale::around(all().map(|&(x, _)| x), axes.left, axes.right);
    let y = Scale::around(all().map(|&(_, y)| y), axes.bottom, axes.top);
    for power in y.powers() {
        let at = y.at(power);
        svg.line((axes.left, at), (axes.right, at), GRID);
        svg.text(axes.left - 8.0, at + 4.5, TICK.anchor(Anchor::End), bytes(power as u64));
    }
    let mut lengths: Vec<f64> = curves.iter().flat_map(|curve| &curve.points).map(|&(x, _)| x).collect();
    lengths.sort_by(f64::total_cmp);
    lengths.dedup();
    for length in lengths {
        svg.text(x.at(length), axes.bottom + 19.0, TICK.anchor(Anchor::Middle), length);
    }
    for curve in curves {
        let place = |&(n, bytes): &(f64, f64)| (x.at(n), y.at(bytes));
        svg.curve(curve.dotted.iter().map(place), colour(curve.name), true);
        svg.curve(curve.line.iter().map(place), colour(curve.name), false);
        for (x, y) in curve.points.iter().map(place) {
            svg.circle(x, y, 4.5, colour(curve.name));
        }
    }
    name(svg, &axes, &y, curves);
}

/// Writes each curve's name at its end, from the top down, none over another.
fn name(svg: &mut Svg, axes: &Axes, y: &Scale, curves: &[Curve]) {
    let mut ends: Vec<(f64, &'static str)> =
        curves.iter().filter_map(|curve| Some((y.at(curve.points.last()?.1), curve.name))).collect();
    ends.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let mut free = axes.top;
    for (end, name) in ends {
        let at = end.max(free);
        svg.text(axes.right + 10.0, at + 5.0, Style { colour: colour(name), ..NAME }, name);
        free = at + LINE_HEIGHT;
    }
}

/// A logarithmic scale: `low` lies at `from`, `high` at `to`.
struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    /// A scale on which all values have a place.
    fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Scale {
        let (low, high) = values.fold((f64::MAX, 1.0), |(low, high), value| (value.min(low), value.max(high)));
        let low = low.clamp(1.0, high);
        // One length, or one value, gets some room.
        let high = if high > low { high } else { 2.0 * low };
        Scale { low, high, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let part = (value.max(self.low) / self.low).ln() / (self.high / self.low).ln();
        self.from + part * (self.to - self.from)
    }

    /// Powers of 4 on the scale: 1 KiB, 4 KiB, 16 KiB ...
    fn powers(&self) -> impl Iterator<Item = f64> {
        (0..32).map(|power| 4f64.powi(power)).filter(|power| (self.low..=self.high).contains(power))
    }
}
