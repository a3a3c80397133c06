//! Who uses which bdev: for front ends that would give a bdev to whoever says its name.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::descriptor::User;
use crate::manager::{Error, Manager, names_of};

impl Manager {
    /// Who has the bdev of this name or alias open, and for whom it is reserved.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn users(&self, name: &str) -> Result<Vec<User>, Error> {
        let entry = self.entry(name)?;
        let mut users = entry.users();
        let reserved = self.reserved.lock().unwrap_or_else(|e| e.into_inner());
        if names_of(entry.info()).any(|name| reserved.contains(&name)) {
            users.push(User::Part);
        }
        Ok(users)
    }

    /// Keeps the bdev of this name or alias, which may come later, for a part of the program: [`User::Part`] is one of its
    /// users until `wanted` is false.
    pub fn reserve(&self, name: &str, wanted: bool) {
        let mut reserved = self.reserved.lock().unwrap_or_else(|e| e.into_inner());
        if wanted {
            reserved.insert(name.to_owned());
        } else {
            reserved.remove(name);
        }
    }

    /// Names of the bdevs that `name` is built on, in all layers below it; of those that SPDK builds, nothing is known here.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn bases(&self, name: &str) -> Result<Vec<String>, Error> {
        let all = self.entries();
        let mut above = vec![self.entry(name)?.info().name.clone()];
        let mut next = 0;
        while next < above.len() {
            let layer = User::Layer(above[next].clone());
            let below = all.iter().filter(|e| e.users().contains(&layer)).map(|e| e.info().name.clone());
            let new: Vec<String> = below.filter(|name| !above.contains(name)).collect();
            above.extend(new);
            next += 1;
        }
        above.remove(0);
        Ok(above)
    }

    /// Somebody has said who may have which bdev: from now on, until the program ends, bdevs are not anybody's any more.
    /// [`Manager::open_as`] does this for an export.
    pub fn note_export(&self) {
        if self.exported.swap(true, Ordering::Relaxed) {
            return;
        }
        let hook = self.on_first_export.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(hook) = hook {
            hook();
        }
    }

    /// Sets the one hook that hears of the first export. It must not block.
    pub fn on_first_export(&self, hook: impl FnOnce() + Send + 'static) {
        *self.on_first_export.lock().unwrap_or_else(|e| e.into_inner()) = Some(Box::new(hook));
    }

    /// [`Manager::note_export`] was called, ever.
    pub fn was_exported(&self) -> bool {
        self.exported.load(Ordering::Relaxed)
    }
}

impl crate::manager::Entry {
    fn users(self: &Arc<Self>) -> Vec<User> {
        // Clones leave the lock: the drop of the last one takes it again.
        let open = self.opens().all();
        open.iter().map(|open| open.user.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use iobuf::Registry;

    use super::*;
    use crate::descriptor::Mode;
    use crate::{delay, malloc};

    fn malloc(manager: &Arc<Manager>, name: &str) {
        let params = malloc::Params {
            name: Some(name.into()),
            num_blocks: 8,
            block_size: 512,
            physical_block_size: None,
            uuid: None,
        };
        malloc::create(manager, params).unwrap();
    }

    fn delay(manager: &Arc<Manager>, base: &str, name: &str) {
        let latencies = delay::Latencies { avg_read: 1, p99_read: 1, avg_write: 1, p99_write: 1 };
        let params = delay::Params { name: name.into(), base_bdev_name: base.into(), uuid: None, latencies };
        delay::create(manager, params).unwrap();
    }

    #[test]
    fn users_are_known_as_long_as_they_have_it_open() {
        let manager = Manager::new(Registry::new());
        malloc(&manager, "M0");
        assert!(manager.users("M0").unwrap().is_empty() && manager.users("M1").is_err());
        let open = |user| manager.open_as(user, "M0", Mode::ReadOnly, Box::new(|_| ())).unwrap();
        let client = open(User::Client("a client".into()));
        let heard = Arc::new(AtomicBool::new(false));
        let hook = heard.clone();
        manager.on_first_export(move || hook.store(true, Ordering::Relaxed));
        assert!(!manager.was_exported());
        let export = open(User::Export("an export".into()));
        assert!(manager.was_exported() && heard.load(Ordering::Relaxed));
        let uuid = manager.get("M0").unwrap().info().uuid.to_string();
        let both = [User::Client("a client".into()), User::Export("an export".into())];
        assert_eq!(manager.users(&uuid).unwrap(), both, "by whatever name");
        drop(client);
        assert_eq!(manager.users("M0").unwrap(), both[1..]);
        drop(export);
        assert!(manager.users("M0").unwrap().is_empty() && manager.was_exported());
        manager.reserve(&uuid, true);
        assert_eq!(manager.users("M0").unwrap(), [User::Part]);
        manager.reserve(&uuid, false);
        assert!(manager.users("M0").unwrap().is_empty());
    }

    #[test]
    fn layers_are_users_of_what_is_below() {
        let manager = Manager::new(Registry::new());
        malloc(&manager, "M0");
        delay(&manager, "M0", "D0");
        delay(&manager, "D0", "D1");
        assert_eq!(manager.users("M0").unwrap(), [User::Layer("D0".into())]);
        assert_eq!(manager.bases("D1").unwrap(), ["D0", "M0"]);
        assert!(manager.bases("M0").unwrap().is_empty() && manager.bases("gone").is_err());
    }
}
