//! Packet sequence numbers: 24 bits, compared by their signed distance (IBTA 9.7.1).

/// A packet sequence number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Psn(u32);

impl Psn {
    /// One more than the largest value.
    pub const MODULUS: u32 = 1 << 24;

    /// The low 24 bits of `value`.
    pub const fn new(value: u32) -> Self {
        Self(value & (Self::MODULUS - 1))
    }

    /// As a number below [`Psn::MODULUS`].
    pub const fn get(self) -> u32 {
        self.0
    }

    /// `n` packets later.
    #[must_use]
    pub const fn plus(self, n: u32) -> Self {
        Self::new(self.0.wrapping_add(n))
    }

    /// `n` packets earlier.
    #[must_use]
    pub const fn minus(self, n: u32) -> Self {
        Self::new(self.0.wrapping_sub(n))
    }

    /// How far `self` is after `other`, -2^23..2^23.
    pub const fn since(self, other: Self) -> i32 {
        (self.0.wrapping_sub(other.0) << 8) as i32 >> 8
    }

    /// `self` comes before `other`.
    pub const fn is_before(self, other: Self) -> bool {
        self.since(other) < 0
    }

    /// `from <= self < to`.
    pub const fn is_within(self, from: Self, to: Self) -> bool {
        self.since(from) >= 0 && self.since(to) < 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_survives_the_wrap() {
        let last = Psn::new(0xff_ffff);
        assert_eq!(last.plus(1), Psn::new(0));
        assert!(last.is_before(last.plus(1)));
        assert_eq!(last.plus(5).since(last), 5);
        assert_eq!(last.since(last.plus(5)), -5);
        assert_eq!(Psn::new(0).minus(1), last);
        assert!(Psn::new(0).is_within(last, Psn::new(1)));
        assert!(!Psn::new(1).is_within(last, Psn::new(1)));
    }
}
