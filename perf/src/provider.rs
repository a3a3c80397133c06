//! The RDMA providers that a load program can use.

use rtrs_poll::Provider;
use verbs::Cm;

const ALL: [Provider; 2] = [Provider::RdmaCore, Provider::SoftRoce];

/// A connection manager of the provider called `name`.
///
/// # Errors
/// Unknown name, or what the provider misses on this host, in words for the operator.
pub fn open_provider(name: &str) -> Result<Box<dyn Cm>, String> {
    match ALL.iter().find(|p| p.name() == name) {
        Some(provider) => provider.open().map_err(|e| e.to_string()),
        None => Err(format!("provider '{name}': use {}", ALL.map(Provider::name).join(" or "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_names_are_told_the_known_ones() {
        let error = open_provider("x").err().expect("no such provider");
        assert!(ALL.iter().all(|p| error.contains(p.name())), "{error}");
    }
}
