//! Values found by index, with a generation that tells a former value's name from the present one's.

/// Names a value of a [`Slab`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::client) struct Key {
    pub index: u32,
    /// 24 bits, never 0.
    pub generation: u32,
}

pub(super) struct Slab<T> {
    entries: Vec<(u32, Option<T>)>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Places, free ones included.
    pub fn capacity(&self) -> usize {
        self.entries.len()
    }

    /// Puts in what `make` returns for its name-to-be.
    pub fn insert_with(&mut self, make: impl FnOnce(Key) -> T) -> Key {
        let index = self.entries.iter().position(|(_, v)| v.is_none()).unwrap_or_else(|| {
            self.entries.push((0, None));
            self.entries.len() - 1
        });
        let (generation, value) = &mut self.entries[index];
        *generation = (*generation % 0xff_ffff) + 1;
        let key = Key { index: index as u32, generation: *generation };
        *value = Some(make(key));
        key
    }

    pub fn get(&mut self, key: Key) -> Option<&mut T> {
        let (generation, value) = self.entries.get_mut(key.index as usize)?;
        if *generation == key.generation { value.as_mut() } else { None }
    }

    pub fn remove(&mut self, key: Key) -> Option<T> {
        let (generation, value) = self.entries.get_mut(key.index as usize)?;
        if *generation == key.generation { value.take() } else { None }
    }

    /// All names, to look at each while values come and go. Allocates.
    pub fn keys(&self) -> Vec<Key> {
        self.iter().map(|(k, _)| k).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.entries.iter().enumerate().filter_map(|(i, (generation, value))| {
            Some((Key { index: i as u32, generation: *generation }, value.as_ref()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn former_names_find_nothing() {
        let mut s = Slab::default();
        let a = s.insert_with(|_| 'a');
        assert_eq!(s.remove(a), Some('a'));
        let b = s.insert_with(|_| 'b');
        assert_eq!((a.index, s.get(a)), (b.index, None));
        assert_eq!(s.remove(a), None);
        assert_eq!(s.get(b), Some(&mut 'b'));
        assert_eq!(s.iter().collect::<Vec<_>>(), [(b, &'b')]);
    }
}
