//! What a server offers, as haggling asks for it.

use crate::wire::TransmissionFlags;

/// An export as it is told to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export<'a> {
    /// Comes back in [`Chosen`](super::Chosen); no meaning here.
    pub id: u64,
    /// Canonical name, at most [`MAX_STRING`](super::wire::MAX_STRING) bytes without NUL.
    pub name: &'a str,
    /// For people; empty for none. At most as long as a name.
    pub description: &'a str,
    /// Bytes.
    pub size: u64,
    /// With HAS_FLAGS.
    pub flags: TransmissionFlags,
    /// Told to clients that ask. Those that do not ask may send any range.
    pub sizes: BlockSizes,
}

/// Size constraints (`doc/proto.md`, "Size constraints"), bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Unit and alignment of requests: a power of two up to 65536.
    pub minimum: u32,
    /// From here on efficient: a power of two, at least 512 and `minimum`.
    pub preferred: u32,
    /// Most data of a READ or WRITE: at least `preferred`.
    pub max_payload: u32,
}

impl BlockSizes {
    /// Whether the specification allows them.
    pub fn are_legal(&self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 1 << 16
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum.max(512)
            && self.max_payload >= self.preferred
            && (self.max_payload == u32::MAX || self.max_payload.is_multiple_of(self.minimum))
    }
}

/// Why an export is not to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No export has this name.
    Unknown,
    /// There may be one, but not without TLS.
    TlsRequired,
    /// There is one, but not for this client or not now: the reason, for people, in fewer than 1000 bytes.
    Policy(String),
}

/// The exports of a server, as one client may see them.
pub trait Catalog {
    /// The first export whose name is greater than `after` (as bytes), or the first of all.
    fn next(&self, after: Option<&str>) -> Option<Export<'_>>;

    /// The export that a client calls `name`; the default one for an empty name.
    ///
    /// # Errors
    /// [`Refusal`].
    fn find(&self, name: &str) -> Result<Export<'_>, Refusal>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legal_sizes() {
        let sizes = |minimum, preferred, max_payload| BlockSizes { minimum, preferred, max_payload };
        for good in [sizes(1, 512, 512), sizes(512, 4096, 32 << 20), sizes(65536, 65536, u32::MAX)] {
            assert!(good.are_legal(), "{good:?}");
        }
        for bad in [
            sizes(0, 512, 512),
            sizes(3, 512, 512),
            sizes(1, 256, 512),
            sizes(1 << 17, 1 << 17, 1 << 20),
            sizes(4096, 512, 1 << 20),
            sizes(512, 4096, 2048),
            sizes(4096, 4096, 4097),
        ] {
            assert!(!bad.are_legal(), "{bad:?}");
        }
    }
}
