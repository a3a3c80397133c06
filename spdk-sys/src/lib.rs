//! SPDK's bdev layer and what it takes to run it in one's own threads, as bindgen sees it: declarations and link flags,
//! nothing else. The `bdev` crate's feature `spdk` is the user, and has the safe side of it.
//!
//! `build.rs` finds SPDK: `SPDK_DIR` (an install prefix), then pkg-config. Versions from v24.09 on; nothing of their ABI
//! is stable, so build again for another one.

#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]
// Generated: SPDK's own headers are the documentation, and C has names and layouts that clippy would not choose.
#![allow(missing_docs, clippy::all, clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)]
#![allow(rustdoc::all, unnecessary_transmutes)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
