//! One value of each type, for subsystems to keep their state in.

use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// Values by their type.
#[derive(Default)]
pub(crate) struct StateMap(HashMap<TypeId, Rc<dyn Any>>);

impl StateMap {
    pub(crate) fn set<T: 'static>(&mut self, value: Rc<RefCell<T>>) {
        self.0.insert(TypeId::of::<T>(), value);
    }

    pub(crate) fn get<T: 'static>(&self) -> Option<Rc<RefCell<T>>> {
        self.0.get(&TypeId::of::<T>())?.clone().downcast().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_of_each_type() {
        let mut map = StateMap::default();
        assert!(map.get::<u32>().is_none());
        map.set(Rc::new(RefCell::new(1_u32)));
        map.set(Rc::new(RefCell::new("a")));
        *map.get::<u32>().unwrap().borrow_mut() += 1;
        assert_eq!(*map.get::<u32>().unwrap().borrow(), 2);
        assert_eq!(*map.get::<&str>().unwrap().borrow(), "a");
        map.set(Rc::new(RefCell::new(7_u32)));
        assert_eq!(*map.get::<u32>().unwrap().borrow(), 7);
    }
}
