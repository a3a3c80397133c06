//! The bdevs of the program, as the name space sees them.

use std::collections::HashMap;
use std::sync::Arc;

use bdev::uring::{FileId, file_of, on_file};
use bdev::{Manager, User};

use super::names::Bdevs;

/// All bdevs.
pub(super) struct TableOfBdevs<'a> {
    pub manager: &'a Arc<Manager>,
    /// Those that were made for clients who asked for a file, by name.
    pub for_files: &'a HashMap<String, usize>,
}

impl Bdevs for TableOfBdevs<'_> {
    fn own_name(&self, name: &str) -> Option<String> {
        Some(self.manager.get(name).ok()?.info().name.clone())
    }

    fn used_by(&self, own: &str) -> Option<String> {
        if let Some(user) = self.users(own).into_iter().next() {
            return Some(user.to_string());
        }
        let exported = |name: &String| self.users(name).into_iter().find(|u| matches!(u, User::Export(_)));
        let below = self.bases(own).iter().find_map(exported);
        if let Some(user) = below {
            return Some(format!("{user}, below it"));
        }
        let held = self.manager.get(own).is_ok_and(|bdev| bdev.is_held());
        held.then(|| "a module of SPDK".to_owned())
    }

    /// Those that have the same file are no better than the bdev itself.
    fn bases(&self, own: &str) -> Vec<String> {
        let mut bases = self.manager.bases(own).unwrap_or_default();
        let all: Vec<String> = bases.iter().cloned().chain([own.to_owned()]).collect();
        let files = all.iter().filter_map(|name| file_of(self.manager.get(name).ok()?));
        let same = files.flat_map(|file| on_file(self.manager, file));
        bases.extend(same.filter(|name| !all.contains(name)).collect::<Vec<_>>());
        bases
    }

    fn was_exported(&self) -> bool {
        self.manager.was_exported()
    }

    fn on_file(&self, file: FileId) -> Option<String> {
        let free = |name: &String| self.for_files.contains_key(name) && self.used_by(name).is_none();
        on_file(self.manager, file).into_iter().find(|name| !free(name))
    }
}

impl TableOfBdevs<'_> {
    /// Those who keep others off.
    fn users(&self, name: &str) -> Vec<User> {
        let mut users = self.manager.users(name).unwrap_or_default();
        users.retain(|user| !matches!(user, User::Client(_)));
        users
    }
}
