//! A table whose places are used again: nothing is allocated once it has seen its largest number of entries.

/// Entries by small numbers.
#[derive(Debug)]
pub(super) struct Slots<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { items: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// Puts `item` into a free place; returns its number.
    pub fn insert(&mut self, item: T) -> u32 {
        if let Some(place) = self.free.pop() {
            self.items[place as usize] = Some(item);
            return place;
        }
        self.items.push(Some(item));
        // Room for all of them, so that giving them back never allocates.
        self.free.reserve(self.items.len());
        self.items.len() as u32 - 1
    }

    /// Takes an entry out.
    pub fn remove(&mut self, place: u32) -> Option<T> {
        let item = self.items.get_mut(place as usize)?.take()?;
        self.free.push(place);
        Some(item)
    }

    pub fn get(&self, place: u32) -> Option<&T> {
        self.items.get(place as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, place: u32) -> Option<&mut T> {
        self.items.get_mut(place as usize)?.as_mut()
    }

    /// Entries with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().enumerate().filter_map(|(i, item)| Some((i as u32, item.as_ref()?)))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        self.items.iter_mut().enumerate().filter_map(|(i, item)| Some((i as u32, item.as_mut()?)))
    }

    /// Entries there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again() {
        let mut s = Slots::default();
        assert_eq!((s.insert('a'), s.insert('b')), (0, 1));
        assert_eq!((s.remove(0), s.remove(0), s.remove(9)), (Some('a'), None, None));
        assert_eq!((s.insert('c'), s.insert('d'), s.len()), (0, 2, 3));
        assert_eq!(s.iter().map(|(i, c)| (i, *c)).collect::<Vec<_>>(), [(0, 'c'), (1, 'b'), (2, 'd')]);
        *s.get_mut(1).unwrap() = 'x';
        assert_eq!((s.get(1), s.get(7)), (Some(&'x'), None));
    }
}
