//! SPDK's log lines become events of this program's log, under the target `spdk`.

use std::collections::VecDeque;
use std::ffi::{c_char, c_int};
use std::sync::Mutex;

use spdk_sys as sys;

use super::ffi;

/// Lines kept for error messages.
const KEPT: usize = 4;

static ERRORS: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// What SPDK last complained about, newest last; it tells more than its return codes. Forgets it.
pub fn recent_errors() -> String {
    let mut errors = ERRORS.lock().unwrap_or_else(|e| e.into_inner());
    errors.drain(..).collect::<Vec<_>>().join("; ")
}

/// Takes SPDK's log over. Before anything else of SPDK is called.
pub(super) fn take_over() {
    // SAFETY: a function that lives for ever; levels are plain numbers.
    unsafe {
        sys::spdk_log_open(Some(line));
        sys::spdk_log_set_level(sys::spdk_log_level::SPDK_LOG_INFO);
        sys::spdk_log_set_print_level(sys::spdk_log_level::SPDK_LOG_INFO);
    }
}

/// SPDK's `logfunc`: file, line and function are null for lines that are continued.
unsafe extern "C" fn line(
    level: c_int,
    _file: *const c_char,
    _line: c_int,
    function: *const c_char,
    format: *const c_char,
    args: *mut sys::__va_list_tag,
) {
    let mut buffer = [0u8; 1024];
    // SAFETY: the buffer has the length that is told; format and arguments come from SPDK's caller, who checked them as
    // for printf; the result is terminated.
    let (text, function) = unsafe {
        sys::vsnprintf(buffer.as_mut_ptr().cast(), buffer.len() as _, format, args);
        (ffi::text(buffer.as_ptr().cast()), ffi::text(function))
    };
    let text = text.trim_end();
    match level {
        sys::spdk_log_level::SPDK_LOG_ERROR => {
            let mut errors = ERRORS.lock().unwrap_or_else(|e| e.into_inner());
            if errors.len() == KEPT {
                errors.pop_front();
            }
            errors.push_back(text.to_owned());
            drop(errors);
            tracing::error!(target: "spdk", function, "{text}");
        }
        sys::spdk_log_level::SPDK_LOG_WARN => tracing::warn!(target: "spdk", function, "{text}"),
        sys::spdk_log_level::SPDK_LOG_NOTICE => tracing::info!(target: "spdk", "{text}"),
        _ => tracing::debug!(target: "spdk", function, "{text}"),
    }
}
