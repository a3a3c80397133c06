//! Rules of access one by one; under loom, that nobody writes to memory whose key is gone.

use super::*;

const DOMAIN: u32 = 7;

fn entry(base: u64, len: u64) -> Entry {
    Entry {
        base,
        len,
        domain: DOMAIN,
        remote_write: true,
        remote_read: false,
        local_write: false,
        invalidatable: true,
        qpn: None,
    }
}

fn numbers(seed: u32) -> impl FnMut() -> u32 {
    let mut state = seed | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    }
}

#[cfg(not(loom))]
mod plain {
    use super::*;

    fn write(table: &Table, key: u32, va: u64, len: u64) -> Result<(), AccessError> {
        table.pin(key, DOMAIN, va, len, Access::RemoteWrite).map(drop)
    }

    #[test]
    fn bounds_do_not_overflow() {
        let table = Table::with_slots(16);
        let key = table.insert(entry(0x1000, 0x100), numbers(1)).unwrap();
        for (va, len) in [(0x1000, 0x100), (0x1000, 0), (0x1100, 0), (0x10ff, 1), (0x1080, 0x80)] {
            assert_eq!(write(&table, key, va, len), Ok(()), "{va:#x}+{len:#x}");
        }
        for (va, len) in [
            (0xfff, 1),
            (0x1000, 0x101),
            (0x1100, 1),
            (0x1101, 0),
            (0x1080, 0x81),
            (0x1080, u64::MAX),
            (u64::MAX, 2),
            (0, 0),
            (u64::MAX, u64::MAX),
        ] {
            assert_eq!(write(&table, key, va, len), Err(AccessError::Bounds), "{va:#x}+{len:#x}");
        }
        let top = table.insert(entry(u64::MAX - 9, 10), numbers(2)).unwrap();
        assert_eq!(write(&table, top, u64::MAX - 9, 10), Ok(()));
        assert_eq!(write(&table, top, u64::MAX, 10), Err(AccessError::Bounds));
    }

    #[test]
    fn permissions() {
        use Access::*;
        let table = Table::with_slots(16);
        let none = Entry { remote_write: false, ..entry(0, 8) };
        for (granted, allowed) in [
            (none, &[LocalRead][..]),
            (Entry { remote_write: true, ..none }, &[LocalRead, RemoteWrite]),
            (Entry { remote_read: true, ..none }, &[LocalRead, RemoteRead]),
            (Entry { local_write: true, ..none }, &[LocalRead, LocalWrite]),
        ] {
            let key = table.insert(granted, numbers(3)).unwrap();
            for access in [LocalRead, LocalWrite, RemoteRead, RemoteWrite] {
                let want = if allowed.contains(&access) { None } else { Some(AccessError::Permission) };
                assert_eq!(table.pin(key, DOMAIN, 0, 8, access).err(), want, "{granted:?} {access:?}");
            }
        }
    }

    #[test]
    fn other_domains_and_queue_pairs_do_not_see_it() {
        let table = Table::with_slots(16);
        let key = table.insert(Entry { qpn: Some(0x1234), ..entry(0, 8) }, numbers(4)).unwrap();
        let by = |qpn| table.pin_by(key, DOMAIN, qpn, 0, 8, Access::RemoteWrite).map(drop);
        assert_eq!(table.pin(key, DOMAIN + 1, 0, 8, Access::RemoteWrite).err(), Some(AccessError::Key));
        assert_eq!((by(0x1234), by(0x1235)), (Ok(()), Err(AccessError::Key)));
        assert!(!table.invalidate(key, DOMAIN + 1));
        assert!(!table.invalidate_by(key, DOMAIN, 0x1235));
        assert!(table.invalidate_by(key, DOMAIN, 0x1234));
    }

    #[test]
    fn wrong_nonces_open_nothing() {
        let table = Table::with_slots(16);
        let key = table.insert(entry(0, 8), numbers(5)).unwrap();
        for bit in 0..32 {
            assert_eq!(write(&table, key ^ 1 << bit, 0, 8), Err(AccessError::Key));
            assert!(!table.remove(key ^ 1 << bit));
        }
        assert!(table.remove(key) && !table.remove(key));
        assert_eq!(write(&table, key, 0, 8), Err(AccessError::Key));
        // Nothing is there yet, whatever the nonce.
        assert_eq!(write(&table, 0, 0, 0), Err(AccessError::Key));
    }

    #[test]
    fn replace_ends_the_old_key_and_moves_the_range() {
        let table = Table::with_slots(16);
        let old = table.insert(entry(0, 8), numbers(6)).unwrap();
        // The same number again: the nonce must differ all the same.
        let new = table.replace(old, entry(100, 4), || old).unwrap();
        assert_ne!(old, new);
        assert_eq!(write(&table, old, 0, 8), Err(AccessError::Key));
        assert_eq!(write(&table, new, 100, 4), Ok(()));
        assert_eq!(table.replace(old, entry(0, 8), numbers(7)), None);
        assert!(table.remove(new));
    }

    #[test]
    fn invalidated_keys_stay_their_owners() {
        let table = Table::with_slots(1);
        let key = table.insert(entry(0, 8), numbers(8)).unwrap();
        assert!(table.invalidate(key, DOMAIN) && !table.invalidate(key, DOMAIN));
        assert_eq!(write(&table, key, 0, 8), Err(AccessError::Key));
        assert_eq!(table.insert(entry(0, 8), numbers(9)), None);
        let fixed = table.replace(key, Entry { invalidatable: false, ..entry(0, 8) }, numbers(10)).unwrap();
        assert!(!table.invalidate(fixed, DOMAIN));
        assert_eq!(write(&table, fixed, 0, 8), Ok(()));
        assert!(table.remove(fixed));
        assert!(table.insert(entry(0, 8), numbers(11)).is_some());
    }

    #[test]
    fn every_slot_can_be_taken_once() {
        let table = Table::with_slots(300);
        let mut random = numbers(12);
        let mut slots: Vec<u32> =
            (0..300).map(|_| table.insert(entry(0, 8), &mut random).unwrap() >> 16).collect();
        assert_eq!(table.insert(entry(0, 8), &mut random), None);
        assert!(!slots.is_sorted());
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), 300);
    }

    #[test]
    fn removal_waits_for_the_last_pin() {
        let table = Table::with_slots(16);
        let key = table.insert(entry(0, 8), numbers(13)).unwrap();
        let pins = [(); 2].map(|()| table.pin(key, DOMAIN, 4, 4, Access::RemoteWrite).unwrap());
        assert_eq!((pins[0].addr, pins[0].len), (4, 4));
        std::thread::scope(|scope| {
            let remover = scope.spawn(|| table.remove(key));
            // From the moment it begins, nobody new gets in.
            while write(&table, key, 0, 8).is_ok() {
                std::thread::yield_now();
            }
            let [first, second] = pins;
            drop(first);
            assert!(!remover.is_finished());
            drop(second);
            assert!(remover.join().unwrap());
        });
    }
}

#[cfg(loom)]
mod model {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    /// A table with a key over a buffer that loom watches: it fails when two threads are at it without order.
    struct Memory {
        table: Table,
        key: u32,
        bytes: UnsafeCell<u32>,
    }

    fn memory() -> Arc<Memory> {
        let table = Table::with_slots(1);
        let key = table.insert(entry(0, 8), numbers(1)).unwrap();
        Arc::new(Memory { table, key, bytes: UnsafeCell::new(0) })
    }

    /// What a thread that receives packets does. `bytes` is only named, not dereferenced: loom checks the access.
    fn peer_writes(memory: &Memory, key: u32) {
        if let Ok(_pin) = memory.table.pin(key, DOMAIN, 0, 8, Access::RemoteWrite) {
            memory.bytes.with_mut(|_| ());
        }
    }

    /// `end` must order all writes before it; then the memory is the owner's.
    fn nobody_writes_after(end: impl Fn(&Memory) + Sync + Send + 'static) {
        loom::model(move || {
            let memory = memory();
            let writer = {
                let memory = memory.clone();
                thread::spawn(move || peer_writes(&memory, memory.key))
            };
            end(&memory);
            memory.bytes.with_mut(|_| ());
            peer_writes(&memory, memory.key);
            writer.join().unwrap();
        });
    }

    #[test]
    fn remove() {
        nobody_writes_after(|memory| assert!(memory.table.remove(memory.key)));
    }

    #[test]
    fn invalidate() {
        nobody_writes_after(|memory| assert!(memory.table.invalidate(memory.key, DOMAIN)));
    }

    #[test]
    fn replace() {
        nobody_writes_after(|memory| {
            let other = Entry { base: 100, ..entry(0, 8) };
            assert!(memory.table.replace(memory.key, other, numbers(5)).is_some());
        });
    }

    /// Fields are the key's own, whichever of two entries a reader finds.
    #[test]
    fn a_key_has_its_own_range() {
        loom::model(|| {
            let table = Arc::new(Table::with_slots(1));
            let old = table.insert(entry(0, 8), || 1).unwrap();
            let reader = {
                let table = table.clone();
                thread::spawn(move || {
                    assert!(!matches!(
                        table.pin(old, DOMAIN, 0, 8, Access::RemoteWrite),
                        Err(AccessError::Bounds)
                    ));
                    assert!(!matches!(
                        table.pin(2, DOMAIN, 100, 8, Access::RemoteWrite),
                        Err(AccessError::Bounds)
                    ));
                })
            };
            assert_eq!(table.replace(old, entry(100, 8), || 2), Some(2));
            reader.join().unwrap();
        });
    }

    /// A peer's invalidation against the owner's rebinding: the new key survives, the old one does not, no one hangs.
    #[test]
    fn invalidate_against_replace() {
        loom::model(|| {
            let table = Arc::new(Table::with_slots(1));
            let old = table.insert(entry(0, 8), || 1).unwrap();
            let peer = {
                let table = table.clone();
                thread::spawn(move || table.invalidate(old, DOMAIN))
            };
            let new = table.replace(old, entry(0, 8), || 2).unwrap();
            peer.join().unwrap();
            assert!(table.pin(old, DOMAIN, 0, 8, Access::RemoteWrite).is_err());
            assert!(table.pin(new, DOMAIN, 0, 8, Access::RemoteWrite).is_ok());
            assert!(table.remove(new));
        });
    }
}
