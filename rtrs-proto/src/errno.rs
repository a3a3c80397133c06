//! Linux error numbers as RTRS carries them.

use std::fmt;
use std::num::NonZeroU16;

/// A Linux errno, 1..=511, without its sign: what fits the nine errno bits of a response immediate
/// (`rtrs-pri.h`, `MAX_IMM_ERRNO_BITS`). There is no value for "no error"; use `Result<_, Errno>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(NonZeroU16);

/// Largest errno that a response immediate can hold.
pub const MAX_ERRNO: u16 = 0x1ff;

macro_rules! errnos {
    ($($name:ident = $value:literal, $text:literal;)*) => {
        impl Errno {
            $(#[doc = concat!($text, " (", stringify!($value), ").")]
            pub const $name: Errno = Errno(NonZeroU16::new($value).unwrap());)*

            /// The symbolic name, if this crate knows it.
            pub const fn name(self) -> Option<&'static str> {
                match self.0.get() {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM = 1, "Operation not permitted";
    ENOENT = 2, "No such file or directory";
    EIO = 5, "Input/output error";
    ENXIO = 6, "No such device or address";
    EAGAIN = 11, "Try again";
    ENOMEM = 12, "Out of memory";
    EACCES = 13, "Permission denied";
    ENOTBLK = 15, "Block device required";
    EBUSY = 16, "Device or resource busy";
    EEXIST = 17, "Exists already";
    ENODEV = 19, "No such device";
    EINVAL = 22, "Invalid argument";
    EMFILE = 24, "Too many open files";
    ENOSPC = 28, "No space left on device";
    EROFS = 30, "Read-only device";
    ENAMETOOLONG = 36, "Name too long";
    EBADE = 52, "Invalid exchange";
    ENODATA = 61, "No data available (medium error)";
    ETIME = 62, "Timer expired";
    ENOLINK = 67, "Link has been severed";
    EPROTO = 71, "Protocol error";
    EILSEQ = 84, "Illegal byte sequence (integrity error)";
    EMSGSIZE = 90, "Message too long";
    EOPNOTSUPP = 95, "Operation not supported";
    ECONNABORTED = 103, "Connection aborted";
    ECONNRESET = 104, "Connection reset";
    ENOTCONN = 107, "Not connected";
    ETIMEDOUT = 110, "Timed out";
    EREMOTEIO = 121, "Remote I/O error";
    ECANCELED = 125, "Operation cancelled";
}

impl Errno {
    /// Takes an errno of either sign, as system calls and the wire give them.
    /// 0 is `None`; a number that does not fit nine bits becomes `EIO` rather than some other, wrong error.
    pub const fn from_raw(raw: i32) -> Option<Errno> {
        let abs = raw.unsigned_abs();
        if abs > MAX_ERRNO as u32 {
            return Some(Errno::EIO);
        }
        match NonZeroU16::new(abs as u16) {
            Some(n) => Some(Errno(n)),
            None => None,
        }
    }

    /// The positive number, 1..=511.
    pub const fn get(self) -> u16 {
        self.0.get()
    }

    /// The number as a connect reject carries it: negative.
    pub const fn negative(self) -> i16 {
        -(self.0.get() as i16)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name}({})", self.0),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_sign_is_taken_and_the_reject_form_is_negative() {
        assert_eq!(Errno::from_raw(-17), Some(Errno::EEXIST));
        assert_eq!(Errno::from_raw(17), Some(Errno::EEXIST));
        assert_eq!(Errno::EEXIST.negative().to_le_bytes(), [0xef, 0xff]);
        assert_eq!(Errno::from_raw(0), None);
    }

    #[test]
    fn what_does_not_fit_nine_bits_becomes_eio() {
        assert_eq!(Errno::from_raw(-511).map(Errno::get), Some(511));
        assert_eq!(Errno::from_raw(-512), Some(Errno::EIO));
        assert_eq!(Errno::from_raw(i32::MIN), Some(Errno::EIO));
    }

    #[test]
    fn display_has_name_and_number() {
        assert_eq!(Errno::ENOTCONN.to_string(), "ENOTCONN(107)");
        assert_eq!(Errno::from_raw(500).unwrap().to_string(), "errno 500");
    }
}
