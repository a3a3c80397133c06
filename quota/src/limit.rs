//! A limit, the share of each source, and the reserve.

use std::fmt;

/// A bound on something that peers can make a server keep: pieces, or bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    total: u64,
    percent: u8,
    unit: u64,
}

/// Why a peer may not have more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Its source has its share.
    Share,
    /// Everything is taken, except what is kept for known sources, and it is none.
    Reserved,
    /// Everything is taken.
    Total,
}

impl Limit {
    /// One part in so many is the reserve.
    const RESERVE: u64 = 8;
    /// A source may have so many units even where `percent` gives it fewer, as long as that is no more than half.
    const LEAST_UNITS: u64 = 4;

    /// At most `total`, of which one source may have `percent`, 1 to 100. A client cannot work with less than `unit`.
    pub const fn new(total: u64, percent: u8, unit: u64) -> Limit {
        Limit { total, percent: if percent > 100 { 100 } else { percent }, unit }
    }

    /// What there is.
    pub const fn total(self) -> u64 {
        self.total
    }

    /// What one source may have. A small limit would be divided into shares that are of no use, so a source gets a few
    /// units of it, up to half of all, and always one.
    pub fn share(self) -> u64 {
        let part = |percent: u8| (u128::from(self.total) * u128::from(percent) / 100) as u64;
        let least = part(self.percent.max(50)).min(self.unit.saturating_mul(Self::LEAST_UNITS));
        part(self.percent).max(least).max(self.unit).min(self.total)
    }

    /// What is kept for known sources: as soon as no more is left than this, others get nothing.
    pub const fn reserve(self) -> u64 {
        self.total / Self::RESERVE
    }

    /// Whether a source that has `own` of the `used` may have `more`.
    ///
    /// # Errors
    /// Which bound is in the way.
    pub fn check(self, known: bool, own: u64, used: u64, more: u64) -> Result<(), Over> {
        let then = |now: u64| now.saturating_add(more);
        if then(own) > self.share() {
            Err(Over::Share)
        } else if then(used) > self.total {
            Err(Over::Total)
        } else if !known && then(used) > self.total - self.reserve() {
            Err(Over::Reserved)
        } else {
            Ok(())
        }
    }
}

impl Over {
    /// In words, about `limit` of `what`, which is a plural.
    pub fn explain(self, limit: Limit, what: impl fmt::Display) -> String {
        let total = limit.total();
        match self {
            Over::Share => format!("one address may have {} of {total} {what}", limit.share()),
            Over::Total => format!("limit of {total} {what} reached"),
            Over::Reserved => format!(
                "limit of {total} {what} reached: the last {} are for clients that opened a device before or that an allow list names",
                limit.reserve()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_part_but_never_too_little_to_work_with() {
        let share = |total| Limit::new(total, 25, 1).share();
        assert_eq!(
            [share(64), share(16), share(12), share(8), share(4), share(2), share(1)],
            [16, 4, 4, 4, 2, 1, 1]
        );
        assert_eq!(Limit::new(512, 25, 70).share(), 256, "half of a budget that has room for seven");
        assert_eq!(Limit::new(100, 25, 70).share(), 70, "one client fits");
        assert_eq!(Limit::new(50, 25, 70).share(), 50, "none does, and the total says so");
        assert_eq!(Limit::new(64, 100, 1).share(), 64);
        assert_eq!(Limit::new(u64::MAX, 25, 1).share(), u64::MAX / 4);
    }

    #[test]
    fn the_reserve_is_for_those_who_are_known() {
        let limit = Limit::new(64, 25, 1);
        assert_eq!(limit.check(false, 0, 55, 1), Ok(()));
        assert_eq!(limit.check(false, 0, 56, 1), Err(Over::Reserved));
        assert_eq!(limit.check(true, 0, 56, 1), Ok(()));
        assert_eq!(limit.check(true, 0, 64, 1), Err(Over::Total));
        assert_eq!(limit.check(true, 16, 16, 1), Err(Over::Share));
        assert_eq!(limit.check(true, 0, 0, u64::MAX), Err(Over::Share));
    }

    #[test]
    fn reasons_name_the_bound() {
        let limit = Limit::new(64, 25, 1);
        assert_eq!(Over::Share.explain(limit, "sessions"), "one address may have 16 of 64 sessions");
        assert_eq!(Over::Total.explain(limit, "sessions"), "limit of 64 sessions reached");
        assert!(Over::Reserved.explain(limit, "sessions").contains("the last 8 are for clients"));
    }
}
