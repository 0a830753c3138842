//! A small writer of SVG.
use std::fmt::{Display, Write};

/// A picture in the making. Coordinates are pixels, from the top left.
pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

const STRIPES: &str = r##"<defs>
<pattern id="stripes" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="2" height="7" fill="#ffffff" fill-opacity="0.35"/>
</pattern>
</defs>"##;

/// Where a text lies relative to its point.
#[derive(Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// How a text looks.
#[derive(Clone, Copy)]
pub struct Style {
    pub size: f64,
    pub bold: bool,
    pub colour: &'static str,
    pub anchor: Anchor,
}

impl Style {
    /// Plain text of a size, beginning at its point.
    pub const fn new(size: f64, colour: &'static str) -> Style {
        Style { size, bold: false, colour, anchor: Anchor::Start }
    }

    pub const fn bold(self) -> Style {
        Style { bold: true, ..self }
    }

    pub const fn anchor(self, anchor: Anchor) -> Style {
        Style { anchor, ..self }
    }
}

impl Svg {
    /// An empty white picture.
    pub fn new(width: f64, height: f64) -> Svg {
        let mut svg = Svg { width, height, body: String::new() };
        svg.rectangle(0.0, 0.0, width, height, "#ffffff");
        svg
    }

    pub fn rectangle(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        self.add(format_args!(
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{fill}"/>"#
        ));
    }

    /// Pale stripes over what lies there.
    pub fn stripes(&mut self, x: f64, y: f64, width: f64, height: f64) {
        self.rectangle(x, y, width, height, "url(#stripes)");
    }

    pub fn circle(&mut self, x: f64, y: f64, radius: f64, fill: &str) {
        self.add(format_args!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="{radius}" fill="{fill}"/>"#));
    }

    pub fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str) {
        self.add(format_args!(r#"<path d="M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}" stroke="{colour}" fill="none"/>"#));
    }

    /// A line through points; dotted, if `dots`.
    pub fn curve(&mut self, points: impl IntoIterator<Item = (f64, f64)>, colour: &str, dots: bool) {
        let mut path = String::new();
        for (x, y) in points {
            let command = if path.is_empty() { 'M' } else { 'L' };
            write!(path, "{command}{x:.1} {y:.1}").expect("a string takes all");
        }
        let dots = if dots { r#" stroke-dasharray="2 4""# } else { "" };
        self.add(format_args!(r#"<path d="{path}" stroke="{colour}" stroke-width="2"{dots} fill="none"/>"#));
    }

    pub fn text(&mut self, x: f64, y: f64, style: Style, text: impl Display) {
        let Style { size, bold, colour, anchor } = style;
        let weight = if bold { r#" font-weight="600""# } else { "" };
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(&text.to_string());
        self.add(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}"{weight} fill="{colour}" text-anchor="{anchor}">{text}</text>"#
        ));
    }

    /// The whole file.
    pub fn finish(self) -> String {
        let Svg { width, height, body } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"Helvetica Neue, Helvetica, Arial, DejaVu Sans, sans-serif\">\n{STRIPES}\n{body}</svg>\n"
        )
    }

    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        writeln!(self.body, "{element}").expect("a string takes all");
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
