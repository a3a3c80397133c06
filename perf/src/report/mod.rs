//! Pages of results: `rnbd-perf report`.
//!
//! ```text
//! input.rs: files, checked ─▶ group.rs: runs by case and label, medians ─▶ page.rs: HTML with tables
//!                                                                     └─▶ chart.rs, bars.rs: SVG ─▶ image.rs: files, PNG
//! ```
//!
//! Results may come from anybody: `input.rs` lets nothing through that the others could not draw, and `page.rs` escapes
//! every text.

mod bars;
mod chart;
mod group;
mod image;
mod input;
mod page;
mod style;

use std::path::{Path, PathBuf};

pub use input::InputError;

/// What to make of what.
#[derive(Clone, Debug)]
pub struct Options {
    /// Results.
    pub files: Vec<PathBuf>,
    /// The page.
    pub output: PathBuf,
    /// The label that others are compared with; `None`: the first.
    pub baseline: Option<String>,
    /// Headline.
    pub title: String,
    /// Folder for PNG files.
    pub png: Option<PathBuf>,
    /// Folder for SVG files.
    pub svg: Option<PathBuf>,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// Nothing to show.
    #[error("which results? Name files that rnbd-perf --json has written")]
    NoFiles,
    /// A file is no result.
    #[error(transparent)]
    Input(#[from] InputError),
    /// No run has the label.
    #[error("--baseline {wanted}: no run has this label; there are {}", .there.join(", "))]
    Baseline {
        /// As asked for.
        wanted: String,
        /// All labels.
        there: Vec<String>,
    },
    /// Nobody could read the page.
    #[error("more than {most} {what} on one page: make several")]
    TooMany {
        /// "labels" or "cases".
        what: &'static str,
        /// As many fit.
        most: usize,
    },
    /// A picture could not be drawn.
    #[error("cannot draw '{name}': {why}")]
    Draw {
        /// Which.
        name: String,
        /// In words.
        why: String,
    },
    /// A file could not be written.
    #[error("cannot write {}: {source}", .path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// A picture.
pub(crate) struct Plot {
    /// For files: letters, digits and '-'.
    pub name: String,
    /// What is to be seen.
    pub caption: String,
    /// The picture.
    pub svg: String,
}

/// Makes the page, and the files that were asked for.
///
/// # Errors
/// [`ReportError`]; then no page has been written.
pub fn make(options: &Options) -> Result<(), ReportError> {
    if options.files.is_empty() {
        return Err(ReportError::NoFiles);
    }
    let runs = input::load(&options.files)?;
    let data = group::Data::new(&runs, options.baseline.as_deref())?;
    let overview = bars::plots(&data)?;
    let cases = (0..data.cases.len()).map(|i| chart::plots(&data, i)).collect::<Result<Vec<_>, _>>()?;
    let all: Vec<&Plot> = overview.iter().chain(cases.iter().flatten()).collect();
    if let Some(folder) = &options.svg {
        image::write_svg(folder, &all)?;
    }
    if let Some(folder) = &options.png {
        image::write_png(folder, &all)?;
    }
    write(&options.output, page::html(&options.title, &runs, &data, &overview, &cases).as_bytes())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ReportError> {
    std::fs::write(path, bytes).map_err(|source| ReportError::Write { path: path.to_owned(), source })
}
