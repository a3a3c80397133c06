//! What the load programs share. Each program is a file or folder of `src/bin`.

pub mod load;
mod provider;

pub use provider::open_provider;
