//! The polled RDMA subset that RTRS needs: [`api`] says what a provider offers, the other modules are providers.

pub mod api;
pub mod loopback;
pub mod rdma_core;
pub mod wc_status;

pub use api::*;
