//! Pictures of one case: latency curves and time lines.

use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::group::{Case, Data};
use super::style::{self, Area, FAINT, GRID, INK, WIDTH};
use super::{Plot, ReportError};
use crate::result::{Interval, RunResult};

const HEIGHT: u32 = 340;
/// Points of one line: more cannot be seen.
const MAX_POINTS: usize = 600;

/// A line with its label's number.
struct Line {
    label: usize,
    points: Vec<(f64, f64)>,
    /// One of several of its label, and not the typical one.
    pale: bool,
}

/// The pictures of case number `index`.
pub(super) fn plots(data: &Data<'_>, index: usize) -> Result<Vec<Plot>, ReportError> {
    let case = &data.cases[index];
    let mut plots = Vec::new();
    let curves = lines(case, |run| Some(curve(run)), true);
    if !curves.is_empty() {
        let caption = format!("{}: latency by percentile, of each label's middle run", case.name);
        plots.push(style::plot(file(index, case, "latency"), caption, HEIGHT, |area| {
            let (end, (low, high)) = (span(&curves, |p| p.0).1.max(1.0), decades(&curves));
            let axes = Axes {
                x: 0.0..end,
                x_words: &nines,
                x_ticks: (end as usize + 1).max(2),
                y_words: &style::time,
                x_title: "percentile",
            };
            draw(area, data, &curves, &axes, (low..high).log_scale())
        })?);
    }
    let rates = lines(case, |run| timeline(run, |i| Some(i.iops)), false);
    if !rates.is_empty() {
        let caption = format!("{}: requests per second over time, every run", case.name);
        plots.push(style::plot(file(index, case, "iops-over-time"), caption, HEIGHT, |area| {
            let high = span(&rates, |p| p.1).1.max(1.0) * 1.05;
            draw(area, data, &rates, &seconds(&rates, &style::count), 0.0..high)
        })?);
    }
    let tails = lines(case, |run| timeline(run, |i| (i.iops > 0.0).then_some(i.p99_us)), false);
    if !tails.is_empty() {
        let what =
            "99th percentile of latency over time, every run; gaps are stalls, in which nothing completed";
        let caption = format!("{}: {what}", case.name);
        plots.push(style::plot(file(index, case, "p99-over-time"), caption, HEIGHT, |area| {
            let (low, high) = decades(&tails);
            draw(area, data, &tails, &seconds(&tails, &style::time), (low..high).log_scale())
        })?);
    }
    Ok(plots)
}

/// The number keeps cases apart whose names differ only in other characters.
fn file(index: usize, case: &Case<'_>, what: &str) -> String {
    format!("{:02}-{}-{what}", index + 1, style::slug(case.name))
}

/// Lines of runs that have at least two points.
fn lines(
    case: &Case<'_>,
    points: impl Fn(&RunResult) -> Option<Vec<(f64, f64)>>,
    typical_only: bool,
) -> Vec<Line> {
    let mut all = Vec::new();
    for (label, group) in case.groups.iter().enumerate() {
        let Some(typical) = group.typical() else { continue };
        for run in &group.runs {
            let is_typical = std::ptr::eq(*run, typical);
            if typical_only && !is_typical {
                continue;
            }
            if let Some(points) = points(run).filter(|p| p.len() > 1) {
                all.push(Line { label, points, pale: !is_typical });
            }
        }
    }
    // What matters most comes last, and so on top.
    all.sort_by_key(|l| !l.pale);
    all
}

/// The curve over "nines": 0 is the fastest, 1 is 90 %, 2 is 99 %.
fn curve(run: &RunResult) -> Vec<(f64, f64)> {
    let slowest = (run.totals.ios.max(2) as f64).log10();
    let nines = |p: f64| (-(1.0 - p / 100.0).log10()).clamp(0.0, slowest);
    run.totals.percentiles.iter().map(|(p, us)| (nines(*p), us.max(0.001))).collect()
}

/// A figure over time; steps are joined if there are more than can be seen. NaN where there is none.
fn timeline(run: &RunResult, figure: impl Fn(&Interval) -> Option<f64>) -> Option<Vec<(f64, f64)>> {
    let each = run.timeline.len().div_ceil(MAX_POINTS).max(1);
    let mean = |part: &[Interval]| {
        let known: Vec<f64> = part.iter().filter_map(&figure).collect();
        part.last().map(|last| (last.at, known.iter().sum::<f64>() / known.len() as f64))
    };
    run.timeline.chunks(each).map(mean).collect()
}

fn span(lines: &[Line], of: impl Fn(&(f64, f64)) -> f64) -> (f64, f64) {
    let values = lines.iter().flat_map(|l| &l.points).map(of).filter(|v| !v.is_nan());
    values.fold((f64::MAX, 0.0), |(low, high), v| (low.min(v), high.max(v)))
}

/// Ends of a logarithmic axis for positive values: a little more than there is, and at least a factor of ten.
fn decades(lines: &[Line]) -> (f64, f64) {
    let values = lines.iter().flat_map(|l| &l.points).map(|p| p.1).filter(|v| *v > 0.0);
    let (low, high) = values.fold((f64::MAX, 0.001f64), |(low, high), v| (low.min(v), high.max(v)));
    let low = low.min(high) / 1.3;
    (low, (high * 1.3).max(low * 10.0))
}

fn nines(x: &f64) -> String {
    if x.fract() != 0.0 {
        return String::new();
    }
    match *x as u32 {
        0 => "0".into(),
        1 => "90 %".into(),
        2 => "99 %".into(),
        n => format!("99.{} %", "9".repeat(n as usize - 2)),
    }
}

/// Everything of the axes but the vertical one's scale.
struct Axes<'a> {
    x: std::ops::Range<f64>,
    x_words: &'a dyn Fn(&f64) -> String,
    x_ticks: usize,
    y_words: &'a dyn Fn(f64) -> String,
    x_title: &'a str,
}

fn seconds<'a>(lines: &[Line], y_words: &'a dyn Fn(f64) -> String) -> Axes<'a> {
    let (_, end) = span(lines, |p| p.0);
    let x_words = &|x: &f64| if x.fract() == 0.0 { format!("{x} s") } else { format!("{x:.1} s") };
    Axes { x: 0.0..end.max(0.001), x_words, x_ticks: 10, y_words, x_title: "time" }
}

fn draw<Y>(area: &Area<'_>, data: &Data<'_>, lines: &[Line], axes: &Axes<'_>, y: Y) -> Result<(), String>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let words = |e: DrawingAreaErrorKind<_>| format!("{e}");
    let below = legend(area, data, lines).map_err(words)?;
    let (_, body) = area.split_vertically(below);
    let mut chart = ChartBuilder::on(&body)
        .margin_right(28)
        .margin_bottom(6)
        .x_label_area_size(40)
        .y_label_area_size(84)
        .build_cartesian_2d(axes.x.clone(), y)
        .map_err(words)?;
    chart
        .configure_mesh()
        .x_labels(axes.x_ticks)
        .y_labels(8)
        .x_label_formatter(&|x| (axes.x_words)(x))
        .y_label_formatter(&|y| (axes.y_words)(*y))
        .x_desc(axes.x_title)
        .axis_desc_style(("sans-serif", 15).into_font().color(&FAINT))
        .label_style(("sans-serif", 15).into_font().color(&INK))
        .axis_style(FAINT)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(words)?;
    for line in lines {
        let (strength, width) = if line.pale { (0.35, 1) } else { (1.0, 2) };
        let style = style::colour(line.label).mix(strength).stroke_width(width);
        for part in line.points.split(|p| p.1.is_nan()).filter(|part| !part.is_empty()) {
            match part {
                // Between two stalls.
                [one] => chart.draw_series([Circle::new(*one, width, style)]).map(drop).map_err(words)?,
                _ => chart.draw_series(LineSeries::new(part.to_vec(), style)).map(drop).map_err(words)?,
            }
        }
    }
    Ok(())
}

type Drawn<T> = Result<T, DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

/// Names beside their colours, in as many rows as they need; returns where the chart may begin.
fn legend(area: &Area<'_>, data: &Data<'_>, lines: &[Line]) -> Drawn<i32> {
    let (mut x, mut y) = (84, 16);
    for (label, name) in data.labels.iter().enumerate().filter(|(i, _)| lines.iter().any(|l| l.label == *i)) {
        let name = style::cut(name, 40);
        // As wide as the widest letters could make it, roughly.
        let width = 40 + name.chars().count() as i32 * 8;
        if x + width > WIDTH as i32 && x > 84 {
            (x, y) = (84, y + 20);
        }
        area.draw(&PathElement::new([(x, y), (x + 18, y)], style::colour(label).stroke_width(3)))?;
        area.draw(&Text::new(name, (x + 24, y), style::text(16, INK, HPos::Left)))?;
        x += width;
    }
    Ok(y + 14)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::Totals;

    #[test]
    fn axes_hold_what_is_on_them() {
        let line = |points: &[(f64, f64)]| Line { label: 0, points: points.to_vec(), pale: false };
        let (low, high) = decades(&[line(&[(0.0, 5.0), (1.0, 7.0)])]);
        assert!(low < 5.0 && high > 7.0 && high >= low * 10.0);
        // Stalls have no percentiles.
        let (low, high) = decades(&[line(&[(0.0, 0.0), (1.0, 0.0)])]);
        assert!(low > 0.0 && high > low);
        assert_eq!(
            [0.0, 1.0, 2.0, 3.0, 4.0, 0.5].map(|x| nines(&x)),
            ["0", "90 %", "99 %", "99.9 %", "99.99 %", ""]
        );
    }

    #[test]
    fn the_slowest_request_has_a_place() {
        let totals = Totals {
            ios: 1000,
            percentiles: vec![(0.0, 1.0), (99.0, 2.0), (100.0, 9.0)],
            ..Default::default()
        };
        let points = curve(&RunResult { totals, ..Default::default() });
        assert_eq!(points.last(), Some(&(3.0, 9.0)));
    }

    #[test]
    fn long_time_lines_are_thinned() {
        let timeline_of =
            (0..100_000).map(|n| Interval { at: f64::from(n), iops: 7.0, ..Default::default() });
        let run = RunResult { timeline: timeline_of.collect(), ..Default::default() };
        let points = timeline(&run, |i| Some(i.iops)).expect("points");
        assert!(points.len() <= MAX_POINTS && points.iter().all(|p| p.1 == 7.0));
    }

    #[test]
    fn a_stall_has_no_percentile() {
        let intervals = [(7.0, 30.0), (0.0, 0.0), (7.0, 50.0)].map(|(iops, p99_us)| Interval {
            iops,
            p99_us,
            ..Default::default()
        });
        let run = RunResult { timeline: intervals.to_vec(), ..Default::default() };
        let points = timeline(&run, |i| (i.iops > 0.0).then_some(i.p99_us)).expect("points");
        assert_eq!((points[0].1, points[2].1), (30.0, 50.0));
        assert!(points[1].1.is_nan());
        let line = Line { label: 0, points, pale: false };
        assert!(decades(&[line]).0 > 20.0, "the stall does not stretch the axis");
    }
}
