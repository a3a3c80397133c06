//! Colours, type and numbers of the pictures.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Plot, ReportError};
use crate::job;

/// A picture while it is drawn.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Width of every picture.
pub(super) const WIDTH: u32 = 960;
pub(super) const INK: RGBColor = RGBColor(0x22, 0x26, 0x2b);
pub(super) const FAINT: RGBColor = RGBColor(0x6b, 0x72, 0x7c);
pub(super) const GRID: RGBColor = RGBColor(0xe3, 0xe6, 0xea);

/// Okabe and Ito's colours, which those who see fewer colours can tell apart as well, without the yellow, which nobody
/// can see on white.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x55, 0x5b, 0x66),
];

/// Of the label with this number.
pub(super) fn colour(label: usize) -> RGBColor {
    COLOURS[label % COLOURS.len()]
}

/// Type of a size in `colour`, anchored at `h` and the middle of the line.
pub(super) fn text<'a>(size: u32, colour: RGBColor, h: HPos) -> TextStyle<'a> {
    let style = TextStyle::from(("sans-serif", size).into_font());
    TextStyle { color: colour.to_backend_color(), ..style }.pos(Pos::new(h, VPos::Center))
}

/// Draws a picture of `height`.
pub(super) fn plot(
    name: String,
    caption: String,
    height: u32,
    draw: impl FnOnce(&Area<'_>) -> Result<(), String>,
) -> Result<Plot, ReportError> {
    let mut svg = String::new();
    let drawn = {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let filled = area.fill(&WHITE).map_err(|e| e.to_string());
        filled.and_then(|()| draw(&area)).and_then(|()| area.present().map_err(|e| e.to_string()))
    };
    drawn.map_err(|why| ReportError::Draw { name: caption.clone(), why })?;
    Ok(Plot { name, caption, svg })
}

/// For file names and fragments: letters and digits of `text`, joined by '-'.
pub(super) fn slug(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty());
    let slug = words.collect::<Vec<_>>().join("-").to_ascii_lowercase();
    slug.chars().take(60).collect()
}

/// At most `most` characters of `text`, the end replaced by an ellipsis.
pub(super) fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

/// "16.40 M".
pub(super) fn count(n: f64) -> String {
    job::si(n).trim_end().to_owned()
}

/// "12.3 µs".
pub(super) fn time(us: f64) -> String {
    job::time(us).replace("us", "µs")
}

/// "512.0 MiB/s".
pub(super) fn bandwidth(mib: f64) -> String {
    if mib >= 10_240.0 { format!("{:.1} GiB/s", mib / 1024.0) } else { format!("{mib:.1} MiB/s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(slug("4k randread QD32 <b>"), "4k-randread-qd32-b");
        assert_eq!((cut("abcdef", 4).as_str(), cut("abc", 4).as_str()), ("abc…", "abc"));
        assert_eq!((time(12.34), bandwidth(20480.0)), ("12.3 µs".into(), "20.0 GiB/s".into()));
    }
}
