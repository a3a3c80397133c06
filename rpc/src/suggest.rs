//! "Did you mean …?"

/// The candidate most similar to `word`, if it is similar enough to be a slip of the pen.
pub(crate) fn similar<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A peer may send a name of any length; no real one is longer than this.
    if word.len() > 128 {
        return None;
    }
    // Two swapped letters count twice.
    let limit = (word.len() / 3).min(4);
    candidates
        .into_iter()
        .map(|candidate| (distance(word.as_bytes(), candidate.as_bytes()), candidate))
        .filter(|&(distance, _)| distance <= limit)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance in bytes.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance(b"kitten", b"sitting"), 3);
        assert_eq!(distance(b"", b"abc"), 3);
        assert_eq!(distance(b"abc", b"abc"), 0);
    }

    #[test]
    fn only_slips_are_suggested() {
        let names = ["bdev_malloc_create", "bdev_null_create", "name"];
        assert_eq!(similar("bdev_maloc_create", names), Some("bdev_malloc_create"));
        assert_eq!(similar("nam", names), Some("name"));
        assert_eq!(similar("block_size", names), None);
    }
}
