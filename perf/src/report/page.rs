//! The page: one file that needs no other, without scripts.

use std::fmt::{Display, Write};

use super::Plot;
use super::group::{Case, Data, Group, Metric, Verdict};
use super::style;
use crate::result::{Machine, RunResult};

/// Text that cannot be taken for markup, in elements and in quoted attributes.
struct Esc<'a>(&'a str);

impl Display for Esc<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.chars() {
            match c {
                '<' => f.write_str("&lt;"),
                '>' => f.write_str("&gt;"),
                '&' => f.write_str("&amp;"),
                '"' => f.write_str("&quot;"),
                '\'' => f.write_str("&#39;"),
                c => f.write_char(c),
            }?;
        }
        Ok(())
    }
}

/// Appends formatted text to a page. Writing to a `String` cannot fail.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {{ let _ = writeln!($out, $($arg)*); }};
}

/// The whole page. `cases` are the pictures of the cases, in their order.
pub(super) fn html(
    title: &str,
    runs: &[RunResult],
    data: &Data<'_>,
    overview: &[Plot],
    cases: &[Vec<Plot>],
) -> String {
    let mut out = String::new();
    put!(out, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">");
    // Nothing of the page may be fetched or run, whatever a result has smuggled in.
    put!(
        out,
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    );
    put!(out, "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">");
    put!(
        out,
        "<title>{}</title>\n<style>\n{}</style>\n</head>\n<body>",
        Esc(title),
        include_str!("page.css")
    );
    put!(out, "<h1>{}</h1>", Esc(title));
    put!(out, "<p>{} runs of {} cases under {} labels.</p>", runs.len(), data.cases.len(), data.labels.len());
    put!(
        out,
        "<nav><a href=\"#compare\">Comparison</a><a href=\"#cases\">Cases</a><a href=\"#runs\">Runs</a></nav>"
    );
    machines(&mut out, runs);
    put!(out, "<h2 id=\"compare\">Comparison</h2>");
    if data.labels.len() > 1 {
        compare(&mut out, data);
    }
    overview.iter().for_each(|p| figure(&mut out, p));
    put!(out, "<h2 id=\"cases\">Cases</h2>");
    for (case, plots) in data.cases.iter().zip(cases) {
        put!(out, "<h3>{}</h3>", Esc(case.name));
        case_table(&mut out, data, case);
        plots.iter().for_each(|p| figure(&mut out, p));
    }
    put!(out, "<h2 id=\"runs\">Runs</h2>");
    run_table(&mut out, runs);
    put!(out, "<p class=\"note\">Made by rnbd-perf {}.</p>\n</body>\n</html>", env!("CARGO_PKG_VERSION"));
    out
}

fn figure(out: &mut String, plot: &Plot) {
    put!(out, "<figure><figcaption>{}</figcaption>\n{}</figure>", Esc(&plot.caption), plot.svg);
}

fn swatch(label: usize) -> String {
    let plotters::style::RGBColor(r, g, b) = style::colour(label);
    format!("<span class=\"swatch\" style=\"background:#{r:02x}{g:02x}{b:02x}\"></span>")
}

/// Where the runs were made: a row for each machine.
fn machines(out: &mut String, runs: &[RunResult]) {
    let mut seen: Vec<Machine> = Vec::new();
    for run in runs {
        let machine = Machine { load_average: 0.0, ..run.machine.clone() };
        if !machine.cpu.is_empty() && !seen.contains(&machine) && seen.len() < 20 {
            seen.push(machine);
        }
    }
    for m in seen {
        let kind = if m.virtual_machine { ", virtual machine" } else { "" };
        let (cpu, kernel, governor) = (Esc(&m.cpu), Esc(&m.kernel), Esc(&m.governor));
        put!(
            out,
            "<p>{} × {cpu}{kind}, {:.1} GiB, Linux {kernel}, frequency governor: {governor}.</p>",
            m.cpus,
            m.memory_mib as f64 / 1024.0
        );
    }
}

/// Every label beside the first one.
fn compare(out: &mut String, data: &Data<'_>) {
    put!(
        out,
        "<p>Each label against <b>{}</b> (or the first of its case), by medians. <span class=\"better\">Better\
         </span> and <span class=\"worse\">worse</span> mean that the ranges of all runs do not overlap; where they do, the difference may be chance.</p>",
        Esc(data.labels[0])
    );
    put!(
        out,
        "<div class=\"scroll\"><table><tr><th>case</th><th class=\"text\">label</th><th>IOPS</th><th>ratio</th>"
    );
    put!(out, "<th>p99</th><th>ratio</th><th>CPU/request</th><th>ratio</th></tr>");
    for case in &data.cases {
        let mut base = None;
        for (label, group) in case.groups.iter().enumerate().filter(|(_, g)| !g.runs.is_empty()) {
            let first = base.is_none();
            let base = *base.get_or_insert(group);
            let (class, name) = if first { (" class=\"first\"", case.name) } else { ("", "") };
            put!(out, "<tr{class}><td>{}</td>", Esc(name));
            put!(out, "<td class=\"text\">{}{}</td>", swatch(label), Esc(data.labels[label]));
            for metric in [Metric::Iops, Metric::P99, Metric::CpuPerIo] {
                put!(out, "<td>{}</td>", cell(group, metric));
                put!(out, "<td>{}</td>", if first { String::new() } else { ratio(group, base, metric) });
            }
            put!(out, "</tr>");
        }
    }
    put!(out, "</table></div>");
}

fn show(metric: Metric, value: f64) -> String {
    match metric {
        // Not told by whoever measured.
        _ if value == 0.0 => "–".into(),
        Metric::Iops => style::count(value),
        Metric::Bandwidth => style::bandwidth(value),
        Metric::P50 | Metric::P99 | Metric::P999 | Metric::CpuPerIo => style::time(value),
    }
}

/// Median and range.
fn cell(group: &Group<'_>, metric: Metric) -> String {
    let Some(s) = group.spread(metric) else { return String::new() };
    let median = show(metric, s.median);
    if group.runs.len() < 2 {
        return median;
    }
    let (min, max) = (show(metric, s.min), show(metric, s.max));
    format!("{median}<br><span class=\"range\">{min} – {max}</span>")
}

fn ratio(group: &Group<'_>, base: &Group<'_>, metric: Metric) -> String {
    let (Some(b), Some(a)) = (group.spread(metric), base.spread(metric)) else { return String::new() };
    if a.median <= 0.0 || b.median <= 0.0 {
        return String::new();
    }
    let ratio = format!("{:.2}", b.median / a.median);
    match group.verdict(base, metric) {
        Verdict::Better => format!("<span class=\"better\">{ratio} better</span>"),
        Verdict::Worse => format!("<span class=\"worse\">{ratio} worse</span>"),
        Verdict::Unclear => format!("{ratio}<br><span class=\"range\">ranges overlap</span>"),
        Verdict::TooFew => ratio,
    }
}

fn case_table(out: &mut String, data: &Data<'_>, case: &Case<'_>) {
    put!(
        out,
        "<div class=\"scroll\"><table><tr><th>label</th><th>runs</th><th>IOPS</th><th>bandwidth</th><th>p50</th>"
    );
    put!(out, "<th>p99</th><th>p99.9</th><th>CPU/request</th><th>busy</th><th>errors</th></tr>");
    for (label, group) in case.groups.iter().enumerate().filter(|(_, g)| !g.runs.is_empty()) {
        let errors = group.errors();
        put!(
            out,
            "<tr{}><td>{}{}</td><td>{}</td>",
            if errors > 0 { " class=\"bad\"" } else { "" },
            swatch(label),
            Esc(data.labels[label]),
            group.runs.len()
        );
        for metric in
            [Metric::Iops, Metric::Bandwidth, Metric::P50, Metric::P99, Metric::P999, Metric::CpuPerIo]
        {
            put!(out, "<td>{}</td>", cell(group, metric));
        }
        put!(out, "<td>{}</td><td>{errors}</td></tr>", busy(group));
    }
    put!(out, "</table></div>");
}

/// How busy the load's reactors were, in the middle run.
fn busy(group: &Group<'_>) -> String {
    let reactors = group.typical().map(|r| &r.cpu.reactors[..]).unwrap_or_default();
    let all: Vec<String> =
        reactors.iter().take(8).map(|r| format!("{:.0} %", r.busy_share * 100.0)).collect();
    all.join(" ")
}

/// Every run, with its command, or with what went wrong, below it.
fn run_table(out: &mut String, runs: &[RunResult]) {
    put!(
        out,
        "<div class=\"scroll\"><table><tr><th>label</th><th class=\"text\">case</th><th>IOPS</th><th>p99</th>"
    );
    put!(out, "<th>load average</th><th>started</th><th>sources</th></tr>");
    for run in runs {
        let plus = if run.git.dirty { "+" } else { "" };
        let p99 = show(Metric::P99, run.totals.latency_us.p99);
        put!(
            out,
            "<tr class=\"run\"><td>{}</td><td class=\"text\">{}</td><td>{}</td><td>{p99}</td><td>{:.1}</td><td>{}</td>\
             <td>{}{plus}</td></tr>",
            Esc(&run.label),
            Esc(&run.case),
            style::count(run.totals.iops),
            run.machine.load_average,
            Esc(&run.started),
            Esc(&run.git.revision)
        );
        if let Some(complaint) = run.complaint() {
            put!(out, "<tr class=\"bad\"><td class=\"text\" colspan=\"7\">{}</td></tr>", Esc(&complaint));
        }
        let command = style::cut(&run.command.join(" "), 1000);
        if !command.is_empty() {
            put!(
                out,
                "<tr><td class=\"text\" colspan=\"7\"><details><summary>command of {}</summary>",
                Esc(&run.program)
            );
            put!(out, "<code>{}</code></details></td></tr>", Esc(&command));
        }
    }
    put!(out, "</table></div>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_results_is_text() {
        let evil = "<script>alert(1)</script>\"'&";
        assert_eq!(Esc(evil).to_string(), "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;&amp;");
    }
}
