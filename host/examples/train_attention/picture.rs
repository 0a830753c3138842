//! The curves.
use anyhow::{Context, Result};
use plotters::prelude::*;
use std::fs;
use std::path::Path;

/// A curve: its name and its losses, a step each.
pub struct Curve<'a> {
    pub name: &'a str,
    pub losses: &'a [f64],
}

/// Draws loss over steps as SVG: the first curve broad and pale, the second thin upon it, so that both can be seen where they
/// agree.
pub fn draw(path: &Path, title: &str, curves: [Curve; 2]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let steps = curves.iter().map(|curve| curve.losses.len()).max().unwrap_or(0);
    let highest = curves.iter().flat_map(|curve| curve.losses).copied().fold(0.0, f64::max);
    let area = SVGBackend::new(path, (900, 500)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(55)
        .build_cartesian_2d(0..steps, 0.0..highest * 1.05)?;
    chart.configure_mesh().x_desc("step").y_desc("loss (nats a token)").light_line_style(TRANSPARENT).draw()?;
    let styles = [RGBColor(250, 190, 120).stroke_width(7), RGBColor(20, 60, 140).stroke_width(2)];
    for (curve, style) in curves.into_iter().zip(styles) {
        chart
            .draw_series(LineSeries::new(curve.losses.iter().copied().enumerate(), style))?
            .label(curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE)
        .label_font(("sans-serif", 15))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present().with_context(|| path.display().to_string())
}
