//! The contract of a bdev, checked on every backend and layer here.

mod common;
#[macro_use]
mod contract;

use common::Setup;

suite! {
    null_512 => Setup::null(512);
    null_4096 => Setup::null(4096);
    malloc_512 => Setup::malloc(512);
    malloc_4096 => Setup::malloc(4096);
    uring_direct_512 => Setup::uring(512, true);
    uring_direct_4096 => Setup::uring(4096, true);
    uring_buffered_512 => Setup::uring(512, false);
    uring_without_fallocate => Setup::uring_plain(512);
    delay_over_malloc => Setup::delayed(Setup::malloc(512));
    delay_over_uring => Setup::delayed(Setup::uring(512, true));
    error_over_malloc => Setup::with_error_layer(Setup::malloc(512));
    error_over_uring => Setup::with_error_layer(Setup::uring(4096, true));
}
