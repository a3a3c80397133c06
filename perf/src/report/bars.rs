//! Bars of all cases: IOPS, bandwidth, CPU.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::group::{Case, Data, Metric, Spread};
use super::style::{self, Area, FAINT, GRID, INK, WIDTH};
use super::{Plot, ReportError};

const ROW: i32 = 22;
const HEADING: i32 = 30;
/// Where names end and bars begin, and where the longest bar ends.
const NAMES: i32 = 230;
const BARS: i32 = WIDTH as i32 - 250;

/// One picture for each metric of which anything is known.
pub(super) fn plots(data: &Data<'_>) -> Result<Vec<Plot>, ReportError> {
    let all = [
        (Metric::Iops, "iops", "Requests per second (more is better)"),
        (Metric::Bandwidth, "bandwidth", "Bandwidth (more is better)"),
        (
            Metric::CpuPerIo,
            "cpu",
            "CPU time for each request: the server's where it was read, else the load's (less is better)",
        ),
    ];
    let known = |metric| {
        let spreads = data.cases.iter().flat_map(|c| &c.groups).filter_map(move |g| g.spread(metric));
        spreads.clone().any(|s: Spread| s.max > 0.0)
    };
    all.into_iter()
        .filter(|(metric, ..)| known(*metric))
        .map(|(metric, name, caption)| bars(data, metric, name, caption))
        .collect()
}

/// Labels that have runs of a case.
fn rows<'a>(case: &'a Case<'_>, metric: Metric) -> impl Iterator<Item = (usize, usize, Spread)> + 'a {
    let spreads = case.groups.iter().enumerate();
    spreads.filter_map(move |(label, g)| g.spread(metric).map(|s| (label, g.runs.len(), s)))
}

fn bars(data: &Data<'_>, metric: Metric, name: &str, caption: &str) -> Result<Plot, ReportError> {
    let height: i32 = data.cases.iter().map(|c| HEADING + ROW * rows(c, metric).count() as i32).sum();
    style::plot(
        name.into(),
        format!("{caption}; bars are to scale within a case, whiskers show all runs"),
        height as u32 + 12,
        |area| {
            let mut y = 0;
            for case in &data.cases {
                y = draw_case(area, data, case, metric, y).map_err(|e| e.to_string())?;
            }
            Ok(())
        },
    )
}

type Drawn<T> = Result<T, DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

/// Draws from `y` on, and returns where the next case begins.
fn draw_case(area: &Area<'_>, data: &Data<'_>, case: &Case<'_>, metric: Metric, mut y: i32) -> Drawn<i32> {
    area.draw(&Text::new(
        style::cut(case.name, 100),
        (8, y + HEADING - 12),
        style::text(18, INK, HPos::Left),
    ))?;
    area.draw(&PathElement::new([(8, y + HEADING - 2), (WIDTH as i32 - 8, y + HEADING - 2)], GRID))?;
    y += HEADING;
    let most = rows(case, metric).map(|(.., s)| s.max).fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| NAMES + (value / most * f64::from(BARS - NAMES)) as i32;
    for (label, runs, s) in rows(case, metric) {
        let (colour, middle) = (style::colour(label), y + ROW / 2);
        let name = style::cut(data.labels[label], 30);
        area.draw(&Text::new(name, (NAMES - 8, middle), style::text(16, INK, HPos::Right)))?;
        area.draw(&Rectangle::new(
            [(NAMES, y + 4), (x(s.median).max(NAMES + 1), y + ROW - 4)],
            colour.filled(),
        ))?;
        if runs > 1 {
            let ends = [x(s.min), x(s.max)];
            area.draw(&PathElement::new([(ends[0], middle), (ends[1], middle)], INK))?;
            for end in ends {
                area.draw(&PathElement::new([(end, middle - 4), (end, middle + 4)], INK))?;
            }
        }
        let value = match runs {
            1 => show(metric, s.median),
            _ => format!("{}  ({} – {})", show(metric, s.median), show(metric, s.min), show(metric, s.max)),
        };
        let at = (x(s.max.max(s.median)) + 8, middle);
        let ink = if runs > 1 { INK } else { FAINT };
        area.draw(&Text::new(value, at, style::text(15, ink, HPos::Left)))?;
        y += ROW;
    }
    Ok(y)
}

fn show(metric: Metric, value: f64) -> String {
    match metric {
        Metric::Iops => style::count(value),
        Metric::Bandwidth => style::bandwidth(value),
        _ => style::time(value),
    }
}
