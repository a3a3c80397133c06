//! Strings from C.

use std::ffi::{CStr, CString, c_char};

/// A copy of a C string; empty for null.
///
/// # Safety
/// `text` is null or a C string that stays while this runs.
pub(super) unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: a C string by the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// For C. A NUL inside ends the text there, as C would read it.
pub(super) fn c_string(text: &str) -> CString {
    let until_nul = text.split('\0').next().unwrap_or_default();
    CString::new(until_nul).expect("no NUL is left")
}

/// A negative errno of SPDK in words.
pub(super) fn errno(rc: i32) -> rustix::io::Errno {
    rustix::io::Errno::from_raw_os_error(rc.saturating_neg().max(1))
}
