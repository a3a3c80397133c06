//! The cores of `-m/--cpumask`, in SPDK's two forms: `0x3` and `[0,2-3]`.

use std::str::FromStr;

/// A non-empty ascending list of core numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuMask(Vec<usize>);

/// Not a core mask.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("core mask '{text}': {why}; write a hexadecimal mask such as 0x3, or a list such as [0,2-3]")]
pub struct CpuMaskError {
    text: String,
    why: String,
}

/// Highest core number accepted, as SPDK's `SPDK_CPUSET_SIZE`.
const MAX_CORES: usize = 1024;

impl CpuMask {
    /// The first core that this thread may run on; core 0 if the system does not say.
    pub fn first_allowed() -> Self {
        let allowed = core_affinity::get_core_ids().unwrap_or_default();
        Self(vec![allowed.iter().map(|c| c.id).min().unwrap_or(0)])
    }

    /// Ascending core numbers, at least one.
    pub fn cores(&self) -> &[usize] {
        &self.0
    }

    /// `0x…`, as SPDK prints masks.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }
}

/// The mask of `cores` as `0x…`.
fn hex(cores: &[usize]) -> String {
    let top = cores.iter().max().copied().unwrap_or(0);
    let mut nibbles = vec![0u8; top / 4 + 1];
    for c in cores {
        nibbles[c / 4] |= 1 << (c % 4);
    }
    nibbles.iter().rev().fold(String::from("0x"), |s, n| s + &format!("{n:x}"))
}

impl FromStr for CpuMask {
    type Err = CpuMaskError;

    fn from_str(text: &str) -> Result<Self, CpuMaskError> {
        let err = |why: &str| CpuMaskError { text: text.into(), why: why.into() };
        let t = text.trim();
        let mut cores = match t.strip_prefix('[') {
            Some(rest) => {
                parse_list(rest.strip_suffix(']').ok_or_else(|| err("the closing ']' is missing"))?)
            }
            None => parse_hex(t.strip_prefix("0x").or(t.strip_prefix("0X")).unwrap_or(t)),
        }
        .map_err(|why| err(&why))?;
        cores.sort_unstable();
        cores.dedup();
        if cores.is_empty() {
            return Err(err("it names no core"));
        }
        Ok(Self(cores))
    }
}

fn parse_hex(digits: &str) -> Result<Vec<usize>, String> {
    if digits.is_empty() || digits.len() > MAX_CORES / 4 {
        return Err("it has no or too many digits".into());
    }
    let mut cores = Vec::new();
    for (i, c) in digits.chars().rev().enumerate() {
        let nibble = c.to_digit(16).ok_or_else(|| format!("'{c}' is not a hexadecimal digit"))?;
        cores.extend((0..4).filter(|b| nibble & (1 << b) != 0).map(|b| i * 4 + b));
    }
    Ok(cores)
}

fn parse_list(list: &str) -> Result<Vec<usize>, String> {
    let number = |s: &str| match s.trim().parse::<usize>() {
        Ok(n) if n < MAX_CORES => Ok(n),
        _ => Err(format!("'{}' is not a core number below {MAX_CORES}", s.trim())),
    };
    let mut cores = Vec::new();
    for part in list.split(',') {
        match part.split_once('-') {
            None => cores.push(number(part)?),
            Some((a, b)) => {
                let (a, b) = (number(a)?, number(b)?);
                if a > b {
                    return Err(format!("range {a}-{b} is backwards"));
                }
                cores.extend(a..=b);
            }
        }
    }
    Ok(cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_a_core_that_may_be_used() {
        let cores = core_affinity::get_core_ids().unwrap();
        let last = *cores.last().unwrap();
        // As under taskset(1).
        let chosen = std::thread::spawn(move || {
            assert!(core_affinity::set_for_current(last));
            CpuMask::first_allowed()
        });
        assert_eq!(chosen.join().unwrap().cores(), [last.id]);
    }

    #[test]
    fn both_forms() {
        for (text, want) in [
            ("0x3", vec![0, 1]),
            ("3", vec![0, 1]),
            ("0x10", vec![4]),
            ("[0,2-3]", vec![0, 2, 3]),
            ("[1]", vec![1]),
            (" [3, 1] ", vec![1, 3]),
        ] {
            assert_eq!(text.parse::<CpuMask>().unwrap().cores(), want, "{text}");
        }
        assert_eq!("[0,2-3]".parse::<CpuMask>().unwrap().to_hex(), "0xd");
        assert_eq!("[4]".parse::<CpuMask>().unwrap().to_hex(), "0x10");
    }

    #[test]
    fn errors_show_what_is_right() {
        for text in ["", "0x", "0x0", "[]", "[0", "[a]", "[3-1]", "0xg", "[1024]", "[-1]", "[0-9999999]"] {
            let e = text.parse::<CpuMask>().unwrap_err().to_string();
            assert!(e.contains("[0,2-3]"), "{text}: {e}");
        }
    }
}
