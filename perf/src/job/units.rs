//! Numbers with suffixes.

/// Bytes, as "4096", "4k", "1M", "2GiB": powers of 1024.
///
/// # Errors
/// In words.
pub fn size(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match lower[digits.len()..].trim_end_matches("ib").trim_end_matches('b') {
        "" => Some(0),
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        "t" => Some(40),
        _ => None,
    };
    let number = digits.parse::<u64>().ok();
    let bytes = number.zip(shift).and_then(|(n, shift)| n.checked_mul(1 << shift));
    bytes.ok_or_else(|| format!("'{text}' is no size; use bytes, such as 4096, 4k or 1G"))
}

/// The shortest way to write `bytes`: "4k", "1M", "1536".
pub fn short(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "k")];
    let fit = units.iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    fit.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("4k", 4096), ("1M", 1 << 20), ("2GiB", 2 << 30), ("1tb", 1 << 40)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "-1", "4x", "1.5k", "99999999999T", "4 k k"] {
            assert!(size(text).unwrap_err().contains("4k"), "{text}");
        }
        assert_eq!([4096, 1536, 1 << 30, 0].map(short), ["4k", "1536", "1G", "0"]);
    }
}
