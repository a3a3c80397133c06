//! Pictures as files.

use std::path::Path;
use std::sync::Arc;

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};

use super::{Plot, ReportError, write};

/// Pixels for each unit: sharp on screens and on paper.
const SCALE: f32 = 2.0;
/// Looked for in this order; any other will do if there is none of these.
const FONTS: [&str; 5] = ["DejaVu Sans", "Liberation Sans", "Noto Sans", "Arial", "Helvetica"];

fn folder(path: &Path) -> Result<(), ReportError> {
    std::fs::create_dir_all(path).map_err(|source| ReportError::Write { path: path.to_owned(), source })
}

/// A file `NAME.svg` each.
pub(super) fn write_svg(path: &Path, plots: &[&Plot]) -> Result<(), ReportError> {
    folder(path)?;
    plots.iter().try_for_each(|p| write(&path.join(format!("{}.svg", p.name)), p.svg.as_bytes()))
}

/// A file `NAME.png` each.
pub(super) fn write_png(path: &Path, plots: &[&Plot]) -> Result<(), ReportError> {
    let options = fonts().map_err(|why| ReportError::Draw { name: "PNG files".into(), why })?;
    folder(path)?;
    for plot in plots {
        let png = png(&plot.svg, &options);
        let png = png.map_err(|why| ReportError::Draw { name: plot.caption.clone(), why })?;
        write(&path.join(format!("{}.png", plot.name)), &png)?;
    }
    Ok(())
}

fn fonts() -> Result<Options<'static>, String> {
    let mut options = Options::default();
    let fonts = Arc::make_mut(&mut options.fontdb);
    fonts.load_system_fonts();
    let has = |name: &&&str| fonts.faces().any(|f| f.families.iter().any(|(family, _)| family == **name));
    let first = || fonts.faces().next().and_then(|f| f.families.first()).map(|(family, _)| family.clone());
    let family = FONTS.iter().find(has).map(|f| (*f).to_owned()).or_else(first);
    // Without one, every text would be missing from the picture, silently.
    let family = family.ok_or("no font is installed; install one (fonts-dejavu-core), or use --svg")?;
    fonts.set_sans_serif_family(family);
    Ok(options)
}

fn png(svg: &str, options: &Options<'_>) -> Result<Vec<u8>, String> {
    let tree = Tree::from_str(svg, options).map_err(|e| e.to_string())?;
    let size = tree.size().to_int_size().scale_by(SCALE).ok_or("it has no size")?;
    let mut pixels = Pixmap::new(size.width(), size.height()).ok_or("it is too large")?;
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().map_err(|e| e.to_string())
}
