//! What somebody can open of whom nothing is known but that he reaches a listener.

use std::collections::{BTreeSet, HashMap};

use engine::App;
use serde_json::{Value, json};

use super::bdevs::TableOfBdevs;
use super::export::{Export, Exports};
use super::subsystem::{RnbdState, state};

/// Names in one line of the log.
const MOST: usize = 20;

/// To whom an export is open, as far as its entries tell.
pub(super) fn open_to(export: &Export) -> &'static str {
    if export.allow.is_empty() {
        "everybody"
    } else if export.allow.iter().any(|allow| allow.addr.is_none()) {
        "names"
    } else {
        "addresses"
    }
}

/// The bdevs that a client gets by saying their names.
pub(super) fn bdevs(app: &App, exports: &Exports) -> Vec<(String, bool)> {
    // Those for files have names that no client can say.
    let bdevs = TableOfBdevs { manager: &app.manager, for_files: &HashMap::new() };
    if !exports.offers_bdevs(&bdevs) {
        return Vec::new();
    }
    let all = app.manager.list().into_iter().map(|status| status.bdev);
    let sayable = all.filter(|bdev| !bdev.info().name.starts_with('/'));
    let free = sayable.filter(|bdev| exports.withheld(&bdevs, &bdev.info().name).is_none());
    free.map(|bdev| (bdev.info().name.clone(), bdev.info().read_only)).collect()
}

/// As `rnbd_get_name_space` shows it.
pub(super) fn name_space(app: &App, exports: &Exports) -> Value {
    let bdev = |(name, read_only): (String, bool)| json!({"bdev_name": name, "read_only": read_only});
    let export = |e: &Export| json!({"device_path": e.device_path, "bdev_name": e.bdev_name, "read_only": e.read_only, "open_to": open_to(e)});
    let free = TableOfBdevs { manager: &app.manager, for_files: &HashMap::new() };
    let files = exports
        .open_files
        .then(|| json!({"below": exports.search_path.common(), "read_only": exports.open_files_read_only}));
    json!({
        "dev_search_path": exports.search_path.as_str(),
        "exports": exports.list().iter().map(export).collect::<Vec<_>>(),
        "bdevs_offered": exports.offers_bdevs(&free),
        "bdevs": bdevs(app, exports).into_iter().map(bdev).collect::<Vec<_>>(),
        "files": files,
    })
}

/// What strangers can open, in words.
fn list(app: &App, exports: &Exports) -> BTreeSet<String> {
    let how = |read_only: bool| if read_only { "read-only" } else { "read-write" };
    let exported = exports.list().iter().filter_map(|e| {
        let whose = match open_to(e) {
            "everybody" => "",
            "names" => ", whoever calls his session as an allow entry without address says",
            _ => return None,
        };
        Some(format!("'{}' ({}{whose})", e.device_path, how(e.read_only)))
    });
    let bdevs = bdevs(app, exports);
    let bdevs = bdevs.into_iter().map(|(name, ro)| format!("bdev '{name}' by its own name ({})", how(ro)));
    let files = exports.open_files.then(|| {
        let (below, ro) = (exports.search_path.common(), how(exports.open_files_read_only));
        format!("every file and block device below {below} ({ro})")
    });
    exported.chain(bdevs).chain(files).collect()
}

/// The configuration has been carried out.
pub(super) fn begin(app: &App) {
    if let Ok(state) = state(app) {
        state.borrow_mut().told = Some(BTreeSet::new());
    }
    tell(app);
}

/// Warns of what strangers can open now and could not when the last warning was given.
pub(super) fn tell(app: &App) {
    let Ok(state) = state(app) else { return };
    let mut state = state.borrow_mut();
    let RnbdState { told: Some(told), exports, server: Some(server), .. } = &mut *state else { return };
    if server.borrow().listeners().is_empty() {
        return;
    }
    let now = list(app, &exports.borrow());
    let new: Vec<&str> = now.difference(told).map(String::as_str).collect();
    if !new.is_empty() {
        let more = new.len().saturating_sub(MOST);
        let more = if more > 0 { format!(", and {more} more") } else { String::new() };
        let names = new[..new.len().min(MOST)].join(", ");
        tracing::warn!(
            "everybody who reaches a listener can open {names}{more}; an export with allow entries for addresses keeps \
             strangers off"
        );
    }
    *told = now;
}
