//! Networks in allow lists.

use std::net::IpAddr;
use std::str::FromStr;

/// Addresses with the same first bits, or one address: 192.0.2.0/24, fd00::/8, 192.0.2.7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    addr: IpAddr,
    bits: u8,
}

/// What was given is none; the text says what would be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no address and no network; write 192.0.2.7, 192.0.2.0/24 or fd00::/8")]
pub struct NoNetwork(String);

impl FromStr for Network {
    type Err = NoNetwork;

    fn from_str(text: &str) -> Result<Self, NoNetwork> {
        let wrong = || NoNetwork(text.into());
        let (addr, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let addr = addr.parse::<IpAddr>().map_err(|_| wrong())?.to_canonical();
        let most = if addr.is_ipv4() { 32 } else { 128 };
        let bits: u8 = bits.map_or(Ok(most), str::parse).map_err(|_| wrong())?;
        if bits > most { Err(wrong()) } else { Ok(Self { addr, bits }) }
    }
}

impl Network {
    /// IPv4 peers of a listener on `::` come with addresses of IPv6.
    pub fn has(self, addr: IpAddr) -> bool {
        match (self.addr, addr.to_canonical()) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
                let differ = u32::from(ours) ^ u32::from(theirs);
                differ.checked_shr(32 - u32::from(self.bits)).unwrap_or(0) == 0
            }
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
                let differ = u128::from(ours) ^ u128::from(theirs);
                differ.checked_shr(128 - u32::from(self.bits)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_those_bits() {
        let has = |network: &str, addr: &str| network.parse::<Network>().unwrap().has(addr.parse().unwrap());
        for (network, inside, outside) in [
            ("192.0.2.7", "192.0.2.7", "192.0.2.6"),
            ("192.0.2.0/24", "192.0.2.255", "192.0.3.0"),
            ("192.0.2.77/25", "192.0.2.127", "192.0.2.128"),
            ("fd00::/8", "fdff::1", "fe00::1"),
            ("192.0.2.0/24", "::ffff:192.0.2.9", "::192.0.2.9"),
            ("::1", "::1", "127.0.0.1"),
        ] {
            assert!(has(network, inside) && !has(network, outside), "{network}");
        }
        assert!(has("0.0.0.0/0", "255.1.2.3") && !has("0.0.0.0/0", "fd00::1") && has("::/0", "fd00::1"));
        for bad in ["", "host", "192.0.2.0/33", "::/129", "192.0.2.0/", "192.0.2.0/-1", "192.0.2/24"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }
}
